# SPDX-License-Identifier: Apache-2.0
"""Products by group on a TPU, where jax's own product by group is one."""

import jax
import jax.numpy as jnp

from dsa_jax.kernels.block_scaled import BlockScaled
from dsa_jax.kernels.grouped_matmul import tpu_codes
from dsa_jax.kernels.products import precision_of

ROWS_IN_GROUPS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def product(rows, weights, sizes, *, transposed: bool):
  """Returns each row times its group's matrix, or times the transposed matrix."""
  numbers = jax.lax.RaggedDotDimensionNumbers(
      dot_dimension_numbers=(((1,), (2 if transposed else 1,)), ((), ())),
      lhs_ragged_dimensions=[0],
      rhs_group_dimensions=[0],
  )
  return jax.lax.ragged_dot_general(rows, weights, sizes, numbers, precision=precision_of(rows.dtype))


def scaled_product(rows, weights: BlockScaled, sizes):
  """Returns each row times its group's matrix, whose codes are widened and scaled tile by tile."""
  if rows.shape[1] // weights.scale.shape[1] < tpu_codes.LEAST_BAND:
    return product(rows, weights.astype(rows.dtype), sizes, transposed=False)
  return tpu_codes.product(rows, weights, sizes)


def weight_gradients(rows, dout, sizes):
  """Returns the float32 gradients of the matrices, [X, D, F]."""
  return jax.lax.ragged_dot_general(
      rows, dout, sizes, ROWS_IN_GROUPS, precision=precision_of(rows.dtype), preferred_element_type=jnp.float32
  )
