# SPDX-License-Identifier: Apache-2.0
"""The indexer's divergence from attention, a block of query rows at a time."""

import dataclasses

import jax
import jax.numpy as jnp

from dsa_jax.kernels.mean_attention import mean_attention
from dsa_jax.kernels.rows import gather_rows, map_rows, scan_rows, scatter_rows
from dsa_jax.kernels.visibility import visible_keys

_f32 = {'preferred_element_type': jnp.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
  """They change the speed, never the result."""

  block_t: int = 32  # Query rows whose two distributions exist at one time.


def forward(constants, index_q, index_k, index_weights, *, sm_scale: float, blocks: BlockSizes):
  """Returns the divergence and the log-sum-exp of the index scores, both [B, T]."""
  q, k, lse, start, end, indices = constants

  def compare(rows):
    q, lse, start, end, indices, index_q, index_weights = rows
    seen = _seen(start, end, indices, k.shape[1])
    target = mean_attention(q, _keys(k, indices), lse, seen, sm_scale)
    _, scores = _scores(index_q, _keys(index_k, indices), index_weights)
    scores = jnp.where(seen, scores, -jnp.inf)
    scores_lse = jax.nn.logsumexp(scores, axis=-1)
    some = target > 0
    log_ratio = jnp.log(jnp.where(some, target, 1)) - jnp.where(some, scores - scores_lse[..., None], 0)
    return jnp.sum(target * log_ratio, axis=-1), scores_lse

  rows = (q, lse, start, end, indices, index_q, index_weights)
  return map_rows(compare, rows, blocks.block_t)


def backward(constants, residuals, dkl, *, sm_scale: float, blocks: BlockSizes):
  """Returns the gradients of the three index inputs; the scores' own is softmax - target."""
  q, k, lse, start, end, indices = constants
  index_q, index_k, index_weights, scores_lse = residuals

  def step(dindex_k, rows):
    q, lse, start, end, indices, index_q, index_weights, scores_lse, dkl = rows
    keys = _keys(index_k, indices)
    seen = _seen(start, end, indices, k.shape[1])
    target = mean_attention(q, _keys(k, indices), lse, seen, sm_scale)
    dots, scores = _scores(index_q, keys, index_weights)
    scores_lse = jnp.where(scores_lse > -jnp.inf, scores_lse, 0)
    probs = jnp.where(seen, jnp.exp(scores - scores_lse[..., None]), 0)
    mass = jnp.sum(target, axis=-1, keepdims=True)
    dscores = dkl[..., None] * (mass * probs - target)  # B T S
    dweights = jnp.einsum('BTS,BTIS->BTI', dscores, jax.nn.relu(dots), **_f32)
    ddots = index_weights.astype(jnp.float32)[..., None] * dscores[:, :, None]
    ddots = jnp.where(dots > 0, ddots, 0)
    if indices is None:
      dindex_q = jnp.einsum('BTIS,BSJ->BTIJ', ddots, keys, **_f32)
      dindex_k += jnp.einsum('BTIS,BTIJ->BSJ', ddots, index_q, **_f32)
    else:
      dindex_q = jnp.einsum('BTIK,BTKJ->BTIJ', ddots, keys, **_f32)
      dkeys = jnp.einsum('BTIK,BTIJ->BTKJ', ddots, index_q, **_f32)
      dindex_k = scatter_rows(dindex_k, indices, dkeys)
    return dindex_k, (dindex_q.astype(index_q.dtype), dweights.astype(index_weights.dtype))

  rows = (q, lse, start, end, indices, index_q, index_weights, scores_lse, dkl)
  dindex_k = jnp.zeros(index_k.shape, jnp.float32)
  dindex_k, (dindex_q, dweights) = scan_rows(step, dindex_k, rows, blocks.block_t)
  return dindex_q, dindex_k.astype(index_k.dtype), dweights


def _keys(x, indices):
  """All keys [B, S, ...], or each query's own [B, T, K, ...]."""
  return x if indices is None else gather_rows(x, indices)


def _seen(start, end, indices, n_keys):
  if indices is None:
    return visible_keys(start, end, jnp.arange(n_keys))
  filled = (indices >= 0) & (indices < n_keys)
  return filled & (indices >= start[..., None]) & (indices < end[..., None])


def _scores(q, k, weights):
  """`index_scores`, and the dots before the ReLU, over all keys or each query's own."""
  equation = 'BTIJ,BSJ->BTIS' if k.ndim == 3 else 'BTIJ,BTSJ->BTIS'
  dots = jnp.einsum(equation, q, k, **_f32)
  return dots, jnp.einsum('BTIS,BTI->BTS', jax.nn.relu(dots), weights.astype(jnp.float32))
