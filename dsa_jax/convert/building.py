# SPDX-License-Identifier: Apache-2.0
"""What both directions share: a target that appears whole or not at all."""

from collections.abc import Iterator
import contextlib
import pathlib
import shutil
from typing import Any, NamedTuple

from dsa_jax.config import ConfigError

KEPT_FILES = (  # Carried along, unread.
    'tokenizer.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'generation_config.json',
)


class Summary(NamedTuple):
  """What was converted."""

  family: str
  n_layers: int
  n_parameters: int
  nbytes: int  # Of the arrays, before any compression.

  def __str__(self) -> str:
    return (
        f'{self.family}: {self.n_layers} layers, {self.n_parameters:,} parameters, '
        f'{self.nbytes:,} bytes'
    )


@contextlib.contextmanager
def building(target: pathlib.Path, *, needs: int) -> Iterator[pathlib.Path]:
  """Gives a folder to build in; it becomes `target` at the end, or disappears.

  A process that is killed leaves it behind, with the suffix .partial; the next run starts anew.

  Args:
    target: Must not exist.
    needs: Bytes that the disk must have.

  Raises:
    ValueError: `target` exists.
    OSError: It could not be written, for want of space or of a right.
  """
  if target.exists():
    raise ConfigError(f'{target} exists; choose another target, or delete it.')
  partial = target.with_name(target.name + '.partial')
  done = False
  try:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < needs:
      raise OSError(f'it needs about {needs:,} bytes and its disk has {free:,} left')
    yield partial
    partial.rename(target)
    done = True
  except Exception as error:  # TensorStore, orbax and safetensors each raise their own.
    raise OSError(f'{target} could not be written: {error}. Nothing was left there.') from error
  finally:
    if not done:
      shutil.rmtree(partial, ignore_errors=True)


def nested(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
  """Turns {('a', 'b'): x} into {'a': {'b': x}}."""
  tree: dict[str, Any] = {}
  for path, x in flat.items():
    branch = tree
    for name in path[:-1]:
      branch = branch.setdefault(name, {})
    branch[path[-1]] = x
  return tree
