# SPDX-License-Identifier: Apache-2.0
"""The indexer's divergence on selected keys on a TPU; see `resident` for where keys lie.

Rows of both keys, the attention's and the indexer's, are copied tile by tile. A query's sums
over them are all that the divergence needs (see `xla`); backward makes target and scores again.
"""

import dataclasses

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.tpu import resident
from dsa_jax.kernels.tpu.resident import LANES, Rows, ShardKernels, dot
from dsa_jax.kernels.tpu.shards import fit_shards
from dsa_jax.kernels.xla.rows import map_rows, scan_rows

TOP, TOTAL, MASS, ENTROPY, CROSS = range(5)  # A query's sums, one to a lane.
SCORES_LSE, TARGET_MASS, DKL = range(3)  # What its gradient needs.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  block_t: int = 1024  # Query rows whose sums over the shards exist at one time.
  step_t: int = 4  # Query rows of a step of the grid; half of them where VMEM is 64 MiB.
  tile: int = 1152  # At most so many selected rows of a query are met at one time.
  line: int = LANES  # Slots of a line, where tiles may begin; a chip has no other.
  copied: int = 256  # Rows copied between two branches.
  vmem_share: float = 0.8  # Of VMEM, for a shard of keys and of their gradients.


def forward(constants, index_q, index_k, index_weights, *, sm_scale: float, blocks: BlockSizes):
  """Returns the divergence [B, T], and what its gradient needs, as `xla.forward` does."""
  blocks = resident.fit_chip(blocks, resident.vmem_bytes())
  q, k, lse, start, end, indices = constants
  kernels = _Kernels.of(k, index_k, indices, 0, sm_scale, blocks)
  packed = kernels.pack(k, index_k)

  def diverge(block):
    slots, queries = kernels.prepare(block, k.shape[1])
    sums = jnp.zeros((*slots.shape[:2], 1, LANES)).at[..., TOP].set(-jnp.inf)
    step = lambda shard, sums: kernels.forward(shard, slots, queries, packed, sums)
    sums = jax.lax.fori_loop(0, kernels.shards.n, step, sums)[:, :, 0]
    total = jnp.where(sums[..., TOTAL] > 0, sums[..., TOTAL], 1)
    scores_lse = jnp.where(sums[..., TOTAL] > 0, sums[..., TOP], 0) + jnp.log(total)
    mass = sums[..., MASS]
    return sums[..., ENTROPY] - sums[..., CROSS] + mass * scores_lse, scores_lse, mass

  block = q, lse, start, end, indices, index_q, index_weights
  kl, *saved = map_rows(diverge, block, blocks.block_t, blocks.step_t)
  return kl, tuple(saved)


def backward(constants, residuals, dkl, *, sm_scale: float, blocks: BlockSizes):
  blocks = resident.fit_chip(blocks, resident.vmem_bytes())
  q, k, lse, start, end, indices = constants
  index_q, index_k, index_weights, scores_lse, mass = residuals
  index_rows = Rows(index_k.shape[-1], index_k.dtype)
  kernels = _Kernels.of(k, index_k, indices, 4 * index_rows.channels, sm_scale, blocks)
  packed = kernels.pack(k, index_k)

  def step(dindex_k, block):
    *block, scores_lse, mass, dkl = block
    slots, queries = kernels.prepare(block, k.shape[1])
    stats = jnp.stack([scores_lse, mass, dkl], axis=-1)[:, :, None]
    stats = jnp.pad(stats, [(0, 0)] * 3 + [(0, LANES - stats.shape[-1])])
    step = lambda shard, state: kernels.backward(shard, slots, (*queries, stats), packed, state)
    state = dindex_k, jnp.zeros(queries[2].shape), jnp.zeros(queries[3].shape)
    dindex_k, dindex_q, dweights = jax.lax.fori_loop(0, kernels.shards.n, step, state)
    dindex_q = dindex_q[..., : index_q.shape[-1]].astype(index_q.dtype)
    return dindex_k, (dindex_q, dweights[..., 0].astype(index_weights.dtype))

  dindex_k = resident.zero_sums(k.shape[0], index_rows, kernels.shards)
  rows = q, lse, start, end, indices, index_q, index_weights, scores_lse, mass, dkl
  dindex_k, (dindex_q, dweights) = scan_rows(
      step, dindex_k, rows, blocks.block_t, blocks.step_t
  )
  dindex_k = resident.unpack_sums(dindex_k, kernels.shards, *index_k.shape[1:])
  return dindex_q, dindex_k.astype(index_k.dtype), dweights


@dataclasses.dataclass(frozen=True)
class _Kernels(ShardKernels):
  n_groups: int  # Key heads; each has its own channels of a row.
  rows: Rows
  index_rows: Rows
  sm_scale: float

  @classmethod
  def of(cls, k, index_k, indices, more_bytes, sm_scale, blocks):
    head = Rows(k.shape[-1], k.dtype)
    rows = Rows(k.shape[2] * head.channels, k.dtype)
    index_rows = Rows(index_k.shape[-1], index_k.dtype)
    bytes_per_key = rows.bytes + index_rows.bytes + more_bytes
    sizes = k.shape[1], indices.shape[2], bytes_per_key
    shards, tile = fit_shards(*sizes, resident.vmem_bytes(), blocks)
    how = blocks.step_t, tile, blocks.line, blocks.copied
    return cls(shards, *how, k.shape[2], rows, index_rows, sm_scale)

  def pack(self, k, index_k):
    k = resident.pad_channels(k).reshape(*k.shape[:2], -1)
    return resident.pack(k, self.shards), resident.pack(index_k, self.shards)

  def prepare(self, block, n_keys):
    """Sorted slots, and queries as the kernels read them: q, lse, index q and weights."""
    q, lse, start, end, indices, index_q, index_weights = block
    visible = (indices >= start[..., None]) & (indices < end[..., None])
    slots = resident.sort_slots(jnp.where(visible, indices, -1), n_keys)
    column = lambda x: x.astype(jnp.float32)[..., None]
    q, index_q = resident.pad_channels(q), resident.pad_channels(index_q)
    return slots, (q, column(lse), index_q, column(index_weights))

  def forward(self, shard, slots, queries, packed, sums):
    """Adds a shard to a query's sums, [B, T, 1, 128]."""
    (sums,) = self.call(
        self._diverge,
        'index_kl_selected_forward',
        shard,
        self.scalars(shard, slots, self.rows.lines, self.index_rows.lines),
        [*queries, *packed, sums],
        [*map(self.queries, queries), *map(self.shard, packed), self.queries(sums)],
        [self.queries(sums)],
        aliases={6: 0},
        scratch=self._buffers(),
    )
    return sums

  def _diverge(
      self, _, spans, table, index_table, q, lse, index_q, weights, k, index_k, sums,
      new_sums, *buffers,
  ):  # fmt: skip
    def meet(j, states):
      self._copy(spans, (table, index_table), (k, index_k), j, buffers)

      def score(i):
        return self._logits(q, i, buffers), *self._dots(index_q, i, buffers)

      def diverge(i, logits, dots, _):
        top, total, mass, entropy, cross = states[i]
        seen = self.seen(spans, i, j)
        target = self._target(logits, lse[0, i], seen)
        scores = _scores(dots, weights[0, i])
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

      return resident.overlap(score, diverge, self.step_t)

    lane_of = lambda i: [sums[0, i, :, lane : lane + 1] for lane in range(5)]
    states = [tuple(lane_of(i)) for i in range(self.step_t)]
    states = jax.lax.fori_loop(0, self.tiles(spans), meet, states)
    lanes = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    for i, state in enumerate(states):
      new_sums[0, i] = sum(jnp.where(lanes == lane, x, 0) for lane, x in enumerate(state))

  def backward(self, shard, slots, queries, packed, state):
    """Adds a shard to the gradients of index keys (sums), queries and weights, float32."""
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    specs = [anywhere, *map(self.queries, state[1:])]
    return self.call(
        self._diverge_backward,
        'index_kl_selected_backward',
        shard,
        self.scalars(
            shard, slots, self.rows.lines, self.index_rows.lines, self.index_rows.blocks
        ),
        [*queries, *packed, *state],
        [*map(self.queries, queries), *map(self.shard, packed), *specs],
        specs,
        aliases={7: 0, 8: 1, 9: 2},
        scratch=[
            *self._buffers(),
            self.buffer(self.index_rows.blocks, jnp.float32),
            *self.sums(self.index_rows.blocks),
        ],
    )

  def _diverge_backward(
      self, shard, spans, table, index_table, sums_table,
      q, lse, index_q, weights, stats, k, index_k, _, dindex_q, dweights,
      dindex_k, new_dindex_q, new_dweights, *buffers,
  ):  # fmt: skip
    *buffers, dkeys, sums, sem = buffers
    resident.fetch_sums(shard, dindex_k, sums, sem)

    def meet(j, _):
      self._copy(spans, (table, index_table), (k, index_k), j, buffers)

      def score(i):
        return self._logits(q, i, buffers), *self._dots(index_q, i, buffers)

      def differentiate(i, logits, dots, keys):
        seen = self.seen(spans, i, j)
        scores_lse, mass, dkl = (stats[0, i, :, lane : lane + 1] for lane in range(3))
        target = self._target(logits, lse[0, i], seen)
        probs = jnp.exp(_scores(dots, weights[0, i]) - scores_lse)
        dscores = jnp.where(seen, dkl * (mass * probs - target), 0)
        new_dweights[0, i] += jnp.sum(dscores * jnp.maximum(dots, 0), axis=1, keepdims=True)
        ddots = jnp.where(dots > 0, dscores * weights[0, i], 0).astype(keys.dtype)
        new_dindex_q[0, i] += dot(ddots, keys, 1, 0)
        resident.write_rows(dkeys, i * self.tile, dot(ddots, index_q[0, i], 0, 0))

      resident.overlap(score, differentiate, self.step_t)
      for i in range(self.step_t):  # Two queries may add to the same row.
        self.add(self.index_rows.blocks, dkeys, sums, spans, sums_table, i, j)
      return 0

    new_dindex_q[...] = dindex_q[...]
    new_dweights[...] = dweights[...]
    jax.lax.fori_loop(0, self.tiles(spans), meet, 0)
    resident.store_sums(shard, dindex_k, sums, sem)

  def _buffers(self):
    rows = self.rows, self.index_rows
    return [self.buffer(x.lines, x.words) for x in rows]

  def _copy(self, spans, tables, shards, j, buffers):
    for rows, table, shard, buffer in zip((self.rows, self.index_rows), tables, shards, buffers):
      self.copy(rows.lines, shard, spans, table, j, buffer)

  def _logits(self, q, i, buffers):
    """Of the attention's heads, [H, tile]: each with the channels of its key head."""
    keys = self.read(self.rows, buffers[0], i)
    heads, width = q.shape[2] // self.n_groups, q.shape[3]
    of_group = lambda g: dot(
        q[0, i, pl.ds(g * heads, heads)], keys[:, g * width : (g + 1) * width], 1, 1
    )
    return self.sm_scale * jnp.concatenate([of_group(g) for g in range(self.n_groups)], axis=0)

  def _target(self, logits, lse, seen):
    """Mean over heads of the attention's probabilities, [1, tile]."""
    total = jnp.sum(jnp.exp(logits - lse), axis=0, keepdims=True)
    return jnp.where(seen, total / logits.shape[0], 0)

  def _dots(self, index_q, i, buffers):
    """Dots of the index heads [I, tile], and the index keys."""
    keys = self.read(self.index_rows, buffers[1], i)
    return dot(index_q[0, i], keys, 1, 1), keys


def _scores(dots, weights):
  return jnp.sum(jnp.maximum(dots, 0) * weights, axis=0, keepdims=True)


def _reduce(how, x):
  return how(x, axis=1, keepdims=True)
