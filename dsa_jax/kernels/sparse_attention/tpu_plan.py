# SPDX-License-Identifier: Apache-2.0
"""Which path attention to a selection takes on a TPU, and how each path cuts its work.

Where there are few queries, XLA gathers the rows that they selected (`Decode`). Otherwise kernels
copy rows within VMEM (`InVmem`). Where VMEM holds too few keys for whole tiles of each shard, rows
are first brought together in HBM (`Together`, and `TogetherBackward` for the gradients). Gradients
of grouped heads that share a selection have a path of their own (`WideBackward`).
"""

import dataclasses
from typing import NamedTuple

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.tpu import gather_scatter
from dsa_jax.kernels.tpu.gather_scatter import Fetch, Gather, OwnRows, Scatter
from dsa_jax.kernels.tpu.layout import LANES, Rows
from dsa_jax.kernels.tpu.plans import KernelPlan
from dsa_jax.kernels.tpu.shards import (
    SPARE,
    ShardPlan,
    Shards,
    fit_chip,
    plan_shards,
    plan_whole_tiles,
)
from dsa_jax.kernels.xla.rows import whole_block


TOGETHER_BYTES = 2**33  # Rows of a block of queries take no more of HBM.
FITTING = 0.88  # The part of VMEM that what is counted may take.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  block_t: int = 1024  # Query rows per pass; bounds the accumulators' memory.
  step_t: int = 4  # Query rows of a step of the grid; half of them where VMEM is 64 MiB.
  tile: int = 1152  # At most so many selected rows of a query are read at one time.
  line: int = LANES  # Slots of a line, where tiles begin; a chip has no other lines.
  copied: int = 256  # Rows copied between two branches.
  step_t_compact: int = 4  # Query rows of a step that brings their selected rows together.
  block_t_compact: int = 512  # Query rows per pass whose rows are together; half of it backward.
  own_tile: int = 2304  # At most so many of those rows are read at one time; half if float32.
  vmem_share: float = 0.8  # Part of VMEM for a shard of keys and of their gradients.
  # Forward, grouped heads that share a selection of so many keys read one wide row for each, all
  # key heads side by side. That is one copy in place of G, for products G times as wide.
  wide_slots: int = 1024
  # Backward, grouped heads that share a selection have at most so many key heads side by side.
  wide_heads: int = 8
  wide_rows: int = 256  # At most so many of their rows are read for a query at one time.
  step_t_wide: int = 8  # Query rows of a step.
  block_t_wide: int = 4096  # Query rows per pass, for which the shards come to VMEM once.
  vmem_share_wide: float = 0.92  # Part of VMEM for a shard and for a step's queries.


class Sizes(NamedTuple):
  """The sizes that a plan is made for."""

  batch: int
  n_queries: int
  n_heads: int
  n_keys: int
  n_slots: int
  v_dim: int
  rows: Rows  # The layout of keys.

  @classmethod
  def of(cls, q, kv, n_slots: int, v_dim: int) -> 'Sizes':
    """Returns the sizes of q [B, T, H, E] and kv [B, S, E]."""
    rows = Rows(kv.shape[-1], kv.dtype)
    return cls(*q.shape[:3], kv.shape[1], n_slots, v_dim, rows)

  @property
  def attended_bytes(self) -> int:
    """Bytes of a query and of its output, which `tpu_rows` streams through HBM with its rows."""
    return self.n_heads * self.rows.channels * 2 + self.n_heads * self.v_dim * 4


class InVmem(NamedTuple):
  """Keys lie in VMEM, shard after shard, and the rows of each query are copied there."""

  sizes: Sizes
  name: str
  block_t: int
  keys: ShardPlan
  adds: bool  # Whether the gradient of the keys is added to sums in VMEM.

  gathered_bytes = 0

  def kernels(self) -> dict[str, KernelPlan]:
    block_t = whole_block(self.sizes.n_queries, self.block_t, self.keys.step_t)
    loops = [*self.keys.step_loops(), *self.keys.copy_loops()]
    loops += self.keys.add_loops() if self.adds else []
    return {self.name: KernelPlan(self.keys.grid(self.sizes.batch, block_t), loops)}


class Decode(NamedTuple):
  """XLA brings the rows of few queries together. All queries count as those of one sequence."""

  sizes: Sizes
  own: OwnRows

  gathered_bytes = 0

  def kernels(self) -> dict[str, KernelPlan]:
    n_queries = self.sizes.batch * self.sizes.n_queries
    n_bytes = self.sizes.n_slots * self.sizes.rows.bytes + self.sizes.attended_bytes
    return {'sparse_attention_rows': self.own.kernel(1, n_queries, n_bytes)}


class Together(NamedTuple):
  """Kernels bring the rows of a block of queries together, which then attend to them."""

  sizes: Sizes
  block_t: int
  gather: Gather

  gathered_bytes = 0

  def kernels(self) -> dict[str, KernelPlan]:
    batch, own = self.sizes.batch, self.gather.own
    block_t = whole_block(self.sizes.n_queries, self.block_t, self.gather.plan.step_t)
    n_bytes = own.n_rows * self.sizes.rows.bytes + self.sizes.attended_bytes
    return {
        'gather_selected_rows': self.gather.kernel(batch, block_t),
        'sparse_attention_rows': own.kernel(batch, block_t, n_bytes),
    }


class TogetherBackward(NamedTuple):
  """Each query's rows get their gradients, which are then added to those of the keys."""

  sizes: Sizes
  block_t: int
  gather: Gather | Fetch  # SparseCores fetch where there are some.
  scatter: Scatter

  @property
  def gathered_bytes(self) -> int:
    """Bytes that SparseCores fetch for one query, beside the kernels."""
    return self.gather.bytes if isinstance(self.gather, Fetch) else 0

  def kernels(self) -> dict[str, KernelPlan]:
    batch, rows, own = self.sizes.batch, self.sizes.rows, self.gather.own
    block_t = whole_block(self.sizes.n_queries, self.block_t, self.scatter.plan.step_t)
    fetches = isinstance(self.gather, Fetch)
    n_rows = self.sizes.n_slots if fetches else own.n_rows
    n_bytes = n_rows * (rows.bytes + rows.sum_bytes) + 8 * self.sizes.n_heads * rows.channels
    gather = {} if fetches else {'gather_selected_rows': self.gather.kernel(batch, block_t)}
    return gather | {
        'sparse_attention_rows_backward': own.kernel(batch, block_t, n_bytes),
        'scatter_selected_rows': self.scatter.kernel(batch, block_t, n_rows),
    }


class WideBackward(NamedTuple):
  """Keys of `n_wide` key heads lie side by side in VMEM, with their gradients, shard by shard."""

  sizes: Sizes  # Those of `n_wide` key heads, whose keys are folded.
  n_wide: int
  block_t: int
  keys: ShardPlan  # Its keys and slots are tokens.

  gathered_bytes = 0

  @property
  def row_shards(self) -> Shards:
    """The shards as those of folded keys."""
    return Shards(self.keys.shards.n, self.keys.shards.share * self.n_wide, 0)

  def kernels(self) -> dict[str, KernelPlan]:
    """Returns the plan for `n_wide` key heads. Each shard passes HBM, and so does each query."""
    rows, shards, heads = self.sizes.rows, self.row_shards, self.sizes.n_heads
    block_t = whole_block(self.sizes.n_queries, self.block_t, self.keys.step_t)
    of_query = heads * (2 * rows.channels * rows.dtype.itemsize + 2 * rows.sum_bytes + 4 * LANES)
    of_shard = shards.stored * (rows.bytes + 2 * rows.sum_bytes)
    hbm_bytes = shards.n * (of_query + of_shard / block_t)
    grid, loops = self.keys.grid(self.sizes.batch, block_t), self.keys.whole_tile_loops()
    return {'sparse_attention_backward_wide': KernelPlan(grid, loops, hbm_bytes)}


def plan_forward(
    q, kv, n_slots: int, *, v_dim: int, vmem: int, blocks: BlockSizes
) -> InVmem | Decode | Together:
  """Returns how `forward` of q [B, T, H, E] and kv [B, S, E] is done.

  Args:
    q: Queries; only their shape counts.
    kv: Keys; only their shape and dtype count.
    n_slots: K, the selected keys of a query.
    v_dim: The width of the value.
    vmem: Bytes of VMEM of the chip.
    blocks: The op's block sizes.
  """
  sizes, blocks = Sizes.of(q, kv, n_slots, v_dim), fit_chip(blocks, vmem)
  if sizes.n_queries * n_slots < sizes.n_keys:  # Fewer rows are selected than there are keys.
    return Decode(sizes, gather_scatter.plan_own(n_slots, sizes.rows, vmem, blocks))
  keys = plan_shards(sizes.n_keys, n_slots, sizes.rows.bytes, vmem, blocks)
  if keys.shards.loose:
    gather, _ = gather_scatter.plan_gather(sizes.rows, sizes.n_keys, n_slots, vmem, blocks)
    return Together(sizes, blocks.block_t_compact, gather)
  return InVmem(sizes, 'sparse_attention_forward', blocks.block_t, keys, adds=False)


def fits(plan: InVmem | Decode | Together, vmem: int) -> bool:
  """Returns whether `forward` has room for key heads side by side.

  In HBM that is for the rows that a block of queries has selected. In VMEM it is for a shard, two
  windows of a step's queries and of their outputs, and the rows of its tiles, which count twice: of 32
  key heads, the compiler asked for 126 MB where all of it was 102.
  """
  if isinstance(plan, Together):
    return plan.block_t * plan.gather.own.n_rows * plan.sizes.rows.bytes <= TOGETHER_BYTES
  if isinstance(plan, Decode):
    return True
  rows, keys = plan.sizes.rows, plan.keys
  of_query = plan.sizes.n_heads * rows.channels * 2 * (rows.dtype.itemsize + 4)
  of_step = keys.step_t * (2 * keys.tile * rows.bytes + of_query)
  return keys.shards.stored * rows.bytes + of_step <= FITTING * vmem


def plan_backward(
    q, kv, n_slots: int, *, v_dim: int, vmem: int, sparse_cores: bool, blocks: BlockSizes
) -> InVmem | TogetherBackward:
  """Returns how `backward` is done, on a chip with SparseCores or without; see `plan_forward`."""
  sizes, blocks = Sizes.of(q, kv, n_slots, v_dim), fit_chip(blocks, vmem)
  bytes_per_key = sizes.rows.bytes + sizes.rows.sum_bytes
  keys = plan_shards(sizes.n_keys, n_slots, bytes_per_key, vmem, blocks)
  if not keys.shards.loose:
    return InVmem(sizes, 'sparse_attention_backward', blocks.block_t, keys, adds=True)
  of_keys = sizes.rows, sizes.n_keys, n_slots, vmem, blocks
  gather, scatter = gather_scatter.plan_gather(*of_keys)
  if sparse_cores:
    gather = gather_scatter.plan_fetch(*of_keys)
    scatter = dataclasses.replace(scatter, gather=gather)
  return TogetherBackward(sizes, blocks.block_t_compact // 2, gather, scatter)


def plan_wide(q, kv, n_slots: int, *, n_groups: int, vmem: int, blocks: BlockSizes) -> WideBackward:
  """Returns how the gradients of grouped heads that share a selection are found.

  Args:
    q: Queries of all heads, [B, T, H, E]; only their shape counts.
    kv: Folded keys, [B, S * G, E]; only their shape and dtype count.
    n_slots: K.
    n_groups: G.
    vmem: Bytes of VMEM of the chip.
    blocks: The op's block sizes.
  """
  most = min(blocks.wide_heads, SPARE)  # A spare token has as many rows.
  n_wide = max(n for n in range(1, most + 1) if n_groups % n == 0)
  rows = Rows(kv.shape[2], kv.dtype)
  n_keys, n_heads = kv.shape[1] // n_groups, q.shape[2] * n_wide // n_groups
  sizes = Sizes(*q.shape[:2], n_heads, n_keys, n_slots, kv.shape[2], rows)
  row_bytes = rows.bytes + rows.sum_bytes
  # Two windows of a query, its gradient before and after, each head's statistics, and a tile.
  of_head = 4 * rows.channels * rows.dtype.itemsize + 4 * rows.sum_bytes + 8 * LANES
  of_step = blocks.step_t_wide * (n_heads * of_head + blocks.wide_rows * row_bytes)
  blocks = dataclasses.replace(
      blocks,
      tile=max(blocks.wide_rows // n_wide, 1),
      step_t=blocks.step_t_wide,
      vmem_share=blocks.vmem_share_wide - of_step / vmem,
  )
  token_bytes = n_wide * row_bytes
  keys = plan_whole_tiles(n_keys, n_slots, token_bytes, vmem, blocks)
  return WideBackward(sizes, n_wide, blocks.block_t_wide, keys)
