# SPDX-License-Identifier: Apache-2.0
"""The indexer's divergence on selected keys, of which each query row has its own.

A row's divergence is sum target * (ln target - score) + sum target * ln sum exp score.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.groups import fold_heads, fold_indices, fold_keys
from dsa_jax.kernels.index_scores import weigh
from dsa_jax.kernels.mean_attention import mean_attention
from dsa_jax.kernels.products import einsum
from dsa_jax.kernels.xla.rows import gather_rows, map_rows, scan_rows, scatter_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result."""

  block_t: int = 8  # Query rows per pass.
  gathered: int = 2**19  # With several key heads, at most so many bytes are gathered at one time.


def forward(constants, index_q, index_k, index_weights, *, sm_scale: float, blocks: BlockSizes):
  """Returns the divergence, and what its gradient needs.

  That is ln sum exp of the scores and the sum of the target, both [B, T], and the target itself,
  [B, T, K], which is smaller than the queries that it is computed from.
  """
  q, k, lse, start, end, indices = constants

  def compare(rows):
    q, lse, start, end, indices, index_q, index_weights = rows
    seen = _seen(indices, start, end, k.shape[1])
    target = _target(q, k, lse, indices, seen, sm_scale, blocks)
    _, scores = _scores(index_q, gather_rows(index_k, indices), index_weights, seen)
    top = jnp.max(scores, axis=-1)
    safe = jnp.where(top > -jnp.inf, top, 0)
    scores_lse = top + jnp.log(jnp.sum(jnp.exp(scores - safe[..., None]), axis=-1))
    some = target > 0
    entropy = jnp.sum(target * jnp.log(jnp.where(some, target, 1)), axis=-1)
    cross = jnp.sum(target * jnp.where(some, scores, 0), axis=-1)
    mass = jnp.sum(target, axis=-1)
    kl = entropy - cross + mass * jnp.where(mass > 0, scores_lse, 0)
    return kl, (scores_lse, mass, target)

  rows = q, lse, start, end, indices, index_q, index_weights
  return map_rows(compare, rows, blocks.block_t)


def backward(constants, residuals, dkl, *, sm_scale: float, blocks: BlockSizes):
  """Returns the gradients of the three index inputs; the scores' own is softmax - target."""
  _, k, _, start, end, indices = constants
  index_q, index_k, index_weights, scores_lse, mass, target = residuals
  scores_lse = jnp.where(scores_lse > -jnp.inf, scores_lse, 0)

  def step(dindex_k, rows):
    start, end, indices, index_q, index_weights, scores_lse, mass, target, dkl = rows
    chosen = gather_rows(index_k, indices)
    seen = _seen(indices, start, end, k.shape[1])
    dots, scores = _scores(index_q, chosen, index_weights, seen)
    probs = jnp.exp(scores - scores_lse[..., None])
    dscores = dkl[..., None] * (mass[..., None] * probs - target)  # B T K
    dweights = einsum('BTK,BTKI->BTI', dscores, jax.nn.relu(dots))
    ddots = dscores[..., None] * index_weights.astype(jnp.float32)[:, :, None]
    ddots = jnp.where(dots > 0, ddots, 0)
    dindex_q = einsum('BTKI,BTKJ->BTIJ', ddots, chosen)
    dchosen = einsum('BTKI,BTIJ->BTKJ', ddots, index_q)
    dindex_k = scatter_rows(dindex_k, indices, dchosen)
    return dindex_k, (dindex_q.astype(index_q.dtype), dweights.astype(index_weights.dtype))

  rows = start, end, indices, index_q, index_weights, scores_lse, mass, target, dkl
  dindex_k, (dindex_q, dweights) = scan_rows(
      step, jnp.zeros(index_k.shape), rows, blocks.block_t
  )
  return dindex_q, dindex_k.astype(index_k.dtype), dweights


def _target(q, k, lse, indices, seen, sm_scale: float, blocks: BlockSizes):
  """Returns the mean over heads of the probabilities of selected keys, [B, T, K]."""
  batch, n_keys, n_groups, width = k.shape
  if n_groups == 1:
    return mean_attention(q, gather_rows(k, indices), lse, seen, sm_scale)
  keys = fold_keys(k)

  def of_groups(rows):
    q, lse, indices = rows
    chosen = gather_rows(keys, indices)[..., None, :]
    return mean_attention(q, chosen, lse, indices >= 0, sm_scale)

  own = fold_indices(jnp.where(seen, indices, -1), n_groups, n_keys)
  rows = fold_heads(q, n_groups), fold_heads(lse, n_groups), own
  block = max(blocks.gathered // (batch * indices.shape[2] * width * k.dtype.itemsize), 1)
  probs = map_rows(of_groups, rows, block)
  return jnp.mean(probs.reshape(*probs.shape[:1], -1, n_groups, probs.shape[2]), axis=2)


def _seen(indices, start, end, n_keys: int):
  """Says which selected positions [B, T, K] are of keys that the query sees."""
  seen = (indices >= jnp.maximum(start, 0)[..., None]) & (indices < end[..., None])
  return seen & (indices < n_keys)


def _scores(q, chosen, weights, seen):
  """Returns the dots before the ReLU, [B, T, K, I], and the scores, -inf where not seen."""
  dots = einsum('BTIJ,BTKJ->BTKI', q, chosen)
  return dots, jnp.where(seen, weigh(dots, weights, axis=3), -jnp.inf)
