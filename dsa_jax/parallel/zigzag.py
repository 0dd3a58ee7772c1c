# SPDX-License-Identifier: Apache-2.0
"""The order of tokens in which devices that share a sequence do the same causal work."""

import jax
import jax.numpy as jnp


def zigzag(x: jax.Array, n: int) -> jax.Array:
  """Reorders the tokens of [B, T, ...] so that n equal shards do the same causal work.

  Shard i holds pieces i and 2n - 1 - i of 2n pieces.
  """
  pieces = _cut(x, 2 * n)
  pairs = jnp.stack([pieces[:, :n], pieces[:, : n - 1 : -1]], axis=2)
  return pairs.reshape(x.shape)


def unzigzag(x: jax.Array, n: int) -> jax.Array:
  """Restores the order of the text."""
  pairs = _cut(x, 2 * n).reshape(x.shape[0], n, 2, -1, *x.shape[2:])
  return jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], axis=1).reshape(x.shape)


def _cut(x, n):
  return x.reshape(x.shape[0], n, x.shape[1] // n, *x.shape[2:])
