# SPDX-License-Identifier: Apache-2.0
"""How `tpu_dense` cuts queries, keys and heads into blocks."""

import dataclasses
from typing import NamedTuple

from jax.experimental import pallas as pl

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.tpu.layout import Rows
from dsa_jax.kernels.tpu.plans import KernelPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  block_t: int = 1024  # Query rows of a block, forward.
  block_t_backward: int = 512  # Query rows of a block whose gradients are in VMEM, too.
  block_s: int = 1024  # Keys whose target and scores are in VMEM.
  heads: int = 8  # At most so many heads of attention run in a step of the grid; fewer if wide.
  tile_t: int = 256  # Query rows of one product.
  tile_s: int = 512  # Keys of one product.


class Plan(NamedTuple):
  """How `forward` or `backward` runs: one kernel, grid (batch, query blocks, key blocks, steps)."""

  name: str
  batch: int
  n_queries: int
  n_keys: int
  block_t: int
  block_s: int
  tile_t: int
  tile_s: int
  heads: int  # Heads of attention of a group.
  n_groups: int  # Groups of heads, of attention and of the indexer alike.
  index_heads: int  # Index heads of a group; the last ones may be padding.
  n_index_heads: int  # Index heads in all.
  key_heads: int  # Key heads of a group.
  heads_per_key: int  # Heads of attention that share a key head.
  n_steps: int  # Groups of a block, which backward goes through twice.
  vmem: int  # Bytes of VMEM of the chip.

  gathered_bytes = 0

  @property
  def grid(self) -> tuple[int, int, int, int]:
    n_blocks = pl.cdiv(self.n_queries, self.block_t)
    return self.batch, n_blocks, pl.cdiv(self.n_keys, self.block_s), self.n_steps

  def kernels(self) -> dict[str, KernelPlan]:
    """Returns the plan of the one kernel.

    Steps without work count like others. Blocks of queries at the diagonal see half a block more.
    """
    columns = self.block_t // self.tile_t
    steps = self.n_steps * self.grid[2] / self.block_t
    seen = (self.n_keys + min(self.block_t, self.n_keys)) / 2
    tiles = seen / self.tile_s / self.block_t
    of_group, of_block = [[(2, n)] * columns for n in (self.n_groups * tiles, tiles)]
    loops = [*of_group, *of_block]
    if self.n_steps > self.n_groups:
      loops = [(2, self.n_index_heads / self.block_t), *loops, *of_group]
    return {self.name: KernelPlan(self.grid, [(1, steps), *loops])}


def plan_forward(q, k, index_q, *, vmem: int, blocks: BlockSizes) -> Plan:
  """Returns how `forward` runs; of the arrays only shapes and dtypes count.

  Args:
    q: The attention's queries.
    k: The attention's keys.
    index_q: The index queries.
    vmem: Bytes of VMEM of the chip.
    blocks: The op's block sizes.
  """
  return _plan('index_kl_dense_forward', q, k, index_q, vmem, blocks, blocks.block_t, passes=1)


def plan_backward(q, k, index_q, *, vmem: int, blocks: BlockSizes) -> Plan:
  """Returns how `backward` runs; see `plan_forward`."""
  block_t = blocks.block_t_backward
  return _plan('index_kl_dense_backward', q, k, index_q, vmem, blocks, block_t, passes=2)


def _plan(name, q, k, index_q, vmem, blocks, block_t, *, passes) -> Plan:
  batch, n_queries, n_heads = q.shape[:3]
  n_keys, per_key = k.shape[1], n_heads // k.shape[2]
  whole = lambda n, tile: -(-n // tile) * tile
  block_t = min(block_t, whole(n_queries, blocks.tile_t))
  block_s = min(blocks.block_s, whole(n_keys, blocks.tile_s))
  width = Rows(q.shape[-1], q.dtype)
  bytes_per_head = 2 * (block_t + block_s) * width.channels * width.dtype.itemsize
  most = min(blocks.heads, vmem // (3 * bytes_per_head), n_heads)
  fits = lambda n: n_heads % n == 0 and (n % per_key == 0 or per_key % n == 0)
  heads = max([n for n in range(1, most + 1) if fits(n)], default=1)
  n_groups = n_heads // heads
  return Plan(
      name=name,
      batch=batch,
      n_queries=n_queries,
      n_keys=n_keys,
      block_t=block_t,
      block_s=block_s,
      tile_t=blocks.tile_t,
      tile_s=blocks.tile_s,
      heads=heads,
      n_groups=n_groups,
      index_heads=-(-index_q.shape[2] // n_groups),
      n_index_heads=index_q.shape[2],
      key_heads=-(-heads // per_key),
      heads_per_key=per_key,
      n_steps=passes * n_groups,
      vmem=vmem,
  )
