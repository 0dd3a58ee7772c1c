# SPDX-License-Identifier: Apache-2.0
"""Collectives under jax's own names, over axes of the mesh, within `shard.shard_mapped`.

Each takes any number of axes and does nothing where they hold a single device or where no mesh is
set, so a model is the same program on every mesh.
"""

import math

import jax


def axis_size(*axes: str) -> int:
  """Returns the number of devices along the axes; 1 outside `shard_mapped`."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.manual_axes)


def axis_index(*axes: str) -> jax.Array | int:
  """Returns the number of this device along the axes."""
  return jax.lax.axis_index(axes) if axis_size(*axes) > 1 else 0


def all_gather(x: jax.Array, *axes: str, dim: int) -> jax.Array:
  """Concatenates the shards of all devices along a dimension; its gradient is `psum_scatter`."""
  if axis_size(*axes) == 1:
    return x
  if not _leads(x, dim):
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True)
  rest = x.shape[dim + 1 :]
  shards = jax.lax.all_gather(x.reshape(-1, *rest), axes)
  return shards.reshape(*x.shape[:dim], -1, *rest)


def own_shard(x: jax.Array, *axes: str, dim: int) -> jax.Array:
  """Returns this device's shard of a dimension that every device holds whole; `all_gather` undoes it."""
  if axis_size(*axes) == 1:
    return x
  size = x.shape[dim] // axis_size(*axes)
  return jax.lax.dynamic_slice_in_dim(x, axis_index(*axes) * size, size, dim)


def psum_scatter(x: jax.Array, *axes: str, dim: int) -> jax.Array:
  """Sums over devices and returns this device's shard of a dimension."""
  if axis_size(*axes) == 1:
    return x
  if not _leads(x, dim):
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
  rest = x.shape[dim + 1 :]
  shards = jax.lax.psum_scatter(x.reshape(axis_size(*axes), -1, *rest), axes)
  return shards.reshape(*x.shape[:dim], -1, *rest)


def _leads(x, dim: int) -> bool:
  """Returns whether all dimensions before `dim` have one entry.

  The shards then lie one after another in memory. TPUs would otherwise sum and send all of the array.
  """
  return math.prod(x.shape[:dim]) == 1


def psum(x: jax.Array, *axes: str) -> jax.Array:
  """Sums over devices."""
  return jax.lax.psum(x, axes) if axis_size(*axes) > 1 else x


def pmax(x: jax.Array, *axes: str) -> jax.Array:
  """Returns the maximum over devices."""
  return jax.lax.pmax(x, axes) if axis_size(*axes) > 1 else x


def all_to_all(x: jax.Array, axis: str, *, split: int, join: int) -> jax.Array:
  """Splits one dimension over the devices and concatenates another: heads for tokens, say."""
  return jax.lax.all_to_all(x, axis, split, join, tiled=True) if axis_size(axis) > 1 else x
