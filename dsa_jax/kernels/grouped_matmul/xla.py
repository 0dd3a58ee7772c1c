# SPDX-License-Identifier: Apache-2.0
"""Products by group, one tile of rows after another. Memory besides the result is a tile's."""

import jax
import jax.numpy as jnp

from dsa_jax.kernels.block_scaled import BlockScaled
from dsa_jax.kernels.grouped_matmul.turns import cut
from dsa_jax.kernels.products import precision_of

TILE = 256  # Rows of one product at most; fewer where groups are small.
LEAST = 16


def scaled_product(rows, weights: BlockScaled, sizes):
  """Returns each row times its group's matrix, which is widened for every tile of rows."""
  return product(rows, weights, sizes, transposed=False)


def product(rows, weights, sizes, *, transposed: bool):
  """Returns each row times its group's matrix, or times the transposed matrix."""
  turns, tile = _cut(rows, sizes)
  of_weights = 1 if transposed else 0

  def multiply(i, out):
    x, own, at = _take(rows, turns, tile, i)
    of_group = lambda x: jax.lax.dynamic_index_in_dim(x, turns.group[i], keepdims=False)
    weight = jax.tree.map(of_group, weights).astype(x.dtype)
    new = _dot(x, weight, 1, of_weights).astype(out.dtype)
    old = jax.lax.dynamic_slice_in_dim(out, at, tile)
    return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(own, new, old), at, 0)

  out = jnp.zeros((len(rows), weights.shape[2 - of_weights]), rows.dtype)
  return jax.lax.fori_loop(0, turns.used, multiply, out)


def weight_gradients(rows, dout, sizes):
  """Returns the float32 gradients of the matrices, [X, D, F]."""
  turns, tile = _cut(rows, sizes)

  def add(i, dweights):
    x, own, at = _take(rows, turns, tile, i)
    dout_tile = jax.lax.dynamic_slice_in_dim(dout, at, tile)
    new = _dot(jnp.where(own, x, 0), jnp.where(own, dout_tile, 0), 0, 0)
    old = jax.lax.dynamic_index_in_dim(dweights, turns.group[i], keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(dweights, old + new, turns.group[i], 0)

  dweights = jnp.zeros((len(sizes), rows.shape[1], dout.shape[1]), jnp.float32)
  return jax.lax.fori_loop(0, turns.used, add, dweights)


def _cut(rows, sizes):
  """Returns the tiles, whose size suits groups of even sizes, and that size."""
  even = -(-len(rows) // len(sizes))
  tile = min(max(1 << (even - 1).bit_length(), LEAST), TILE, len(rows))
  return cut(sizes, len(rows), tile), tile


def _take(rows, turns, tile, i):
  """Returns the rows of a tile, which of them are its own, and where it starts.

  A tile that would end behind the last row starts earlier.
  """
  at = jnp.minimum(turns.first[i], len(rows) - tile)
  row = at + jnp.arange(tile)
  own = (row >= turns.first[i]) & (row < turns.end[i])
  return jax.lax.dynamic_slice_in_dim(rows, at, tile), own[:, None], at


def _dot(a, b, a_axis: int, b_axis: int):
  axes = ((a_axis,), (b_axis,)), ((), ())
  return jax.lax.dot_general(a, b, axes, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)
