# SPDX-License-Identifier: Apache-2.0
r"""lm-evaluation-harness with models of this package.

    pip install lm_eval
    python -m dsa_jax.lm_eval --model dsa_jax --tasks hellaswag \
        --model_args checkpoint=runs/mine/checkpoints/sparse,attention=sparse,index_topk=64

takes every flag of `lm_eval`. The arguments of a model are those of `evaluation.harness.Harness`; on
several devices, `mesh.expert=8` and the like say how many share what.
"""

from collections.abc import Sequence
import inspect
import sys
from typing import Any

from dsa_jax.config import ConfigError
from dsa_jax.evaluation.harness import Harness
from dsa_jax.parallel.mesh import MESH_AXES, MeshConfig


def register() -> type:
  """Returns the class that lm-evaluation-harness from now on knows as `dsa_jax`.

  Raises:
    ConfigError: It is not installed.
  """
  try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
  except ImportError as error:
    raise ConfigError(f'this needs lm-evaluation-harness: pip install lm_eval ({error})') from error

  @register_model('dsa_jax')
  class Model(LM):
    """A checkpoint, as the harness sees it."""

    def __init__(self, checkpoint: str = '', batch_size: int | str = 4, **kwargs: Any):
      super().__init__()
      if not checkpoint:
        raise ConfigError('name the checkpoint: --model_args checkpoint=RUN/checkpoints/ENTRY.')
      for name in 'max_batch_size', 'device':  # The command always gives them.
        kwargs.pop(name, None)
      if not str(batch_size).isdigit():
        raise ConfigError(f'{batch_size=} must be a number.')
      mesh = mesh_of(kwargs)
      known = {*inspect.signature(Harness).parameters} - {'mesh'}
      if unknown := kwargs.keys() - known:
        raise ConfigError(f'--model_args has no {sorted(unknown)}; it has {sorted(known)}.')
      numbers = {'index_topk': int, 'max_length': int, 'index_rope_factor': int | float}
      if wrong := [x for x, kind in numbers.items() if not isinstance(kwargs.get(x), kind | None)]:
        raise ConfigError(f'--model_args: {wrong[0]}={kwargs[wrong[0]]!r} must be a number.')
      self._harness = Harness(checkpoint, batch_size=int(batch_size), mesh=mesh, **kwargs)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
      return self._harness.likelihoods([request.args for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
      return self._harness.rolling([request.args[0] for request in requests])

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
      return self._harness.continuations([request.args for request in requests])

  return Model


def mesh_of(kwargs: dict[str, Any]) -> MeshConfig:
  """Takes `mesh.AXIS` out of the arguments of a model, and returns the mesh.

  Raises:
    ConfigError: There is no such axis, or no such size.
  """
  given = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith('mesh.')}
  sizes = {name.removeprefix('mesh.'): size for name, size in given.items()}
  wrong = [name for name, n in sizes.items() if name not in MESH_AXES or not isinstance(n, int)]
  if wrong:
    raise ConfigError(f'{given} must give numbers of devices along axes of {MESH_AXES}.')
  return MeshConfig(**sizes)


def main():
  try:
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
  except ConfigError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
