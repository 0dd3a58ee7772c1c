# SPDX-License-Identifier: Apache-2.0
"""Exact selection within rows of scores that already exist: what every selection ends in."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.kernels.visibility import visible_keys
from dsa_jax.kernels.xla.threshold import best_positions


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
  visible = visible_keys(start, end, jnp.arange(scores.shape[-1]))
  return best_positions(hide(scores, visible), topk)


def hide(scores: Float[Array, '*R'], visible) -> Float[Array, '*R']:
  """Returns scores of one zero, -inf where not visible and nowhere else."""
  scores = jnp.where(scores == 0, 0.0, jnp.maximum(scores, jnp.finfo(jnp.float32).min))
  return jnp.where(visible, scores, -jnp.inf)
