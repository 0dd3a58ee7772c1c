# SPDX-License-Identifier: Apache-2.0
"""Residual streams: a token has several, and layers weigh what they read and what they add to."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsa_jax.config import ModelConfig
from dsa_jax.nn.project import in_float32
from dsa_jax.params import BackboneParam, param


class Streams(nnx.Module):
  """Makes one input of M streams, and adds an output to each (independent hyper-connections).

  Both weights of a stream are sigmoids of a map of all streams, which is divided by their root mean
  square. All of it is computed in float32.

  Source:
    `HYV4HyperConnection` and `HYV4HyperHead` in `transformers` 5.24.0.
  """

  def __init__(self, cfg: ModelConfig, *, writes: bool, rngs: nnx.Rngs):
    m, d = cfg.n_streams, cfg.dim
    kinds = 2 if writes else 1  # Weights for reading, and those for writing.
    axes = None, None, None
    self.map = param(BackboneParam, (m, d, kinds * m), axes, std=(m * d) ** -0.5, rngs=rngs)
    base = jnp.zeros((kinds, m)).at[0].set(-math.log(max(m - 1, 1)))  # They read the mean at first.
    self.base = BackboneParam(base.reshape(-1), axes=(None,))
    self.scale = BackboneParam(jnp.full(kinds, 0.01), axes=(None,))
    self.norm_eps, self.eps, self.magnitude = cfg.norm_eps, cfg.streams_eps, cfg.streams_magnitude

  def read(self, x: Float[Array, 'B T M D']) -> Float[Array, 'B T D']:
    """Returns the weighted sum of the streams."""
    weights = jax.nn.sigmoid(self._logits(x, 0)) + self.eps
    return in_float32('BTM,BTMD->BTD', weights, x).astype(x.dtype)

  def add(self, x: Float[Array, 'B T M D'], out: Float[Array, 'B T D']) -> Float[Array, 'B T M D']:
    """Returns the streams, each with its share of what was computed from them."""
    weights = self.magnitude * jax.nn.sigmoid(self._logits(x, 1)) + self.eps
    y = weights[..., None] * out.astype(jnp.float32)[:, :, None]
    return (x.astype(jnp.float32) + y).astype(x.dtype)

  def _logits(self, x, kind: int):
    m = x.shape[2]
    own = slice(kind * m, (kind + 1) * m)
    x = x.astype(jnp.float32)
    rms = jax.lax.rsqrt(jnp.mean(x * x, axis=(2, 3)) + self.norm_eps)
    logits = in_float32('BTMD,MDE->BTE', x, self.map[...][..., own]) * rms[..., None]
    return logits * self.scale[...][kind] + self.base[...][own]
