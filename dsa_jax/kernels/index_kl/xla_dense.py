# SPDX-License-Identifier: Apache-2.0
"""The indexer's divergence over all visible keys: blocks of query rows times the keys they see.

A row's sums over its keys, in whatever blocks these come, are all that its divergence needs:

  kl = sum target * ln target - sum target * score + sum target * ln sum exp score
"""

import dataclasses

import jax
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.index_scores import weigh
from dsa_jax.kernels.mean_attention import mean_attention
from dsa_jax.kernels.products import einsum
from dsa_jax.kernels.visibility import visible_keys
from dsa_jax.kernels.xla.rows import add_block, key_range, map_rows, pad_axis, scan_rows, take_block


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result."""

  block_t: int = 128  # Query rows per pass.
  block_s: int = 256  # Keys at one time.


def forward(constants, index_q, index_k, index_weights, *, sm_scale: float, blocks: BlockSizes):
  """Returns the divergence, and what its gradient needs.

  That is ln sum exp of the scores and the sum of the target, both [B, T].
  """
  q, k, lse, start, end, _ = constants
  n_keys, block_s = k.shape[1], min(blocks.block_s, k.shape[1])
  k, index_k = pad_axis(k, 1, block_s), pad_axis(index_k, 1, block_s)

  def compare(rows):
    q, lse, start, end, index_q, index_weights = rows

    def add_block_of_keys(j, state):
      top, total, mass, entropy, cross = state
      seen = _seen(start, end, n_keys, j, block_s)
      target = mean_attention(q, take_block(k, j, block_s), lse, seen, sm_scale)
      _, scores = _scores(index_q, take_block(index_k, j, block_s), index_weights, seen)
      new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
      safe = jnp.where(new_top > -jnp.inf, new_top, 0)
      total = total * jnp.exp(top - safe) + jnp.sum(jnp.exp(scores - safe[..., None]), axis=-1)
      some = target > 0
      entropy += jnp.sum(target * jnp.log(jnp.where(some, target, 1)), axis=-1)
      cross += jnp.sum(target * jnp.where(some, scores, 0), axis=-1)
      return new_top, total, mass + jnp.sum(target, axis=-1), entropy, cross

    zero = jnp.zeros(start.shape)
    state = zero - jnp.inf, zero, zero, zero, zero
    first, last = key_range(start, end, n_keys, block_s)
    state = jax.lax.fori_loop(first, last, add_block_of_keys, state)
    top, total, mass, entropy, cross = state
    scores_lse = top + jnp.log(total)
    kl = entropy - cross + mass * jnp.where(mass > 0, scores_lse, 0)
    return kl, (scores_lse, mass)

  rows = q, lse, start, end, index_q, index_weights
  return map_rows(compare, rows, blocks.block_t)


def backward(constants, residuals, dkl, *, sm_scale: float, blocks: BlockSizes):
  """Returns the gradients of the three index inputs; the scores' own is softmax - target."""
  q, k, lse, start, end, _ = constants
  index_q, index_k, index_weights, scores_lse, mass = residuals
  n_keys, block_s = k.shape[1], min(blocks.block_s, k.shape[1])
  scores_lse = jnp.where(scores_lse > -jnp.inf, scores_lse, 0)
  k, padded = pad_axis(k, 1, block_s), pad_axis(index_k, 1, block_s)

  def step(dindex_k, rows):
    q, lse, start, end, index_q, index_weights, scores_lse, mass, dkl = rows

    def add_block_of_keys(j, state):
      dindex_k, dindex_q, dweights = state
      seen, keys = _seen(start, end, n_keys, j, block_s), take_block(padded, j, block_s)
      target = mean_attention(q, take_block(k, j, block_s), lse, seen, sm_scale)
      dots, scores = _scores(index_q, keys, index_weights, seen)
      probs = jnp.exp(scores - scores_lse[..., None])
      dscores = dkl[..., None] * (mass[..., None] * probs - target)  # B T S
      dweights += einsum('BTS,BTIS->BTI', dscores, jax.nn.relu(dots))
      ddots = dscores[:, :, None] * index_weights.astype(jnp.float32)[..., None]
      ddots = jnp.where(dots > 0, ddots, 0)
      dindex_q += einsum('BTIS,BSJ->BTIJ', ddots, keys)
      dkeys = einsum('BTIS,BTIJ->BSJ', ddots, index_q)
      return add_block(dindex_k, j, dkeys), dindex_q, dweights

    state = dindex_k, jnp.zeros(index_q.shape), jnp.zeros(index_weights.shape)
    first, last = key_range(start, end, n_keys, block_s)
    state = jax.lax.fori_loop(first, last, add_block_of_keys, state)
    dindex_k, dindex_q, dweights = state
    return dindex_k, (dindex_q.astype(index_q.dtype), dweights.astype(index_weights.dtype))

  rows = q, lse, start, end, index_q, index_weights, scores_lse, mass, dkl
  dindex_k = jnp.zeros(padded.shape)
  dindex_k, (dindex_q, dweights) = scan_rows(step, dindex_k, rows, blocks.block_t)
  return dindex_q, dindex_k[:, :n_keys].astype(index_k.dtype), dweights


def _seen(start, end, n_keys: int, j, block_s: int):
  """Says which keys of the j-th block each query sees."""
  return visible_keys(start, jnp.minimum(end, n_keys), j * block_s + jnp.arange(block_s))


def _scores(q, keys, weights, seen):
  """Returns the dots before the ReLU, [B, T, I, S], and the scores, -inf where not seen."""
  dots = einsum('BTIJ,BSJ->BTIS', q, keys)
  return dots, jnp.where(seen, weigh(dots, weights, axis=2), -jnp.inf)
