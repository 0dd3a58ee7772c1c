# SPDX-License-Identifier: Apache-2.0
"""Rows of several groups, each times the matrix of its group: what dropless experts compute."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.kernels.backend import check_backend, load_kernels
from dsa_jax.kernels.block_scaled import BlockScaled
from dsa_jax.kernels.grouped_matmul.reference import grouped_matmul_reference

KERNELS = {
    'xla': 'dsa_jax.kernels.grouped_matmul.xla',
    'tpu': 'dsa_jax.kernels.grouped_matmul.tpu',
    'gpu': 'dsa_jax.kernels.grouped_matmul.gpu',
}


@jax.named_scope('grouped_matmul')
def grouped_matmul(
    rows: Float[Array, 'N D'],
    weights: Float[Array, 'X D F'] | BlockScaled,
    sizes: Int[Array, 'X'],
    *,
    backend: str,
) -> Float[Array, 'N F']:
  """Returns the products of rows that are sorted by group, zeros behind the last group.

  It costs N * D * F whatever X is, and so does each of its two gradients, besides a part of a tile
  of rows for each group. Equal inputs give equal bits.

  Args:
    rows: The rows of group 0, then those of group 1, and so on. Rows behind the last group may hold
      NaN, and their gradients are zero.
    weights: One matrix for each group, of the rows' dtype; or their codes and scales, which are
      widened tile by tile and have no gradients. For the gradient of rows all of them are widened;
      there is no forward mode.
    sizes: int32; how many rows each group has. It may have none. Their sum is at most N.
    backend: Which implementation. `tpu` is jax's own `ragged_dot`.
  """
  check_backend(backend)
  if rows.ndim != 2 or weights.ndim != 3 or rows.shape[1] != weights.shape[1]:
    raise ValueError(
        f'must be rows [N, D], weights [X, D, F]; got {rows.shape}, {weights.shape}.'
    )
  is_scaled = isinstance(weights, BlockScaled)
  if not is_scaled and rows.dtype != weights.dtype:
    raise ValueError(f'rows and weights must share a dtype; got {rows.dtype}, {weights.dtype}.')
  if sizes.shape != weights.shape[:1] or sizes.dtype != 'int32':
    raise ValueError(
        f'sizes must be int32 {weights.shape[:1]}, one per group; got {sizes.dtype} {sizes.shape}.'
    )
  if backend == 'reference':
    return grouped_matmul_reference(rows, weights.astype(rows.dtype), sizes)
  kernels = load_kernels(KERNELS[backend])
  if not len(rows) or not len(sizes):  # There are no tiles.
    return jnp.zeros((len(rows), weights.shape[2]), rows.dtype)
  return (_scaled_op if is_scaled else _op)(rows, weights, sizes, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _op(rows, weights, sizes, kernels):
  return kernels.product(rows, weights, sizes, transposed=False)


def _fwd(rows, weights, sizes, kernels):
  return _op(rows, weights, sizes, kernels), (rows, weights, sizes)


def _bwd(kernels, residuals, dout):
  rows, weights, sizes = residuals
  drows = kernels.product(dout, weights, sizes, transposed=True)
  return drows, kernels.weight_gradients(rows, dout, sizes).astype(weights.dtype), None


_op.defvjp(_fwd, _bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scaled_op(rows, weights, sizes, kernels):
  return kernels.scaled_product(rows, weights, sizes)


def _scaled_fwd(rows, weights, sizes, kernels):
  return _scaled_op(rows, weights, sizes, kernels), (weights, sizes)


def _scaled_bwd(kernels, residuals, dout):
  weights, sizes = residuals
  return kernels.product(dout, weights.astype(dout.dtype), sizes, transposed=True), None, None


_scaled_op.defvjp(_scaled_fwd, _scaled_bwd)
