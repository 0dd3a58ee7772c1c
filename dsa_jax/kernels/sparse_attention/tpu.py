# SPDX-License-Identifier: Apache-2.0
"""Attention to a selection on a TPU, forward and backward; see `resident` for where keys lie.

A step of the grid takes a few queries. Their rows of the shard are copied tile by tile, and all
heads meet them: online softmax forward; backward, the gradient of the keys is added to rows that
lie in VMEM as the keys do, and reaches HBM once for each shard and block of queries. Where VMEM
holds too few keys for whole tiles of each shard, rows are brought together first: `tpu_rows`.
"""

import dataclasses

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.sparse_attention import tpu_rows
from dsa_jax.kernels.tpu import resident
from dsa_jax.kernels.tpu.resident import LANES, Rows, ShardKernels, dot
from dsa_jax.kernels.tpu.shards import fit_shards
from dsa_jax.kernels.xla.rows import map_rows, scan_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  block_t: int = 1024  # Query rows whose sums over the shards exist at one time.
  step_t: int = 4  # Query rows of a step of the grid; half of them where VMEM is 64 MiB.
  tile: int = 1152  # At most so many selected rows of a query are met at one time.
  line: int = LANES  # Slots of a line, where tiles may begin; a chip has no other.
  copied: int = 256  # Rows copied between two branches.
  step_t_compact: int = 4  # Query rows whose selected rows are brought together in a step,
  block_t_compact: int = 512  # and how many have theirs in HBM at one time; backward, half of them.
  own_tile: int = 2304  # At most so many of those rows are met at one time; half, if float32.
  vmem_share: float = 0.8  # Of VMEM, for a shard of keys and of their gradients.


def brings_together(q, kv, n_slots: int, blocks: BlockSizes) -> bool:
  """Whether `forward` of q [B, T, H, E] and kv [B, S, E] brings rows together in HBM first."""
  blocks = resident.fit_chip(blocks, resident.vmem_bytes())
  bytes_per_key = Rows(kv.shape[-1], kv.dtype).bytes
  shards, _ = fit_shards(kv.shape[1], n_slots, bytes_per_key, resident.vmem_bytes(), blocks)
  return shards.loose and not _is_decoding(q, kv, n_slots)


def forward(q, kv, indices, *, v_dim: int, sm_scale: float, blocks: BlockSizes):
  blocks = resident.fit_chip(blocks, resident.vmem_bytes())
  rows = Rows(kv.shape[-1], kv.dtype)
  how = dict(v_dim=v_dim, sm_scale=sm_scale, blocks=blocks)
  if _is_decoding(q, kv, indices.shape[2]):
    return tpu_rows.decode(q, kv, indices, **how)
  kernels = _Kernels.of(rows, kv, indices, rows.bytes, sm_scale, blocks)
  if kernels.shards.loose:
    return tpu_rows.forward(q, kv, indices, **how)
  packed = resident.pack(kv, kernels.shards)
  v_channels = Rows(v_dim, kv.dtype).channels

  def attend(block):
    q, indices = block
    slots = resident.sort_slots(indices, kv.shape[1])
    state = jnp.zeros((*q.shape[:3], v_channels)), jnp.full((*q.shape[:3], 1), -jnp.inf)
    padded = resident.pad_channels(q)
    step = lambda shard, state: kernels.forward(shard, slots, padded, packed, state)
    out, lse = jax.lax.fori_loop(0, kernels.shards.n, step, state)
    return out[..., :v_dim].astype(q.dtype), lse[..., 0]

  return map_rows(attend, (q, indices), blocks.block_t, blocks.step_t)


def _is_decoding(q, kv, n_slots: int) -> bool:
  """Whether fewer rows are selected than there are keys."""
  return q.shape[1] * n_slots < kv.shape[1]


def backward(residuals, cotangents, *, v_dim: int, sm_scale: float, blocks: BlockSizes):
  blocks = resident.fit_chip(blocks, resident.vmem_bytes())
  q, kv, indices, out, lse = residuals
  dout, dlse = cotangents
  delta = jnp.sum(out.astype(jnp.float32) * dout, axis=-1) - jnp.where(lse > -jnp.inf, dlse, 0)
  key_rows = Rows(kv.shape[-1], kv.dtype)
  bytes_per_key = key_rows.bytes + 4 * key_rows.channels
  kernels = _Kernels.of(key_rows, kv, indices, bytes_per_key, sm_scale, blocks)
  rows = q, indices, lse, dout, delta
  if kernels.shards.loose:
    return tpu_rows.backward(rows, kv, sm_scale=sm_scale, blocks=blocks)
  packed = resident.pack(kv, kernels.shards)

  def step(dkv, block):
    slots, queries = tpu_rows.prepare(block, kv)
    step = lambda shard, state: kernels.backward(shard, slots, queries, packed, state)
    dq = jnp.zeros((*block[0].shape[:3], key_rows.channels))
    dkv, dq = jax.lax.fori_loop(0, kernels.shards.n, step, (dkv, dq))
    return dkv, dq[..., : kv.shape[-1]].astype(q.dtype)

  dkv = resident.zero_sums(kv.shape[0], key_rows, kernels.shards)
  dkv, dq = scan_rows(step, dkv, rows, blocks.block_t, blocks.step_t)
  dkv = resident.unpack_sums(dkv, kernels.shards, *kv.shape[1:])
  return dq, dkv.astype(kv.dtype)


@dataclasses.dataclass(frozen=True)
class _Kernels(ShardKernels):
  rows: Rows
  sm_scale: float

  @classmethod
  def of(cls, rows, kv, indices, bytes_per_key, sm_scale, blocks):
    sizes = kv.shape[1], indices.shape[2], bytes_per_key
    shards, tile = fit_shards(*sizes, resident.vmem_bytes(), blocks)
    return cls(shards, blocks.step_t, tile, blocks.line, blocks.copied, rows, sm_scale)

  def forward(self, shard, slots, q, packed, state):
    """Adds a shard to (out, lse): float32 [B, T, H, V] and [B, T, H, 1] of the keys before it."""
    state_specs = [self.queries(x) for x in state]
    return self.call(
        self._attend,
        'sparse_attention_forward',
        shard,
        self.scalars(shard, slots, self.rows.lines),
        [q, packed, *state],
        [self.queries(q), self.shard(packed), *state_specs],
        state_specs,
        aliases={2: 0, 3: 1},
        scratch=[self.buffer(self.rows.lines, self.rows.words)],
    )

  def _attend(self, _, spans, table, q, kv, out, lse, new_out, new_lse, buffer):
    def meet(j, states):
      self.copy(self.rows.lines, kv, spans, table, j, buffer)

      def score(i):
        keys = self.read(self.rows, buffer, i)
        return keys, self.sm_scale * dot(q[0, i], keys, 1, 1)

      def weigh(i, keys, logits):
        top, total = states[i]
        logits = jnp.where(self.seen(spans, i, j), logits, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
        finite = jnp.where(new_top > -jnp.inf, new_top, 0)  # Others may have more tiles.
        shrink = jnp.exp(top - finite)
        weights = jnp.exp(logits - finite)
        value = dot(weights.astype(keys.dtype), keys[:, : out.shape[-1]], 1, 0)
        new_out[0, i] = new_out[0, i] * shrink + value
        return new_top, total * shrink + jnp.sum(weights, axis=1, keepdims=True)

      return resident.overlap(score, weigh, self.step_t)

    states = []
    for i in range(self.step_t):
      new_out[0, i] = out[0, i]
      states.append((lse[0, i], jnp.where(lse[0, i] > -jnp.inf, 1.0, 0.0)))
    states = jax.lax.fori_loop(0, self.tiles(spans), meet, states)
    for i, (top, total) in enumerate(states):
      total = jnp.where(top > -jnp.inf, total, 1)
      new_out[0, i] = new_out[0, i] / total
      new_lse[0, i] = top + jnp.log(total)

  def backward(self, shard, slots, queries, packed, state):
    """Adds a shard to (dkv, dq), float32: sums as `resident` has them, and [B, T, H, E].

    Args:
      shard: Which.
      slots: Sorted selections, [B, T, K].
      queries: q and the gradient of the output, H heads of each, padded to the same channels; lse
        and delta, [B, T, H, 2].
      packed: Keys.
      state: (dkv, dq) of the shards before it.
    """
    dq = self.queries(state[1])
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return self.call(
        self._attend_backward,
        'sparse_attention_backward',
        shard,
        self.scalars(shard, slots, self.rows.lines, self.rows.blocks),
        [*queries, packed, *state],
        [*map(self.queries, queries), self.shard(packed), anywhere, dq],
        [anywhere, dq],
        aliases={3: 0, 4: 1},
        scratch=[
            self.buffer(self.rows.lines, self.rows.words),
            self.buffer(self.rows.blocks, jnp.float32),
            *self.sums(self.rows.blocks),
        ],
    )

  def _attend_backward(
      self, shard, spans, table, sums_table, q_dout, stats, kv, _, dq,
      dkv, new_dq, buffer, dkeys, *sums,
  ):  # fmt: skip
    resident.fetch_sums(shard, dkv, *sums)

    def meet(j, _):
      self.copy(self.rows.lines, kv, spans, table, j, buffer)

      def score(i):
        keys = self.read(self.rows, buffer, i)
        return keys, dot(q_dout[0, i], keys, 1, 1)

      def differentiate(i, keys, dots):
        seen = self.seen(spans, i, j)
        gradients = tpu_rows.differentiate_logits(dots, stats[0, i], seen, keys, self.sm_scale)
        dlogits, dlogits_probs = gradients
        new_dq[0, i] += dot(dlogits, keys, 1, 0)
        resident.write_rows(dkeys, i * self.tile, dot(dlogits_probs, q_dout[0, i], 0, 0))

      resident.overlap(score, differentiate, self.step_t)
      for i in range(self.step_t):  # Two queries may add to the same row.
        self.add(self.rows.blocks, dkeys, sums[0], spans, sums_table, i, j)
      return 0

    new_dq[...] = dq[...]
    jax.lax.fori_loop(0, self.tiles(spans), meet, 0)
    resident.store_sums(shard, dkv, *sums)
