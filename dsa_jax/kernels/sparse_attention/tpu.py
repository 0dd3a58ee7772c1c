# SPDX-License-Identifier: Apache-2.0
"""Attention to a selection on a TPU, forward and backward; `tpu_plan` chooses the path.

Where keys lie in VMEM (see `resident`), a step of the grid takes a few queries. Their rows of the
shard are copied tile by tile, and all heads attend to them. Forward uses online softmax. Backward,
the gradient of the keys is added to rows that lie in VMEM as the keys do, and reaches HBM once for
each shard and block of queries. The other paths are those of `tpu_rows`, and of `tpu_wide` for
gradients of grouped heads that share a selection.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels import groups
from dsa_jax.kernels.sparse_attention import tpu_rows, tpu_wide
from dsa_jax.kernels.sparse_attention.tpu_plan import (
    BlockSizes,
    Decode,
    InVmem,
    Together,
    TogetherBackward,
    fits,
    plan_backward,
    plan_forward,
    plan_wide,
)
from dsa_jax.kernels.sparse_attention.tpu_rows import BackwardScratch, Gradients
from dsa_jax.kernels.tpu import chip, layout, resident, sparse_cores
from dsa_jax.kernels.tpu.layout import Rows
from dsa_jax.kernels.tpu.resident import Scalars, ShardKernels, dot
from dsa_jax.kernels.tpu.slots import sort_slots
from dsa_jax.kernels.xla.rows import map_rows, scan_rows


def forward(
    q, kv, indices, *, n_groups: int, v_dim: int, sm_scale: float, blocks: BlockSizes
):
  """Returns the output and the log-sum-exp, as the op does; keys are folded, see `groups`.

  Where few rows are selected they are gathered from wherever they lie. A selection that all heads
  share brings the rows of all key heads side by side, in one copy, if that pays. Otherwise a block
  of queries reads the keys of one key head after the other, as many in VMEM as there is room.
  """
  options = dict(v_dim=v_dim, sm_scale=sm_scale, blocks=blocks)
  n_keys = kv.shape[1] // n_groups
  if n_groups == 1 or q.shape[1] * indices.shape[-1] < n_keys:
    indices = groups.fold_indices(indices, n_groups, n_keys)
    results = _attend(groups.fold_heads(q, n_groups), kv, indices, **options)
    return tuple(groups.unfold_heads(x, n_groups) for x in results)
  wide_keys = kv.reshape(kv.shape[0], n_keys, -1)
  if indices.ndim == 3 and indices.shape[2] >= blocks.wide_slots:
    plan = _plan(q, wide_keys, indices, n_groups, v_dim, blocks)
    if fits(plan, chip.vmem_bytes()):
      return _attend(q, wide_keys, indices, n_wide=n_groups, **options)
  attend = functools.partial(_attend, **options)
  results = _map_groups(attend, q, kv, indices, n_groups)
  return tuple(map(groups.join_groups, results))


def backward(
    residuals, dout, delta, *, n_groups: int, v_dim: int, sm_scale: float, blocks: BlockSizes
):
  """Returns the gradients of q and kv.

  Args:
    residuals: q, folded keys, indices and the log-sum-exp.
    dout: The gradient of the output.
    delta: See `logits_delta`.
    n_groups: G.
    v_dim: As the op has it.
    sm_scale: As the op has it.
    blocks: As the op has them.
  """
  q, kv, indices, lse = residuals
  sizes = dict(v_dim=v_dim, sm_scale=sm_scale, blocks=blocks)

  def differentiate(of_queries, keys, indices):
    q, *rest = of_queries
    return _differentiate(tpu_rows.Queries(q, indices, *rest), keys, **sizes)

  of_queries = q, lse, dout, delta
  if n_groups == 1:
    return differentiate(of_queries, kv, groups.fold_indices(indices, 1, kv.shape[1]))
  if indices.ndim == 3:
    return _differentiate_wide(of_queries, kv, indices, n_groups, sm_scale, blocks)
  dq, dkv = _map_groups(differentiate, of_queries, kv, indices, n_groups)
  return groups.join_groups(dq), jnp.moveaxis(dkv, 0, 2).reshape(kv.shape)


def _differentiate_wide(
    of_queries, kv, indices, n_groups: int, sm_scale: float, blocks: BlockSizes
):
  """Differentiates for one set of key heads after the other; those of a set lie side by side."""
  sizes = dict(n_groups=n_groups, vmem=chip.vmem_bytes(), blocks=blocks)
  plan = plan_wide(of_queries[0], kv, indices.shape[2], **sizes)
  n_sets, width = n_groups // plan.n_wide, kv.shape[2]

  def differentiate(of_queries, keys, indices):
    q, *rest = of_queries
    queries = tpu_rows.Queries(q, indices, *rest)
    keys = keys.reshape(keys.shape[0], -1, width)
    return tpu_wide.backward(queries, keys, plan=plan, sm_scale=sm_scale)

  sets = kv.reshape(kv.shape[0], -1, plan.n_wide * width)
  dq, dkv = _map_groups(differentiate, of_queries, sets, indices, n_sets)
  dkv = dkv.reshape(*dkv.shape[:2], -1, plan.n_wide * width)
  return groups.join_groups(dq), jnp.moveaxis(dkv, 0, 2).reshape(kv.shape)


def _map_groups(f: Callable, of_queries, kv, indices, n_groups: int):
  """Applies f(queries, keys, indices) to one key head after the other."""
  of_queries = jax.tree.map(lambda x: groups.by_group(x, n_groups), of_queries)
  keys = jnp.moveaxis(kv.reshape(kv.shape[0], -1, n_groups, kv.shape[2]), 2, 0)
  if indices.ndim == 3:
    return jax.lax.map(lambda x: f(*x, indices), (of_queries, keys))
  return jax.lax.map(lambda x: f(*x), (of_queries, keys, jnp.moveaxis(indices, 2, 0)))


def _plan(q, kv, indices, n_wide: int, v_dim: int, blocks: BlockSizes):
  wide = jax.eval_shape(lambda x: groups.widen(x, n_wide), q)
  width = v_dim if n_wide == 1 else kv.shape[2]
  return plan_forward(wide, kv, indices.shape[2], v_dim=width, vmem=chip.vmem_bytes(), blocks=blocks)


def _attend(
    q, kv, indices, *, n_wide: int = 1, v_dim: int, sm_scale: float, blocks: BlockSizes
):
  """Attends to rows of one key head, or to those of `n_wide` key heads side by side."""
  plan = _plan(q, kv, indices, n_wide, v_dim, blocks)
  sizes = dict(v_dim=v_dim, sm_scale=sm_scale)
  if isinstance(plan, Decode):
    return tpu_rows.decode(q, kv, indices, plan=plan, **sizes)
  if isinstance(plan, Together):
    return tpu_rows.forward(q, kv, indices, n_wide=n_wide, plan=plan, **sizes)
  return _forward(q, kv, indices, n_wide=n_wide, plan=plan, **sizes)


def _differentiate(
    queries: tpu_rows.Queries, kv, *, v_dim: int, sm_scale: float, blocks: BlockSizes
):
  plan = plan_backward(
      queries.q,
      kv,
      queries.indices.shape[2],
      v_dim=v_dim,
      vmem=chip.vmem_bytes(),
      sparse_cores=sparse_cores.available(),
      blocks=blocks,
  )
  if isinstance(plan, TogetherBackward):
    return tpu_rows.backward(queries, kv, plan=plan, sm_scale=sm_scale)
  return _backward(queries, kv, plan=plan, sm_scale=sm_scale)


def _forward(q, kv, indices, *, n_wide: int, plan: InVmem, v_dim: int, sm_scale: float):
  kernels = _Kernels(plan.keys, plan.sizes.rows, sm_scale)
  packed = layout.pack(kv, plan.keys.shards)
  width = plan.sizes.v_dim
  v_channels = Rows(width, kv.dtype).channels

  def attend(block):
    q, indices = block
    q = groups.widen(q, n_wide)
    slots = sort_slots(indices, kv.shape[1])
    state = State(
        out=jnp.zeros((*q.shape[:3], v_channels)), lse=jnp.full((*q.shape[:3], 1), -jnp.inf)
    )
    inputs = AttendIn(layout.pad_channels(q), packed)
    step = lambda shard, state: kernels.forward(shard, slots, inputs, state)
    out, lse = jax.lax.fori_loop(0, plan.keys.shards.n, step, state)
    out = groups.narrow(out[..., :width], n_wide)[..., :v_dim]
    return out.astype(q.dtype), lse[..., 0]

  return map_rows(attend, (q, indices), plan.block_t, plan.keys.step_t)


def _backward(queries, kv, *, plan: InVmem, sm_scale: float):
  rows = plan.sizes.rows
  kernels = _Kernels(plan.keys, rows, sm_scale)
  packed = layout.pack(kv, plan.keys.shards)

  def step(dkv, block):
    slots, (q_dout, stats) = tpu_rows.prepare(block, kv.shape[1])
    inputs = BackwardIn(q_dout, stats, packed)
    step = lambda shard, state: kernels.backward(shard, slots, inputs, state)
    state = Gradients(dkv=dkv, dq=jnp.zeros((*block.q.shape[:3], rows.channels)))
    dkv, dq = jax.lax.fori_loop(0, plan.keys.shards.n, step, state)
    return dkv, dq[..., : kv.shape[-1]].astype(block.q.dtype)

  dkv = layout.zero_sums(kv.shape[0], rows, plan.keys.shards)
  dkv, dq = scan_rows(step, dkv, queries, plan.block_t, plan.keys.step_t)
  dkv = layout.unpack_sums(dkv, plan.keys.shards, *kv.shape[1:])
  return dq, dkv.astype(kv.dtype)


class AttendIn(NamedTuple):
  """What the forward kernel reads."""

  q: Any
  kv: Any


class State(NamedTuple):
  """The result for the shards so far, float32."""

  out: Any  # [B, T, H, V]
  lse: Any  # [B, T, H, 1]


class BackwardIn(NamedTuple):
  """What the backward kernel reads."""

  q_dout: Any  # q, then the gradient of the output, 2H heads with the channels of a packed key.
  stats: Any  # lse and delta, [B, T, H, 2].
  kv: Any


@dataclasses.dataclass(frozen=True)
class _Kernels(ShardKernels):
  rows: Rows
  sm_scale: float

  def forward(self, shard, slots, inputs: AttendIn, state: State) -> State:
    """Adds a shard to the state."""
    return self.call(
        self._attend,
        'sparse_attention_forward',
        shard,
        self.scalars(shard, slots, self.rows.lines),
        inputs,
        AttendIn(self.queries(inputs.q), self.shard(inputs.kv)),
        state,
        jax.tree.map(self.queries, state),
        self.buffer(self.rows.lines, self.rows.words),
    )

  def _attend(self, _, scalars: Scalars, inputs: AttendIn, before: State, after: State, buffer):
    spans, (table,) = scalars

    def attend_tile(j, states):
      self.copy(self.rows.lines, inputs.kv, spans, table, j, buffer)

      def score(i):
        keys = self.read(self.rows, buffer, i)
        return keys, self.sm_scale * dot(inputs.q[0, i], keys, 1, 1)

      def weigh(i, keys, logits):
        top, total = states[i]
        logits = jnp.where(self.seen(spans, i, j), logits, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
        finite = jnp.where(new_top > -jnp.inf, new_top, 0)  # Others may have more tiles.
        shrink = jnp.exp(top - finite)
        weights = jnp.exp(logits - finite)
        value = dot(weights.astype(keys.dtype), keys[:, : after.out.shape[-1]], 1, 0)
        after.out[0, i] = after.out[0, i] * shrink + value
        return new_top, total * shrink + jnp.sum(weights, axis=1, keepdims=True)

      return resident.overlap(score, weigh, self.plan.step_t)

    states = []
    for i in range(self.plan.step_t):
      after.out[0, i] = before.out[0, i]
      states.append((before.lse[0, i], jnp.where(before.lse[0, i] > -jnp.inf, 1.0, 0.0)))
    states = jax.lax.fori_loop(0, self.tiles(spans), attend_tile, states)
    for i, (top, total) in enumerate(states):
      total = jnp.where(top > -jnp.inf, total, 1)
      after.out[0, i] = after.out[0, i] / total
      after.lse[0, i] = top + jnp.log(total)

  def backward(self, shard, slots, inputs: BackwardIn, state: Gradients) -> Gradients:
    """Adds a shard to the gradients."""
    return self.call(
        self._attend_backward,
        'sparse_attention_backward',
        shard,
        self.scalars(shard, slots, self.rows.lines, self.rows.blocks),
        inputs,
        BackwardIn(
            self.queries(inputs.q_dout), self.queries(inputs.stats), self.shard(inputs.kv)
        ),
        state,
        Gradients(dkv=pl.BlockSpec(memory_space=pl.ANY), dq=self.queries(state.dq)),
        BackwardScratch(
            keys=self.buffer(self.rows.lines, self.rows.words),
            dkeys=self.buffer(self.rows.blocks, jnp.float32),
            sums=self.sums(self.rows.blocks),
        ),
    )

  def _attend_backward(
      self,
      shard,
      scalars: Scalars,
      inputs: BackwardIn,
      before: Gradients,
      after: Gradients,
      scratch: BackwardScratch,
  ):
    spans, (table, sums_table) = scalars
    q_dout, stats, kv = inputs
    resident.fetch_sums(shard, after.dkv, scratch.sums)

    def differentiate_tile(j, _):
      self.copy(self.rows.lines, kv, spans, table, j, scratch.keys)

      def score(i):
        keys = self.read(self.rows, scratch.keys, i)
        return keys, dot(q_dout[0, i], keys, 1, 1)

      def differentiate(i, keys, dots):
        seen = self.seen(spans, i, j)
        gradients = tpu_rows.differentiate_logits(dots, stats[0, i], seen, keys, self.sm_scale)
        dlogits, dlogits_probs = gradients
        after.dq[0, i] += dot(dlogits, keys, 1, 0)
        dkeys = dot(dlogits_probs, q_dout[0, i], 0, 0)
        resident.write_rows(scratch.dkeys, i * self.plan.tile, dkeys)

      resident.overlap(score, differentiate, self.plan.step_t)
      for i in range(self.plan.step_t):  # Two queries may add to the same row.
        self.add(self.rows.blocks, scratch.dkeys, scratch.sums.rows, spans, sums_table, i, j)
      return 0

    after.dq[...] = before.dq[...]
    jax.lax.fori_loop(0, self.tiles(spans), differentiate_tile, 0)
    resident.store_sums(shard, after.dkv, scratch.sums)
