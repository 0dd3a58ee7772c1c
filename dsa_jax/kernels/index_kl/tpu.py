# SPDX-License-Identifier: Apache-2.0
"""The indexer's divergence on selected keys on a TPU; see `resident` for where keys lie.

Rows of both kinds of keys, the attention's and the indexer's, are copied tile by tile. A query's
sums over them are all that the divergence needs (see `xla_dense`); backward computes target and
scores again.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.tpu import chip, layout, resident
from dsa_jax.kernels.tpu.layout import LANES, Rows
from dsa_jax.kernels.tpu.plans import KernelPlan
from dsa_jax.kernels.tpu.resident import Scalars, ShardKernels, Sums, dot
from dsa_jax.kernels.tpu.shards import ShardPlan, fit_chip, plan_shards
from dsa_jax.kernels.tpu.slots import sort_slots
from dsa_jax.kernels.xla.rows import map_rows, scan_rows, whole_block

TOP, TOTAL, MASS, ENTROPY, CROSS = range(5)  # The lane of each of a query's sums.
SCORES_LSE, TARGET_MASS, DKL = range(3)  # The lane of each number that its gradient needs.
BUFFERED = 0.106  # The part of VMEM that copied tiles may take, unless one line of slots takes more.
FITTING = 0.995  # The part of a shard and of them twice, as they are copied and as they are read.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  block_t: int = 1024  # Query rows per pass; bounds the accumulators' memory.
  step_t: int = 4  # Query rows of a step of the grid; half of them where VMEM is 64 MiB.
  tile: int = 1152  # At most so many selected rows of a query are read at one time.
  line: int = LANES  # Slots of a line, where tiles begin; a chip has no other lines.
  copied: int = 256  # Rows copied between two branches.
  vmem_share: float = 0.8  # Part of VMEM for a shard of keys and of their gradients.


class Plan(NamedTuple):
  """How `forward` or `backward` reads the selected keys."""

  name: str
  batch: int
  n_queries: int
  block_t: int  # Query rows per pass.
  n_groups: int  # Key heads of the attention; each has its own channels of a row.
  rows: Rows  # The layout of the attention's keys.
  index_rows: Rows
  keys: ShardPlan
  adds: bool  # Whether the gradient of index keys is added to sums in VMEM.

  gathered_bytes = 0

  def kernels(self) -> dict[str, KernelPlan]:
    block_t = whole_block(self.n_queries, self.block_t, self.keys.step_t)
    loops = [*self.keys.step_loops(), *self.keys.copy_loops() * 2]
    loops += self.keys.add_loops() if self.adds else []
    return {self.name: KernelPlan(self.keys.grid(self.batch, block_t), loops)}


def plan_forward(k, index_k, indices, *, vmem: int, blocks: BlockSizes) -> Plan:
  """Returns how `forward` reads keys; of the arrays only shapes and dtypes count.

  Args:
    k: The attention's keys.
    index_k: The index keys.
    indices: The selection.
    vmem: Bytes of VMEM of the chip.
    blocks: The op's block sizes.
  """
  return _plan('index_kl_selected_forward', k, index_k, indices, vmem, blocks, adds=False)


def plan_backward(k, index_k, indices, *, vmem: int, blocks: BlockSizes) -> Plan:
  """Returns how `backward` reads keys; see `plan_forward`."""
  return _plan('index_kl_selected_backward', k, index_k, indices, vmem, blocks, adds=True)


def _plan(name, k, index_k, indices, vmem, blocks, *, adds) -> Plan:
  head = Rows(k.shape[-1], k.dtype)
  rows = Rows(k.shape[2] * head.channels, k.dtype)
  index_rows = Rows(index_k.shape[-1], index_k.dtype)
  bytes_per_key = rows.bytes + index_rows.bytes + index_rows.sum_bytes * adds
  blocks = _fit_tiles(fit_chip(blocks, vmem), bytes_per_key, vmem)
  return Plan(
      name=name,
      batch=k.shape[0],
      n_queries=indices.shape[1],
      block_t=blocks.block_t,
      n_groups=k.shape[2],
      rows=rows,
      index_rows=index_rows,
      keys=plan_shards(k.shape[1], indices.shape[2], bytes_per_key, vmem, blocks),
      adds=adds,
  )


def _fit_tiles(blocks: BlockSizes, bytes_per_key: int, vmem: int) -> BlockSizes:
  """Makes tiles shorter where rows are wide, of many key heads; with fewer queries if a line is too long."""
  step_t = blocks.step_t
  while (most := int(BUFFERED * vmem) // (step_t * bytes_per_key)) < blocks.line and step_t > 1:
    step_t //= 2
  tile = min(blocks.tile, max(most // blocks.line, 1) * blocks.line)
  share = min(blocks.vmem_share, FITTING - 2 * step_t * tile * bytes_per_key / vmem)
  return dataclasses.replace(blocks, step_t=step_t, tile=tile, vmem_share=share)


def forward(constants, index_q, index_k, index_weights, *, sm_scale: float, blocks: BlockSizes):
  """Returns the divergence, ln sum exp of scores and the target's sum of each query, [B, T]."""
  q, k, lse, start, end, indices = constants
  plan = plan_forward(k, index_k, indices, vmem=chip.vmem_bytes(), blocks=blocks)
  kernels = _Kernels(plan.keys, plan.n_groups, plan.rows, plan.index_rows, sm_scale)
  packed = kernels.pack(k, index_k)

  def diverge(block):
    slots, queries = prepare(block, k.shape[1])
    inputs = DivergeIn(*queries, *packed)
    sums = jnp.zeros((*slots.shape[:2], 1, LANES)).at[..., TOP].set(-jnp.inf)
    step = lambda shard, sums: kernels.forward(shard, slots, inputs, sums)
    sums = jax.lax.fori_loop(0, plan.keys.shards.n, step, sums)[:, :, 0]
    total = jnp.where(sums[..., TOTAL] > 0, sums[..., TOTAL], 1)
    scores_lse = jnp.where(sums[..., TOTAL] > 0, sums[..., TOP], 0) + jnp.log(total)
    mass = sums[..., MASS]
    return sums[..., ENTROPY] - sums[..., CROSS] + mass * scores_lse, scores_lse, mass

  block = q, lse, start, end, indices, index_q, index_weights
  kl, *saved = map_rows(diverge, block, plan.block_t, plan.keys.step_t)
  return kl, tuple(saved)


def backward(constants, residuals, dkl, *, sm_scale: float, blocks: BlockSizes):
  """Returns the gradients of the three index inputs."""
  q, k, lse, start, end, indices = constants
  index_q, index_k, index_weights, scores_lse, mass = residuals
  plan = plan_backward(k, index_k, indices, vmem=chip.vmem_bytes(), blocks=blocks)
  kernels = _Kernels(plan.keys, plan.n_groups, plan.rows, plan.index_rows, sm_scale)
  packed = kernels.pack(k, index_k)

  def step(dindex_k, block):
    *block, scores_lse, mass, dkl = block
    slots, queries = prepare(block, k.shape[1])
    stats = jnp.stack([scores_lse, mass, dkl], axis=-1)[:, :, None]
    stats = jnp.pad(stats, [(0, 0)] * 3 + [(0, LANES - stats.shape[-1])])
    inputs = DivergeBackwardIn(*queries, stats, *packed)
    step = lambda shard, state: kernels.backward(shard, slots, inputs, state)
    dindex_q, dweights = jnp.zeros(queries.index_q.shape), jnp.zeros(queries.weights.shape)
    state = Gradients(dindex_k, dindex_q, dweights)
    dindex_k, dindex_q, dweights = jax.lax.fori_loop(0, plan.keys.shards.n, step, state)
    dindex_q = dindex_q[..., : index_q.shape[-1]].astype(index_q.dtype)
    return dindex_k, (dindex_q, dweights[..., 0].astype(index_weights.dtype))

  dindex_k = layout.zero_sums(k.shape[0], plan.index_rows, plan.keys.shards)
  rows = q, lse, start, end, indices, index_q, index_weights, scores_lse, mass, dkl
  dindex_k, (dindex_q, dweights) = scan_rows(
      step, dindex_k, rows, plan.block_t, plan.keys.step_t
  )
  dindex_k = layout.unpack_sums(dindex_k, plan.keys.shards, *index_k.shape[1:])
  return dindex_q, dindex_k.astype(index_k.dtype), dweights


class Queries(NamedTuple):
  """Queries as the kernels read them, float32 where they are no queries."""

  q: Any
  lse: Any
  index_q: Any
  weights: Any


def prepare(block, n_keys: int) -> tuple[jax.Array, Queries]:
  """Returns sorted slots, and queries as the kernels read them."""
  q, lse, start, end, indices, index_q, index_weights = block
  visible = (indices >= start[..., None]) & (indices < end[..., None])
  slots = sort_slots(jnp.where(visible, indices, -1), n_keys)
  column = lambda x: x.astype(jnp.float32)[..., None]
  q, index_q = layout.pad_channels(q), layout.pad_channels(index_q)
  return slots, Queries(q, column(lse), index_q, column(index_weights))


class DivergeIn(NamedTuple):
  """What the forward kernel reads."""

  q: Any
  lse: Any
  index_q: Any
  weights: Any
  k: Any
  index_k: Any


class DivergeBackwardIn(NamedTuple):
  """What the backward kernel reads."""

  q: Any
  lse: Any
  index_q: Any
  weights: Any
  stats: Any  # What its gradient needs of a query, [B, T, 1, 128].
  k: Any
  index_k: Any


class Gradients(NamedTuple):
  """The gradients from the shards so far, float32."""

  dindex_k: Any  # Sums that lie as `layout.zero_sums` has them.
  dindex_q: Any
  dweights: Any


class Buffers(NamedTuple):
  """A copied tile of each query, of both kinds of keys."""

  k: Any
  index_k: Any


class BackwardScratch(NamedTuple):
  """What the backward kernel works in."""

  buffers: Buffers
  dkeys: Any  # The gradients of a tile of index keys of each query.
  sums: Sums


@dataclasses.dataclass(frozen=True)
class _Kernels(ShardKernels):
  n_groups: int
  rows: Rows
  index_rows: Rows
  sm_scale: float

  def pack(self, k, index_k):
    k = layout.pad_channels(k).reshape(*k.shape[:2], -1)
    return layout.pack(k, self.plan.shards), layout.pack(index_k, self.plan.shards)

  def specs(self, inputs: DivergeIn | DivergeBackwardIn):
    """Returns the block specs of a kernel's inputs."""
    keys = dict(k=self.shard(inputs.k), index_k=self.shard(inputs.index_k))
    return jax.tree.map(self.queries, inputs)._replace(**keys)

  def forward(self, shard, slots, inputs: DivergeIn, sums):
    """Adds a shard to a query's sums, [B, T, 1, 128]."""
    return self.call(
        self._diverge,
        'index_kl_selected_forward',
        shard,
        self.scalars(shard, slots, self.rows.lines, self.index_rows.lines),
        inputs,
        self.specs(inputs),
        sums,
        self.queries(sums),
        self._buffers(),
    )

  def _diverge(self, _, scalars: Scalars, inputs: DivergeIn, sums, new_sums, buffers: Buffers):
    spans = scalars.spans

    def diverge_tile(j, states):
      self._copy(scalars, inputs, j, buffers)

      def score(i):
        return self._logits(inputs.q, i, buffers), *self._dots(inputs.index_q, i, buffers)

      def diverge(i, logits, dots, _):
        top, total, mass, entropy, cross = states[i]
        seen = self.seen(spans, i, j)
        target = self._target(logits, inputs.lse[0, i], seen)
        scores = _scores(dots, inputs.weights[0, i])
        new_top = jnp.maximum(top, _reduce(jnp.max, jnp.where(seen, scores, -jnp.inf)))
        finite = jnp.where(new_top > -jnp.inf, new_top, 0)  # Others may have more tiles.
        shared = jnp.where(seen, jnp.exp(scores - finite), 0)
        log_target = jnp.log(jnp.where(target > 0, target, 1))
        return (
            new_top,
            total * jnp.exp(top - finite) + _reduce(jnp.sum, shared),
            mass + _reduce(jnp.sum, target),
            entropy + _reduce(jnp.sum, target * log_target),
            cross + _reduce(jnp.sum, target * scores),
        )

      return resident.overlap(score, diverge, self.plan.step_t)

    lane_of = lambda i: [sums[0, i, :, lane : lane + 1] for lane in range(5)]
    states = [tuple(lane_of(i)) for i in range(self.plan.step_t)]
    states = jax.lax.fori_loop(0, self.tiles(spans), diverge_tile, states)
    lanes = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    for i, state in enumerate(states):
      new_sums[0, i] = sum(jnp.where(lanes == lane, x, 0) for lane, x in enumerate(state))

  def backward(self, shard, slots, inputs: DivergeBackwardIn, state: Gradients) -> Gradients:
    """Adds a shard to the gradients."""
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return self.call(
        self._diverge_backward,
        'index_kl_selected_backward',
        shard,
        self.scalars(
            shard, slots, self.rows.lines, self.index_rows.lines, self.index_rows.blocks
        ),
        inputs,
        self.specs(inputs),
        state,
        jax.tree.map(self.queries, state)._replace(dindex_k=anywhere),
        BackwardScratch(
            buffers=self._buffers(),
            dkeys=self.buffer(self.index_rows.blocks, jnp.float32),
            sums=self.sums(self.index_rows.blocks),
        ),
    )

  def _diverge_backward(
      self,
      shard,
      scalars: Scalars,
      inputs: DivergeBackwardIn,
      before: Gradients,
      after: Gradients,
      scratch: BackwardScratch,
  ):
    spans, (*_, sums_table) = scalars
    q, lse, index_q, weights, stats, *_ = inputs
    buffers, dkeys, sums = scratch
    resident.fetch_sums(shard, after.dindex_k, sums)

    def differentiate_tile(j, _):
      self._copy(scalars, inputs, j, buffers)

      def score(i):
        return self._logits(q, i, buffers), *self._dots(index_q, i, buffers)

      def differentiate(i, logits, dots, keys):
        seen = self.seen(spans, i, j)
        scores_lse, mass, dkl = (stats[0, i, :, lane : lane + 1] for lane in range(3))
        target = self._target(logits, lse[0, i], seen)
        probs = jnp.exp(_scores(dots, weights[0, i]) - scores_lse)
        dscores = jnp.where(seen, dkl * (mass * probs - target), 0)
        after.dweights[0, i] += jnp.sum(dscores * jnp.maximum(dots, 0), axis=1, keepdims=True)
        ddots = jnp.where(dots > 0, dscores * weights[0, i], 0).astype(keys.dtype)
        after.dindex_q[0, i] += dot(ddots, keys, 1, 0)
        resident.write_rows(dkeys, i * self.plan.tile, dot(ddots, index_q[0, i], 0, 0))

      resident.overlap(score, differentiate, self.plan.step_t)
      for i in range(self.plan.step_t):  # Two queries may add to the same row.
        self.add(self.index_rows.blocks, dkeys, sums.rows, spans, sums_table, i, j)
      return 0

    after.dindex_q[...] = before.dindex_q[...]
    after.dweights[...] = before.dweights[...]
    jax.lax.fori_loop(0, self.tiles(spans), differentiate_tile, 0)
    resident.store_sums(shard, after.dindex_k, sums)

  def _buffers(self) -> Buffers:
    rows = self.rows, self.index_rows
    return Buffers(*(self.buffer(x.lines, x.words) for x in rows))

  def _copy(self, scalars: Scalars, inputs, j, buffers: Buffers):
    """Copies the j-th tile of every query, of both kinds of keys."""
    spans, (table, index_table, *_) = scalars
    self.copy(self.rows.lines, inputs.k, spans, table, j, buffers.k)
    self.copy(self.index_rows.lines, inputs.index_k, spans, index_table, j, buffers.index_k)

  def _logits(self, q, i, buffers):
    """Returns the logits [H, tile]: each head reads the channels of its key head."""
    keys = self.read(self.rows, buffers.k, i)
    heads, width = q.shape[2] // self.n_groups, q.shape[3]
    of_group = lambda g: dot(
        q[0, i, pl.ds(g * heads, heads)], keys[:, g * width : (g + 1) * width], 1, 1
    )
    return self.sm_scale * jnp.concatenate([of_group(g) for g in range(self.n_groups)], axis=0)

  def _target(self, logits, lse, seen):
    """Returns the mean over heads of the attention's probabilities, [1, tile]."""
    total = jnp.sum(jnp.exp(logits - lse), axis=0, keepdims=True)
    return jnp.where(seen, total / logits.shape[0], 0)

  def _dots(self, index_q, i, buffers):
    """Returns the dots of the index heads, [I, tile], and the index keys."""
    keys = self.read(self.index_rows, buffers.index_k, i)
    return dot(index_q[0, i], keys, 1, 1), keys


def _scores(dots, weights):
  return jnp.sum(jnp.maximum(dots, 0) * weights, axis=0, keepdims=True)


def _reduce(reduction, x):
  return reduction(x, axis=1, keepdims=True)
