# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention as attention with one key head, by reshaping alone.

H / G heads share each of G key heads. Folded, the heads that share one are a query of their own,
[B, T * G, H / G, E], and the key heads of a token are keys of their own, [B, S * G, E]. Key head g
of token s is key s * G + g.
"""

import jax
import jax.numpy as jnp


def fold_keys(x: jax.Array) -> jax.Array:
  """Turns [B, S, G, E] to [B, S * G, E]."""
  return x.reshape(x.shape[0], -1, x.shape[3])


def fold_heads(x: jax.Array, n_groups: int) -> jax.Array:
  """Turns [B, T, H, ...] to [B, T * G, H / G, ...]."""
  batch, rows, heads = x.shape[:3]
  return x.reshape(batch, rows * n_groups, heads // n_groups, *x.shape[3:])


def unfold_heads(x: jax.Array, n_groups: int) -> jax.Array:
  """Turns [B, T * G, H / G, ...] to [B, T, H, ...]."""
  batch, rows, heads = x.shape[:3]
  return x.reshape(batch, rows // n_groups, heads * n_groups, *x.shape[3:])


def fold_indices(indices: jax.Array, n_groups: int, n_keys: int) -> jax.Array:
  """Turns positions [B, T, K] or [B, T, G, K] to those of folded keys, [B, T * G, K].

  What is no position of the `n_keys` tokens becomes -1; with one key head everything stays.
  """
  if n_groups == 1:
    return indices if indices.ndim == 3 else indices[:, :, 0]
  indices = indices if indices.ndim == 4 else indices[:, :, None]
  filled = (indices >= 0) & (indices < n_keys)
  own = indices * n_groups + jnp.arange(n_groups, dtype=indices.dtype)[:, None]
  rows = jnp.where(filled, own, -1)
  return rows.reshape(rows.shape[0], -1, rows.shape[3])


def widen(x: jax.Array, n_groups: int) -> jax.Array:
  """Turns [B, T, H, P] to [B, T, H, G * P]: each head's channels where its key head has them.

  Its dot with the rows of all key heads side by side is that with its own: the rest is zeros.
  """
  if n_groups == 1:
    return x
  batch, rows, heads, width = x.shape
  wide = jnp.where(_own(heads, n_groups), x[:, :, :, None], 0)
  return wide.reshape(batch, rows, heads, n_groups * width)


def narrow(x: jax.Array, n_groups: int) -> jax.Array:
  """Turns [B, T, H, G * P] to [B, T, H, P]: of each head, the channels of its key head."""
  if n_groups == 1:
    return x
  x = x.reshape(*x.shape[:3], n_groups, -1)
  return jnp.sum(jnp.where(_own(x.shape[2], n_groups), x, 0), axis=3)


def _own(heads: int, n_groups: int) -> jax.Array:
  """Says which key head, [H, G, 1], is each head's own."""
  own = jnp.arange(heads) // (heads // n_groups)
  return (own[:, None] == jnp.arange(n_groups))[..., None]


def by_group(x: jax.Array, n_groups: int) -> jax.Array:
  """Turns [B, T, H, ...] to [G, B, T, H / G, ...], for a loop over key heads."""
  batch, rows, heads = x.shape[:3]
  x = x.reshape(batch, rows, n_groups, heads // n_groups, *x.shape[3:])
  return jnp.moveaxis(x, 2, 0)


def join_groups(x: jax.Array) -> jax.Array:
  """Turns [G, B, T, H / G, ...] to [B, T, H, ...]."""
  x = jnp.moveaxis(x, 0, 2)
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])
