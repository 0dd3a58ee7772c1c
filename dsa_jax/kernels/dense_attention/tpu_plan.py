# SPDX-License-Identifier: Apache-2.0
"""How `tpu` cuts queries and keys into blocks."""

import dataclasses
from typing import NamedTuple

from jax.experimental import pallas as pl

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.tpu.layout import LANES, Rows
from dsa_jax.kernels.tpu.plans import KernelPlan

MOST_SCALARS = 3 * 2**16  # Three quarters of the SMEM of a chip, in words.
WORD = 32  # Bits of a word, one for each line of a block of keys.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  block_r: int = 1024  # Rows of a block; a row is one head of a query.
  block_s: int = 8192  # Keys that are in VMEM at one time; half, or a quarter, where fewer fit.
  tile_s: int = 1024  # Keys of one product, forward.
  tile_s_backward: int = 512  # Keys of one product, backward.
  line: int = LANES  # Keys side by side; a chip has no other lines.
  block_t: int = 1024  # Query rows per pass if a selection is given, whose bits exist at one time.
  vmem_share: float = 0.4  # Part of VMEM for a block of keys and its gradients.


class Plan(NamedTuple):
  """How `forward` or `backward` runs: one kernel for blocks of rows times blocks of keys.

  The rows of a key head are its heads of query 0, then those of query 1, and so on.
  """

  name: str
  batch: int
  n_groups: int  # Key heads.
  per_group: int  # Heads that share a key head.
  n_queries: int  # Queries of one pass.
  n_keys: int
  block_r: int  # Rows of a block.
  block_s: int  # Keys of a block.
  tile_s: int
  line: int
  by_row: bool  # Whether blocks of rows are the outer loop, and blocks of keys the inner one.
  vmem: int  # Bytes of VMEM of the chip.

  gathered_bytes = 0

  @property
  def row_blocks(self) -> int:
    return pl.cdiv(self.n_queries * self.per_group, self.block_r)

  @property
  def key_blocks(self) -> int:
    return pl.cdiv(self.n_keys, self.block_s)

  @property
  def grid(self) -> tuple[int, int, int, int]:
    blocks = self.row_blocks, self.key_blocks
    return self.batch, self.n_groups, *(blocks if self.by_row else blocks[::-1])

  def kernels(self) -> dict[str, KernelPlan]:
    """Returns the plan of the one kernel.

    Tiles at the diagonal are masked, and those before it are not. Steps without work count like
    others.
    """
    blocks = self.n_groups * self.row_blocks / self.n_queries
    queries = max(self.block_r / self.per_group, 1)  # Of a block of rows.
    masked = min(max(queries, self.tile_s), self.n_keys) / self.tile_s
    whole = max((self.n_keys - queries) / 2 / self.tile_s, 0)
    loops = [(1, blocks * self.key_blocks), (2, blocks * masked), (2, blocks * whole)]
    return {self.name: KernelPlan(self.grid, loops)}


def plan_forward(q, k, v, *, masked: bool, vmem: int, blocks: BlockSizes) -> Plan:
  """Returns how `forward` runs; of the arrays only shapes and dtypes count.

  Args:
    q: Queries.
    k: Keys.
    v: Values.
    masked: Whether a selection is given.
    vmem: Bytes of VMEM of the chip.
    blocks: The op's block sizes.

  Raises:
    ValueError: The queries have more blocks than the scalar memory has intervals for.
  """
  # Two buffers of each block.
  bytes_per_key = 2 * _row_bytes(k, v)
  tile_s = blocks.tile_s
  return _plan('dense_attention_forward', q, k, masked, vmem, blocks, tile_s, bytes_per_key)


def plan_backward(q, k, v, *, masked: bool, vmem: int, blocks: BlockSizes) -> Plan:
  """Returns how `backward` runs; see `plan_forward`."""
  # Two buffers of each block and of its gradients, which may be float32, and the sums.
  widths = Rows(k.shape[-1], k.dtype).channels + Rows(v.shape[-1], v.dtype).channels
  bytes_per_key = 2 * _row_bytes(k, v) + 2 * max(_row_bytes(k, v), 4 * widths * masked) + 4 * widths
  tile_s = blocks.tile_s_backward
  return _plan('dense_attention_backward', q, k, masked, vmem, blocks, tile_s, bytes_per_key)


def _row_bytes(*arrays) -> int:
  return sum(Rows(x.shape[-1], x.dtype).channels * x.dtype.itemsize for x in arrays)


def _plan(name, q, k, masked, vmem, blocks: BlockSizes, tile_s, bytes_per_key) -> Plan:
  batch, n_queries, n_heads = q.shape[:3]
  n_keys, n_groups = k.shape[1:3]
  whole = lambda n, unit: pl.cdiv(n, unit) * unit
  if tile_s % blocks.line:
    raise ValueError(f'tile_s={tile_s} must be a multiple of line={blocks.line}.')
  per_group = n_heads // n_groups
  n_queries = min(n_queries, blocks.block_t) if masked else n_queries
  tile_s = min(tile_s, whole(n_keys, blocks.line))
  block_s = min(blocks.block_s, WORD * blocks.line) if masked else blocks.block_s
  while block_s > tile_s and block_s * bytes_per_key > blocks.vmem_share * vmem:
    block_s //= 2
  plan = Plan(
      name=name,
      batch=batch,
      n_groups=n_groups,
      per_group=per_group,
      n_queries=n_queries,
      n_keys=n_keys,
      block_r=min(blocks.block_r, whole(n_queries * per_group, blocks.line)),
      block_s=min(max(block_s // tile_s, 1) * tile_s, whole(n_keys, tile_s)),
      tile_s=tile_s,
      line=blocks.line,
      by_row=name.endswith('forward'),
      vmem=vmem,
  )
  n_scalars = batch * (4 * whole(plan.row_blocks, LANES) + 2 * whole(plan.key_blocks, LANES))
  if n_scalars > MOST_SCALARS:
    raise ValueError(
        f'the intervals of {batch} sequences of {n_queries} queries with {per_group} heads of each '
        f'key head take {n_scalars} words of scalar memory, of which there are {MOST_SCALARS}: '
        'give fewer sequences or queries at one time.'
    )
  return plan
