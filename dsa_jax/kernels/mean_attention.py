# SPDX-License-Identifier: Apache-2.0
"""The mean over heads of attention's probabilities, which the indexer predicts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dsa_jax.kernels.products import einsum


def mean_attention(
    q: Float[Array, 'B T H E'],
    k: Float[Array, 'B S G E'] | Float[Array, 'B T S G E'],
    lse: Float[Array, 'B T H'],
    seen: Bool[Array, 'B T S'],
    sm_scale: float,
) -> Float[Array, 'B T S']:
  """Returns mean over heads of exp(sm_scale * dot(q, k[s]) - lse), 0 where not seen.

  All [B, T, S] values exist at once: this is for plots and blocks of rows.

  Args:
    q: Queries.
    k: Keys that all queries share, or each query's own.
    lse: Log-sum-exp of the logits over the seen keys, in nats.
    seen: Which keys count.
    sm_scale: Softmax scale.
  """
  b, t, _, e = q.shape
  n_groups = k.shape[-2]
  lse = jnp.where(lse > -jnp.inf, lse, 0)
  if k.ndim == 5 and n_groups == 1:
    # XLA would turn the keys to pair an axis of one. Turned logits run along memory.
    logits = einsum('BTSE,BTHE->BTSH', k[..., 0, :], q)
    logits = jnp.swapaxes(jax.lax.optimization_barrier(logits), 2, 3)
    mask = jnp.where(seen, 0.0, -jnp.inf)[:, :, None]
    probs = jax.lax.optimization_barrier(jnp.exp(sm_scale * logits + mask - lse[..., None]))
    return jnp.mean(probs, axis=2)
  q = q.reshape(b, t, n_groups, -1, e)
  lse = lse.reshape(*q.shape[:-1])
  if k.ndim == 4:
    logits = einsum('BTGME,BSGE->BTGMS', q, k)
    logits = jnp.where(seen[:, :, None, None], sm_scale * logits - lse[..., None], -jnp.inf)
    return jnp.mean(jnp.exp(logits), axis=(2, 3))
  logits = einsum('BTSGE,BTGME->BTSGM', k, q)
  logits = jnp.where(seen[..., None, None], sm_scale * logits - lse[:, :, None], -jnp.inf)
  return jnp.mean(jnp.exp(logits), axis=(3, 4))
