# SPDX-License-Identifier: Apache-2.0
"""The definition of products by group."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul_reference(
    rows: Float[Array, 'N D'], weights: Float[Array, 'X D F'], sizes: Int[Array, 'X']
) -> Float[Array, 'N F']:
  """See `grouped_matmul`. Multiplies every row with every matrix, and keeps that of its group."""
  end = jnp.cumsum(sizes)
  row = jnp.arange(len(rows))[:, None]
  own = (row >= end - sizes) & (row < end)
  rows = jnp.where(jnp.any(own, axis=1, keepdims=True), rows, 0)
  products = jnp.einsum('ND,XDF->NXF', rows, weights, precision='highest')
  return jnp.sum(jnp.where(own[..., None], products, 0), axis=1)
