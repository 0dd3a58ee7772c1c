# SPDX-License-Identifier: Apache-2.0
"""The indexer's divergence on all visible keys on a GPU, a block of query rows at a time.

Target and scores of a block, [block, S], lie in memory one block at a time; backward makes them
again. The gradient of index keys grows from block to block, in their order.
"""

import dataclasses

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.gpu import triton
from dsa_jax.kernels.gpu.score_tiles import ScoreTiles
from dsa_jax.kernels.gpu.selected_rows import flat
from dsa_jax.kernels.gpu.triton import column_parts, dot, gather
from dsa_jax.kernels.index_kl.gpu import compare
from dsa_jax.kernels.visibility import visible_keys
from dsa_jax.kernels.xla.rows import map_rows, scan_rows

WIDE = 256  # Channels; wider heads meet in smaller tiles.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  block_t: int = 512  # Query rows whose target and scores exist at one time.
  tile: int = 128  # Queries and keys that meet at one time for the target; half of it if wide.
  columns: int = 256  # Queries times heads that index keys meet at one time,
  columns_queries: int = 64  # and for gradients of queries,
  columns_keys: int = 128  # and of keys,
  index_tile: int = 64  # and those keys,
  index_tile_backward: int = 64  # and backward.
  span: int = 4096  # Keys that a program scores.


def forward(constants, index_q, index_k, index_weights, *, sm_scale: float, blocks: BlockSizes):
  """Returns the divergence [B, T]; of each row ln sum exp of scores, and the target's sum."""
  q, k, lse, start, end, _ = constants

  def diverge(block):
    kl, *saved = compare(*_both(block, k, index_k, sm_scale, blocks))
    return kl, tuple(saved)

  block = q, lse, start, end, index_q, index_weights
  return map_rows(diverge, block, blocks.block_t, _multiple(index_q, index_k, blocks))


def backward(constants, residuals, dkl, *, sm_scale: float, blocks: BlockSizes):
  q, k, lse, start, end, _ = constants
  index_q, index_k, index_weights, scores_lse, mass = residuals
  of_queries, of_keys = (
      ScoreTiles.of(index_q, index_k, columns, blocks.index_tile_backward, stages=2)
      for columns in (blocks.columns_queries, blocks.columns_keys)
  )

  def step(dindex_k, block):
    *block, scores_lse, mass, dkl = block
    target, scores = _both(block, k, index_k, sm_scale, blocks)
    scores_lse = jnp.where(mass > 0, scores_lse, 0)[..., None]
    dscores = dkl[..., None] * (mass[..., None] * jnp.exp(scores - scores_lse) - target)
    *_, start, end, index_q, weights = block
    args = index_k, *of_keys.pad_heads(index_q, weights)
    widths = (0, 0), (0, of_keys.padded_keys - dscores.shape[2])
    dscores = jnp.pad(flat(dscores), widths)
    where = start, jnp.minimum(end, k.shape[1])
    dindex_q, dweights = of_queries.query_gradients(*args, *where, dscores)
    dindex_k = of_keys.key_gradients(*args, dscores, dindex_k)
    heads = weights.shape[2]
    return dindex_k, (dindex_q[:, :, :heads], dweights[:, :, :heads].astype(weights.dtype))

  rows = q, lse, start, end, index_q, index_weights, scores_lse, mass, dkl
  multiple = _multiple(index_q, index_k, blocks)
  dindex_k = jnp.zeros(index_k.shape)
  dindex_k, (dindex_q, dweights) = scan_rows(step, dindex_k, rows, blocks.block_t, multiple)
  return dindex_q, dindex_k.astype(index_k.dtype), dweights


def _multiple(index_q, index_k, blocks):
  """Of query rows: of what any kernel takes at one time."""
  columns = max(blocks.columns, blocks.columns_queries, blocks.columns_keys)
  return max(ScoreTiles.of(index_q, index_k, columns, 1, 1).step_t, blocks.tile)


def _both(block, k, index_k, sm_scale, blocks):
  """Target [B, T, S], 0 where not seen, and scores, -inf there."""
  q, lse, start, end, index_q, weights = block
  n_keys = k.shape[1]
  tiles = ScoreTiles.of(index_q, index_k, blocks.columns, blocks.index_tile, stages=2)
  where = start, jnp.minimum(end, n_keys)
  scores = tiles.score(index_k, *tiles.pad_heads(index_q, weights), *where, span=blocks.span)
  shape = *start.shape, -1
  scores = scores.reshape(shape)[..., :n_keys]
  target = _target(q, k, lse, *where, sm_scale, blocks).reshape(shape)[..., :n_keys]
  seen = visible_keys(start, end, jnp.arange(n_keys))
  return jnp.where(seen, target, 0), jnp.where(seen, scores, -jnp.inf)


def _target(q, k, lse, start, end, sm_scale, blocks):
  """Mean over heads of the attention's probabilities, [B * T, S], in tiles that some row sees."""
  batch, n_rows, heads, width = q.shape
  n_keys, n_groups = k.shape[1:3]
  wide = width > WIDE
  side = max(blocks.tile // (2 if wide else 1), triton.LEAST)
  columns, steps = pl.cdiv(n_keys, side), n_rows // side
  parts = column_parts(width)

  def kernel(q, k, lse, start, end, target):
    program = pl.program_id(0)
    step, column = program // columns, program % columns
    row = step * side + jnp.arange(side)
    key = column * side + jnp.arange(side)
    starts, ends = triton.load(start.at[row]), triton.load(end.at[row])
    seen = (ends > starts) & (ends > column * side) & (starts < (column + 1) * side)
    key_rows = (step // steps * n_keys + jnp.minimum(key, n_keys - 1)) * n_groups

    def meet(head, total):
      queries = [gather(q, row * heads + head, *part) for part in parts]
      keys = [gather(k, key_rows + head // (heads // n_groups), *part) for part in parts]
      dots = sum(dot(a, b, 1, 1) for a, b in zip(queries, keys))
      top = triton.load(lse.at[row * heads + head])
      return total + jnp.exp2(triton.LOG2_E * (sm_scale * dots - top[:, None]))

    some = jnp.max(seen.astype(jnp.int32))
    total = jax.lax.fori_loop(0, some * heads, meet, jnp.zeros((side, side)))
    where = jnp.broadcast_arrays(row[:, None], key[None])
    triton.store(target.at[*where], total / heads)

  out = jax.ShapeDtypeStruct((batch * n_rows, columns * side), jnp.float32)
  args = q.reshape(-1, width), k.reshape(-1, width), lse.reshape(-1), start.reshape(-1)
  how = dict(warps=max(side // 16, 1), stages=1 if wide else 2)
  args = *args, end.reshape(-1)
  programs = batch * steps * columns
  (target,) = triton.call(kernel, 'index_kl_dense_target', programs, [out], args, **how)
  return target
