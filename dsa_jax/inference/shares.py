# SPDX-License-Identifier: Apache-2.0
"""The shares that the devices of a mesh have of a model and of texts, and programs that run on them."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.inference.cache import Cache
from dsa_jax.nn.transformer import Transformer
from dsa_jax.parallel.mesh import MESH_AXES, SEQUENCES, TOKENS, MeshConfig, shardings_of

AnyMesh = Mesh | AbstractMesh  # The latter has shapes alone.


@dataclasses.dataclass(frozen=True)
class Shares:
  """A mesh, and how it splits the arrays of programs.

  Weights are split as in training. Texts are split over SEQUENCES, unless there is only one, and their
  caches also over positions (`context`) and, of GQA, over key heads (`tensor`).
  """

  mesh: AnyMesh
  splits_heads: bool  # Whether each device keeps the key heads of its own heads only.
  weights: tuple[P, ...]

  def row_heads(self, cfg: ModelConfig) -> int:
    """Returns the key heads of a row of the cache, see `init_cache`."""
    return max(cfg.row_heads, self.mesh.shape['tensor']) if self.splits_heads else 0

  def sequences(self, n_texts: int) -> tuple[str, ...]:
    """Returns the axes of the mesh that split so many texts."""
    return SEQUENCES if n_texts > 1 else ()

  def shared(self, n_texts: int) -> tuple[str, ...]:
    """Returns the axes along which devices have the same of so many texts."""
    return TOKENS if self.sequences(n_texts) else MESH_AXES

  def specs(self, tree: Any, n_texts: int) -> Any:
    """Returns the partition specs of caches, and of arrays that have an entry for each text."""
    texts = self.sequences(n_texts) or None
    store = P(texts, 'context', 'tensor' if self.splits_heads else None)

    def specs_of(x):
      if not isinstance(x, Cache):
        return P(texts)
      fill = lambda part, spec: jax.tree.map(lambda _: spec, part)
      index_key, window_kv = fill(x.index_key, P(texts, 'context')), fill(x.window_kv, store)
      return Cache(fill(x.kv, store), index_key, P(texts), window_kv)

    return jax.tree.map(specs_of, tree, is_leaf=lambda x: isinstance(x, Cache))

  def run(self, f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Returns `f` as a program of all devices, each with its shards."""
    return jax.shard_map(
        f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def shares_of(model: Transformer, mesh: Mesh | None) -> Shares | None:
  """Returns the shares of a model on a mesh; None where there is one device."""
  if (shares := shares_of_texts(model.cfg, mesh)) is None:
    return None
  specs = [place.spec for place in jax.tree.leaves(shardings_of(model, mesh))]
  return dataclasses.replace(shares, weights=tuple(specs))


def shares_of_texts(cfg: ModelConfig, mesh: AnyMesh | None) -> Shares | None:
  """Returns the shares of texts alone; None where there is one device."""
  if mesh is None or mesh.size == 1:
    return None
  return Shares(mesh, cfg.attention == 'gqa' and mesh.shape['tensor'] > 1, ())


def make_texts(
    make: Callable, *args: Any, n_texts: int, shares: Shares | None, numbers: tuple = ()
) -> Any:
  """Returns `make(*args, *numbers)`, which is of so many texts, on the devices that share them.

  The arguments are hashable. Only the numbers may change without another program.
  """
  if shares is None:
    return make(*args, *numbers)
  return _program(make, args, n_texts, shares, len(numbers))(*numbers)


@functools.cache
def _program(make: Callable, args: tuple, n_texts: int, shares: Shares, n_numbers: int) -> Callable:
  run = functools.partial(make, *args)
  specs = shares.specs(jax.eval_shape(run, *[jnp.uint32(0)] * n_numbers), n_texts)
  places = jax.tree.map(lambda spec: NamedSharding(shares.mesh, spec), specs)
  return jax.jit(run, out_shardings=places)


def place_text(x: np.ndarray, shares: Shares | None) -> jax.Array:
  """Returns what belongs to a single text, on all devices that share it."""
  if shares is None:
    return jnp.asarray(x)
  place = NamedSharding(shares.mesh, P())
  return jax.make_array_from_callback(x.shape, place, lambda index: x[index])


def whole_rows(capacity: int, mesh: MeshConfig) -> int:
  """Returns the largest capacity up to the given one that can be split over positions."""
  return capacity - capacity % mesh.context


def check_mesh(mesh: MeshConfig, cfg: ModelConfig, *, capacity: int):
  """Raises a ConfigError if a mesh cannot hold a model or its cache; see `Sampler`."""
  mesh.check_model(cfg)
  if capacity % mesh.context:
    below = whole_rows(capacity, mesh)
    raise ConfigError(
        f'context={mesh.context} must divide {capacity=}, which is split over it: {below} would do.'
    )
  if jax.process_count() > 1 and mesh.n_devices != jax.device_count():
    raise ConfigError(
        f'mesh {mesh.sizes} has {mesh.n_devices} devices; the {jax.process_count()} processes of '
        f'this job have {jax.device_count()}, and it must take them all.'
    )


def check_texts(mesh: MeshConfig, name: str, n: int):
  """Raises a ConfigError if a number of texts cannot be split evenly. One alone is on all devices."""
  if (n_shares := mesh.fsdp * mesh.expert) > 1 and n > 1 and n % n_shares:
    more = n + -n % n_shares
    raise ConfigError(
        f'fsdp={mesh.fsdp} times expert={mesh.expert} must divide {name}={n}, or it must be 1: '
        f'{more} would do.'
    )


def mesh_config(mesh: AnyMesh | None) -> MeshConfig:
  """Returns the sizes of a mesh.

  Raises:
    ConfigError: It has other axes than those of `make_mesh`.
  """
  if mesh is None:
    return MeshConfig()
  if mesh.axis_names != MESH_AXES:
    raise ConfigError(
        f'the mesh has the axes {mesh.axis_names}; they must be {MESH_AXES}: make_mesh makes such a one.'
    )
  return MeshConfig(**mesh.shape)
