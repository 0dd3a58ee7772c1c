# SPDX-License-Identifier: Apache-2.0
"""Attention to a selection on a TPU, forward and backward; see `resident` for where keys lie.

A step of the grid takes a few queries. Each copies its rows of the shard, tile by tile, and all
heads meet them: online softmax forward; backward, the gradient of the keys is added to rows that
lie in VMEM as the keys do, and reaches HBM once for each shard and block of queries.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsa_jax.kernels import resident
from dsa_jax.kernels.resident import Rows, Shards
from dsa_jax.kernels.rows import gather_rows, map_rows, scan_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
  """They change the speed, never the result beyond rounding."""

  block_t: int = 1024  # Query rows whose sums over the shards exist at one time.
  step_t: int = 2  # Query rows of a step of the grid.
  tile: int = 256  # Selected rows that meet the heads at one time.
  vmem_share: float = 0.7  # Of VMEM, for a shard of keys and of their gradients.


def forward(q, kv, indices, *, v_dim: int, sm_scale: float, blocks: BlockSizes):
  batch, n_queries, _, width = q.shape
  if n_queries * indices.shape[2] < kv.shape[1]:  # Decoding: fewer rows than there are keys.
    indices = jnp.where((indices >= 0) & (indices < kv.shape[1]), indices, -1)
    own = gather_rows(kv, indices).reshape(-1, indices.shape[2], width)
    slots = jnp.where(indices >= 0, jnp.arange(indices.shape[2]), -1)
    each = lambda x: x.reshape(batch * n_queries, 1, *x.shape[2:])
    how = dict(v_dim=v_dim, sm_scale=sm_scale, blocks=blocks)
    out, lse = _forward(each(q), own, each(slots), **how)
    return out.reshape(*q.shape[:3], v_dim), lse.reshape(q.shape[:3])
  return _forward(q, kv, indices, v_dim=v_dim, sm_scale=sm_scale, blocks=blocks)


def _forward(q, kv, indices, *, v_dim, sm_scale, blocks):
  call = _Call.of(kv, kv.dtype.itemsize, blocks, sm_scale)
  packed = resident.pack(kv, call.shards)
  v_channels = pl.cdiv(v_dim, resident.LANES) * resident.LANES

  def attend(block):
    q, indices = block
    slots = resident.sort_slots(indices, kv.shape[1])
    state = jnp.zeros((*q.shape[:3], v_channels)), jnp.full((*q.shape[:3], 1), -jnp.inf)
    padded = resident.pad_channels(q)
    step = lambda shard, state: call.forward(shard, slots, padded, packed, state)
    out, lse = jax.lax.fori_loop(0, call.shards.n, step, state)
    return out[..., :v_dim].astype(q.dtype), lse[..., 0]

  return map_rows(attend, (q, indices), _block(blocks, q))


def backward(residuals, cotangents, *, v_dim: int, sm_scale: float, blocks: BlockSizes):
  q, kv, indices, out, lse = residuals
  dout, dlse = cotangents
  delta = jnp.sum(out.astype(jnp.float32) * dout, axis=-1) - jnp.where(lse > -jnp.inf, dlse, 0)
  call = _Call.of(kv, kv.dtype.itemsize + 4, blocks, sm_scale)
  packed = resident.pack(kv, call.shards)

  def step(dkv, block):
    q, indices, lse, dout, delta = block
    slots = resident.sort_slots(indices, kv.shape[1])
    stats = jnp.stack([lse, delta], axis=-1)
    padded, dout = resident.pad_channels(q), resident.pad_channels(dout)
    step = lambda shard, state: call.backward(shard, slots, padded, dout, stats, packed, state)
    state = dkv, jnp.zeros(padded.shape, jnp.float32)
    dkv, dq = jax.lax.fori_loop(0, call.shards.n, step, state)
    return dkv, dq[..., : q.shape[-1]].astype(q.dtype)

  dkv = jnp.zeros(resident.sums_shape(packed, call.rows, call.shards))
  dkv, dq = scan_rows(step, dkv, (q, indices, lse, dout, delta), _block(blocks, q))
  dkv = resident.unpack_sums(dkv, call.shards, *kv.shape[1:])
  return dq, dkv.astype(kv.dtype)


def _block(blocks: BlockSizes, q) -> int:
  """Query rows of a block: whole steps of the grid."""
  return pl.cdiv(min(blocks.block_t, q.shape[1]), blocks.step_t) * blocks.step_t


@dataclasses.dataclass(frozen=True)
class _Call:
  """What the kernels of a direction share."""

  rows: Rows
  shards: Shards
  blocks: BlockSizes
  sm_scale: float
  vmem: int

  @classmethod
  def of(cls, kv, bytes_per_channel, blocks, sm_scale):
    rows, vmem = Rows(kv.shape[-1], kv.dtype), resident.vmem_bytes()
    sums = (bytes_per_channel - kv.dtype.itemsize) * rows.channels
    budget = int(blocks.vmem_share * vmem)
    shards = resident.make_shards(kv.shape[1], rows.bytes + sums, budget)
    return cls(rows, shards, blocks, sm_scale, vmem)

  def forward(self, shard, slots, q, packed, state):
    """Adds a shard to (out, lse): float32 [B, T, H, V] and [B, T, H, 1] of the keys before it."""
    out, lse = state
    heads = self._queries(*q.shape[2:])
    outs = [self._queries(*x.shape[2:]) for x in state]
    return self._call(
        self._attend,
        'sparse_attention_forward',
        shard,
        slots,
        [q, packed, out, lse],
        [heads, self._shard(packed), *outs],
        outs,
        aliases={5: 0, 6: 1},
        scratch=[self._buffer(self.rows.lines, jnp.int32 if self._packs else self.rows.dtype)],
    )

  def _attend(self, at, spans, slots, q, kv, out, lse, new_out, new_lse, buffer):
    def query(i, _):
      def meet(j, state):
        top, total = state
        keys, seen = self._keys(spans, slots, i, j, kv, buffer)
        logits = jnp.where(seen, self.sm_scale * _dot(q[0, i], keys, 1, 1), -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
        shrink = jnp.exp(top - new_top)  # A tile has a row, so the new top is finite.
        weights = jnp.exp(logits - new_top)
        value = _dot(weights.astype(keys.dtype), keys[:, : out.shape[-1]], 1, 0)
        new_out[0, i] = new_out[0, i] * shrink + value
        return new_top, total * shrink + jnp.sum(weights, axis=1, keepdims=True)

      top = lse[0, i]
      new_out[0, i] = out[0, i]
      total = jnp.where(top > -jnp.inf, 1.0, 0.0)
      top, total = jax.lax.fori_loop(0, self._tiles(spans, i), meet, (top, total))
      new_out[0, i] = new_out[0, i] / jnp.where(total > 0, total, 1)
      new_lse[0, i] = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)
      return 0

    jax.lax.fori_loop(0, self.blocks.step_t, query, 0)

  def backward(self, shard, slots, q, dout, stats, packed, state):
    """Adds a shard to (dkv, dq), float32: sums as `resident` has them, and [B, T, H, E]."""
    dkv, dq = state
    inputs = [q, dout, stats]
    specs = [self._queries(*x.shape[2:]) for x in inputs]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    rows = self.rows
    return self._call(
        self._attend_backward,
        'sparse_attention_backward',
        shard,
        slots,
        [*inputs, packed, dkv, dq],
        [*specs, self._shard(packed), anywhere, specs[0]],
        [anywhere, specs[0]],
        aliases={7: 0, 8: 1},
        scratch=[
            self._buffer(rows.lines, jnp.int32 if self._packs else rows.dtype),
            self._buffer(rows.blocks, jnp.float32),
            pltpu.VMEM((self.shards.stored * rows.blocks, resident.LANES), jnp.float32),
            pltpu.SemaphoreType.DMA,
        ],
    )

  def _attend_backward(
      self, at, spans, slots, q, dout, stats, kv, _, dq, dkv, new_dq, buffer, dkeys, sums, sem
  ):
    in_hbm = dkv.at[pl.program_id(0), at[0]]

    @pl.when(pl.program_id(1) == 0)
    def _():
      pltpu.async_copy(in_hbm, sums, sem).wait()

    def query(i, _):
      lse, delta = stats[0, i, :, 0:1], stats[0, i, :, 1:2]
      new_dq[0, i] = dq[0, i]

      def meet(j, _):
        keys, seen = self._keys(spans, slots, i, j, kv, buffer)
        probs = jnp.exp(self.sm_scale * _dot(q[0, i], keys, 1, 1) - lse)
        probs = jnp.where(seen, probs, 0)
        dprobs = _dot(dout[0, i], keys[:, : dout.shape[-1]], 1, 1)
        dlogits = (self.sm_scale * probs * (dprobs - delta)).astype(keys.dtype)
        new_dq[0, i] += _dot(dlogits, keys, 1, 0)
        dvalues = _dot(probs.astype(keys.dtype), dout[0, i], 0, 0)
        dk = _dot(dlogits, q[0, i], 0, 0)
        width = dvalues.shape[1]
        both = jnp.concatenate([dk[:, :width] + dvalues, dk[:, width:]], axis=1)
        resident.write_sums(dkeys, both)
        first, n = self._tile(spans, i, j)
        resident.add_rows(self.rows.blocks, dkeys, sums, lambda r: slots[0, 0, i, first + r], n)
        return 0

      jax.lax.fori_loop(0, self._tiles(spans, i), meet, 0)
      return 0

    jax.lax.fori_loop(0, self.blocks.step_t, query, 0)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
      pltpu.async_copy(sums, in_hbm, sem).wait()

  def _keys(self, spans, slots, i, j, kv, buffer):
    """The j-th tile of query i, [tile, E], and which of its rows are no filling, [1, tile]."""
    tile = self.blocks.tile
    first, n = self._tile(spans, i, j)
    resident.copy_rows(self.rows, kv.at[0, 0], buffer, lambda r: slots[0, 0, i, first + r], n)
    seen = jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1) < n
    return resident.read_rows(self.rows, buffer, n, tile), seen

  def _tile(self, spans, i, j):
    first = spans[0, 0, i, 0] + j * self.blocks.tile
    return first, jnp.minimum(spans[0, 0, i, 1] - first, self.blocks.tile)

  def _tiles(self, spans, i):
    return pl.cdiv(spans[0, 0, i, 1] - spans[0, 0, i, 0], self.blocks.tile)

  @property
  def _packs(self):
    return self.rows.dtype.itemsize == 2

  def _queries(self, *shape):
    """A block of what is [B, T, *shape]."""
    zeros = (0,) * len(shape)
    return pl.BlockSpec((1, self.blocks.step_t, *shape), lambda b, t, _: (b, t, *zeros))

  def _shard(self, packed):
    index = lambda b, t, at: (b, at[0], 0, 0)
    return pl.BlockSpec((1, 1, *packed.shape[2:]), index, pipeline_mode=pl.Buffered(1))

  def _buffer(self, lines, dtype):
    return pltpu.VMEM((self.blocks.tile * lines, resident.LANES), dtype)

  def _call(self, kernel, name, shard, slots, inputs, in_specs, out_specs, *, aliases, scratch):
    spans, slots = resident.locate(slots, shard, self.shards, self.blocks.tile)
    steps = lambda x: x.reshape(x.shape[0], -1, self.blocks.step_t, x.shape[2])
    spans, slots = steps(spans), steps(slots)
    scalars = lambda x: pl.BlockSpec(
        (1, 1, *x.shape[2:]), lambda b, t, _: (b, t, 0, 0), memory_space=pltpu.SMEM
    )
    outputs = [inputs[i - 3] for i in aliases]
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=slots.shape[:2],
            in_specs=[scalars(spans), scalars(slots), *in_specs],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=int(0.95 * self.vmem), disable_bounds_checks=True
        ),
        name=name,
    )
    return call(jnp.reshape(shard, 1), spans, slots, *inputs)


def _dot(x, y, x_axis: int, y_axis: int):
  """A product over one axis of each, summed in float32."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  dims = ((x_axis,), (y_axis,)), ((), ())
  return jax.lax.dot_general(
      x, y, dims, precision=precision, preferred_element_type=jnp.float32
  )
