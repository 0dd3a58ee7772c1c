# SPDX-License-Identifier: Apache-2.0
"""Attention to an interval on a TPU: blocks of rows times the blocks of keys that some row sees.

A row is one head of a query, and the heads that share a key head are rows of the same array. Of
each block of rows the scalar unit knows which keys some row sees, which cost time, and which keys
all rows see, which need no mask. The structure is that of jax's splash attention, which cannot
serve this op: it knows a query by one position and one segment, which cannot say any two bounds,
and its fused backward pass keeps the gradients of all queries from each block of keys, so that its
memory grows with the square of the context.

Forward, queries lie along sublanes. Backward, keys do: a query's numbers are in a row then, and
only one of five products takes a transposed operand. Gradients of a block of keys stay in VMEM
while rows go by. Those of a block of rows are added up in HBM, whose reads and writes run beside
the products.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from dsa_jax.kernels.dense_attention.spans import Spans, rows_of, spans_of
from dsa_jax.kernels.dense_attention.tpu_plan import (
    WORD,
    BlockSizes,
    Plan,
    plan_backward,
    plan_forward,
)
from dsa_jax.kernels.tpu import chip
from dsa_jax.kernels.tpu.resident import dot
from dsa_jax.kernels.visibility import selected_keys
from dsa_jax.kernels.xla import set_bits
from dsa_jax.kernels.xla.rows import map_rows, pad_axis, scan_rows

UNSEEN = -1e30  # The logit of a hidden key: finite, so that differences of maxima are.
LOG2E = math.log2(math.e)


def forward(q, k, v, start, end, indices, *, sm_scale: float, blocks: BlockSizes):
  """Returns the output and the log-sum-exp, as the op does."""
  masked = indices is not None
  plan = plan_forward(q, k, v, masked=masked, vmem=chip.vmem_bytes(), blocks=blocks)
  kernels = _Kernels(plan, sm_scale)
  keys = kernels.by_key(k), kernels.by_key(v)

  def attend(block):
    q, *visibility = block
    spans, seen = kernels.visibility(*visibility)
    out, lse = kernels.forward(spans, ForwardIn(kernels.by_row(q), *keys, seen), v.shape[-1])
    return kernels.by_query(out), kernels.by_query(lse[..., 0, :, None])[..., 0]

  rows = q, start, end, indices
  return map_rows(attend, rows, plan.n_queries) if masked else attend(rows)


def backward(residuals, dout, delta, *, sm_scale: float, blocks: BlockSizes):
  """Returns the gradients of q, k and v; see `logits_delta` for delta."""
  q, k, v, start, end, indices, lse = residuals
  masked = indices is not None
  plan = plan_backward(q, k, v, masked=masked, vmem=chip.vmem_bytes(), blocks=blocks)
  kernels = _Kernels(plan, sm_scale)
  keys = kernels.by_key(k), kernels.by_key(v)
  lse = LOG2E * jnp.where(lse > -jnp.inf, lse, 0)
  dtype = jnp.float32 if masked else k.dtype  # Passes add up the gradients of keys in it.

  def differentiate(block):
    q, dout, lse, delta, *visibility = block
    spans, seen = kernels.visibility(*visibility)
    stats = (kernels.by_row(x[..., None])[..., None, :, 0] for x in (lse, delta))
    inputs = BackwardIn(kernels.by_row(q), *keys, kernels.by_row(dout), *stats, seen)
    dq, dk, dv = kernels.backward(spans, inputs, dtype)
    return kernels.by_query(sm_scale * jnp.swapaxes(dq, 2, 3)).astype(q.dtype), (dk, dv)

  def step(dkv, block):
    dq, more = differentiate(block)
    return jax.tree.map(jnp.add, dkv, more), dq

  rows = q, dout.astype(q.dtype), lse, delta, start, end, indices
  if masked:
    dkv = [jnp.zeros(x.shape, dtype) for x in keys]
    (dk, dv), dq = scan_rows(step, tuple(dkv), rows, plan.n_queries)
  else:
    dq, (dk, dv) = differentiate(rows)
  dk, dv = (jnp.swapaxes(x, 1, 2)[:, : k.shape[1]].astype(k.dtype) for x in (dk, dv))
  return dq, dk, dv


class Seen(NamedTuple):
  """Who sees whom, row by row."""

  interval: Any  # int32 [B, 2, R].
  # Bit i of word j says whether a row selected key i * line + j of the block. Forward it is
  # uint32 [B, R, key blocks * line], and backward [B, key blocks * line, R]. It is None if there
  # is no selection.
  words: Any


class ForwardIn(NamedTuple):
  """What the forward kernel reads, heads before rows."""

  q: Any
  k: Any
  v: Any
  seen: Seen


class BackwardIn(NamedTuple):
  """What the backward kernel reads, heads before rows."""

  q: Any
  k: Any
  v: Any
  dout: Any
  lse: Any  # In units of ln 2, [B, G, 1, R].
  delta: Any
  seen: Seen


class ForwardScratch(NamedTuple):
  """What the forward kernel keeps of a block of rows; a row's number fills a line."""

  top: Any
  total: Any
  out: Any
  start: Any
  end: Any


class Gradients(NamedTuple):
  """What the backward kernel writes."""

  dq: Any  # float32 [B, G, E, R], in HBM.
  dk: Any
  dv: Any


class BackwardScratch(NamedTuple):
  """What the backward kernel works in."""

  dq: Any  # The gradients of a block of rows from one block of keys, [E, rows].
  dk: Any
  dv: Any
  sums: Any  # What was in HBM of them, [2, E, rows]: steps take turns.
  read: Any
  written: Any
  last: Any  # SMEM: how many steps of a key head had work, and the block of rows of the last.


@dataclasses.dataclass(frozen=True)
class _Kernels:
  plan: Plan
  sm_scale: float

  def by_key(self, x):
    """Turns keys [B, S, G, E] to [B, G, S, E], filled up with zeros to whole blocks."""
    return jnp.swapaxes(pad_axis(x, 1, self.plan.block_s), 1, 2)

  def by_row(self, x):
    """Turns [B, T, H, E] to [B, G, R, E], filled up with zeros to whole blocks."""
    b, t, _, e = x.shape
    x = jnp.moveaxis(x.reshape(b, t, self.plan.n_groups, -1, e), 2, 1)
    return pad_axis(x.reshape(b, self.plan.n_groups, -1, e), 2, self.plan.block_r)

  def by_query(self, x):
    """Turns [B, G, R, E] to [B, T, H, E]."""
    b, g, _, e = x.shape
    t, m = self.plan.n_queries, self.plan.per_group
    x = x[:, :, : t * m].reshape(b, g, t, m, e)
    return jnp.moveaxis(x, 1, 2).reshape(b, t, g * m, e)

  def visibility(self, start, end, indices) -> tuple[Spans, Seen]:
    """Returns who sees whom."""
    plan = self.plan
    words = None if indices is None else self._words(selected_keys(indices, plan.n_keys))
    rows = rows_of(start, end, plan.n_keys, plan.per_group, plan.block_r)
    spans = spans_of(rows, plan.n_keys, plan.block_r, plan.block_s, masked=words is not None)
    return spans, Seen(jnp.stack(rows, axis=1), words)

  def _words(self, chosen):
    """Packs flags [B, T, S] as `Seen.words` has them."""
    plan = self.plan
    chosen = pad_axis(chosen, 2, plan.block_s)
    lines = chosen.reshape(*chosen.shape[:2], plan.key_blocks, -1, plan.line)
    lines = jnp.swapaxes(pad_axis(lines, 3, WORD), 3, 4)
    words = set_bits.pack(lines).reshape(*chosen.shape[:2], -1)
    words = jnp.repeat(words, plan.per_group, axis=1)
    words = pad_axis(words, 1, plan.block_r)
    return words if plan.by_row else jnp.swapaxes(words, 1, 2)

  def forward(self, spans: Spans, inputs: ForwardIn, v_dim: int):
    """Returns the output [B, G, R, V] and the log-sum-exp [B, G, 1, R]."""
    plan = self.plan
    shape = inputs.q.shape[:3]
    number = pltpu.VMEM((plan.block_r, plan.line), jnp.float32)
    bound = pltpu.VMEM((plan.block_r, plan.line), jnp.int32)
    out = pltpu.VMEM((plan.block_r, v_dim), jnp.float32)
    return self._call(
        self._attend,
        [self._specs(inputs)],
        [self._rows(v_dim), self._stats()],
        [
            jax.ShapeDtypeStruct((*shape, v_dim), inputs.q.dtype),
            jax.ShapeDtypeStruct((*shape[:2], 1, shape[2]), jnp.float32),
        ],
        [ForwardScratch(number, number, out, bound, bound)],
        parallel=3,
    )(spans, inputs)

  def backward(self, spans: Spans, inputs: BackwardIn, dtype) -> Gradients:
    """Returns the gradients, those of keys in `dtype`. dq lacks the factor `sm_scale`."""
    plan = self.plan
    (b, g, n_rows, width), v_dim = inputs.q.shape, inputs.v.shape[-1]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    dq = jnp.zeros((b, g, width, n_rows), jnp.float32)
    like = lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype)
    n_before = len(jax.tree.leaves((spans, inputs)))
    return self._call(
        self._differentiate,
        [self._specs(inputs), anywhere],
        [Gradients(anywhere, self._keys(width), self._keys(v_dim))],
        [Gradients(like(dq, dq.dtype), like(inputs.k, dtype), like(inputs.v, dtype))],
        [
            BackwardScratch(
                dq=pltpu.VMEM((width, plan.block_r), jnp.float32),
                dk=pltpu.VMEM((plan.block_s, width), jnp.float32),
                dv=pltpu.VMEM((plan.block_s, v_dim), jnp.float32),
                sums=pltpu.VMEM((2, width, plan.block_r), jnp.float32),
                read=pltpu.SemaphoreType.DMA,
                written=pltpu.SemaphoreType.DMA,
                last=pltpu.SMEM((2,), jnp.int32),
            )
        ],
        parallel=2,
        aliases={n_before: 0},
    )(spans, inputs, dq)[0]

  def _call(self, kernel, specs, out_specs, out_shape, scratch, *, parallel: int, aliases=None):
    """Returns the call of a kernel whose first `parallel` axes of the grid may run on two cores."""
    semantics = ['parallel'] * parallel + ['arbitrary'] * (4 - parallel)
    params = chip.compiler_params(self.plan.vmem)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=self.plan.grid,
            in_specs=specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        input_output_aliases=aliases or {},
        compiler_params=dataclasses.replace(params, dimension_semantics=semantics),
        name=self.plan.name,
    )

  def _specs(self, inputs: ForwardIn | BackwardIn):
    """Returns the block specs of what a kernel reads."""
    plan, width, v_dim = self.plan, inputs.q.shape[-1], inputs.v.shape[-1]
    words = None
    if inputs.seen.words is not None and plan.by_row:
      words = self._spec((1, plan.block_r, plan.line), lambda b, g, r, s: (b, r, s))
    elif inputs.seen.words is not None:
      words = self._spec((1, plan.line, plan.block_r), lambda b, g, r, s: (b, s, r))
    interval = self._spec((1, 2, plan.block_r), lambda b, g, r, s: (b, 0, r))
    specs = dict(
        q=self._rows(width), k=self._keys(width), v=self._keys(v_dim), seen=Seen(interval, words)
    )
    if isinstance(inputs, ForwardIn):
      return ForwardIn(**specs)
    return BackwardIn(**specs, dout=self._rows(v_dim), lse=self._stats(), delta=self._stats())

  def _rows(self, width) -> pl.BlockSpec:
    return self._spec((1, 1, self.plan.block_r, width), lambda b, g, r, s: (b, g, r, 0))

  def _keys(self, width) -> pl.BlockSpec:
    return self._spec((1, 1, self.plan.block_s, width), lambda b, g, r, s: (b, g, s, 0))

  def _stats(self) -> pl.BlockSpec:
    return self._spec((1, 1, 1, self.plan.block_r), lambda b, g, r, s: (b, g, 0, r))

  def _spec(self, shape, index) -> pl.BlockSpec:
    """Returns a block spec. Steps without work fetch the block of the step before or after them."""

    def clamp(i, first, last):
      return jnp.clip(i, first, jnp.maximum(last - 1, first))

    def by_row(b, g, r, s, spans):
      first, last = (spans.keys[i, b, r] for i in range(2))
      return index(b, g, r, clamp(s, first // self.plan.block_s, pl.cdiv(last, self.plan.block_s)))

    def by_key(b, g, s, r, spans):
      return index(b, g, clamp(r, spans.rows[0, b, s], spans.rows[1, b, s]), s)

    return pl.BlockSpec(shape, by_row if self.plan.by_row else by_key)

  def _each_tile(self, spans: Spans, b, r, s, do):
    """Runs `do(first key, masked)` for each tile of a block of keys that some row sees."""
    n, tile = self.plan.block_s, self.plan.tile_s
    first, last, all_first, all_last = (
        jnp.clip(spans.keys[i, b, r] - s * n, 0, n) for i in range(4)
    )
    first, last = first // tile, pl.cdiv(last, tile)
    all_first = jnp.clip(pl.cdiv(all_first, tile), first, jnp.maximum(last, first))
    all_last = jnp.clip(all_last // tile, all_first, jnp.maximum(last, all_first))

    def masked(i, _):
      j = first + i
      j = jnp.where(j < all_first, j, j - all_first + all_last)
      do(pl.multiple_of(j * tile, tile), True)
      return 0

    def whole(j, _):
      do(pl.multiple_of(j * tile, tile), False)
      return 0

    jax.lax.fori_loop(0, last - first - (all_last - all_first), masked, 0)
    jax.lax.fori_loop(all_first, all_last, whole, 0)

  def _attend(self, spans: Spans, inputs: ForwardIn, out, lse, scratch: ForwardScratch):
    plan = self.plan
    b, _, r, s = (pl.program_id(axis) for axis in range(4))
    top, total, sums, start, end = scratch
    wide = lambda x, width: jnp.tile(x, (1, pl.cdiv(width, plan.line)))[:, :width]

    @pl.when(s == 0)
    def _():
      top[...] = jnp.full(top.shape, UNSEEN, jnp.float32)
      total[...] = jnp.zeros(total.shape, jnp.float32)
      sums[...] = jnp.zeros(sums.shape, jnp.float32)
      for i, bound in enumerate((start, end)):
        row = inputs.seen.interval[0, i : i + 1]
        bound[...] = jnp.broadcast_to(row, (plan.line, plan.block_r)).T

    def attend_tile(at, masked):
      keys = pl.ds(at, plan.tile_s)
      logits = LOG2E * self.sm_scale * dot(inputs.q[0, 0], inputs.k[0, 0, keys], 1, 1)
      if masked:
        position = s * plan.block_s + at + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        seen = (position >= wide(start[...], plan.tile_s)) & (position < wide(end[...], plan.tile_s))
        seen &= self._chosen(inputs.seen.words, at, axis=1)
        logits = jnp.where(seen, logits, UNSEEN)
      before = top[...]
      new = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
      shrink = jnp.exp2(before - new)
      weights = jnp.exp2(logits - wide(new, plan.tile_s))
      top[...] = new
      total[...] = shrink * total[...] + jnp.sum(weights, axis=1, keepdims=True)
      value = dot(weights.astype(inputs.v.dtype), inputs.v[0, 0, keys], 1, 0)
      sums[...] = wide(shrink, sums.shape[1]) * sums[...] + value

    self._each_tile(spans, b, r, s, attend_tile)

    @pl.when(s == plan.key_blocks - 1)
    def _():
      some = top[...] > UNSEEN  # Rows that see nothing have added up what they do not see.
      scale = jnp.where(some, 1 / jnp.where(some, total[...], 1), 0)
      out[0, 0] = (wide(scale, sums.shape[1]) * sums[...]).astype(out.dtype)
      nats = (top[...] + jnp.log2(total[...])) / LOG2E
      lse[0, 0] = jnp.where(some, nats, -jnp.inf).T[:1]

  def _chosen(self, words, at, axis: int):
    """Returns which keys of a tile each row selected, with keys along an axis; True if all."""
    if words is None:
      return True
    line, bits = self.plan.line, words[0]
    parts = [bits >> (at // line + i).astype(bits.dtype) & 1 for i in range(self.plan.tile_s // line)]
    return jnp.concatenate(parts, axis=axis) != 0

  def _differentiate(
      self, spans: Spans, inputs: BackwardIn, _, out: Gradients, scratch: BackwardScratch
  ):
    plan = self.plan
    b, g, s, r = (pl.program_id(axis) for axis in range(4))
    dq, dk, dv, sums, read, written, last = scratch
    is_first_row, is_last_row = r == 0, r == plan.row_blocks - 1
    q, dout = inputs.q, inputs.dout

    @pl.when((s == 0) & is_first_row)
    def _():
      last[0], last[1] = 0, -1

    @pl.when(is_first_row)
    def _():
      dk[...] = jnp.zeros(dk.shape, jnp.float32)
      dv[...] = jnp.zeros(dv.shape, jnp.float32)

    def differentiate_tile(at, masked):
      keys = pl.ds(at, plan.tile_s)
      key, value = inputs.k[0, 0, keys], inputs.v[0, 0, keys]
      logits = LOG2E * self.sm_scale * dot(key, q[0, 0], 1, 1)
      probs = jnp.exp2(logits - inputs.lse[0, 0])
      if masked:
        position = s * plan.block_s + at + jax.lax.broadcasted_iota(jnp.int32, probs.shape, 0)
        start, end = (inputs.seen.interval[0, i : i + 1] for i in range(2))
        seen = (position >= start) & (position < end)
        seen &= self._chosen(inputs.seen.words, at, axis=0)
        probs = jnp.where(seen, probs, 0)
      dv[keys] += dot(probs.astype(dout.dtype), dout[0, 0], 1, 0)
      dprobs = dot(value, dout[0, 0], 1, 1)
      dlogits = (probs * (dprobs - inputs.delta[0, 0])).astype(q.dtype)
      dk[keys] += dot(dlogits, q[0, 0], 1, 0)
      dq[...] += dot(key, dlogits, 0, 0)

    begin, end = (spans.keys[i, b, r] - s * plan.block_s for i in range(2))

    @pl.when((begin < plan.block_s) & (end > jnp.maximum(begin, 0)))
    def _():
      n, block_before = last[0], last[1]
      slot = jax.lax.rem(n, 2)
      in_hbm = out.dq.at[b, g, :, pl.ds(r * plan.block_r, plan.block_r)]
      fetch = pltpu.make_async_copy(in_hbm, sums.at[slot], read)
      store = pltpu.make_async_copy(sums.at[slot], in_hbm, written)
      pl.when(block_before == r)(store.wait)  # All are of one size: it waits for the last one.
      fetch.start()
      dq[...] = jnp.zeros(dq.shape, jnp.float32)
      self._each_tile(spans, b, r, s, differentiate_tile)
      fetch.wait()
      sums[slot] += dq[...]
      pl.when((n > 0) & (block_before != r))(store.wait)
      store.start()
      last[0], last[1] = n + 1, r

    @pl.when(is_last_row)
    def _():
      out.dk[0, 0] = (self.sm_scale * dk[...]).astype(out.dk.dtype)
      out.dv[0, 0] = dv[...].astype(out.dv.dtype)

    @pl.when((s == plan.key_blocks - 1) & is_last_row & (last[0] > 0))
    def _():
      pltpu.make_async_copy(sums.at[0], sums.at[1], written).wait()
