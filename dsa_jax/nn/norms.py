# SPDX-License-Identifier: Apache-2.0
"""RMSNorm, with or without gates, and LayerNorm, computed in float32."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsa_jax.params import BackboneParam, param


class RMSNorm(nnx.Module):
  """Divides by the root mean square, without subtracting a mean."""

  def __init__(self, width: int, *, eps: float):
    self.scale = BackboneParam(jnp.ones(width), axes=(None,))
    self.eps = eps

  def __call__(self, x: Float[Array, '*any E']) -> Float[Array, '*any E']:
    return _rms_norm(x, self.scale[...], self.eps)


class GatedRMSNorm(RMSNorm):
  """Multiplies each channel of the normed input by a gate, a sigmoid of a low-rank map of all."""

  def __init__(self, width: int, *, rank: int, eps: float, rngs: nnx.Rngs):
    super().__init__(width, eps=eps)
    weight = functools.partial(param, BackboneParam, axes=(None, None), rngs=rngs)
    self.w_down = weight((width, rank), std=width**-0.5)
    self.w_up = weight((rank, width), std=rank**-0.5)

  def __call__(self, x: Float[Array, '*any E']) -> Float[Array, '*any E']:
    return _through_gates(super().__call__(x), self.w_down[...], self.w_up[...])


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


@jax.checkpoint  # As above.
def _through_gates(y, w_down, w_up):
  inner = jax.nn.silu((y @ w_down.astype(y.dtype)).astype(jnp.float32)).astype(y.dtype)
  gates = jax.nn.sigmoid((inner @ w_up.astype(y.dtype)).astype(jnp.float32))
  return (y.astype(jnp.float32) * gates).astype(y.dtype)
