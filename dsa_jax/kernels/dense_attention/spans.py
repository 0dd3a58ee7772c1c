# SPDX-License-Identifier: Apache-2.0
"""Which blocks of rows see which blocks of keys; a row is one head of a query.

The rows of a key head are its heads of query 0, then those of query 1, and so on.
"""

from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp


class Rows(NamedTuple):
  """What each row sees, int32 [B, R], R filled up to whole blocks with copies of the last row."""

  start: Any  # The first key that a row sees; the number of keys if it sees none.
  end: Any  # One past the last; 0 if it sees none.


class Spans(NamedTuple):
  """What is known of each block of rows, and of each block of keys, int32."""

  keys: Any  # [4, B, row blocks]: some row sees the keys from 0 to 1, and all see those from 2 to 3.
  rows: Any  # [2, B, key blocks]: no other blocks of rows than those from 0 to 1 see such a block.


def rows_of(start: jax.Array, end: jax.Array, n_keys: int, per_group: int, block_r: int) -> Rows:
  """Returns what each row sees, of what each query sees; `per_group` heads share a key head."""
  start, end = jnp.maximum(start, 0), jnp.minimum(end, n_keys)
  start, end = jnp.where(end > start, start, n_keys), jnp.where(end > start, end, 0)
  padding = (0, 0), (0, -start.shape[1] * per_group % block_r)
  fill = lambda x: jnp.pad(jnp.repeat(x, per_group, axis=1), padding, mode='edge')
  return Rows(fill(start), fill(end))


def spans_of(rows: Rows, n_keys: int, block_r: int, block_s: int, *, masked: bool) -> Spans:
  """Returns the spans of blocks. If there is a mask, no key counts as seen by all rows."""
  start, end = (x.reshape(x.shape[0], -1, block_r) for x in rows)
  last = jnp.max(end, axis=-1)
  first = jnp.minimum(jnp.min(start, axis=-1), last)
  all_first = jnp.max(start, axis=-1)
  all_last = all_first if masked else jnp.min(end, axis=-1)
  blocks = first // block_s, pl.cdiv(last, block_s) - 1
  n_rows, n_blocks = first.shape[1], pl.cdiv(n_keys, block_s)
  some = last > first
  number = jnp.arange(n_rows)
  # A block of keys is seen by no block of rows before the first that reaches so far, and by none
  # after the last that begins so early.
  at = lambda i: jnp.where(some, i, n_blocks)
  scatter = lambda empty, place, add: jax.vmap(
      lambda i: add(jnp.full(n_blocks, empty).at[i], number)
  )(at(place))
  reaches = scatter(n_rows, blocks[1], lambda x, n: x.min(n, mode='drop'))
  begins = scatter(-1, blocks[0], lambda x, n: x.max(n, mode='drop'))
  row_first = jax.lax.cummin(reaches, axis=1, reverse=True)
  row_last = jax.lax.cummax(begins, axis=1) + 1
  of_keys = jnp.where(row_first < row_last, jnp.stack([row_first, row_last]), 0)
  return Spans(jnp.stack([first, last, all_first, all_last]), of_keys.astype(jnp.int32))
