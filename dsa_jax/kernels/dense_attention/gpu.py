# SPDX-License-Identifier: Apache-2.0
"""Attention to an interval on a GPU: a program takes a block of rows or a block of keys.

A row is one head of a query, and the heads that share a key head are rows of the same blocks. A
program goes through the tiles that its block sees, or is seen by. Backward, one kernel makes the
gradients of queries and another those of keys, so that no two programs add to one number.

cuDNN's attention does not stand behind this op: as jax calls it, who sees whom is a causal mask, a
sliding window, lengths or an array of [T, S]. Two bounds for each query, the log-sum-exp's gradient
and a selection are none of these in linear memory.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.dense_attention.spans import Rows, Spans, rows_of, spans_of
from dsa_jax.kernels.gpu import triton
from dsa_jax.kernels.gpu.triton import column_parts, dot, gather
from dsa_jax.kernels.visibility import selected_keys
from dsa_jax.kernels.xla import set_bits
from dsa_jax.kernels.xla.rows import map_rows, pad_axis, scan_rows

UNSEEN = -1e30  # The logit of a hidden key: finite, so that differences of maxima are.
# The block sizes are for a key and a value of so many bytes. Wider ones take smaller blocks.
ROW_BYTES = 640


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  block_r: int = 128  # Rows of a program.
  tile_s: int = 128  # Keys of one product, forward; half of them under a mask.
  tile_s_backward: int = 64  # Keys of one product, for gradients of queries.
  tile_r: int = 32  # Rows of one product, for gradients of keys.
  block_s: int = 128  # Keys of a program, for their gradients.
  block_t: int = 1024  # Query rows per pass if a selection is given, whose bits exist at one time.


class Plan(NamedTuple):
  """How rows and keys are cut into programs."""

  batch: int
  n_queries: int  # Queries of one pass.
  n_keys: int
  n_groups: int  # Key heads.
  per_group: int  # Heads that share a key head.
  block_r: int
  tile_s: int  # Keys of one product, forward.
  tile_s_backward: int
  tile_r: int
  block_s: int
  keys: tuple[tuple[int, int, int], ...]  # Parts of the channels of a key.
  values: tuple[tuple[int, int, int], ...]

  @property
  def n_rows(self) -> int:
    """Rows of a key head."""
    return self.n_queries * self.per_group

  @property
  def row_blocks(self) -> int:
    return pl.cdiv(self.n_rows, self.block_r)

  @property
  def key_blocks(self) -> int:
    return pl.cdiv(self.n_keys, self.block_s)

  def forward_kernels(self) -> dict[str, int]:
    """Returns the programs of each kernel, forward."""
    return {'dense_attention_forward': self.batch * self.n_groups * self.row_blocks}

  def backward_kernels(self) -> dict[str, int]:
    """Returns the programs of each kernel, backward."""
    heads = self.batch * self.n_groups
    return {
        'dense_attention_dq': heads * self.row_blocks,
        'dense_attention_dkv': heads * self.key_blocks,
    }


def plan(q, k, v, *, masked: bool, blocks: BlockSizes) -> Plan:
  """Returns how `forward` and `backward` are done; of the arrays only shapes count.

  Args:
    q: Queries.
    k: Keys.
    v: Values.
    masked: Whether a selection is given.
    blocks: The op's block sizes.

  Raises:
    ValueError: Heads are too wide.
  """
  batch, n_queries, n_heads = q.shape[:3]
  n_keys, n_groups = k.shape[1:3]
  n_queries = min(n_queries, blocks.block_t) if masked else n_queries
  parts = column_parts(k.shape[-1]), column_parts(v.shape[-1])
  row_bytes = sum(side for part in parts for _, side, _ in part) * k.dtype.itemsize
  part = pl.next_power_of_2(pl.cdiv(row_bytes, ROW_BYTES))
  if part > 8:
    raise ValueError(
        f'a key of {k.shape[-1]} channels and a value of {v.shape[-1]}, {k.dtype}, take {row_bytes} '
        f'bytes; the shared memory of a GPU has room for {8 * ROW_BYTES}.'
    )
  if k.dtype == jnp.float32:  # Such products take three parts of either operand in registers.
    part = 8
  side = lambda n, part: max(n // part, triton.LEAST)
  return Plan(
      batch=batch,
      n_queries=n_queries,
      n_keys=n_keys,
      n_groups=n_groups,
      per_group=n_heads // n_groups,
      block_r=side(blocks.block_r, part if part > 4 else min(part, 2)),  # wgmma takes 64.
      tile_s=side(blocks.tile_s, 2 * part if masked else part),
      tile_s_backward=side(blocks.tile_s_backward, part),
      tile_r=side(blocks.tile_r, part),
      block_s=side(blocks.block_s, part),
      keys=parts[0],
      values=parts[1],
  )


def forward(q, k, v, start, end, indices, *, sm_scale: float, blocks: BlockSizes):
  """Returns the output and the log-sum-exp, as the op does."""
  masked = indices is not None
  kernels = _Kernels(plan(q, k, v, masked=masked, blocks=blocks), sm_scale)
  attend = lambda rows: kernels.forward(rows[0], k, v, *rows[1:])
  rows = q, start, end, indices
  return map_rows(attend, rows, kernels.plan.n_queries) if masked else attend(rows)


def backward(residuals, dout, delta, *, sm_scale: float, blocks: BlockSizes):
  """Returns the gradients of q, k and v; see `logits_delta` for delta."""
  q, k, v, start, end, indices, lse = residuals
  masked = indices is not None
  kernels = _Kernels(plan(q, k, v, masked=masked, blocks=blocks), sm_scale)
  lse = triton.LOG2_E * jnp.where(lse > -jnp.inf, lse, 0)
  rows = q, dout.astype(q.dtype), lse, delta, start, end, indices
  if not masked:
    return kernels.backward(k, v, rows, k.dtype)

  def step(dkv, rows):
    dq, *more = kernels.backward(k, v, rows, jnp.float32)
    return jax.tree.map(jnp.add, dkv, tuple(more)), dq

  dkv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  (dk, dv), dq = scan_rows(step, dkv, rows, kernels.plan.n_queries)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype)


class Seen(NamedTuple):
  """Who sees whom."""

  rows: Rows
  spans: Spans
  words: Any  # uint32 [B * T, S / 32]: the keys that a query selected; None if there is no mask.


class Queries(NamedTuple):
  """What both backward kernels read of queries, a row for each head."""

  q: Any
  dout: Any
  lse: Any  # In units of ln 2.
  delta: Any


@dataclasses.dataclass(frozen=True)
class _Kernels:
  plan: Plan
  sm_scale: float

  def seen(self, start, end, indices, block_r: int, block_s: int) -> Seen:
    plan, words, masked = self.plan, None, indices is not None
    rows = rows_of(start, end, plan.n_keys, plan.per_group, block_r)
    spans = spans_of(rows, plan.n_keys, block_r, block_s, masked=masked)
    if masked:
      chosen = pad_axis(selected_keys(indices, plan.n_keys), 2, set_bits.WORD)
      words = set_bits.pack(chosen).reshape(-1, chosen.shape[2] // set_bits.WORD)
    return Seen(rows, spans, words)

  def forward(self, q, k, v, start, end, indices):
    plan = self.plan
    seen = self.seen(start, end, indices, plan.block_r, plan.tile_s)
    shape = *q.shape[:3], v.shape[-1]
    out, lse = triton.call(
        self.attend,
        'dense_attention_forward',
        plan.forward_kernels()['dense_attention_forward'],
        [
            jax.ShapeDtypeStruct((q.size // q.shape[-1], v.shape[-1]), q.dtype),
            jax.ShapeDtypeStruct((q.size // q.shape[-1],), jnp.float32),
        ],
        [*map(_flat, (q, k, v)), seen],
        warps=8,
        stages=2,
    )
    return out.reshape(shape), lse.reshape(shape[:3])

  def backward(self, k, v, rows, dtype):
    """Returns the gradients of queries, and those of keys and values in `dtype`."""
    plan, (q, dout, lse, delta, *visibility) = self.plan, rows
    queries = Queries(_flat(q), _flat(dout), lse.reshape(-1), delta.reshape(-1))
    keys = _flat(k), _flat(v)
    of_rows = self.seen(*visibility, plan.block_r, plan.tile_s_backward)
    of_keys = self.seen(*visibility, plan.tile_r, plan.block_s)
    programs = plan.backward_kernels()
    call = lambda kernel, name, out, seen: triton.call(
        kernel, name, programs[name], out, [queries, *keys, seen], warps=8, stages=2
    )
    like = lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype)
    out = [like(queries.q, q.dtype)]
    (dq,) = call(self.differentiate_rows, 'dense_attention_dq', out, of_rows)
    out = [like(x, dtype) for x in keys]
    dk, dv = call(self.differentiate_keys, 'dense_attention_dkv', out, of_keys)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)

  def place(self, blocks: int):
    """Returns the sequence, the key head and the block of this program."""
    program = pl.program_id(0)
    head = program // blocks
    return head // self.plan.n_groups, head % self.plan.n_groups, program % blocks

  def row_places(self, b, g, row):
    """Returns where rows lie in [B * T * H, ...], and which of them there are; None if all."""
    plan = self.plan
    filled = None if plan.n_rows % row.size == 0 else row < plan.n_rows  # Tiles begin at multiples.
    query, head = row // plan.per_group, row % plan.per_group
    return ((b * plan.n_queries + query) * plan.n_groups + g) * plan.per_group + head, filled

  def key_places(self, b, g, key):
    """Returns where keys lie in [B * S * G, ...], and which of them there are; None if all."""
    plan = self.plan
    filled = None if plan.n_keys % key.size == 0 else key < plan.n_keys  # Tiles begin at multiples.
    return (b * plan.n_keys + key) * plan.n_groups + g, filled

  def sees(self, seen: Seen, b, row, key):
    """Returns which rows see which keys. One of `row` and `key` is a column, the other a row."""
    start, end = (triton.load(x.at[b, row]) for x in seen.rows)
    visible = (key >= start) & (key < end)
    if seen.words is None:
      return visible
    query = b * self.plan.n_queries + jnp.minimum(row, self.plan.n_rows - 1) // self.plan.per_group
    places = jnp.broadcast_arrays(query, jnp.minimum(key, self.plan.n_keys - 1) // set_bits.WORD)
    bits = triton.load(seen.words.at[*places])
    return visible & ((bits >> (key % set_bits.WORD).astype(bits.dtype)) & 1 != 0)

  def logits(self, a, b):
    """Returns logits in units of ln 2."""
    return triton.LOG2_E * self.sm_scale * _product(a, b)

  def attend(self, q, k, v, seen: Seen, out, lse):
    plan = self.plan
    b, g, i = self.place(plan.row_blocks)
    i = plan.row_blocks - 1 - i  # The last ones see most, and begin first.
    row = i * plan.block_r + jnp.arange(plan.block_r)
    places, filled = self.row_places(b, g, row)
    queries = [gather(q, places, *part, filled) for part in plan.keys]

    def attend_tile(first, masked, state):
      top, total, value = state
      key = first + jnp.arange(plan.tile_s)
      key_places, key_filled = self.key_places(b, g, key)
      keys = [gather(k, key_places, *part, key_filled) for part in plan.keys]
      logits = self.logits(queries, keys)
      if masked:
        logits = jnp.where(self.sees(seen, b, row[:, None], key[None]), logits, UNSEEN)
      new_top = jnp.maximum(top, jnp.max(logits, axis=1))
      shrink = jnp.exp2(top - new_top)
      weights = jnp.exp2(logits - new_top[:, None])
      total = total * shrink + jnp.sum(weights, axis=1)
      weights = weights.astype(v.dtype)
      values = [gather(v, key_places, *part, key_filled) for part in plan.values]
      value = [x * shrink[:, None] + dot(weights, y, 1, 0) for x, y in zip(value, values)]
      return new_top, total, value

    zero = jnp.zeros(plan.block_r)
    value = [jnp.zeros((plan.block_r, side)) for _, side, _ in plan.values]
    state = self.each_tile(seen.spans, b, i, plan.tile_s, attend_tile, (zero + UNSEEN, zero, value))
    top, total, value = state
    some = top > UNSEEN
    total = jnp.where(some, total, 1)
    scale = jnp.where(some, 1 / total, 0)
    _store_rows(out, places, filled, plan.values, [x * scale[:, None] for x in value])
    nats = jnp.where(some, (top + jnp.log2(total)) / triton.LOG2_E, -jnp.inf)
    triton.store(lse.at[places], nats, filled)

  def each_tile(self, spans: Spans, b, i, tile: int, step, state):
    """Runs `state = step(first key, masked, state)` for each tile that a block of rows sees."""
    first, last, all_first, all_last = (spans.keys[x, b, i] for x in range(4))
    first, last = first // tile, pl.cdiv(last, tile)
    all_first = jnp.clip(pl.cdiv(all_first, tile), first, last)
    all_last = jnp.clip(all_last // tile, all_first, last)

    def masked(j, state):
      j = jnp.where(j < all_first, j, j - all_first + all_last)
      return step(j * tile, True, state)

    n_masked = last - first - (all_last - all_first)
    whole = lambda j, state: step((all_first + j) * tile, False, state)
    state = triton.some_tiles(all_last - all_first, whole, state)
    return triton.some_tiles(n_masked, lambda j, state: masked(first + j, state), state)

  def differentiate_rows(self, queries: Queries, k, v, seen: Seen, dq):
    plan = self.plan
    b, g, i = self.place(plan.row_blocks)
    i = plan.row_blocks - 1 - i  # The last ones see most, and begin first.
    row = i * plan.block_r + jnp.arange(plan.block_r)
    places, filled = self.row_places(b, g, row)
    q = [gather(queries.q, places, *part, filled) for part in plan.keys]
    dout = [gather(queries.dout, places, *part, filled) for part in plan.values]
    lse, delta = (triton.load(x.at[places], filled)[:, None] for x in (queries.lse, queries.delta))

    def differentiate_tile(first, masked, state):
      key = first + jnp.arange(plan.tile_s_backward)
      key_places, key_filled = self.key_places(b, g, key)
      keys = [gather(k, key_places, *part, key_filled) for part in plan.keys]
      values = [gather(v, key_places, *part, key_filled) for part in plan.values]
      probs = jnp.exp2(self.logits(q, keys) - lse)
      if masked:
        probs = jnp.where(self.sees(seen, b, row[:, None], key[None]), probs, 0)
      dlogits = (probs * (_product(dout, values) - delta)).astype(k.dtype)
      return [x + dot(dlogits, y, 1, 0) for x, y in zip(state, keys)]

    state = [jnp.zeros((plan.block_r, side)) for _, side, _ in plan.keys]
    state = self.each_tile(seen.spans, b, i, plan.tile_s_backward, differentiate_tile, state)
    _store_rows(dq, places, filled, plan.keys, [self.sm_scale * x for x in state])

  def differentiate_keys(self, queries: Queries, k, v, seen: Seen, dk, dv):
    plan = self.plan
    b, g, j = self.place(plan.key_blocks)
    key = j * plan.block_s + jnp.arange(plan.block_s)
    key_places, key_filled = self.key_places(b, g, key)
    keys = [gather(k, key_places, *part, key_filled) for part in plan.keys]
    values = [gather(v, key_places, *part, key_filled) for part in plan.values]
    first, last = (seen.spans.rows[x, b, j] for x in range(2))

    def add_rows(i, state):
      dk, dv = state
      row = (first + i) * plan.tile_r + jnp.arange(plan.tile_r)
      places, filled = self.row_places(b, g, row)
      q = [gather(queries.q, places, *part, filled) for part in plan.keys]
      dout = [gather(queries.dout, places, *part, filled) for part in plan.values]
      lse, delta = (triton.load(x.at[places], filled)[None] for x in (queries.lse, queries.delta))
      probs = jnp.exp2(self.logits(keys, q) - lse)
      probs = jnp.where(self.sees(seen, b, row[None], key[:, None]), probs, 0)
      dlogits = (probs * (_product(values, dout) - delta)).astype(k.dtype)
      dk = [x + dot(dlogits, y, 1, 0) for x, y in zip(dk, q)]
      return dk, [x + dot(probs.astype(v.dtype), y, 1, 0) for x, y in zip(dv, dout)]

    zeros = lambda parts: [jnp.zeros((plan.block_s, side)) for _, side, _ in parts]
    new_k, new_v = triton.some_tiles(last - first, add_rows, (zeros(plan.keys), zeros(plan.values)))
    _store_rows(dk, key_places, key_filled, plan.keys, [self.sm_scale * x for x in new_k])
    _store_rows(dv, key_places, key_filled, plan.values, new_v)


def _flat(x):
  return x.reshape(-1, x.shape[-1])


def _product(a, b):
  """Returns the product of rows and rows, whose channels are in parts."""
  return sum(dot(x, y, 1, 1) for x, y in zip(a, b))


def _store_rows(ref, places, filled, parts, values):
  """Writes parts of the channels of rows to their places."""
  for (first, side, end), x in zip(parts, values):
    column = first + jnp.arange(side)
    masks = [] if first + side <= end else [column[None] < end]
    masks += [] if filled is None else [filled[:, None]]
    mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), x.shape) if masks else None
    where = jnp.broadcast_arrays(places[:, None], column[None])
    triton.store(ref.at[*where], x.astype(ref.dtype), mask)
