# SPDX-License-Identifier: Apache-2.0
"""Products with a layer's matrices, which may be codes."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from dsa_jax.kernels.block_scaled import BlockScaled
from dsa_jax.kernels.grouped_matmul.op import grouped_matmul


def in_float32(equation: str, *operands: Array) -> Array:
  """Returns `jnp.einsum` in float32 on every device.

  By default a TPU would round float32 operands to bfloat16, and a GPU to TF32, where a router's logits,
  for one, then choose other experts.
  """
  return jnp.einsum(equation, *(x.astype(jnp.float32) for x in operands), precision='highest')


def project(
    x: Float[Array, '*any'], weights: Float[Array, '*shape'] | BlockScaled, n_axes: int = 1
) -> Float[Array, '*out']:
  """Returns x times a matrix in the dtype of x, summed over the last axes of x and the matrix's first.

  Kernels widen codes tile by tile, as the product of a single group. Elsewhere all codes of the matrix
  are widened before.
  """
  is_scaled = isinstance(weights, BlockScaled)
  if not is_scaled or weights.backend not in ('tpu', 'gpu'):
    return jnp.tensordot(x, weights.astype(x.dtype), n_axes)
  kept, inner = x.shape[: x.ndim - n_axes], weights.shape[:n_axes]
  rows, matrix = x.reshape(-1, math.prod(inner)), weights.as_matrix(n_axes)
  sizes = jnp.full(1, len(rows), jnp.int32)
  out = grouped_matmul(rows, matrix[None], sizes, backend=weights.backend)
  return out.reshape(*kept, *weights.shape[n_axes:])
