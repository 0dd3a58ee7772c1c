# SPDX-License-Identifier: Apache-2.0
"""The definition of the indexer's loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.kernels.groups import by_group
from dsa_jax.kernels.index_scores import index_scores
from dsa_jax.kernels.products import einsum
from dsa_jax.kernels.visibility import selected_keys, visible_keys


def index_kl_reference(
    q: Float[Array, 'B T H E'],
    k: Float[Array, 'B S G E'],
    lse: Float[Array, 'B T H'],
    index_q: Float[Array, 'B T I J'],
    index_k: Float[Array, 'B S J'],
    index_weights: Float[Array, 'B T I'],
    start: Int[Array, 'B T'],
    end: Int[Array, 'B T'],
    *,
    sm_scale: float,
    indices: Int[Array, 'B T K'] | Int[Array, 'B T G K'] | None = None,
    n_selections: int = 1,
) -> Float[Array, 'B T']:
  """See `index_kl`. Makes both distributions over all keys, then compares them."""
  if n_selections > 1:
    compare = lambda q, k, lse, index_q, index_weights, indices: index_kl_reference(
        q, k, lse, index_q, index_k, index_weights, start, end, sm_scale=sm_scale, indices=indices
    )
    own = [by_group(x, n_selections) for x in (q, k, lse, index_q, index_weights)]
    axes = 0, 0, 0, 0, 0, 2 if indices is not None and indices.ndim == 4 else None
    return jnp.mean(jax.vmap(compare, in_axes=axes)(*own, indices), axis=0)
  if indices is not None and indices.ndim == 4:
    indices = indices[:, :, 0]
  n_keys, per_group = k.shape[1], q.shape[2] // k.shape[2]
  visible = visible_keys(start, end, jnp.arange(n_keys))
  if indices is not None:
    visible &= selected_keys(indices, n_keys)
  q, k, lse = jax.lax.stop_gradient((q.astype(jnp.float32), k.astype(jnp.float32), lse))
  logits = sm_scale * einsum('BTHE,BSHE->BTHS', q, jnp.repeat(k, per_group, axis=2))
  lse = jnp.where(lse > -jnp.inf, lse, 0)
  target = jnp.where(visible, jnp.mean(jnp.exp(logits - lse[..., None]), axis=2), 0)  # B T S

  scores = index_scores(index_q, index_k, index_weights)
  scores_lse = jax.nn.logsumexp(scores, axis=-1, where=visible, keepdims=True)
  some = target > 0
  log_ratio = jnp.log(jnp.where(some, target, 1)) - jnp.where(some, scores - scores_lse, 0)
  return jnp.sum(target * log_ratio, axis=-1)
