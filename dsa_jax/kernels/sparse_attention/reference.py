# SPDX-License-Identifier: Apache-2.0
"""The definition of attention to a selection."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.kernels.xla.rows import gather_rows


def sparse_attention_reference(
    q: Float[Array, 'B T H E'],
    kv: Float[Array, 'B S E'],
    indices: Int[Array, 'B T K'],
    *,
    v_dim: int,
    sm_scale: float,
) -> tuple[Float[Array, 'B T H {v_dim}'], Float[Array, 'B T H']]:
  """See `sparse_attention`. Gathers the selection, then attends to all of it."""
  filled = ((indices >= 0) & (indices < kv.shape[1]))[:, :, None]
  chosen = gather_rows(kv, indices).astype(jnp.float32)  # B T K E
  logits = sm_scale * jnp.einsum('BTHE,BTKE->BTHK', q.astype(jnp.float32), chosen)
  logits = jnp.where(filled, logits, -jnp.inf)
  lse = jax.nn.logsumexp(logits, axis=-1, where=filled)
  probs = jnp.exp(logits - jnp.where(lse > -jnp.inf, lse, 0)[..., None])
  out = jnp.einsum('BTHK,BTKV->BTHV', probs, chosen[..., :v_dim])
  return out.astype(q.dtype), lse
