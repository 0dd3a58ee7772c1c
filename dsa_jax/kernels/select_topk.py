# SPDX-License-Identifier: Apache-2.0
"""Exact selection within rows of scores that already exist: what every selection ends in."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.kernels.visibility import visible_keys


def select_topk(
    scores: Float[Array, 'B T S'],
    start: Int[Array, 'B T'],
    end: Int[Array, 'B T'],
    *,
    topk: int,
) -> Int[Array, 'B T {topk}']:
  """Returns the positions of the `topk` highest visible scores, ascending, then -1.

  Ties at the cut go to the lowest position, and -0 equals +0 (a plateau of ReLU zeros under
  weights of both signs holds both).
  """
  n_keys = scores.shape[-1]
  visible = visible_keys(start, end, jnp.arange(n_keys))
  scores = jnp.where(scores == 0, 0.0, jnp.maximum(scores, jnp.finfo(jnp.float32).min))
  scores = jnp.where(visible, scores, -jnp.inf)
  best, position = jax.lax.top_k(scores, min(topk, n_keys))  # Stable: the lowest position first.
  position = jnp.where(best > -jnp.inf, position, n_keys)
  position = jnp.sort(position, axis=-1)
  position = jnp.where(position < n_keys, position, -1)
  return jnp.pad(position, ((0, 0), (0, 0), (0, topk - position.shape[-1])), constant_values=-1)
