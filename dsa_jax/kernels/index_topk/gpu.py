# SPDX-License-Identifier: Apache-2.0
"""Scores and exact selection on a GPU, a block of query rows at a time.

One kernel scores tiles of keys for a few queries and writes integers that are ordered like the
scores. Another finds, for each row, an interval of them below which nothing is selected and above
which everything is, then the positions: what lies in the interval counts from the lowest position.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dsa_jax.kernels import triton
from dsa_jax.kernels.rows import map_rows
from dsa_jax.kernels.score_tiles import ScoreTiles

LOWEST, HIGHEST = -(2**31), 2**31 - 1
WAYS = 8  # Parts into which a pass divides the interval.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
  """They change the speed, never the result."""

  block_t: int = 512  # Query rows whose scores exist at one time.
  columns: int = 256  # Queries times heads of a program,
  tile: int = 64  # the keys that they meet at one time,
  span: int = 4096  # and in all.
  stages: int = 2  # Tiles in flight or in use.
  chunk: int = 2048  # Scores of a row that are read at one time.


def forward(q, k, weights, start, end, *, topk: int, blocks: BlockSizes):
  start, end = jnp.maximum(start, 0), jnp.minimum(end, k.shape[1])
  tiles = ScoreTiles.of(q, k, blocks.columns, blocks.tile, blocks.stages)
  q, weights = tiles.pad_heads(q, weights)
  kernel = _Kernel(topk, blocks.chunk)

  def select(rows):
    batch, n_rows = rows[2].shape
    scores = tiles.score(k, *rows, span=blocks.span, encode=_to_order, dtype=jnp.int32)
    return kernel.select(scores, rows[2], rows[3]).reshape(batch, n_rows, topk)

  return map_rows(select, (q, weights, start, end), blocks.block_t, tiles.step_t)


@dataclasses.dataclass(frozen=True)
class _Kernel:
  topk: int
  chunk: int

  def select(self, scores, start, end):
    """Returns the positions of the best scores of each row, int32 [B * T, K]."""
    out = jax.ShapeDtypeStruct((start.size, self.topk), jnp.int32)
    args = scores, start.reshape(-1), end.reshape(-1)
    return triton.call(self._select, 'index_topk', start.size, [out], args, warps=8)[0]

  def _select(self, scores, start, end, out):
    row, chunk = pl.program_id(0), self.chunk
    start, end = start[row], end[row]
    chunks = start // chunk, jnp.where(end > start, pl.cdiv(end, chunk), 0)

    def read(j):
      at = j * chunk + jnp.arange(chunk)
      seen = (at >= start) & (at < end)
      return at, triton.load(scores.at[row, at], seen, LOWEST)

    low, high, ties = self._cut(read, chunks, end - start)

    def write(j, counts):
      n_out, n_ties = counts
      at, x = read(j)
      tied = (x >= low) & (x < high)
      number = n_ties + jnp.cumsum(tied.astype(jnp.int32))
      chosen = (x >= high) | (tied & (number <= ties))
      slot = n_out + jnp.cumsum(chosen.astype(jnp.int32)) - 1
      slot = jnp.where(chosen, slot, self.topk)  # Two of one slot would race where interpreted.
      triton.store(out.at[row, slot], at, chosen)
      return n_out + jnp.sum(chosen.astype(jnp.int32)), n_ties + jnp.sum(tied.astype(jnp.int32))

    n_out, _ = jax.lax.fori_loop(*chunks, write, (jnp.int32(0), jnp.int32(0)))
    for first in range(0, self.topk, chunk):
      slot = first + jnp.arange(chunk)
      empty = (slot >= n_out) & (slot < self.topk)
      triton.store(out.at[row, slot], jnp.full(chunk, -1, jnp.int32), empty)

  def _cut(self, read, chunks, n_visible):
    """Returns low, high, n: everything from high on is selected, and the first n of [low, high).

    Each pass counts what lies above a few values within the interval.
    """
    chunk, topk = self.chunk, self.topk

    def bounds(j, state):
      _, x = read(j)
      low, high = state
      return jnp.minimum(low, jnp.where(x > LOWEST, x, HIGHEST)), jnp.maximum(high, x)

    state = jnp.full(chunk, HIGHEST, jnp.int32), jnp.full(chunk, LOWEST, jnp.int32)
    low, high = jax.lax.fori_loop(*chunks, bounds, state)
    state = jnp.min(low), jnp.max(high) + 1, n_visible, jnp.int32(0)

    def narrow(state):
      low, high, n_low, n_high = state
      step = jnp.maximum((high >> 3) - (low >> 3), 1)
      cuts = [low + i * step for i in range(1, WAYS)]

      def count(j, sums):
        _, x = read(j)
        return [n + (x >= cut).astype(jnp.int32) for n, cut in zip(sums, cuts)]

      sums = jax.lax.fori_loop(*chunks, count, [jnp.zeros(chunk, jnp.int32)] * len(cuts))
      for cut, n in zip(cuts, [jnp.sum(n) for n in sums]):
        enough, closer = n >= topk, (n < topk) & (cut < high)
        low, n_low = jnp.where(enough, cut, low), jnp.where(enough, n, n_low)
        high, n_high = jnp.where(closer, cut, high), jnp.where(closer, n, n_high)
      return low, high, n_low, n_high

    undecided = lambda state: (state[2] > topk) & (state[1] > state[0] + 1)
    low, high, _, n_high = jax.lax.while_loop(undecided, narrow, state)
    return low, high, topk - n_high


def _to_order(x):
  """float32 to int32 of the same order, of one zero, above `LOWEST`."""
  x = jnp.where(x == 0, 0.0, jnp.maximum(x, jnp.finfo(jnp.float32).min))
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)
