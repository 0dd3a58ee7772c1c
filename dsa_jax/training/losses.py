# SPDX-License-Identifier: Apache-2.0
"""Losses of each token. The step that sums them decides which tokens count."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.parallel import collectives, shard
from dsa_jax.parallel.mesh import ALL_TOKENS, LOGITS


def next_token_loss(
    logits: Float[Array, 'B T W'], targets: Int[Array, 'B T']
) -> Float[Array, 'B T']:
  """Returns the cross-entropy of every target, in nats, float32."""
  return shard.shard_mapped(_next_token_loss, (LOGITS, ALL_TOKENS), ALL_TOKENS)(logits, targets)


def _next_token_loss(logits, targets):
  """Computes the loss from each device's shard of the vocabulary."""
  logits, n_words = logits.astype(jnp.float32), logits.shape[-1]
  word = targets - collectives.axis_index('tensor') * n_words
  is_target = word[..., None] == jnp.arange(n_words)  # The gradient of this sum needs no scatter.
  own = collectives.psum(jnp.sum(jnp.where(is_target, logits, 0), axis=-1), 'tensor')
  top = collectives.pmax(jax.lax.stop_gradient(logits.max(axis=-1)), 'tensor')
  mass = collectives.psum(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1), 'tensor')
  return top + jnp.log(mass) - own


def shift_targets(
    targets: Int[Array, 'B T'], weights: Float[Array, 'B T']
) -> tuple[Int[Array, 'B T'], Float[Array, 'B T']]:
  """Returns the targets of the MTP layer and their weights: the tokens after the next ones.

  They count where both the next token and the one after it count, which is within one document.
  """
  last = ((0, 0), (0, 1))
  later = jnp.pad(weights, last)[:, 1:]
  return jnp.pad(targets, last)[:, 1:], weights * later
