# SPDX-License-Identifier: Apache-2.0
"""Selection and attention on a TPU while its SparseCores bring the selected rows together.

Queries go in blocks. In each step SparseCores fetch the rows of the block before, which takes
longer than attention to them. The TensorCore selects for the next block meanwhile, and attends from
the block whose rows were fetched in the last step.
"""

import dataclasses
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.index_topk import tpu as selection
from dsa_jax.kernels.sparse_attention import tpu as attention, tpu_plan, tpu_rows
from dsa_jax.kernels.tpu import chip, gather_scatter, layout, sparse_cores
from dsa_jax.kernels.tpu.plans import KernelPlan
from dsa_jax.kernels.tpu.shards import fit_chip
from dsa_jax.kernels.xla.rows import pad_axis, take_block


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  block_t: int = 128  # Query rows of a step.
  select: selection.BlockSizes = selection.BlockSizes()
  attend: attention.BlockSizes = attention.BlockSizes()


class Plan(NamedTuple):
  """How selection, fetching and attention go through blocks of queries, in n_blocks + 2 steps."""

  sizes: tpu_plan.Sizes
  block_t: int
  n_blocks: int
  select: selection.Plan
  fetch: gather_scatter.Fetch

  @property
  def repeats(self) -> float:
    """How often a query's work is done: the first and last steps have it without a query."""
    return 1 + 2 * self.block_t / self.sizes.n_queries

  @property
  def gathered_bytes(self) -> float:
    """Bytes that SparseCores fetch for one query, beside the kernels."""
    return self.repeats * self.fetch.bytes

  def kernels(self) -> dict[str, KernelPlan]:
    """Returns the plan of each kernel. Steps without queries score no keys."""
    more = lambda loops: [(depth, self.repeats * n) for depth, n in loops]
    selected = self.select.kernels()
    cut, numbering = selected['index_topk_cut'], selected['index_topk_positions']
    n_bytes = self.fetch.bytes + self.sizes.attended_bytes
    attend = self.fetch.own.kernel(self.sizes.batch, self.block_t, n_bytes)
    return {
        'index_topk_cut': cut._replace(loops=[*more(cut.loops[:1]), *cut.loops[1:]]),
        'index_topk_positions': numbering._replace(loops=more(numbering.loops)),
        'sparse_attention_rows': attend._replace(
            loops=more(attend.loops), hbm_bytes=self.repeats * attend.hbm_bytes
        ),
    }


def plan(q, kv, index_q, index_k, *, topk: int, v_dim: int, vmem: int, blocks: BlockSizes) -> Plan:
  """Returns how `forward` is done; of the arrays only shapes and dtypes count.

  Args:
    q: Queries.
    kv: Keys.
    index_q: Index queries.
    index_k: Index keys.
    topk: K, the selected keys of a query.
    v_dim: The width of the value.
    vmem: Bytes of VMEM of the chip.
    blocks: The op's block sizes.
  """
  sizes, attend = tpu_plan.Sizes.of(q, kv, topk, v_dim), fit_chip(blocks.attend, vmem)
  block = (index_q.shape[0], blocks.block_t, *index_q.shape[2:])
  block = jax.ShapeDtypeStruct(block, index_q.dtype)
  return Plan(
      sizes=sizes,
      block_t=blocks.block_t,
      n_blocks=pl.cdiv(sizes.n_queries, blocks.block_t),
      select=selection.plan(block, index_k, topk=topk, vmem=vmem, blocks=blocks.select),
      fetch=gather_scatter.plan_fetch(sizes.rows, sizes.n_keys, topk, vmem, attend),
  )


def plan_if_it_pays(q, kv, index_q, index_k, *, topk: int, v_dim: int, blocks: BlockSizes):
  """Returns the plan for this chip, or None where the two ops in turn are as good.

  It pays where SparseCores are there and the TensorCore alone would bring rows together, too.
  """
  sizes = dict(v_dim=v_dim, vmem=chip.vmem_bytes())
  alone = tpu_plan.plan_forward(q, kv, topk, **sizes, blocks=blocks.attend)
  if sparse_cores.available() and isinstance(alone, tpu_plan.Together):
    return plan(q, kv, index_q, index_k, topk=topk, **sizes, blocks=blocks)
  return None


def forward(q, kv, index_q, index_k, weights, start, end, *, plan: Plan, sm_scale: float):
  """Returns the output and the selection."""
  batch, n_queries = q.shape[:2]
  fetch, v_dim = plan.fetch, plan.sizes.v_dim
  end = jnp.minimum(end, kv.shape[1])  # Never the padding.
  index_k = selection.tile_keys(index_k)
  keys = layout.pack(kv, fetch.shards)
  by_query = layout.pad_channels(q), index_q, weights, start, end
  q, *by_query = [pad_axis(x, 1, plan.block_t) for x in by_query]
  of_block = lambda x, i: take_block(x, jnp.clip(i, 0, plan.n_blocks - 1), plan.block_t)

  def step(state, i):
    before, own, seen = state  # The selection of block i - 1, the rows of block i - 2.
    arriving = fetch.run(before, keys)
    index_q, weights, start, end = [of_block(x, i) for x in by_query]
    end = jnp.where(i < plan.n_blocks, end, start)  # The last steps select nothing.
    now = selection.select(index_q, weights, start, end, k=index_k, plan=plan.select)
    queries = of_block(q, i - 2)
    out, _ = tpu_rows.attend(queries, own, seen, plan=fetch.own, v_dim=v_dim, sm_scale=sm_scale)
    arriving, (now, out) = sparse_cores.beside(arriving, (now, out), own)
    return (now, *arriving), (out, now)

  nothing = jnp.full((batch, plan.block_t, plan.select.topk), -1, jnp.int32)
  state = nothing, *fetch.nothing(batch, plan.block_t)
  _, (out, indices) = jax.lax.scan(step, state, jnp.arange(plan.n_blocks + 2), unroll=2)
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :n_queries]
  return join(out[2:]), join(indices[:-2])
