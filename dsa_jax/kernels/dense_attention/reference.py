# SPDX-License-Identifier: Apache-2.0
"""The definition of attention to an interval, or to a selection within it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.kernels.products import einsum
from dsa_jax.kernels.visibility import selected_keys, visible_keys


def dense_attention_reference(
    q: Float[Array, 'B T H E'],
    k: Float[Array, 'B S G E'],
    v: Float[Array, 'B S G V'],
    start: Int[Array, 'B T'],
    end: Int[Array, 'B T'],
    *,
    sm_scale: float,
    indices: Int[Array, 'B T K'] | Int[Array, 'B T G K'] | None = None,
) -> tuple[Float[Array, 'B T H V'], Float[Array, 'B T H']]:
  """See `dense_attention`. Makes all logits, then masks."""
  n_keys, per_group = k.shape[1], q.shape[2] // k.shape[2]
  visible = visible_keys(start, end, jnp.arange(n_keys))[:, :, None]
  if indices is not None:
    indices = indices[:, :, None] if indices.ndim == 3 else jnp.repeat(indices, per_group, axis=2)
    visible &= jax.vmap(selected_keys, in_axes=(2, None), out_axes=2)(indices, n_keys)
  dtype = q.dtype
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  k, v = (jnp.repeat(x, per_group, axis=2) for x in (k, v))
  logits = jnp.where(visible, sm_scale * einsum('BTHE,BSHE->BTHS', q, k), -jnp.inf)
  lse = jax.nn.logsumexp(logits, axis=-1, where=visible)
  probs = jnp.exp(logits - jnp.where(lse > -jnp.inf, lse, 0)[..., None])
  return einsum('BTHS,BSHV->BTHV', probs, v).astype(dtype), lse
