# SPDX-License-Identifier: Apache-2.0
"""Selected rows on a GPU: where they lie, and how their gradients are added."""

from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.gpu import triton
from dsa_jax.kernels.gpu.triton import column_parts, gather, load_row, store_row

SUMMED = 8  # Rows for one sum that are read at one time.


class Slots(NamedTuple):
  """The selected rows of each query, [B * T, K] with K padded; arrays or refs to them.

  An empty slot names a row that the query selected: no other is known to be finite.
  """

  rows: Any  # int32, rows of the flat keys.
  bias: Any  # float32, 0, or -inf where a slot is empty.
  ends: Any  # int32 [B * T], one past the last filled slot, up to a whole tile.


def positions(indices: jax.Array, n_keys: int) -> jax.Array:
  """Says which of the indices are positions of keys."""
  return (indices >= 0) & (indices < n_keys)


def slots(indices: jax.Array, filled: jax.Array, n_keys: int, tile: int) -> Slots:
  """Returns the slots of indices [B, T, K].

  Args:
    indices: int32.
    filled: Which of them count. These are positions.
    n_keys: The keys of a sequence.
    tile: Slots are padded to a multiple of this.
  """
  widths = (0, 0), (0, 0), (0, -indices.shape[2] % tile)
  indices, filled = jnp.pad(indices, widths), jnp.pad(filled, widths)
  sequence = jnp.arange(indices.shape[0])[:, None, None]
  some = jnp.max(jnp.where(filled, indices, 0), axis=2, keepdims=True)
  rows = jnp.where(filled, indices, some) + n_keys * sequence
  numbers = jnp.arange(1, indices.shape[2] + 1, dtype=jnp.int32)
  ends = jnp.max(jnp.where(filled, numbers, 0), axis=2)
  bias = jnp.where(filled, 0.0, -jnp.inf)
  return Slots(*map(flat, (rows.astype(jnp.int32), bias, pl.cdiv(ends, tile) * tile)))


def flat(x: jax.Array) -> jax.Array:
  """Turns [B, T, ...] to [B * T, ...]."""
  return x.reshape(-1, *x.shape[2:])


def add_rows(sums: jax.Array, values: jax.Array, rows: jax.Array) -> jax.Array:
  """Adds `values[i]`, [N, E], to `sums[rows[i]]`, float32 [R, E]; nowhere if the row is negative.

  The values of one row are added in the order of i, whatever the machine does.
  """
  n_sums, width = sums.shape
  rows = jnp.where(rows < 0, n_sums, rows).reshape(-1)
  rows, order = jax.lax.sort((rows, jnp.arange(rows.size)), num_keys=1, is_stable=True)
  starts = jnp.searchsorted(rows, jnp.arange(n_sums + 1)).astype(jnp.int32)
  parts = column_parts(width)

  def add(_, values, order, starts, sums):
    row = pl.program_id(0)
    first, end = starts[row], starts[row + 1]

    def step(j, state):
      at = first + j * SUMMED + jnp.arange(SUMMED)
      sources = triton.load(order.at[jnp.minimum(at, order.size - 1)])
      new = [gather(values, sources, *part, filled=at < end) for part in parts]
      return [x + jnp.sum(y.astype(x.dtype), axis=0) for x, y in zip(state, new)]

    @pl.when(end > first)
    def _():
      state = [load_row(sums, row, *part) for part in parts]
      state = jax.lax.fori_loop(0, pl.cdiv(end - first, SUMMED), step, state)
      for (start, _, stop), x in zip(parts, state):
        store_row(sums, row, start, stop, x)

  out = jax.ShapeDtypeStruct(sums.shape, sums.dtype)
  args = sums, values, order, starts
  (sums,) = triton.call(add, 'add_rows', n_sums, [out], args, warps=2, aliases={0: 0})
  return sums
