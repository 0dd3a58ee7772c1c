# SPDX-License-Identifier: Apache-2.0
"""What a device does with its own share of a layer, and what it says to the others.

Nothing here does anything where no mesh is set, or one of a single device: the model is the same
program everywhere.
"""

from collections.abc import Callable
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dsa_jax.parallel.mesh import BATCH, MESH_AXES, shardings_of, split_by
from dsa_jax.params import BackboneParam


def mesh_size(*axes: str) -> int:
  """Over how many devices axes of the mesh that is set go; 1 where none is."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.axis_names)


def _shares_work() -> bool:
  return mesh_size(*MESH_AXES) > 1 and not jax.sharding.get_abstract_mesh().manual_axes


def on_each_device(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
  """Returns f as each device runs it on its own shares; f itself where there is one device."""
  if not _shares_work():
    return f
  return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def weight_specs(module: nnx.Module, whole: tuple[str, ...] = ()) -> Any:
  """The shares of a module's weights that a device receives; `whole` axes of the mesh split none."""

  def spec(x: nnx.Variable) -> nnx.Variable:
    axes = split_by(x.get_metadata()['axes'])
    return x.replace(P(*(None if axis in whole else axis for axis in axes)))

  return jax.tree.map(spec, module, is_leaf=lambda x: isinstance(x, nnx.Variable))


def gather_weights(module: nnx.Module, dtype: Any) -> nnx.Module:
  """Puts what `fsdp` splits together, the backbone's matrices in the dtype they compute in.

  On the way back every device receives the gradient of its own share only.
  """

  def whole(x: nnx.Variable) -> nnx.Variable:
    dims = [i for i, axis in enumerate(split_by(x.get_metadata()['axes'])) if axis == 'fsdp']
    value = x[...].astype(dtype) if dims and isinstance(x, BackboneParam) else x[...]
    for dim in dims:
      value = gather(value, 'fsdp', dim=dim)
    return x.replace(value)

  if size('fsdp') == 1:
    return module
  return jax.tree.map(whole, module, is_leaf=lambda x: isinstance(x, nnx.Variable))


def flowing(x: jax.Array) -> jax.Array:
  """Keeps [B, T, ...] split over sequences and tokens, as it goes from layer to layer."""
  return jax.lax.with_sharding_constraint(x, BATCH) if _shares_work() else x


def micro_batches(x: jax.Array, n: int) -> jax.Array:
  """Cuts [B, T, ...] into [n, B / n, T, ...], each with sequences of every device."""
  x = jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0)
  return jax.lax.with_sharding_constraint(x, P(None, *BATCH)) if _shares_work() else x


def at_rest(tree: Any) -> Any:
  """Keeps weights, and moments like them, where they lie between steps."""
  if not _shares_work():
    return tree
  places = shardings_of(tree, jax.sharding.get_abstract_mesh())
  return jax.lax.with_sharding_constraint(tree, places)


def everywhere(tree: Any) -> Any:
  """Gives every device all of it, so that every process can read it."""
  return jax.lax.with_sharding_constraint(tree, P()) if _shares_work() else tree


def size(*axes: str) -> int:
  """Over how many devices the axes go, within `on_each_device`; 1 elsewhere."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.manual_axes)


def index(*axes: str) -> jax.Array | int:
  """Which of them this device is."""
  return jax.lax.axis_index(axes) if size(*axes) > 1 else 0


def gather(x: jax.Array, *axes: str, dim: int) -> jax.Array:
  """Puts the shares of all devices together along a dimension; gradients add up on the way back."""
  if size(*axes) == 1:
    return x
  if not _leads(x, dim):
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True)
  rest = x.shape[dim + 1 :]
  shares = jax.lax.all_gather(x.reshape(-1, *rest), axes)
  return shares.reshape(*x.shape[:dim], -1, *rest)


def scatter_sum(x: jax.Array, *axes: str, dim: int) -> jax.Array:
  """Adds up over devices, and keeps this one's share of a dimension."""
  if size(*axes) == 1:
    return x
  if not _leads(x, dim):
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
  rest = x.shape[dim + 1 :]
  shares = jax.lax.psum_scatter(x.reshape(size(*axes), -1, *rest), axes)
  return shares.reshape(*x.shape[:dim], -1, *rest)


def _leads(x, dim: int) -> bool:
  """Whether shares of a dimension can lie one after the other: else TPUs sum and send all of it."""
  return math.prod(x.shape[:dim]) == 1


def total(x: jax.Array, *axes: str) -> jax.Array:
  return jax.lax.psum(x, axes) if size(*axes) > 1 else x


def largest(x: jax.Array, *axes: str) -> jax.Array:
  return jax.lax.pmax(x, axes) if size(*axes) > 1 else x


def exchange(x: jax.Array, axis: str, *, split: int, join: int) -> jax.Array:
  """Gives away pieces of one dimension for those of another: heads for tokens, say."""
  return jax.lax.all_to_all(x, axis, split, join, tiled=True) if size(axis) > 1 else x


def zigzag(x: jax.Array, n: int) -> jax.Array:
  """Orders the tokens of [B, T, ...] so that n equal shares do the same causal work.

  Share i holds piece i and piece 2n - 1 - i of 2n.
  """
  pieces = _cut(x, 2 * n)
  pairs = jnp.stack([pieces[:, :n], pieces[:, : n - 1 : -1]], axis=2)
  return pairs.reshape(x.shape)


def unzigzag(x: jax.Array, n: int) -> jax.Array:
  """Back to the order of the text."""
  pairs = _cut(x, 2 * n).reshape(x.shape[0], n, 2, -1, *x.shape[2:])
  return jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], axis=1).reshape(x.shape)


def _cut(x, n):
  return x.reshape(x.shape[0], n, x.shape[1] // n, *x.shape[2:])
