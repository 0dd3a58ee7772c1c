# SPDX-License-Identifier: Apache-2.0
"""The definition of exact selection."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.kernels.index_scores import index_scores
from dsa_jax.kernels.visibility import visible_keys


def index_topk_reference(
    q: Float[Array, 'B T I J'],
    k: Float[Array, 'B S J'],
    weights: Float[Array, 'B T I'],
    start: Int[Array, 'B T'],
    end: Int[Array, 'B T'],
    *,
    topk: int,
) -> Int[Array, 'B T {topk}']:
  """See `index_topk`. Sorts every row by falling score, then by rising position."""
  n_keys = k.shape[1]
  scores = index_scores(q, k, weights)
  visible = visible_keys(start, end, jnp.arange(n_keys))
  order = jnp.lexsort((jnp.where(scores == 0, 0.0, -scores), ~visible), axis=-1)
  rank = jnp.argsort(order, axis=-1)
  chosen = visible & (rank < topk)
  position = jnp.where(chosen, jnp.arange(n_keys), n_keys)
  position = jnp.pad(position, ((0, 0), (0, 0), (0, topk)), constant_values=n_keys)
  position = jnp.sort(position, axis=-1)[..., :topk]
  return jnp.where(position < n_keys, position, -1)
