# SPDX-License-Identifier: Apache-2.0
"""Functions that run on shards, and the sharding constraints of what flows between them.

Nothing here does anything where no mesh is set or where the mesh has a single device, so a model is
the same program everywhere.
"""

from collections.abc import Callable
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dsa_jax.kernels.block_scaled import cast
from dsa_jax.parallel.collectives import all_gather, axis_size
from dsa_jax.parallel.mesh import BATCH, MESH_AXES, shardings_of, split_by
from dsa_jax.params import BackboneParam


def n_devices(*axes: str) -> int:
  """Returns the number of devices along axes of the mesh that is set; 1 where none is."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.axis_names)


def _is_sharded() -> bool:
  return n_devices(*MESH_AXES) > 1 and not jax.sharding.get_abstract_mesh().manual_axes


def shard_mapped(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
  """Returns `jax.shard_map` of f over the mesh that is set, or f itself where there is one device."""
  if not _is_sharded():
    return f
  return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def weight_specs(module: nnx.Module, whole: tuple[str, ...] = ()) -> Any:
  """Returns the partition specs of a module's weights, without the mesh axes named by `whole`."""

  def spec(x: nnx.Variable) -> nnx.Variable:
    axes = split_by(x.get_metadata()['axes'])
    return x.replace(P(*(None if axis in whole else axis for axis in axes)))

  return jax.tree.map(spec, module, is_leaf=lambda x: isinstance(x, nnx.Variable))


def gather_weights(module: nnx.Module, dtype: Any) -> nnx.Module:
  """All-gathers the weights that `fsdp` splits, the backbone's matrices in the given dtype.

  In the backward pass every device receives the gradient of its own shard only.
  """

  def whole(x: nnx.Variable) -> nnx.Variable:
    dims = [i for i, axis in enumerate(split_by(x.get_metadata()['axes'])) if axis == 'fsdp']
    value = cast(x[...], dtype) if dims and isinstance(x, BackboneParam) else x[...]
    for dim in dims:
      value = jax.tree.map(lambda part: all_gather(part, 'fsdp', dim=dim), value)
    return x.replace(value)

  if axis_size('fsdp') == 1:
    return module
  return jax.tree.map(whole, module, is_leaf=lambda x: isinstance(x, nnx.Variable))


def constrain_activations(x: jax.Array) -> jax.Array:
  """Constrains [B, T, ...] to the sharding that it has between layers."""
  return jax.lax.with_sharding_constraint(x, BATCH) if _is_sharded() else x


def constrain_weights(tree: Any) -> Any:
  """Constrains weights, and moments like them, to the shardings that they have between steps."""
  if not _is_sharded():
    return tree
  shardings = shardings_of(tree, jax.sharding.get_abstract_mesh())
  return jax.lax.with_sharding_constraint(tree, shardings)


def replicate(tree: Any) -> Any:
  """Gives every device all of it, so that every process can read it."""
  return jax.lax.with_sharding_constraint(tree, P()) if _is_sharded() else tree


def split_micro_batches(x: jax.Array, n: int) -> jax.Array:
  """Cuts [B, T, ...] into [n, B / n, T, ...], each of which has sequences of every device."""
  x = jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0)
  return jax.lax.with_sharding_constraint(x, P(None, *BATCH)) if _is_sharded() else x
