# SPDX-License-Identifier: Apache-2.0
"""Blocks of query rows, by which the `xla` backends keep memory linear in the context."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def scan_rows(
    step: Callable, carry: Any, rows: Any, block: int, multiple: int = 1, unroll: int = 1
) -> tuple[Any, Any]:
  """Runs `carry, out = step(carry, rows)` over blocks of rows, one block at a time.

  The last block is filled up with rows that see nothing: integers (positions, indices,
  interval ends) are filled with -1, floats with 0.

  Args:
    step: Gets and returns trees of `[B, block, ...]`; the carry is handed on.
    carry: What the first step gets.
    rows: A tree of arrays `[B, T, ...]`.
    block: How many rows a block has; where there are fewer, a block has all of them.
    multiple: The number of rows of a block is rounded up to a multiple of this.
    unroll: Blocks of a step of the loop.

  Returns:
    The last carry, and the outputs joined to `[B, T, ...]`.
  """
  n_rows = jax.tree.leaves(rows)[0].shape[1]
  block = whole_block(n_rows, block, multiple)
  n_blocks = -(-n_rows // block)

  def split(x):
    fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
    widths = [(0, 0), (0, n_blocks * block - n_rows)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, widths, constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], n_blocks, block, *x.shape[2:]), 1, 0)

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], n_blocks * block, *x.shape[3:])[:, :n_rows]

  carry, out = jax.lax.scan(step, carry, jax.tree.map(split, rows), unroll=unroll)
  return carry, jax.tree.map(join, out)


def whole_block(n_rows: int, block: int, multiple: int) -> int:
  """Returns the rows of a block; see `scan_rows`."""
  return -(-min(block, n_rows) // multiple) * multiple


def map_rows(f: Callable, rows: Any, block: int, multiple: int = 1) -> Any:
  """Applies `f` to blocks of rows, one block at a time; see `scan_rows`."""
  return scan_rows(lambda _, rows: (None, f(rows)), None, rows, block, multiple)[1]


def gather_rows(x: jax.Array, indices: jax.Array) -> jax.Array:
  """Returns `x[b, indices[b, t, k]]` as `[B, T, K, ...]`, zeros where an index is no position.

  No arithmetic touches a row that is not selected: it may hold NaN.
  """
  filled = (indices >= 0) & (indices < x.shape[1])
  take = lambda x, i: x.at[i].get(mode='promise_in_bounds')
  rows = jax.vmap(take)(x, jnp.where(filled, indices, 0))
  return jnp.where(filled.reshape(filled.shape + (1,) * (x.ndim - 2)), rows, 0)


def scatter_rows(x: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
  """Adds `rows[b, t, k]` to `x[b, indices[b, t, k]]`; indices that are no position add nothing."""
  batch, n_rows, *width = x.shape
  filled = (indices >= 0) & (indices < n_rows)
  where = indices + n_rows * jnp.arange(batch, dtype=indices.dtype)[:, None, None]
  where = jnp.where(filled, where, batch * n_rows).reshape(-1)
  x = x.reshape(-1, *width).at[where].add(rows.reshape(-1, *width), mode='drop')
  return x.reshape(batch, n_rows, *width)


def pad_axis(x: jax.Array, axis: int, multiple: int) -> jax.Array:
  """Appends zeros until the axis is a multiple."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, widths)


def key_range(
    start: jax.Array, end: jax.Array, n_keys: int, block: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the blocks of keys that some row sees: the first, one past the last."""
  seen = end > start
  first = jnp.min(jnp.where(seen, start, n_keys)) // block
  last = -(-jnp.max(jnp.where(seen, end, 0)) // block)
  return jnp.maximum(first, 0), jnp.minimum(last, -(-n_keys // block))


def take_block(x: jax.Array, j: jax.Array | int, block: int) -> jax.Array:
  """Returns the j-th block of keys of `x`, [B, S, ...]."""
  return jax.lax.dynamic_slice_in_dim(x, j * block, block, axis=1)


def add_block(x: jax.Array, j: jax.Array | int, block: jax.Array) -> jax.Array:
  """Adds a block to the j-th block of keys of `x`."""
  size = block.shape[1]
  return jax.lax.dynamic_update_slice_in_dim(x, take_block(x, j, size) + block, j * size, axis=1)
