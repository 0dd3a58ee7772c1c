# SPDX-License-Identifier: Apache-2.0
"""The indexer's divergence from attention: blocks of query rows meet blocks of keys they see.

A row's sums over its keys, in whatever blocks these come, are all that its divergence needs:

  kl = sum target * ln target - sum target * score + sum target * ln sum exp score
"""

import dataclasses

import jax
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.index_kl.keys import Keys, over_keys
from dsa_jax.kernels.index_scores import weigh
from dsa_jax.kernels.mean_attention import mean_attention
from dsa_jax.kernels.xla.rows import map_rows, pad_axis, scan_rows

_f32 = {'preferred_element_type': jnp.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result."""

  block_t: int = 128  # Query rows at one time,
  block_s: int = 256  # and the keys that they meet at one time.
  block_selected: int = 8  # Query rows at one time where each has its own keys.


def forward(constants, index_q, index_k, index_weights, *, sm_scale: float, blocks: BlockSizes):
  """Returns the divergence, and what its gradient needs.

  That is ln sum exp of the scores and the sum of the target, both [B, T], and the target itself
  where it is one of selected keys, [B, T, K]: smaller than the queries it is made of.
  """
  q, k, lse, start, end, indices = constants
  block_t, block_s = _sizes(blocks, indices, k.shape[1])

  def compare(rows):
    q, lse, start, end, indices, index_q, index_weights = rows

    def meet(keys, state):
      top, total, mass, entropy, cross, _ = state
      target = mean_attention(q, keys.k, lse, keys.seen, sm_scale)
      _, scores = _scores(index_q, keys, index_weights)
      new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
      safe = jnp.where(new_top > -jnp.inf, new_top, 0)
      total = total * jnp.exp(top - safe) + jnp.sum(jnp.exp(scores - safe[..., None]), axis=-1)
      some = target > 0
      entropy += jnp.sum(target * jnp.log(jnp.where(some, target, 1)), axis=-1)
      cross += jnp.sum(target * jnp.where(some, scores, 0), axis=-1)
      mass += jnp.sum(target, axis=-1)
      return new_top, total, mass, entropy, cross, target if keys.own else None

    zero = jnp.zeros(start.shape)
    state = zero - jnp.inf, zero, zero, zero, zero, None
    state = over_keys(meet, state, k, index_k, start, end, indices, block_s)
    top, total, mass, entropy, cross, target = state
    scores_lse = top + jnp.log(total)
    kl = entropy - cross + mass * jnp.where(mass > 0, scores_lse, 0)
    return kl, (scores_lse, mass, target)

  rows = q, lse, start, end, indices, index_q, index_weights
  return map_rows(compare, rows, block_t)


def backward(constants, residuals, dkl, *, sm_scale: float, blocks: BlockSizes):
  """Returns the gradients of the three index inputs; the scores' own is softmax - target."""
  q, k, lse, start, end, indices = constants
  index_q, index_k, index_weights, scores_lse, mass, target = residuals
  block_t, block_s = _sizes(blocks, indices, k.shape[1])
  scores_lse = jnp.where(scores_lse > -jnp.inf, scores_lse, 0)

  def step(dindex_k, rows):
    q, lse, start, end, indices, index_q, index_weights, scores_lse, mass, known, dkl = rows

    def meet(keys, state):
      dindex_k, dindex_q, dweights = state
      key_axes, dot_axes = _axes(keys)
      target = known
      if target is None:
        target = mean_attention(q, keys.k, lse, keys.seen, sm_scale)
      dots, scores = _scores(index_q, keys, index_weights)
      probs = jnp.exp(scores - scores_lse[..., None])
      dscores = dkl[..., None] * (mass[..., None] * probs - target)  # B T S
      dweights += jnp.einsum(f'BTS,{dot_axes}->BTI', dscores, jax.nn.relu(dots), **_f32)
      ddots = _per_head(dscores, keys) * _per_key(index_weights, keys)
      ddots = jnp.where(dots > 0, ddots, 0)
      dindex_q += jnp.einsum(f'{dot_axes},{key_axes}->BTIJ', ddots, keys.index_k, **_f32)
      dkeys = jnp.einsum(f'{dot_axes},BTIJ->{key_axes}', ddots, index_q, **_f32)
      return keys.add_to(dindex_k, dkeys), dindex_q, dweights

    state = dindex_k, jnp.zeros(index_q.shape), jnp.zeros(index_weights.shape)
    state = over_keys(meet, state, k, index_k, start, end, indices, block_s)
    dindex_k, dindex_q, dweights = state
    return dindex_k, (dindex_q.astype(index_q.dtype), dweights.astype(index_weights.dtype))

  rows = q, lse, start, end, indices, index_q, index_weights, scores_lse, mass, target, dkl
  dindex_k = pad_axis(jnp.zeros(index_k.shape), 1, block_s)
  dindex_k, (dindex_q, dweights) = scan_rows(step, dindex_k, rows, block_t)
  return dindex_q, dindex_k[:, : k.shape[1]].astype(index_k.dtype), dweights


def _sizes(blocks, indices, n_keys):
  """Rows at one time, and keys at one time."""
  if indices is not None:
    return blocks.block_selected, 1
  return blocks.block_t, min(blocks.block_s, n_keys)


def _scores(q, keys, weights):
  """The dots before the ReLU; the scores [B, T, S], -inf where not seen."""
  key_axes, dot_axes = _axes(keys)
  dots = jnp.einsum(f'BTIJ,{key_axes}->{dot_axes}', q, keys.index_k, **_f32)
  scores = weigh(dots, weights, axis=dot_axes.index('I'))
  return dots, jnp.where(keys.seen, scores, -jnp.inf)


def _axes(keys: Keys) -> tuple[str, str]:
  """How index keys and their dots lie in memory: as the products like to read and write them."""
  return ('BTSJ', 'BTSI') if keys.own else ('BSJ', 'BTIS')


def _per_key(weights, keys):
  """Weights [B, T, I] against the dots."""
  return jnp.expand_dims(weights.astype(jnp.float32), 2 if keys.own else 3)


def _per_head(scores, keys):
  """Scores [B, T, S] against the dots."""
  return jnp.expand_dims(scores, 3 if keys.own else 2)
