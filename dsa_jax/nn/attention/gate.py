# SPDX-License-Identifier: Apache-2.0
"""What happens to the output of heads: gates, sigmoids of the token; and sinks, which take a share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.checkpoint  # The backward pass computes it again more cheaply than it could keep it.
def gated(
    out: Float[Array, 'B T H V'], logits: Float[Array, 'B T H #V']
) -> Float[Array, 'B T H V']:
  """Multiplies values by the sigmoids of logits, in float32.

  Each channel of a value may have a gate of its own, so values must be gated as such: a mean of latents
  is expanded before. What a head attends to does not depend on its gates, and neither does the
  target of the indexer's divergence.
  """
  gates = jax.nn.sigmoid(logits.astype(jnp.float32))
  return (out.astype(jnp.float32) * gates).astype(out.dtype)


def beside_sinks(
    out: Float[Array, 'B T H V'], lse: Float[Array, 'B T H'], sinks: Float[Array, 'H']
) -> Float[Array, 'B T H V']:
  """Returns what heads read where the softmax has one logit more for each, whose value is zero.

  `lse` is the log-sum-exp without it, so the keys keep the share sigmoid(lse - sink). The target of
  the indexer's divergence is the attention to keys alone: no selection can change what a sink takes.
  """
  share = jax.nn.sigmoid(lse - sinks)[..., None]
  return (out.astype(jnp.float32) * share).astype(out.dtype)
