# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm, computed in float32."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsa_jax.params import BackboneParam


class RMSNorm(nnx.Module):
  """Divides by the root mean square, without subtracting a mean."""

  def __init__(self, width: int, *, eps: float):
    self.scale = BackboneParam(jnp.ones(width), axes=(None,))
    self.eps = eps

  def __call__(self, x: Float[Array, '*any E']) -> Float[Array, '*any E']:
    return _rms_norm(x, self.scale[...], self.eps)


class LayerNorm(nnx.Module):
  """Subtracts the mean, divides by the deviation, scales and shifts."""

  def __init__(self, width: int, *, kind: type[nnx.Variable], eps: float):
    self.scale = kind(jnp.ones(width), axes=(None,))
    self.bias = kind(jnp.zeros(width), axes=(None,))
    self.eps = eps

  def __call__(self, x: Float[Array, '*any E']) -> Float[Array, '*any E']:
    y = x.astype(jnp.float32)
    y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


@functools.partial(jax.checkpoint, static_argnums=2)  # Recomputing is cheaper than keeping.
def _rms_norm(x, scale, eps):
  y = x.astype(jnp.float32)
  y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * scale).astype(x.dtype)
