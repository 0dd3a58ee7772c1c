# SPDX-License-Identifier: Apache-2.0
"""Gradients of grouped heads that share a selection, on a TPU: several key heads side by side.

The rows of a token's key heads lie one behind the other, in VMEM as in HBM. So a token is copied by
one load and one store, and its gradient is added by a few, where one key head after the other would
take as many of each. All heads of a query meet all rows that were copied for it in one product,
which the matrix unit has room for. Whatever a head has of other key heads' rows becomes zero.

Few tokens of a query lie in one shard. A step reads them tile by tile, in one run without branches:
the compiler overlaps the copies and the additions of some queries with the products of others.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from dsa_jax.kernels.sparse_attention import tpu_rows
from dsa_jax.kernels.sparse_attention.tpu_plan import WideBackward
from dsa_jax.kernels.sparse_attention.tpu_rows import BackwardScratch, Gradients
from dsa_jax.kernels.tpu import layout, resident
from dsa_jax.kernels.tpu.layout import LANES, Rows
from dsa_jax.kernels.tpu.resident import Scalars, ShardKernels, Sums, dot
from dsa_jax.kernels.tpu.shards import ADDED
from dsa_jax.kernels.xla.rows import scan_rows

OTHER = 2**30  # No token of a tile: the row is another key head's.


def backward(queries: tpu_rows.Queries, kv, *, plan: WideBackward, sm_scale: float):
  """Returns the gradients of q [B, T, H, E] and of folded keys [B, S * G, E], all side by side."""
  rows, row_shards = plan.sizes.rows, plan.row_shards
  kernels = _Kernels(plan.keys, plan, sm_scale)
  packed = layout.pack(kv, row_shards)
  tokens = tokens_of_heads(plan.sizes.n_heads, plan.keys.tile, plan.n_wide)

  def step(dkv, block):
    slots, (q_dout, stats) = tpu_rows.prepare(block, plan.sizes.n_keys)
    inputs = BackwardIn(tokens, q_dout, stats, packed)
    step = lambda shard, state: kernels.backward(shard, slots, inputs, state)
    state = Gradients(dkv=dkv, dq=jnp.zeros((*block.q.shape[:3], rows.channels)))
    dkv, dq = jax.lax.fori_loop(0, row_shards.n, step, state)
    return dkv, dq[..., : kv.shape[2]].astype(block.q.dtype)

  dkv = layout.zero_sums(kv.shape[0], rows, row_shards)
  dkv, dq = scan_rows(step, dkv, queries, plan.block_t, plan.keys.step_t)
  dkv = layout.unpack_sums(dkv, row_shards, *kv.shape[1:])
  return dq, dkv.astype(kv.dtype)


def tokens_of_heads(n_heads: int, tile: int, n_wide: int) -> jax.Array:
  """Returns of which token of a tile each row is, [H, tile * G]; `OTHER` in heads that skip it."""
  row = jnp.arange(tile * n_wide, dtype=jnp.int32)
  key_head = jnp.arange(n_heads)[:, None] // (n_heads // n_wide)
  return jnp.where(row % n_wide == key_head, row // n_wide, OTHER)


class BackwardIn(NamedTuple):
  """What the kernel reads."""

  tokens: Any  # See `tokens_of_heads`.
  q_dout: Any  # q, then the gradient of the output, 2H heads with the channels of a packed key.
  stats: Any  # lse and delta, [B, T, H, 2].
  kv: Any


@dataclasses.dataclass(frozen=True)
class _Kernels(ShardKernels):
  """Its slots are tokens, whose tiles begin anywhere."""

  wide: WideBackward
  sm_scale: float

  @property
  def rows(self) -> Rows:
    return self.wide.sizes.rows

  @property
  def lines(self) -> int:
    """Lines of a token's keys."""
    return self.wide.n_wide * self.rows.lines

  @property
  def sum_lines(self) -> int:
    """Lines of their gradients."""
    return self.wide.n_wide * self.rows.blocks

  def backward(self, shard, slots, inputs: BackwardIn, state: Gradients) -> Gradients:
    """Adds a shard to the gradients."""
    n_sums = self.wide.row_shards.stored * self.rows.blocks
    return self.call(
        self._attend_backward,
        'sparse_attention_backward_wide',
        shard,
        self.scalars(shard, slots, self.lines, self.sum_lines),
        inputs,
        BackwardIn(
            pl.BlockSpec(inputs.tokens.shape, lambda b, t, _: (0, 0)),
            self.queries(inputs.q_dout),
            self.queries(inputs.stats),
            self.shard(inputs.kv),
        ),
        state,
        Gradients(dkv=pl.BlockSpec(memory_space=pl.ANY), dq=self.queries(state.dq)),
        BackwardScratch(
            keys=self.buffer(self.lines, self.rows.words),
            dkeys=self.buffer(self.sum_lines, jnp.float32),
            sums=Sums(pltpu.VMEM((n_sums, LANES), jnp.float32), pltpu.SemaphoreType.DMA),
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
    tokens, q_dout, stats, kv = inputs
    resident.fetch_sums(shard, after.dkv, scratch.sums)
    n_rows = self.plan.tile * self.wide.n_wide

    def differentiate_tile(j, _):
      begins = [self._begin(spans, table, i, j) for i in range(self.plan.step_t)]
      self._copy_tokens(kv.at[0, 0], table, begins, scratch.keys)

      def score(i):
        keys = resident.read_rows(self.rows, scratch.keys, i * n_rows, n_rows)
        return keys, dot(q_dout[0, i], keys, 1, 1)

      def differentiate(i, keys, dots):
        seen = tokens[...] < self._left(spans, i, j)
        gradients = tpu_rows.differentiate_logits(dots, stats[0, i], seen, keys, self.sm_scale)
        dlogits, dlogits_probs = gradients
        after.dq[0, i] += dot(dlogits, keys, 1, 0)
        dkeys = dot(dlogits_probs, q_dout[0, i], 0, 0)
        resident.write_rows(scratch.dkeys, i * n_rows, dkeys)

      resident.overlap(score, differentiate, self.plan.step_t, ahead=2)
      for i, begin in enumerate(begins):  # Two queries may add to the same token.
        self._add_tokens(scratch.dkeys, i, scratch.sums.rows, sums_table, begin)
      return 0

    after.dq[...] = before.dq[...]
    jax.lax.fori_loop(0, self.tiles(spans), differentiate_tile, 0)
    resident.store_sums(shard, after.dkv, scratch.sums)

  def _begin(self, spans, table, i: int, j):
    """Returns where the j-th tile of query i begins in the table: at spare slots if it has none."""
    n_slots = table.shape[3] // self.plan.step_t
    slot = jnp.minimum(self._span(spans, i)[0] + j * self.plan.tile, n_slots - self.plan.tile)
    return i * n_slots + slot

  def _copy_tokens(self, shard, table, begins, buffer):
    """Copies a tile of each query; the spare token, which is zeros, behind its last one."""
    for n in range(self.plan.tile):
      for i, begin in enumerate(begins):
        source = pl.ds(table[0, 0, 0, begin + n], self.lines)
        target = pl.ds((i * self.plan.tile + n) * self.lines, self.lines)
        buffer[target, :] = shard[source, :]

  def _add_tokens(self, buffer, i: int, sums, table, begin):
    """Adds a tile that was written for query i, whose tokens are distinct but for the spare one."""

    def load(group):
      tokens = range(group * ADDED, min((group + 1) * ADDED, self.plan.tile))
      at = [pl.ds(table[0, 0, 0, begin + n], self.sum_lines) for n in tokens]
      first = [(i * self.plan.tile + n) * self.sum_lines for n in tokens]
      new = [buffer[pl.ds(n, self.sum_lines), :] for n in first]
      return at, [sums[where, :] + x for where, x in zip(at, new)]

    def store(_, at, totals):
      for where, x in zip(at, totals):
        sums[where, :] = x

    resident.overlap(load, store, pl.cdiv(self.plan.tile, ADDED))
