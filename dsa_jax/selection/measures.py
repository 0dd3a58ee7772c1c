# SPDX-License-Identifier: Apache-2.0
"""Measures of a selection: how good it is, and what it looks like."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def captured_mass(
    lse_selected: Float[Array, 'B T H'], lse_visible: Float[Array, 'B T H']
) -> Float[Array, 'B T']:
  """Returns the share of the true attention mass on the selected tokens, averaged over heads.

  It follows from two log-sum-exps of the same logits, over the selection and over all visible keys.
  """
  seen = lse_visible > -jnp.inf
  return jnp.mean(jnp.where(seen, jnp.exp(lse_selected - jnp.where(seen, lse_visible, 0)), 0), -1)


def overlap(a: Int[Array, '*rows K'], b: Int[Array, '*rows K']) -> Float[Array, '*rows']:
  """Returns the share of the positions in `a` that are also in `b`, and 0 where `a` is empty.

  The positions of both are ascending, then -1.
  """

  def row(a, b):
    b = jnp.where(b < 0, jnp.iinfo(jnp.int32).max, b)
    is_in_b = b[jnp.minimum(jnp.searchsorted(b, a), len(b) - 1)] == a
    return jnp.sum(is_in_b & (a >= 0)) / jnp.maximum(jnp.sum(a >= 0), 1)

  flat = jax.vmap(row)(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))
  return flat.reshape(a.shape[:-1])


def neighbour_overlap(indices: Int[Array, 'B T *G K']) -> Float[Array, 'B T *G']:
  """Returns the share of each query's selection that the query before it selected too."""
  before = jnp.concatenate([jnp.full_like(indices[:, :1], -1), indices[:, :-1]], axis=1)
  return overlap(indices, before)


def selected_distance(
    indices: Int[Array, 'B T *G K'], end: Int[Array, 'B T']
) -> Float[Array, 'B T *G']:
  """Returns the mean distance in tokens from each query back to what it selected, 0 for nothing."""
  filled = indices >= 0
  end = end.reshape(*end.shape, *[1] * (indices.ndim - 2))
  distance = jnp.where(filled, end - 1 - indices, 0)
  return distance.sum(-1) / jnp.maximum(filled.sum(-1), 1)


def leaves_out(
    indices: Int[Array, 'B T *G K'], n_visible: Int[Array, 'B T']
) -> Float[Array, 'B T *G']:
  """Returns 1 where a query selects fewer tokens than it sees, and 0 elsewhere."""
  n_visible = n_visible.reshape(*n_visible.shape, *[1] * (indices.ndim - 3))
  return (jnp.sum(indices >= 0, axis=-1) < n_visible).astype(jnp.float32)


def over_key_heads(x: Float[Array, 'B T *G']) -> Float[Array, 'B T']:
  """Returns the mean over key heads, where each has a selection of its own."""
  return x if x.ndim == 2 else jnp.mean(x, axis=-1)
