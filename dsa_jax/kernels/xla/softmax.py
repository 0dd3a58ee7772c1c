# SPDX-License-Identifier: Apache-2.0
"""What the backward passes of attention share."""

import jax
import jax.numpy as jnp


def logits_delta(out: jax.Array, lse: jax.Array, dout: jax.Array, dlse: jax.Array) -> jax.Array:
  """Returns delta, float32 [B, T, H], of attention's output [B, T, H, V] and log-sum-exp [B, T, H].

  The gradient of a logit is probability * (dot(dout, value) - delta). Rows that see nothing have a
  log-sum-exp of -inf, whose gradient does not count.
  """
  return jnp.sum(out.astype(jnp.float32) * dout, axis=-1) - jnp.where(lse > -jnp.inf, dlse, 0)
