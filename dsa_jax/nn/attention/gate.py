# SPDX-License-Identifier: Apache-2.0
"""Gates of the output: what a head has read, times a sigmoid of its token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.checkpoint  # The backward pass computes it again more cheaply than it could keep it.
def gated(
    out: Float[Array, 'B T H V'], logits: Float[Array, 'B T H V']
) -> Float[Array, 'B T H V']:
  """Multiplies values by the sigmoids of logits, in float32.

  Each channel of a value has a gate of its own, so values must be gated as such: a mean of latents
  is expanded before. What a head attends to does not depend on its gates, and neither does the
  target of the indexer's divergence.
  """
  gates = jax.nn.sigmoid(logits.astype(jnp.float32))
  return (out.astype(jnp.float32) * gates).astype(out.dtype)
