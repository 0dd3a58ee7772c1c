# SPDX-License-Identifier: Apache-2.0
"""Scores and exact selection on a TPU, by two kernels.

`index_topk_cut` keeps the scores of a few queries in VMEM, as integers of the same order, bisects
each row's cut, and leaves two bits for each key: above the cut, at the cut. `index_topk_positions`
settles ties and turns bits into positions: each slot looks up the lane whose words hold it, then
the word, then the bit. Slots of many rows do so at once, each in tables of its own row.

Keys are stored so that a word is made without moving a lane: of WORD x LANES keys, the i-th line
of 128 holds every WORD-th key from the i-th on.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.tpu import chip, layout
from dsa_jax.kernels.tpu.layout import LANES
from dsa_jax.kernels.tpu.plans import KernelPlan
from dsa_jax.kernels.tpu.resident import dot
from dsa_jax.kernels.xla import set_bits
from dsa_jax.kernels.xla.rows import map_rows, pad_axis, whole_block
from dsa_jax.kernels.xla.set_bits import WORD

TILE = WORD * LANES  # Keys whose flags are a line of words.
CHUNK = 8  # Words of a lane that are read at one time.
LEAST_ROWS = 8  # A vector has so many rows, used or not.
HIDDEN = jnp.iinfo(jnp.int32).min
BISECTIONS = 29  # For the slowest of 16 rows of 64K random scores; there are 32 at most.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result."""

  block_t: int = 512  # Query rows per pass, whose bits exist at one time.
  step_t: int = 32  # Query rows whose scores are in VMEM at one time; fewer if keys are many.
  step_s: int = 2048  # Keys of one product with all heads; divides TILE.


class Plan(NamedTuple):
  """How keys are selected: two kernels, which take the queries of a pass step by step."""

  batch: int
  block_t: int  # Query rows per pass.
  step_t: int  # Query rows of a step of the grid.
  step_s: int  # Keys of one product with all heads.
  n_keys: int
  n_tiles: int  # Tiles of keys, the last one filled up.
  words_per_lane: int  # Words of flags that a lane has in a row, whole chunks.
  topk: int
  vmem: int  # Bytes of VMEM of the chip.

  gathered_bytes = 0

  @property
  def n_chunks(self) -> int:
    return self.words_per_lane // CHUNK

  @property
  def n_slots(self) -> int:
    """The slots of a row of positions: whole lines."""
    return pl.cdiv(self.topk, LANES) * LANES

  @property
  def cut_grid(self) -> tuple[int, int, int]:
    return self.batch, self.block_t // self.step_t, self.n_tiles

  @property
  def positions_grid(self) -> tuple[int, int]:
    return self.cut_grid[:2]

  @property
  def compiler_params(self) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(vmem_limit_bytes=int(0.9 * self.vmem))

  def kernels(self) -> dict[str, KernelPlan]:
    cut, positions = self._cut_loops(), self._positions_loops()
    return {
        'index_topk_cut': KernelPlan(self.cut_grid, cut),
        'index_topk_positions': KernelPlan(self.positions_grid, positions),
    }

  def _cut_loops(self) -> list[tuple[int, float]]:
    seen = self.n_keys / 2 / TILE
    return self._per_query(
        (1, self.n_tiles),  # Steps.
        (2, seen * TILE / self.step_s),  # Scores.
        (2, seen),  # The count before bisection.
        (2, BISECTIONS),
        (3, BISECTIONS * seen),  # Their counts.
        (2, seen),  # Words of flags.
    )

  def _positions_loops(self) -> list[tuple[int, float]]:
    chunks, slots = self.n_chunks, self.topk / LANES
    if chunks == 1:  # No loop is made of one trip.
      return self._per_query((1, 1), (2, slots))
    return self._per_query(
        (1, 1),  # Steps.
        (2, chunks),  # Counts.
        (2, chunks),  # Joined words.
        (2, slots),  # Lines of slots.
        (3, slots * chunks),  # Words that slots look up.
    )

  def _per_query(self, *loops: tuple[int, int | float]) -> list[tuple[int, float]]:
    return [(depth, n / self.step_t) for depth, n in loops]


def plan(q, k, *, topk: int, vmem: int, blocks: BlockSizes) -> Plan:
  """Returns how the best keys k [B, S, J] of queries q [B, T, I, J] are selected.

  There are fewer queries in a step where there are few in all, or where the scores of more would
  fill half of VMEM.

  Raises:
    ValueError: VMEM is too small for the scores of so many keys.
  """
  (batch, n_queries), n_tiles = q.shape[:2], pl.cdiv(k.shape[1], TILE)
  bytes_of_row = 4 * n_tiles * TILE
  most, step_t = vmem // (2 * bytes_of_row), blocks.step_t
  if most < LEAST_ROWS:
    longest = vmem // (2 * 4 * LEAST_ROWS)
    raise ValueError(
        f'n_keys={n_tiles * TILE} are too many for VMEM; at most {longest}, padding included.'
    )
  if most < step_t or n_queries <= LEAST_ROWS:
    step_t = LEAST_ROWS
  return Plan(
      batch=batch,
      block_t=whole_block(n_queries, blocks.block_t, step_t),
      step_t=step_t,
      step_s=blocks.step_s,
      n_keys=k.shape[1],
      n_tiles=n_tiles,
      words_per_lane=pl.cdiv(n_tiles, CHUNK) * CHUNK,
      topk=topk,
      vmem=vmem,
  )


def forward(q, k, weights, start, end, *, topk: int, blocks: BlockSizes):
  """Returns the positions [B, T, topk], as the op does."""
  p = plan(q, k, topk=topk, vmem=chip.vmem_bytes(), blocks=blocks)
  end = jnp.minimum(end, k.shape[1])  # Never the padding.
  k = tile_keys(k)
  select_rows = lambda rows: select(*rows, k=k, plan=p)
  return map_rows(select_rows, (q, weights, start, end), p.block_t, p.step_t)


def tile_keys(k: jax.Array) -> jax.Array:
  """Returns keys [B, S, J] in whole tiles: of each, line i, lane l holds key l * WORD + i."""
  k = pad_axis(layout.pad_channels(k), 1, TILE)
  tiles = k.reshape(k.shape[0], -1, LANES, WORD, k.shape[2])
  return jnp.swapaxes(tiles, 2, 3).reshape(k.shape)


def select(q, weights, start, end, *, k, plan: Plan):
  """Does the op for a pass of queries and `tile_keys`, whose padding no query may see."""
  above, tied = _cut(layout.pad_channels(q), k, weights, start, end, plan)
  return _positions(above, tied, plan)


def _cut(q, k, weights, start, end, plan: Plan):
  """Returns flags of the keys above the cut and of those at it, int32 [B, T, S / WORD] each."""
  batch, n_queries, n_heads, width = q.shape
  _, n_steps, n_tiles = plan.cut_grid
  step_t = plan.step_t
  seen = end > start
  steps = lambda x: x.reshape(batch, n_steps, step_t)
  first = jnp.min(steps(jnp.where(seen, jnp.maximum(start, 0), k.shape[1])), -1) // TILE
  last = pl.cdiv(jnp.max(steps(jnp.where(seen, end, 0)), -1), TILE)
  heads = lambda x: jnp.moveaxis(x.reshape(batch, n_steps, step_t, n_heads, -1), 3, 2)
  q = heads(q).reshape(batch, n_steps, n_heads * step_t, width)  # Rows of one head together.
  weights = heads(weights.astype(jnp.float32))

  def index_of_tile(b, t, s, first, last):
    return b, jnp.clip(s, first[b, t], jnp.maximum(last[b, t] - 1, first[b, t]) % n_tiles), 0

  per_step = lambda *shape: pl.BlockSpec(
      (1, 1, *shape), lambda b, t, s, *_: (b, t, *[0] * len(shape))
  )
  flags = jax.ShapeDtypeStruct((batch, n_steps, step_t, n_tiles * LANES), jnp.int32)
  inputs = CutIn(q, k, weights, jnp.stack([start, end], axis=-1).reshape(batch, n_steps, step_t, 2))
  (out,) = pl.pallas_call(
      functools.partial(_cut_kernel, plan),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2,
          grid=plan.cut_grid,
          in_specs=[
              CutIn(
                  q=per_step(n_heads * step_t, width),
                  k=pl.BlockSpec((1, TILE, width), index_of_tile),
                  weights=per_step(n_heads, step_t, 1),
                  interval=per_step(step_t, 2),
              )
          ],
          out_specs=[Flags(*[per_step(step_t, n_tiles * LANES)] * 2)],
          scratch_shapes=[pltpu.VMEM((step_t, n_tiles * TILE), jnp.int32)],
      ),
      out_shape=[Flags(flags, flags)],
      compiler_params=plan.compiler_params,
      name='index_topk_cut',
  )(first, last, inputs)
  return [x.reshape(batch, n_queries, -1) for x in out]


class CutIn(NamedTuple):
  """What the first kernel reads."""

  q: Any  # Rows of one head together.
  k: Any
  weights: Any
  interval: Any


class Flags(NamedTuple):
  """What the first kernel writes."""

  above: Any
  tied: Any


def _cut_kernel(plan: Plan, first, last, inputs: CutIn, out: Flags, scores):
  above, tied = out
  b, t, s = (pl.program_id(axis) for axis in range(3))
  first, last = first[b, t], last[b, t]

  @pl.when((s >= first) & (s < last))
  def _():
    _score(s, inputs, scores, plan.step_s)

  @pl.when(s == pl.num_programs(2) - 1)
  def _():
    above[...] = jnp.zeros(above.shape, jnp.int32)
    tied[...] = jnp.zeros(tied.shape, jnp.int32)
    cut = _bisect(scores, first, last, plan.topk)

    def write(tile, _):
      lines = [scores[:, pl.ds(tile * TILE + i * LANES, LANES)] for i in range(WORD)]
      put = pl.ds(tile * LANES, LANES)
      above[0, 0, :, put] = sum((x > cut).astype(jnp.int32) << i for i, x in enumerate(lines))
      tied[0, 0, :, put] = sum((x == cut).astype(jnp.int32) << i for i, x in enumerate(lines))
      return 0

    jax.lax.fori_loop(first, last, write, 0)


def _score(tile, inputs: CutIn, scores, step_s: int):
  """Scores a tile of keys, a few at a time, as integers of the same order."""
  q, k, weights, interval = inputs
  n_heads, step_t, _ = weights.shape[2:]
  start, end = interval[0, 0, :, 0:1], interval[0, 0, :, 1:2]

  def score(j, _):
    keys = k[0, pl.ds(j * step_s, step_s), :]
    dots = dot(q[0, 0], keys, 1, 1).reshape(n_heads, step_t, step_s)
    x = jnp.sum(jnp.maximum(dots, 0) * weights[0, 0], axis=0)
    x = jnp.where(x == 0, 0.0, jnp.maximum(x, jnp.finfo(jnp.float32).min))  # One zero; no -inf.
    slot = j * step_s + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    position = tile * TILE + slot % LANES * WORD + slot // LANES
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    seen = (position >= start) & (position < end)
    put = pl.ds(tile * TILE + j * step_s, step_s)
    scores[:, put] = jnp.where(seen, ordered, HIDDEN)
    return 0

  jax.lax.fori_loop(0, TILE // step_s, score, 0)


def _bisect(scores, first, last, topk):
  """Returns the highest value that at least `topk` of a row reach, [T, 1], or else the lowest."""
  wide = 4 * LANES  # Sums that do not wait for each other.

  def count(least):
    def add(tile, total):
      lines = [scores[:, pl.ds(tile * TILE + i, wide)] for i in range(0, TILE, wide)]
      return total + sum((x >= least).astype(jnp.float32) for x in lines)

    zero = jnp.zeros((scores.shape[0], wide), jnp.float32)  # Exact below 2**24.
    return jnp.sum(jax.lax.fori_loop(first, last, add, zero), axis=1, keepdims=True)

  def undecided(state):
    _, _, done = state
    return jnp.min(done) == 0

  def halve(state):
    low, high, done = state
    middle = (low >> 1) + (high >> 1) + (low & high & 1)
    n = count(middle)
    low = jnp.where((done == 0) & (n >= topk), middle, low)
    high = jnp.where((done == 0) & (n < topk), middle, high)
    return low, high, jnp.where((n == topk) | (high - 1 <= low), 1, done)

  low = jnp.full((scores.shape[0], 1), HIDDEN + 1)
  high = jnp.full_like(low, jnp.iinfo(jnp.int32).max)
  done = (count(low) <= topk).astype(jnp.int32)
  return jax.lax.while_loop(undecided, halve, (low, high, done))[0]


def _positions(above, tied, plan: Plan):
  """Returns where the `topk` first keys are, those above the cut before those at it: [B, T, topk].

  A lane gets consecutive words, so that a slot finds its lane by bisection, then its word in it.
  """
  batch, n_queries, _ = above.shape
  step_t, words_per_lane = plan.step_t, plan.words_per_lane

  def spread(words):
    words = pad_axis(words, 2, CHUNK * LANES).reshape(batch, -1, step_t, LANES, words_per_lane)
    return jnp.moveaxis(words, 4, 2)  # B steps words step_t LANES

  words = pl.BlockSpec((1, 1, words_per_lane, step_t, LANES), lambda b, t: (b, t, 0, 0, 0))
  out = pl.pallas_call(
      functools.partial(_positions_kernel, plan.topk),
      grid=plan.positions_grid,
      in_specs=[words, words],
      out_specs=pl.BlockSpec((1, step_t, plan.n_slots), lambda b, t: (b, t, 0)),
      out_shape=jax.ShapeDtypeStruct((batch, n_queries, plan.n_slots), jnp.int32),
      scratch_shapes=[pltpu.VMEM((words_per_lane, step_t, LANES), jnp.int32)],
      compiler_params=plan.compiler_params,
      name='index_topk_positions',
  )(spread(above), spread(tied))
  return out[..., : plan.topk]


def _positions_kernel(topk, above, tied, out, words):
  """Joins the words of flags, then finds the lane, the word and the bit of LANES slots a row."""
  n_words, rows, _ = words.shape
  n_chunks = n_words // CHUNK
  lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
  none = jnp.zeros((rows, LANES), jnp.int32)
  row_sum = lambda x: jnp.sum(x, axis=1, keepdims=True)
  chunk = lambda ref, c: ref[0, 0, pl.ds(c * CHUNK, CHUNK)]
  held = lambda x: jnp.sum(jax.lax.population_count(x), axis=0)

  def count(c, n):
    return n[0] + held(chunk(above, c)), n[1] + held(chunk(tied, c))

  def join(c, state):
    left, total = state
    strict, equal = chunk(above, c), chunk(tied, c)
    kept = []
    for word in equal:
      kept.append(_keep_first(word, left))
      left = left - jax.lax.population_count(word)
    joined = strict | jnp.stack(kept)
    words[pl.ds(c * CHUNK, CHUNK)] = joined
    return left, total + held(joined)

  def find(v, _):
    slot = v * LANES + lane
    of_lane, base = none, none
    for half in (64, 32, 16, 8, 4, 2, 1):
      first = _look_up(begin, of_lane + half)
      of_lane = jnp.where(first <= slot, of_lane + half, of_lane)
      base = jnp.where(first <= slot, first, base)

    def search(c, state):
      first, base, index, held_word = state
      for i, word in enumerate(words[pl.ds(c * CHUNK, CHUNK)]):
        word = _look_up(word, of_lane)
        reached = first <= slot
        base = jnp.where(reached, first, base)
        index = jnp.where(reached, c * CHUNK + i, index)
        held_word = jnp.where(reached, word, held_word)
        first = first + jax.lax.population_count(word)
      return first, base, index, held_word

    state = base, base, none, none
    _, base, index, held_word = jax.lax.fori_loop(0, n_chunks, search, state)
    bit = set_bits.nth(jax.lax.bitcast_convert_type(held_word, jnp.uint32), slot - base)
    position = (of_lane * n_words + index) * WORD + bit
    out[0, :, pl.ds(v * LANES, LANES)] = jnp.where(slot < row_sum(total), position, -1)
    return 0

  n_above, n_tied = jax.lax.fori_loop(0, n_chunks, count, (none, none))
  missing = topk - row_sum(n_above) - _sum_before(n_tied)
  _, total = jax.lax.fori_loop(0, n_chunks, join, (missing, none))
  begin = _sum_before(total)
  jax.lax.fori_loop(0, out.shape[2] // LANES, find, 0)


def _look_up(x, lane):
  """Returns x [rows, LANES] at lanes of its own row."""
  return jnp.take_along_axis(x, lane, axis=1, mode='promise_in_bounds')


def _sum_before(x):
  """Returns, for each lane, the sum of the lanes before it."""
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  total = x
  for shift in (1, 2, 4, 8, 16, 32, 64):
    total = total + jnp.where(lane >= shift, pltpu.roll(total, shift, axis=1), 0)
  return total - x


def _keep_first(word, n):
  """Clears all but the first n set bits of each word."""
  bit = set_bits.nth(jax.lax.bitcast_convert_type(word, jnp.uint32), n)
  below = word & ((1 << bit) - 1)
  return jnp.where(n >= jax.lax.population_count(word), word, jnp.where(n > 0, below, 0))
