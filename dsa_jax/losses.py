# SPDX-License-Identifier: Apache-2.0
"""Losses per token; who sums them decides what counts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def next_token_loss(
    logits: Float[Array, 'B T W'], targets: Int[Array, 'B T']
) -> Float[Array, 'B T']:
  """Returns the cross-entropy of every target, in nats, float32."""
  logits = logits.astype(jnp.float32)
  own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - own


def shift_targets(
    targets: Int[Array, 'B T'], weights: Float[Array, 'B T']
) -> tuple[Int[Array, 'B T'], Float[Array, 'B T']]:
  """Returns the targets one token further on, for the MTP layer.

  They count where both the next token and the one after it do: within one document.
  """
  last = ((0, 0), (0, 1))
  later = jnp.pad(weights, last)[:, 1:]
  return jnp.pad(targets, last)[:, 1:], weights * later
