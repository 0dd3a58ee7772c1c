# SPDX-License-Identifier: Apache-2.0
"""Products of the ops, which have the same precision on every device, whatever is asked for elsewhere."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def einsum(equation: str, *operands: Array) -> Float[Array, '...']:
  """Returns `jnp.einsum` in float32, by the precision of the narrowest operand; see `precision_of`."""
  precision = precision_of(min((x.dtype for x in operands), key=lambda dtype: dtype.itemsize))
  return jnp.einsum(equation, *operands, precision=precision, preferred_element_type=jnp.float32)


def precision_of(dtype: DTypeLike) -> jax.lax.Precision:
  """Returns the precision with which operands of a dtype are multiplied.

  Those in float32 keep all their bits: by default a TPU would round them to bfloat16, and a GPU to
  TF32, where an indexer selects other tokens. Narrower ones are multiplied as they are, although
  `jax_default_matmul_precision` may ask for more, which kernels of TPUs cannot do with them.
  """
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
