# SPDX-License-Identifier: Apache-2.0
"""The indexer's divergence on selected keys on a TPU; see `resident` for where keys lie.

A query's rows of both keys, the attention's and the indexer's, are copied tile by tile. Its sums
over them are all that the divergence needs (see `xla`); backward makes target and scores again.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dsa_jax.kernels import resident
from dsa_jax.kernels.resident import Rows, ShardKernels, dot
from dsa_jax.kernels.rows import map_rows, scan_rows

LANES = resident.LANES
TOP, TOTAL, MASS, ENTROPY, CROSS = range(5)  # A query's sums, one to a lane.
SCORES_LSE, TARGET_MASS, DKL = range(3)  # What its gradient needs.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
  """They change the speed, never the result beyond rounding."""

  block_t: int = 1024  # Query rows whose sums over the shards exist at one time.
  step_t: int = 2  # Query rows of a step of the grid.
  tile: int = 2048  # Selected rows that are met at one time.
  group: int = 128  # Rows copied between two branches.
  vmem_share: float = 0.8  # Of VMEM, for a shard of keys and of their gradients.


def forward(constants, index_q, index_k, index_weights, *, sm_scale: float, blocks: BlockSizes):
  """Returns the divergence [B, T], and what its gradient needs, as `xla.forward` does."""
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

  dindex_k = jnp.zeros(resident.sums_shape(packed[1], index_rows, kernels.shards))
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
    budget = int(blocks.vmem_share * resident.vmem_bytes())
    bytes_per_key = rows.bytes + index_rows.bytes + more_bytes
    shards = resident.make_shards(k.shape[1], bytes_per_key, budget)
    tile = resident.fit_tile(blocks.tile, indices.shape[2], shards)
    how = blocks.step_t, tile, resident.fit_group(blocks.group, tile)
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
      self, _, spans, lines, index_lines, q, lse, index_q, weights, k, index_k, sums,
      new_sums, *buffers,
  ):  # fmt: skip
    def query(i, _):
      def meet(j, state):
        top, total, mass, entropy, cross = state
        seen = self.seen(spans, i, j)
        where = spans, lines, index_lines, i, j, buffers
        target = self._target(q, lse, k, *where)
        dots, _ = self._dots(index_q, index_k, *where)
        scores = self._scores(dots, weights[0, i])
        new_top = jnp.maximum(top, _reduce(jnp.max, jnp.where(seen, scores, -jnp.inf)))
        shared = jnp.where(seen, jnp.exp(scores - new_top), 0)
        log_target = jnp.log(jnp.where(target > 0, target, 1))
        return (
            new_top,
            total * jnp.exp(top - new_top) + _reduce(jnp.sum, shared),
            mass + _reduce(jnp.sum, target),
            entropy + _reduce(jnp.sum, target * log_target),
            cross + _reduce(jnp.sum, target * scores),
        )

      state = tuple(sums[0, i, :, lane : lane + 1] for lane in range(5))
      state = jax.lax.fori_loop(0, self.tiles(spans, i), meet, state)
      lanes = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
      new_sums[0, i] = sum(jnp.where(lanes == lane, x, 0) for lane, x in enumerate(state))
      return 0

    jax.lax.fori_loop(0, self.step_t, query, 0)

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
      self, shard, spans, lines, index_lines, sum_lines,
      q, lse, index_q, weights, stats, k, index_k, _, dindex_q, dweights,
      dindex_k, new_dindex_q, new_dweights, buffer, index_buffer, dkeys, *sums,
  ):  # fmt: skip
    resident.fetch_sums(shard, dindex_k, *sums)

    def query(i, _):
      scores_lse, mass, dkl = (stats[0, i, :, lane : lane + 1] for lane in range(3))

      def meet(j, _):
        where = spans, lines, index_lines, i, j, (buffer, index_buffer)
        target = self._target(q, lse, k, *where)
        dots, keys = self._dots(index_q, index_k, *where)
        probs = jnp.exp(self._scores(dots, weights[0, i]) - scores_lse)
        dscores = jnp.where(self.seen(spans, i, j), dkl * (mass * probs - target), 0)
        new_dweights[0, i] += jnp.sum(dscores * jnp.maximum(dots, 0), axis=1, keepdims=True)
        ddots = jnp.where(dots > 0, dscores * weights[0, i], 0).astype(keys.dtype)
        new_dindex_q[0, i] += dot(ddots, keys, 1, 0)
        self.add(dot(ddots, index_q[0, i], 0, 0), dkeys, sums[0], spans, sum_lines, i, j)
        return 0

      new_dindex_q[0, i] = dindex_q[0, i]
      new_dweights[0, i] = dweights[0, i]
      jax.lax.fori_loop(0, self.tiles(spans, i), meet, 0)
      return 0

    jax.lax.fori_loop(0, self.step_t, query, 0)
    resident.store_sums(shard, dindex_k, *sums)

  def _buffers(self):
    rows = self.rows, self.index_rows
    return [self.buffer(x.lines, x.words) for x in rows]

  def _target(self, q, lse, k, spans, lines, _, i, j, buffers):
    """Mean over heads of the attention's probabilities, [1, tile]."""
    keys = self.read(self.rows, k, spans, lines, i, j, buffers[0])
    heads, width = q.shape[2] // self.n_groups, q.shape[3]
    total = 0
    for g in range(self.n_groups):
      mine = pl.ds(g * heads, heads)
      logits = self.sm_scale * dot(q[0, i, mine], keys[:, g * width : (g + 1) * width], 1, 1)
      total += jnp.sum(jnp.exp(logits - lse[0, i, mine]), axis=0, keepdims=True)
    return jnp.where(self.seen(spans, i, j), total / q.shape[2], 0)

  def _dots(self, index_q, index_k, spans, _, lines, i, j, buffers):
    """Dots of the index heads [I, tile], and the index keys."""
    keys = self.read(self.index_rows, index_k, spans, lines, i, j, buffers[1])
    return dot(index_q[0, i], keys, 1, 1), keys

  def _scores(self, dots, weights):
    return jnp.sum(jnp.maximum(dots, 0) * weights, axis=0, keepdims=True)


def _reduce(how, x):
  return how(x, axis=1, keepdims=True)
