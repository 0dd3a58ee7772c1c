# SPDX-License-Identifier: Apache-2.0
"""The SwiGLU block."""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsa_jax.nn.project import project
from dsa_jax.parallel import collectives, shard
from dsa_jax.parallel.mesh import BATCH
from dsa_jax.params import BackboneParam, param


class MLP(nnx.Module):
  """Computes w2(silu(w1 x) * w3 x), with the elementwise product in float32."""

  def __init__(self, dim: int, width: int, *, out_std: float, rngs: nnx.Rngs):
    self.w1 = param(BackboneParam, (dim, width), ('embed', 'ffn'), std=dim**-0.5, rngs=rngs)
    self.w3 = param(BackboneParam, (dim, width), ('embed', 'ffn'), std=dim**-0.5, rngs=rngs)
    self.w2 = param(BackboneParam, (width, dim), ('ffn', 'embed'), std=out_std, rngs=rngs)

  def __call__(self, x: Float[Array, '*any D']) -> Float[Array, '*any D']:
    shares = shard.weight_specs(self), BATCH
    return shard.shard_mapped(MLP._apply, shares, BATCH)(self, x)

  def _apply(self, x):
    """Applies the weights on one device.

    Devices that split the width gather each other's tokens, and reduce-scatter the sum.
    """
    weights = shard.gather_weights(self, x.dtype)
    w1, w3, w2 = (w[...] for w in (weights.w1, weights.w3, weights.w2))
    x = collectives.all_gather(x, 'tensor', dim=1)
    inner = swiglu(project(x, w1), project(x, w3)).astype(x.dtype)
    return collectives.psum_scatter(project(inner, w2), 'tensor', dim=1)


@jax.checkpoint  # The backward pass computes it again more cheaply than it could keep it.
def swiglu(gate: Float[Array, '*any F'], up: Float[Array, '*any F']) -> Float[Array, '*any F']:
  return jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
