# SPDX-License-Identifier: Apache-2.0
"""Rows of several groups, each times the matrix of its group: what dropless experts compute."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TILE = 128  # Rows of one product on a CPU.


@jax.custom_vjp
def grouped_matmul(
    rows: Float[Array, 'N D'], weights: Float[Array, 'X D F'], sizes: Int[Array, 'X']
) -> Float[Array, 'N F']:
  """Returns the products of rows that are sorted by group, zeros behind the last group.

  On a CPU it costs as much as N rows and half a tile of rows for each group. Other platforms run
  XLA's own `ragged_dot`, which keeps that promise on TPUs. On CPUs, and on those GPUs that it has
  been compiled for, `ragged_dot` multiplies every row with every group's matrix.

  Args:
    rows: The rows of group 0, then those of group 1, and so on.
    weights: One matrix for each group.
    sizes: How many rows each group has; it may have none.
  """
  return _forward(rows, weights, sizes)[0]


def _forward(rows, weights, sizes):
  out = jax.lax.platform_dependent(
      rows, weights, sizes, cpu=_by_tiles, default=jax.lax.ragged_dot
  )
  return out, (rows, weights, sizes)


def _backward(residuals, dout):
  def gradients(product, rows, weights, sizes, dout):
    return jax.vjp(lambda rows, weights: product(rows, weights, sizes), rows, weights)[1](dout)

  drows, dweights = jax.lax.platform_dependent(
      *residuals,
      dout,
      cpu=functools.partial(gradients, _by_tiles),
      default=functools.partial(gradients, jax.lax.ragged_dot),
  )
  return drows, dweights, None


grouped_matmul.defvjp(_forward, _backward)


def _by_tiles(rows, weights, sizes):
  """Multiplies tiles of rows; a tile with rows of several groups is multiplied once for each."""
  n, n_groups = len(rows), len(weights)
  n_tiles = -(-n // TILE)
  end = jnp.cumsum(sizes)
  first = (end - sizes) // TILE
  turns_of = jnp.where(sizes > 0, -(-end // TILE) - first, 0)
  turns_up_to = jnp.cumsum(turns_of)
  # Each turn is a pair of a tile and a group that owns rows of it.
  turn = jnp.arange(n_tiles + min(n_groups, n) - 1)
  group = jnp.minimum(jnp.sum(turn[:, None] >= turns_up_to, axis=-1), n_groups - 1)
  tile = jnp.minimum(first[group] + turn - (turns_up_to - turns_of)[group], n_tiles - 1)
  row = tile[:, None] * TILE + jnp.arange(TILE)
  own = (row >= (end - sizes)[group][:, None]) & (row < end[group][:, None])
  own &= (turn < turns_up_to[-1])[:, None]
  tiles = jnp.pad(rows, ((0, n_tiles * TILE - n), (0, 0))).reshape(n_tiles, TILE, -1)
  tiles = jnp.where(own[..., None], tiles[tile], 0)
  out = jnp.einsum('UND,UDF->UNF', tiles, weights[group], preferred_element_type=jnp.float32)
  sums = jnp.zeros((n_tiles, *out.shape[1:])).at[tile].add(out)
  return sums.reshape(-1, out.shape[-1])[:n].astype(rows.dtype)
