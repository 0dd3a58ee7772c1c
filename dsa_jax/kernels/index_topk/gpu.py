# SPDX-License-Identifier: Apache-2.0
"""Scores and exact selection on a GPU, a block of query rows at a time.

One kernel scores tiles of keys for a few queries and writes integers that are ordered like the
scores. Where keys are many, a second kernel cuts each row among the maxima of groups of its keys,
and keeps the candidates: the K best keys lie in the K groups with the highest maxima. The last
kernel cuts among the keys that are left. A cut is an interval of integers: keys above it are
selected, keys below it are not, and keys in it are taken from the lowest position on.
"""

import dataclasses
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.gpu import triton
from dsa_jax.kernels.gpu.score_tiles import ScoreTiles
from dsa_jax.kernels.xla.rows import map_rows, whole_block

LOWEST, HIGHEST = -(2**31), 2**31 - 1
HALF = 2**16  # Two counts share an integer.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result."""

  block_t: int = 1024  # Query rows per pass, whose scores exist at one time.
  columns: int = 256  # Queries times heads of a program that scores.
  tile: int = 64  # Keys of one product.
  span: int = 4096  # Keys that a program scores.
  stages: int = 3  # Tiles in flight or in use.
  groups: int = 4096  # Groups of a row's keys; a row with fewer keys has no groups.
  chunk: int = 4096  # Candidates of a row that are read at one time.


class Plan(NamedTuple):
  """How rows are scored and cut."""

  batch: int
  n_keys: int
  block_t: int  # Query rows per pass.
  tiles: ScoreTiles
  span: int
  groups: int
  chunk: int

  @property
  def has_candidates(self) -> bool:
    """Says whether rows have so many keys that groups of them are cut first.

    A block of the kernel that does so has 512 groups for each warp, and at most 32 warps.
    """
    return self.n_keys > self.groups and self.groups <= 512 * 32

  def kernels(self) -> dict[str, int]:
    """Returns the programs of each kernel."""
    n_rows = self.batch * self.block_t
    candidates = {'index_topk_candidates': n_rows} if self.has_candidates else {}
    scores = {'index_scores': self.tiles.score_programs(n_rows, self.span)}
    return scores | candidates | {'index_topk': n_rows}


def plan(q, k, *, topk: int, blocks: BlockSizes) -> Plan:
  """Returns how the best keys k [B, S, J] of queries q [B, T, I, J] are selected."""
  tiles = ScoreTiles.of(q, k, blocks.columns, blocks.tile, blocks.stages)
  return Plan(
      batch=q.shape[0],
      n_keys=k.shape[1],
      block_t=whole_block(q.shape[1], blocks.block_t, tiles.step_t),
      tiles=tiles,
      span=blocks.span,
      groups=triton.tile_side(2 * topk, least=blocks.groups),
      chunk=blocks.chunk,
  )


def forward(q, k, weights, start, end, *, topk: int, blocks: BlockSizes):
  """Returns the positions [B, T, topk], as the op does."""
  p = plan(q, k, topk=topk, blocks=blocks)
  start, end = jnp.maximum(start, 0), jnp.minimum(end, k.shape[1])
  q, weights = p.tiles.pad_heads(q, weights)

  def select(rows):
    batch, n_rows = rows[2].shape
    scores = p.tiles.score(k, *rows, span=p.span, encode=_to_order, dtype=jnp.int32)
    candidates = scores, rows[2].reshape(-1), rows[3].reshape(-1)
    if p.has_candidates:
      candidates = _candidates(*candidates, topk, p.groups)
    return _best(*candidates, topk=topk, chunk=p.chunk).reshape(batch, n_rows, topk)

  return map_rows(select, (q, weights, start, end), p.block_t, p.tiles.step_t)


def _candidates(scores, start, end, topk, groups):
  """Returns the scores that may be among the best of each row, and where these are.

  Key i is of group i modulo the number of groups. There cannot be more than K candidates for each
  of a group's keys.

  Returns:
    The candidates' scores in the order of positions, the first candidate, which is 0, their number,
    and their positions.
  """
  n_rows, most = scores.shape[0], topk * (pl.cdiv(scores.shape[1], groups) + 1)

  def kernel(scores, start, end, values, positions, n_values):
    row = pl.program_id(0)
    start, end = start[row], end[row]
    read, chunks = _reader(scores, row, start, end, groups), _chunks(start, end, groups)
    highest = lambda j, tops: jnp.maximum(tops, read(j)[1])
    tops = jax.lax.fori_loop(*chunks, highest, jnp.full(groups, LOWEST, jnp.int32))
    n_groups = jnp.sum((tops > LOWEST).astype(jnp.int32))
    low, high, _ = _cut(lambda j: (None, tops), (0, 1), n_groups, topk, groups)
    low = jnp.where(n_groups < topk, LOWEST + 1, low)
    above = lambda j, n: n + jnp.sum((read(j)[1] >= high).astype(jnp.int32))
    counted = jnp.where(high == low + 1, chunks[1], chunks[0])  # Else all of [low, high) is kept.
    ties = topk - jax.lax.fori_loop(chunks[0], counted, above, jnp.int32(0))

    def put(slot, at, x, chosen):
      triton.store(values.at[row, slot], x, chosen)
      triton.store(positions.at[row, slot], at, chosen)

    n_values[row] = _write(read, chunks, (low, high, ties), most, put)

  out = [jax.ShapeDtypeStruct((n_rows, most), jnp.int32)] * 2
  out += [jax.ShapeDtypeStruct((n_rows,), jnp.int32)]
  args = scores, start, end
  values, positions, n_values = triton.call(
      kernel, 'index_topk_candidates', n_rows, out, args, warps=max(groups // 512, 1)
  )
  return values, jnp.zeros_like(n_values), n_values, positions


def _best(scores, start, end, positions=None, *, topk, chunk):
  """Returns the positions of the best scores of each row within [start, end), int32 [rows, K]."""

  def kernel(scores, start, end, positions, out):
    row = pl.program_id(0)
    start, end = start[row], end[row]
    read, chunks = _reader(scores, row, start, end, chunk), _chunks(start, end, chunk)
    cut = _cut(read, chunks, end - start, topk, chunk)

    def put(slot, at, _, chosen):
      position = at if positions is None else triton.load(positions.at[row, at], chosen)
      triton.store(out.at[row, slot], position, chosen)

    n_out = _write(read, chunks, cut, topk, put)
    for first in range(0, topk, chunk):
      slot = first + jnp.arange(chunk)
      empty = (slot >= n_out) & (slot < topk)
      triton.store(out.at[row, slot], jnp.full(chunk, -1, jnp.int32), empty)

  out = [jax.ShapeDtypeStruct((scores.shape[0], topk), jnp.int32)]
  args = scores, start, end, positions
  warps = max(chunk // 512, 1)
  return triton.call(kernel, 'index_topk', scores.shape[0], out, args, warps=warps)[0]


def _chunks(start, end, chunk):
  """Returns the first chunk of a row that holds a seen key, and one past the last."""
  return start // chunk, jnp.where(end > start, pl.cdiv(end, chunk), 0)


def _reader(scores, row, start, end, chunk):
  """Returns what reads positions and scores of a chunk, `LOWEST` where not seen."""

  def read(j):
    at = j * chunk + jnp.arange(chunk)
    return at, triton.load(scores.at[row, at], (at >= start) & (at < end), LOWEST)

  return read


def _cut(read, chunks, n_seen, topk, chunk):
  """Returns low, high, n: scores that reach low are selected, but only the first n of ties at low.

  There are ties to count where high is low + 1. Each pass counts the scores that reach the values
  at the thirds of the interval.
  """

  def bounds(j, state):
    _, x = read(j)
    low, high = state
    return jnp.minimum(low, jnp.where(x > LOWEST, x, HIGHEST)), jnp.maximum(high, x)

  state = jnp.full(chunk, HIGHEST, jnp.int32), jnp.full(chunk, LOWEST, jnp.int32)
  low, high = jax.lax.fori_loop(*chunks, bounds, state)
  state = jnp.min(low), jnp.max(high) + 1, n_seen, jnp.int32(0)

  def narrow(state):
    low, high, n_low, n_high = state
    step = jnp.maximum(high // 3 - low // 3, 1)
    cuts = low + step, low + 2 * step

    def count(j, sums):
      _, x = read(j)
      both = jnp.sum((x >= cuts[0]).astype(jnp.int32) + jnp.where(x >= cuts[1], HALF, 0))
      return sums[0] + both % HALF, sums[1] + both // HALF

    sums = jax.lax.fori_loop(*chunks, count, (jnp.int32(0), jnp.int32(0)))
    for cut, n in zip(cuts, sums):
      enough, closer = n >= topk, (n < topk) & (cut < high)
      low, n_low = jnp.where(enough, cut, low), jnp.where(enough, n, n_low)
      high, n_high = jnp.where(closer, cut, high), jnp.where(closer, n, n_high)
    return low, high, n_low, n_high

  undecided = lambda state: (state[2] > topk) & (state[1] > state[0] + 1)
  low, high, _, n_high = jax.lax.while_loop(undecided, narrow, state)
  return low, high, topk - n_high


def _write(read, chunks, cut, no_slot, put):
  """Puts the keys that a cut selects into the next slots, and returns how many there are."""
  low, high, ties = cut

  def first_ties(x, n_before):
    tied = x == low
    number = n_before + jnp.cumsum(tied.astype(jnp.int32))
    return (x >= high) | (tied & (number <= ties)), n_before + jnp.sum(tied.astype(jnp.int32))

  def write(j, counts):
    n_out, n_ties = counts
    at, x = read(j)
    chosen, n_ties = jax.lax.cond(
        high == low + 1, first_ties, lambda x, n_before: (x >= low, n_before), x, n_ties
    )
    slot = n_out + jnp.cumsum(chosen.astype(jnp.int32)) - 1
    # Where interpreted, two values of one slot would race.
    put(jnp.where(chosen, slot, no_slot), at, x, chosen)
    return n_out + jnp.sum(chosen.astype(jnp.int32)), n_ties

  return jax.lax.fori_loop(*chunks, write, (jnp.int32(0), jnp.int32(0)))[0]


def _to_order(x):
  """Turns float32 to int32 of the same order, of one zero, above `LOWEST`."""
  x = jnp.where(x == 0, 0.0, jnp.maximum(x, jnp.finfo(jnp.float32).min))
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)
