# SPDX-License-Identifier: Apache-2.0
"""The indexer's divergence on all visible keys on a GPU, a block of query rows at a time.

Target and scores of a block, [block, S], lie in memory one block at a time; backward computes them
again. The gradient of index keys grows from block to block, in their order.
"""

import dataclasses
from typing import NamedTuple

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
from dsa_jax.kernels.xla.rows import map_rows, scan_rows, whole_block

WIDE = 256  # Heads of more channels take smaller tiles.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  block_t: int = 512  # Query rows per pass, whose target and scores exist at one time.
  tile: int = 128  # Queries, and keys, of one product for the target; half of it if wide.
  columns: int = 256  # Queries times index heads of one product for scores.
  columns_queries: int = 64  # Queries times index heads of one product for gradients of queries.
  columns_keys: int = 128  # Queries times index heads of one product for gradients of keys.
  index_tile: int = 64  # Index keys of one product, forward.
  index_tile_backward: int = 64  # Index keys of one product, backward.
  span: int = 4096  # Keys that a program scores.


class Plan(NamedTuple):
  """How blocks of queries and keys are cut into programs."""

  batch: int
  n_keys: int
  block_t: int  # Query rows per pass.
  side: int  # Queries, and keys, of one product for the target.
  wide: bool  # Whether the attention's heads are wide.
  span: int  # Keys that a program scores.
  scores: ScoreTiles
  of_queries: ScoreTiles  # For gradients of queries.
  of_keys: ScoreTiles  # For gradients of keys.

  @property
  def n_rows(self) -> int:
    """Query rows of a pass, of all sequences."""
    return self.batch * self.block_t

  @property
  def columns(self) -> int:
    """Tiles of keys for the target."""
    return pl.cdiv(self.n_keys, self.side)

  @property
  def steps(self) -> int:
    """Tiles of queries of a sequence for the target."""
    return self.block_t // self.side

  @property
  def target_programs(self) -> int:
    return self.batch * self.steps * self.columns

  def forward_kernels(self) -> dict[str, int]:
    """Returns the programs of each kernel, forward."""
    return {
        'index_scores': self.scores.score_programs(self.n_rows, self.span),
        'index_kl_dense_target': self.target_programs,
    }

  def backward_kernels(self) -> dict[str, int]:
    """Returns the programs of each kernel, backward."""
    return self.forward_kernels() | {
        'index_scores_dq': self.of_queries.steps(self.n_rows),
        'index_scores_dk': self.of_keys.key_programs(self.batch),
    }


def plan(q, k, index_q, index_k, *, blocks: BlockSizes) -> Plan:
  """Returns how `forward` and `backward` are done; of the arrays only shapes count.

  Args:
    q: The attention's queries.
    k: The attention's keys.
    index_q: The index queries.
    index_k: The index keys.
    blocks: The op's block sizes.
  """
  # A pass is a multiple of the rows that any kernel takes at one time.
  most = max(blocks.columns, blocks.columns_queries, blocks.columns_keys)
  multiple = max(ScoreTiles.of(index_q, index_k, most, 1, 1).step_t, blocks.tile)
  block_t = whole_block(q.shape[1], blocks.block_t, multiple)
  block = jax.ShapeDtypeStruct((q.shape[0], block_t, *index_q.shape[2:]), index_q.dtype)
  wide, tile = q.shape[3] > WIDE, blocks.index_tile_backward
  return Plan(
      batch=q.shape[0],
      n_keys=k.shape[1],
      block_t=block_t,
      side=max(blocks.tile // (2 if wide else 1), triton.LEAST),
      wide=wide,
      span=blocks.span,
      scores=ScoreTiles.of(block, index_k, blocks.columns, blocks.index_tile, stages=2),
      of_queries=ScoreTiles.of(index_q, index_k, blocks.columns_queries, tile, stages=2),
      of_keys=ScoreTiles.of(index_q, index_k, blocks.columns_keys, tile, stages=2),
  )


def forward(constants, index_q, index_k, index_weights, *, sm_scale: float, blocks: BlockSizes):
  """Returns the divergence [B, T]; of each row ln sum exp of scores, and the target's sum."""
  q, k, lse, start, end, _ = constants
  p = plan(q, k, index_q, index_k, blocks=blocks)

  def diverge(block):
    kl, *saved = compare(*_target_and_scores(p, block, k, index_k, sm_scale))
    return kl, tuple(saved)

  block = q, lse, start, end, index_q, index_weights
  return map_rows(diverge, block, p.block_t, p.block_t)


def backward(constants, residuals, dkl, *, sm_scale: float, blocks: BlockSizes):
  """Returns the gradients of the three index inputs."""
  q, k, lse, start, end, _ = constants
  index_q, index_k, index_weights, scores_lse, mass = residuals
  p = plan(q, k, index_q, index_k, blocks=blocks)
  of_queries, of_keys = p.of_queries, p.of_keys

  def step(dindex_k, block):
    *block, scores_lse, mass, dkl = block
    target, scores = _target_and_scores(p, block, k, index_k, sm_scale)
    scores_lse = jnp.where(mass > 0, scores_lse, 0)[..., None]
    dscores = dkl[..., None] * (mass[..., None] * jnp.exp(scores - scores_lse) - target)
    *_, start, end, index_q, weights = block
    args = index_k, *of_keys.pad_heads(index_q, weights)
    widths = (0, 0), (0, of_keys.padded_keys - dscores.shape[2])
    dscores = jnp.pad(flat(dscores), widths)
    interval = start, jnp.minimum(end, k.shape[1])
    dindex_q, dweights = of_queries.query_gradients(*args, *interval, dscores)
    dindex_k = of_keys.key_gradients(*args, dscores, dindex_k)
    heads = weights.shape[2]
    return dindex_k, (dindex_q[:, :, :heads], dweights[:, :, :heads].astype(weights.dtype))

  rows = q, lse, start, end, index_q, index_weights, scores_lse, mass, dkl
  dindex_k = jnp.zeros(index_k.shape)
  dindex_k, (dindex_q, dweights) = scan_rows(step, dindex_k, rows, p.block_t, p.block_t)
  return dindex_q, dindex_k.astype(index_k.dtype), dweights


def _target_and_scores(plan: Plan, block, k, index_k, sm_scale: float):
  """Returns the target [B, T, S], 0 where not seen, and the scores, -inf there."""
  q, lse, start, end, index_q, weights = block
  n_keys, tiles = k.shape[1], plan.scores
  interval = start, jnp.minimum(end, n_keys)
  scores = tiles.score(index_k, *tiles.pad_heads(index_q, weights), *interval, span=plan.span)
  shape = *start.shape, -1
  scores = scores.reshape(shape)[..., :n_keys]
  target = _target(plan, q, k, lse, *interval, sm_scale).reshape(shape)[..., :n_keys]
  seen = visible_keys(start, end, jnp.arange(n_keys))
  return jnp.where(seen, target, 0), jnp.where(seen, scores, -jnp.inf)


def _target(plan: Plan, q, k, lse, start, end, sm_scale: float):
  """Returns the mean over heads of the attention's probabilities, in tiles that some row sees.

  It is float32 [B * T, S], S padded.
  """
  batch, n_rows, heads, width = q.shape
  n_keys, n_groups = k.shape[1:3]
  side, columns, steps = plan.side, plan.columns, plan.steps
  parts = column_parts(width)

  def kernel(q, k, lse, start, end, target):
    program = pl.program_id(0)
    step, column = program // columns, program % columns
    row = step * side + jnp.arange(side)
    key = column * side + jnp.arange(side)
    starts, ends = triton.load(start.at[row]), triton.load(end.at[row])
    seen = (ends > starts) & (ends > column * side) & (starts < (column + 1) * side)
    key_rows = (step // steps * n_keys + jnp.minimum(key, n_keys - 1)) * n_groups

    def add_head(head, total):
      queries = [gather(q, row * heads + head, *part) for part in parts]
      keys = [gather(k, key_rows + head // (heads // n_groups), *part) for part in parts]
      dots = sum(dot(a, b, 1, 1) for a, b in zip(queries, keys))
      top = triton.load(lse.at[row * heads + head])
      return total + jnp.exp2(triton.LOG2_E * (sm_scale * dots - top[:, None]))

    some = jnp.max(seen.astype(jnp.int32))
    total = jax.lax.fori_loop(0, some * heads, add_head, jnp.zeros((side, side)))
    places = jnp.broadcast_arrays(row[:, None], key[None])
    triton.store(target.at[*places], total / heads)

  out = jax.ShapeDtypeStruct((batch * n_rows, columns * side), jnp.float32)
  args = [q.reshape(-1, width), k.reshape(-1, width)]
  args += [x.reshape(-1) for x in (lse, start, end)]
  (target,) = triton.call(
      kernel,
      'index_kl_dense_target',
      plan.target_programs,
      [out],
      args,
      warps=max(side // 16, 1),
      stages=1 if plan.wide else 2,
  )
  return target
