# SPDX-License-Identifier: Apache-2.0
"""The lightning indexer's scores and the exact selection of the K best, in one op."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.kernels.backend import Blocks, check_backend, load_kernels
from dsa_jax.kernels.groups import fold_heads
from dsa_jax.kernels.index_scores import check_index_inputs
from dsa_jax.kernels.index_topk import xla
from dsa_jax.kernels.index_topk.reference import index_topk_reference
from dsa_jax.kernels.visibility import check_intervals, sees_nothing

KERNELS = {'tpu': 'dsa_jax.kernels.index_topk.tpu', 'gpu': 'dsa_jax.kernels.index_topk.gpu'}


@jax.named_scope('index_topk')
def index_topk(
    q: Float[Array, 'B T I J'],
    k: Float[Array, 'B S J'],
    weights: Float[Array, 'B T I'],
    start: Int[Array, 'B T'],
    end: Int[Array, 'B T'],
    *,
    topk: int,
    n_selections: int = 1,
    backend: str,
    blocks: Blocks | None = None,
    span: tuple[Int[Array, ''] | int, int] | None = None,
) -> Int[Array, 'B T {topk}'] | Int[Array, 'B T {n_selections} {topk}']:
  """Selects for each query the `topk` visible keys with the highest index scores.

  Args:
    q: Index queries; see `index_scores`.
    k: Index keys.
    weights: Head weights, scale folded in.
    start: int32; the first key position that each query sees.
    end: int32; one past the last. start = end sees nothing.
    topk: K, how many to keep.
    n_selections: Where it is G > 1, a query has a selection for each of G key heads of attention:
      index heads g * I / G to (g + 1) * I / G - 1 score for key head g. Index keys are shared.
    backend: Which implementation. Never falls back to another.
    blocks: The backend's own BlockSizes; its defaults if None. They cannot change the result.
    span: The first key and the number of keys, for a `k` that holds more than these, as a cache of
      several layers does. Positions count from the first key. `xla` copies no keys for few queries.

  Returns:
    int32 positions, ascending, then -1 in the slots that nothing fills; [B, T, K], or [B, T, G, K]
    if `n_selections` is above 1. All visible keys where there are at most K. Ties at the cut go to
    the lowest position. Carries no gradient.
  """
  check_backend(backend)
  check_selection(q, k, weights, start, end, topk, n_selections)
  q, k, weights = jax.lax.stop_gradient((q, k, weights))
  if sees_nothing(q, k.shape[1] if span is None else span[1]):
    selections = () if n_selections == 1 else (n_selections,)
    return jnp.full((*q.shape[:2], *selections, topk), -1, jnp.int32)
  options = dict(topk=topk, backend=backend, blocks=blocks, span=span)
  if n_selections == 1:
    return _select(q, k, weights, start, end, **options)
  q, weights = (fold_heads(x, n_selections) for x in (q, weights))
  start, end = (jnp.repeat(x, n_selections, axis=1) for x in (start, end))
  indices = _select(q, k, weights, start, end, **options)
  return indices.reshape(indices.shape[0], -1, n_selections, topk)


def _select(q, k, weights, start, end, *, topk, backend, blocks, span):
  if backend == 'xla':
    blocks = blocks or xla.BlockSizes()
    return xla.forward(q, k, weights, start, end, topk=topk, blocks=blocks, span=span)
  if span is not None:
    k = jax.lax.dynamic_slice_in_dim(k, *span, axis=1)
  if backend == 'reference':
    return index_topk_reference(q, k, weights, start, end, topk=topk)
  kernels = load_kernels(KERNELS[backend])
  blocks = blocks or kernels.BlockSizes()
  return kernels.forward(q, k, weights, start, end, topk=topk, blocks=blocks)


def check_selection(q, k, weights, start, end, topk: int, n_selections: int):
  check_index_inputs(q, k, weights, n_selections)
  check_intervals(q, start, end)
  if topk < 1:
    raise ValueError(f'{topk=} must be at least 1.')
