# SPDX-License-Identifier: Apache-2.0
"""Scores and exact selection on a TPU: two kernels, one that finds the cut and one that numbers.

`index_topk_cut` keeps the scores of a few queries in VMEM, as integers of the same order, bisects
each row's cut, and leaves two bits for each key: above the cut, at the cut. Ties are settled on
those words. `index_topk_positions` turns a row of bits into positions, all slots at once: a slot
counts the groups of words that end before it, then the words, then the bits.

Keys are stored so that a word is made without moving a lane: of WORD x LANES keys, the i-th line
of 128 holds every WORD-th key from the i-th on.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsa_jax.kernels import resident, set_bits
from dsa_jax.kernels.resident import LANES, dot
from dsa_jax.kernels.rows import map_rows, pad_axis
from dsa_jax.kernels.set_bits import WORD

TILE = WORD * LANES  # Keys whose flags are a line of words.
GROUP = 64  # Words in a group.
LEAST_ROWS = 8  # A line of scores is that high, whatever is in it.
HIDDEN = jnp.iinfo(jnp.int32).min


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
  """They change the speed, never the result."""

  block_t: int = 512  # Query rows whose bits exist at one time.
  step_t: int = 16  # Query rows whose scores are in VMEM at one time.
  step_s: int = 1024  # Keys that meet all heads at one time; divides TILE.


def forward(q, k, weights, start, end, *, topk: int, blocks: BlockSizes):
  n_keys = k.shape[1]
  k = _interleave(pad_axis(resident.pad_channels(k), 1, TILE))
  end = jnp.minimum(end, n_keys)  # Never the padding.
  blocks = _fit(blocks, k.shape[1])

  def select(rows):
    q, weights, start, end = rows
    above, tied = _cut(resident.pad_channels(q), k, weights, start, end, topk, blocks)
    missing = topk - jnp.sum(set_bits.count(above), axis=-1)
    return _positions(above | set_bits.keep_first(tied, missing), topk, blocks)

  return map_rows(select, (q, weights, start, end), blocks.block_t, blocks.step_t)


def _fit(blocks: BlockSizes, n_keys: int) -> BlockSizes:
  """Fewer rows at one time where their scores would take more than half of VMEM."""
  most = resident.vmem_bytes() // (2 * 4 * n_keys)
  if blocks.step_t <= most:
    return blocks
  if most < LEAST_ROWS:
    longest = resident.vmem_bytes() // (2 * 4 * LEAST_ROWS)
    raise ValueError(f'{n_keys=} are too many for VMEM; at most {longest}, padding included.')
  return dataclasses.replace(blocks, step_t=LEAST_ROWS)


def _interleave(k):
  """Keys [B, S, J] in tiles: line i, lane l holds key l * WORD + i of the tile."""
  tiles = k.reshape(k.shape[0], -1, LANES, WORD, k.shape[2])
  return jnp.swapaxes(tiles, 2, 3).reshape(k.shape)


def _cut(q, k, weights, start, end, topk, blocks):
  """Words of flags, uint32 [B, T, S / WORD] each: keys above the cut of their row, and at it."""
  batch, n_queries, n_heads, width = q.shape
  n_tiles, step_t = k.shape[1] // TILE, blocks.step_t
  n_steps = n_queries // step_t
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
  above, tied = pl.pallas_call(
      lambda *refs: _cut_kernel(*refs, topk=topk, blocks=blocks),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2,
          grid=(batch, n_steps, n_tiles),
          in_specs=[
              per_step(n_heads * step_t, width),
              pl.BlockSpec((1, TILE, width), index_of_tile),
              per_step(n_heads, step_t, 1),
              per_step(step_t, 2),
          ],
          out_specs=[per_step(step_t, n_tiles * LANES)] * 2,
          scratch_shapes=[pltpu.VMEM((step_t, n_tiles * TILE), jnp.int32)],
      ),
      out_shape=[flags, flags],
      compiler_params=pltpu.CompilerParams(vmem_limit_bytes=int(0.9 * resident.vmem_bytes())),
      name='index_topk_cut',
  )(first, last, q, k, weights, jnp.stack([start, end], axis=-1).reshape(batch, n_steps, step_t, 2))
  words = lambda x: x.reshape(batch, n_queries, -1).astype(jnp.uint32)
  return words(above), words(tied)


def _cut_kernel(first, last, q, k, weights, interval, above, tied, scores, *, topk, blocks):
  b, t, s = (pl.program_id(axis) for axis in range(3))
  first, last = first[b, t], last[b, t]

  @pl.when((s >= first) & (s < last))
  def _():
    _score(s, q, k, weights, interval, scores, blocks)

  @pl.when(s == pl.num_programs(2) - 1)
  def _():
    above[...] = jnp.zeros(above.shape, jnp.int32)
    tied[...] = jnp.zeros(tied.shape, jnp.int32)
    cut = _bisect(scores, first, last, topk)

    def write(tile, _):
      lines = [scores[:, pl.ds(tile * TILE + i * LANES, LANES)] for i in range(WORD)]
      put = pl.ds(tile * LANES, LANES)
      above[0, 0, :, put] = sum((x > cut).astype(jnp.int32) << i for i, x in enumerate(lines))
      tied[0, 0, :, put] = sum((x == cut).astype(jnp.int32) << i for i, x in enumerate(lines))
      return 0

    jax.lax.fori_loop(first, last, write, 0)


def _score(tile, q, k, weights, interval, scores, blocks):
  """Scores a tile of keys, a few at a time, as integers of the same order."""
  n_heads, step_t, _ = weights.shape[2:]
  start, end = interval[0, 0, :, 0:1], interval[0, 0, :, 1:2]

  def score(j, _):
    keys = k[0, pl.ds(j * blocks.step_s, blocks.step_s), :]
    dots = dot(q[0, 0], keys, 1, 1).reshape(n_heads, step_t, blocks.step_s)
    x = jnp.sum(jnp.maximum(dots, 0) * weights[0, 0], axis=0)
    x = jnp.where(x == 0, 0.0, jnp.maximum(x, jnp.finfo(jnp.float32).min))  # One zero; no -inf.
    slot = j * blocks.step_s + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    position = tile * TILE + slot % LANES * WORD + slot // LANES
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    seen = (position >= start) & (position < end)
    put = pl.ds(tile * TILE + j * blocks.step_s, blocks.step_s)
    scores[:, put] = jnp.where(seen, ordered, HIDDEN)
    return 0

  jax.lax.fori_loop(0, TILE // blocks.step_s, score, 0)


def _bisect(scores, first, last, topk):
  """The highest value that at least `topk` of a row reach, [T, 1]; the lowest where none is."""

  def count(least):
    def add(tile, total):
      chosen = scores[:, pl.ds(tile * TILE, TILE)] >= least
      return total + jnp.sum(chosen.astype(jnp.float32), axis=1, keepdims=True)

    zero = jnp.zeros((scores.shape[0], 1), jnp.float32)  # Exact below 2**24.
    return jax.lax.fori_loop(first, last, add, zero)

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


def _positions(words, topk, blocks):
  """Where the set bits of words uint32 [B, T, N] are: ascending, then -1, [B, T, topk]."""
  batch, n_queries, _ = words.shape
  step_t, n_slots = blocks.step_t, pl.cdiv(topk, LANES) * LANES
  words = pad_axis(words, 2, 8 * GROUP)
  groups = words.reshape(batch, n_queries, -1, GROUP)
  held = jnp.cumsum(set_bits.count(groups), axis=-1)
  ends = jnp.cumsum(held[..., -1], axis=-1)[..., None]
  held = [held & 0xFF, held >> 8]
  bits = [groups >> shift & 0xFF for shift in (0, 8, 16, 24)]
  tables = jnp.stack([x.astype(jnp.bfloat16) for x in held + bits], axis=2)  # Exact: bytes.
  tables = jnp.swapaxes(tables, -1, -2).reshape(batch, n_queries, 6 * GROUP, -1)
  per_step = lambda *shape: pl.BlockSpec(
      (1, step_t, *shape), lambda b, t: (b, t, *[0] * len(shape))
  )
  out = pl.pallas_call(
      _positions_kernel,
      grid=(batch, n_queries // step_t),
      in_specs=[per_step(*tables.shape[2:]), per_step(*ends.shape[2:])],
      out_specs=per_step(n_slots),
      out_shape=jax.ShapeDtypeStruct((batch, n_queries, n_slots), jnp.int32),
      compiler_params=pltpu.CompilerParams(vmem_limit_bytes=int(0.9 * resident.vmem_bytes())),
      name='index_topk_positions',
  )(tables, ends.astype(jnp.float32))
  return out[..., :topk]


def _positions_kernel(tables, ends, out):
  """Finds the words of all slots, then the bits.

  tables: bytes [6 * GROUP, n]; for each word, two of the bits that its group holds up to its end,
  and its own four. ends: [n, 1], the bits up to the end of each group.
  """
  n_slots = out.shape[2]
  n_groups = ends.shape[2]
  as_float = lambda x: x.astype(jnp.float32)
  total = lambda x: jnp.sum(x, axis=0, keepdims=True)
  iota = lambda n: jax.lax.broadcasted_iota(jnp.int32, (n, n_slots), 0)

  def row(i, _):
    slot = jax.lax.broadcasted_iota(jnp.int32, (1, n_slots), 1)
    end = ends[0, i]  # n 1
    before = end <= as_float(slot)  # n slots
    group = total(before.astype(jnp.int32))
    left = as_float(slot) - jnp.max(jnp.where(before, end, 0), axis=0, keepdims=True)
    own = as_float(iota(n_groups) == group).astype(jnp.bfloat16)
    found = dot(tables[0, i], own, 1, 0).reshape(6, GROUP, n_slots)
    held = found[0] + 256 * found[1]
    before = held <= left
    word = total(before.astype(jnp.int32))
    left = left - jnp.max(jnp.where(before, held, 0), axis=0, keepdims=True)
    mine = iota(GROUP) == word
    of_word = [total(jnp.where(mine, x, 0)).astype(jnp.int32) for x in found[2:]]
    bits = sum(byte << 8 * i for i, byte in enumerate(of_word))
    bit = set_bits.nth(jax.lax.bitcast_convert_type(bits, jnp.uint32), left.astype(jnp.int32))
    filled = as_float(slot) < jnp.max(end, axis=0, keepdims=True)
    out[0, pl.ds(i, 1)] = jnp.where(filled, (group * GROUP + word) * WORD + bit, -1)
    return 0

  jax.lax.fori_loop(0, out.shape[1], row, 0)
