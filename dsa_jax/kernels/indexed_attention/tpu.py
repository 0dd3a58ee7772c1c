# SPDX-License-Identifier: Apache-2.0
"""Selection and attention on a TPU while its SparseCores bring the selected rows together.

Queries go in blocks. In each step SparseCores fetch the rows of the block before, which take
longer than attention to them; the TensorCore selects for the next block meanwhile, and attends
from the last one, whose rows have come.
"""

import dataclasses

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.index_topk import tpu as selection
from dsa_jax.kernels.sparse_attention import tpu as attention, tpu_rows
from dsa_jax.kernels.tpu import gather_scatter, resident, sparse_cores
from dsa_jax.kernels.tpu.resident import Rows
from dsa_jax.kernels.xla.rows import pad_axis, take_block


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  block_t: int = 128  # Query rows of a step.
  select: selection.BlockSizes = selection.BlockSizes()
  attend: attention.BlockSizes = attention.BlockSizes()


def pays(q, kv, topk: int, blocks: BlockSizes) -> bool:
  """Whether the TensorCore alone would bring rows together, too."""
  return sparse_cores.available() and attention.brings_together(q, kv, topk, blocks.attend)


def forward(
    q, kv, index_q, index_k, weights, start, end, *, topk: int, v_dim: int, sm_scale: float, blocks
):
  """Returns the output and the selection."""
  batch, n_queries = q.shape[:2]
  rows = Rows(kv.shape[-1], kv.dtype)
  end = jnp.minimum(end, kv.shape[1])  # Never the padding.
  index_k = selection.tile_keys(index_k)
  select_in = selection.fit(blocks.select, blocks.block_t, index_k.shape[1])
  attend_in = resident.fit_chip(blocks.attend, resident.vmem_bytes())
  fetch = gather_scatter.Fetch.of(rows, kv.shape[1], topk, attend_in)
  keys = resident.pack(kv, fetch.shards)
  by_query = resident.pad_channels(q), index_q, weights, start, end
  q, *by_query = [pad_axis(x, 1, blocks.block_t) for x in by_query]
  n_blocks = q.shape[1] // blocks.block_t
  of_block = lambda x, i: take_block(x, jnp.clip(i, 0, n_blocks - 1), blocks.block_t)

  def step(state, i):
    before, own, seen = state  # The selection of block i - 1, the rows of block i - 2.
    arriving = fetch.run(before, keys)
    index_q, weights, start, end = [of_block(x, i) for x in by_query]
    end = jnp.where(i < n_blocks, end, start)  # The last steps select nothing.
    now = selection.select(index_q, weights, start, end, k=index_k, topk=topk, blocks=select_in)
    out, _ = tpu_rows.attend(of_block(q, i - 2), own, seen, **how)
    arriving, (now, out) = sparse_cores.beside(arriving, (now, out), own)
    return (now, *arriving), (out, now)

  how = dict(rows=rows, v_dim=v_dim, sm_scale=sm_scale, blocks=attend_in)
  nothing = jnp.full((batch, blocks.block_t, topk), -1, jnp.int32)
  state = nothing, *fetch.nothing(batch, blocks.block_t)
  _, (out, indices) = jax.lax.scan(step, state, jnp.arange(n_blocks + 2), unroll=2)
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :n_queries]
  return join(out[2:]), join(indices[:-2])
