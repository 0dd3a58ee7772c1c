# SPDX-License-Identifier: Apache-2.0
"""Queries that grow with the logarithm of their position, so that attention stays as sharp."""

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LogScale(nnx.Module):
  """Multiplies a head's whole query by a · ln(position + 1) + b, with a and b of each head.

  Fresh weights leave queries as they are. Positions count from the beginning of a document.

  Source:
    `MistralLarge4TextSoftmaxScaling` in `transformers` 5.24.0 (SSMax).
  """

  def __init__(self, n_heads: int, *, kind: type[nnx.Variable], axis: str):
    self.scale = kind(jnp.zeros(n_heads), axes=(axis,))
    self.bias = kind(jnp.ones(n_heads), axes=(axis,))

  def __call__(
      self, q: Float[Array, 'B T H E'], positions: Int[Array, 'B T']
  ) -> Float[Array, 'B T H E']:
    length = jnp.log1p(positions.astype(jnp.float32))[..., None]
    factor = self.scale[...] * length + self.bias[...]
    return (q.astype(jnp.float32) * factor[..., None]).astype(q.dtype)
