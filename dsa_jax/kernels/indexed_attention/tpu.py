# SPDX-License-Identifier: Apache-2.0
"""Selection and attention on a TPU while its SparseCores bring the selected rows together.

Queries go in blocks. In each step SparseCores fetch the rows of the block before, which take
longer than attention to them; the TensorCore selects for the next block meanwhile, and attends
from the last one, whose rows have come.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dsa_jax.kernels import compact, resident, sparse_cores
from dsa_jax.kernels.index_topk import tpu as selection
from dsa_jax.kernels.resident import LANES, Rows
from dsa_jax.kernels.rows import pad_axis, take_block
from dsa_jax.kernels.shards import Shards
from dsa_jax.kernels.sparse_attention import tpu as attention
from dsa_jax.kernels.sparse_attention import tpu_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
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
  n_tiles, tile = compact.own_tiles(topk, rows, attend_in)
  n_slots = n_tiles * tile
  keys = resident.pack(kv, Shards(1, kv.shape[1] + n_slots, 0))  # Zeros for slots without a key.
  stored = keys.shape[2] // rows.lines
  by_query = resident.pad_channels(q), index_q, weights, start, end
  q, *by_query = [pad_axis(x, 1, blocks.block_t) for x in by_query]
  n_blocks = q.shape[1] // blocks.block_t
  of_block = lambda x, i: take_block(x, jnp.clip(i, 0, n_blocks - 1), blocks.block_t)

  def gather(indices):
    """The rows of slots, [B, T, lines, N, 128]; slots without a key fetch from many places."""
    indices = jnp.pad(indices, [(0, 0), (0, 0), (0, n_slots - topk)], constant_values=-1)
    row = jnp.where(indices >= 0, indices, kv.shape[1] + jnp.arange(n_slots))
    row += stored * jnp.arange(batch)[:, None, None]
    lines = rows.lines * row[:, :, None] + jnp.arange(rows.lines)[:, None]
    fetched = sparse_cores.gather(keys.reshape(-1, LANES), lines.reshape(-1))
    return fetched.reshape(*lines.shape, LANES)

  def attend(q, own, indices):
    seen = jnp.pad(indices >= 0, [(0, 0), (0, 0), (0, n_slots - topk)])
    how = dict(rows=rows, v_dim=v_dim, sm_scale=sm_scale, blocks=attend_in)
    return tpu_rows.attend(q, own, seen, **how)[0]

  def step(state, i):
    before, last, own = state  # Selections of blocks i - 1 and i - 2; the rows of the latter.
    arriving = gather(before)
    index_q, weights, start, end = [of_block(x, i) for x in by_query]
    end = jnp.where(i < n_blocks, end, start)  # The last steps select nothing.
    now = selection.select(index_q, weights, start, end, k=index_k, topk=topk, blocks=select_in)
    out = attend(of_block(q, i - 2), own, last)
    # The rows go when all is done: XLA would wait with the fetch until they have made room.
    arriving, now, out, _ = jax.lax.optimization_barrier((arriving, now, out, own))
    return (now, before, arriving), (out, now)

  nothing = jnp.full((batch, blocks.block_t, topk), -1, jnp.int32)
  own = jnp.zeros((batch, blocks.block_t, rows.lines, n_slots, LANES), rows.words)
  steps = jnp.arange(n_blocks + 2)
  # In pairs: each step's rows arrive where those of the one before it were, and none are copied.
  _, (out, indices) = jax.lax.scan(step, (nothing, nothing, own), steps, unroll=2)
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :n_queries]
  return join(out[2:]), join(indices[:-2])
