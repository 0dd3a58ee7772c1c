# SPDX-License-Identifier: Apache-2.0
"""How far the lightning indexer is from the attention it should predict."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.kernels.backend import Blocks, check_backend, load_kernels
from dsa_jax.kernels.groups import by_group, fold_indices
from dsa_jax.kernels.index_kl.reference import index_kl_reference
from dsa_jax.kernels.index_scores import check_index_inputs
from dsa_jax.kernels.visibility import check_indices, check_intervals, sees_nothing

SELECTED = {
    'xla': 'dsa_jax.kernels.index_kl.xla',
    'tpu': 'dsa_jax.kernels.index_kl.tpu',
    'gpu': 'dsa_jax.kernels.index_kl.gpu',
}
DENSE = {
    'xla': 'dsa_jax.kernels.index_kl.xla_dense',
    'tpu': 'dsa_jax.kernels.index_kl.tpu_dense',
    'gpu': 'dsa_jax.kernels.index_kl.gpu_dense',
}


@jax.named_scope('index_kl')
def index_kl(
    q: Float[Array, 'B T H E'],
    k: Float[Array, 'B S G E'],
    lse: Float[Array, 'B T H'],
    index_q: Float[Array, 'B T I J'],
    index_k: Float[Array, 'B S J'],
    index_weights: Float[Array, 'B T I'],
    start: Int[Array, 'B T'],
    end: Int[Array, 'B T'],
    *,
    sm_scale: float,
    indices: Int[Array, 'B T K'] | Int[Array, 'B T G K'] | None = None,
    n_selections: int = 1,
    backend: str,
    blocks: Blocks | None = None,
) -> Float[Array, 'B T']:
  """Returns KL(attention || indexer) of each query, in nats.

  target[s] = mean over heads of exp(sm_scale * dot(q, k[s]) - lse)
  kl = sum_s target[s] * (ln target[s] - ln softmax(index_scores)[s])

  With `n_selections` = G, which indices [B, T, G, K] imply, the indexer predicts each key head on
  its own: the target of key head g is the mean over its H / G heads, index heads g * I / G to
  (g + 1) * I / G - 1 score for it, and the result is the mean of the G divergences.

  Both distributions live on the keys the query sees or, with `indices`, on those of them that
  it selected; `lse` must be that of the same keys, so that the target sums to one.

  Args:
    q: The main attention's queries. Constant, like `k` and `lse`: no gradient reaches them.
    k: The main attention's keys (G = 1 in the absorbed form).
    lse: Log-sum-exp that `dense_attention` or `sparse_attention` returned, in nats.
    index_q: See `index_scores`; these three receive the gradient.
    index_k: Index keys.
    index_weights: Head weights, with the scale factors, which this loss sees.
    start: int32; the first key position that each query sees.
    end: int32; one past the last.
    sm_scale: Softmax scale of the main attention.
    indices: The selection (sparse training); None for all visible keys (warm-up).
    n_selections: 1, or G if each key head has index heads of its own.
    backend: Which implementation. Never falls back to another. Each has one module for selected
      keys and another for all visible ones, with block sizes of its own.
    blocks: The kernels' own BlockSizes; their defaults if None. They cannot change the result.

  Returns:
    float32 nats, 0 for a query that sees nothing.

  Source:
    DeepSeek-V3.2-Exp report, eq. 3 (warm-up) and eq. 4 (sparse training).
  """
  check_backend(backend)
  check_indices(q, k, indices)
  if indices is not None and indices.ndim == 4:
    n_selections = indices.shape[2]
  check_index_inputs(index_q, index_k, index_weights, n_selections)
  check_intervals(q, start, end)
  _check_constants(q, k, lse, n_selections)
  q, k, lse = jax.lax.stop_gradient((q, k, lse))
  if sees_nothing(q, k.shape[1]):
    return jnp.zeros(q.shape[:2], jnp.float32)
  if backend == 'reference':
    return index_kl_reference(
        q, k, lse, index_q, index_k, index_weights, start, end,
        sm_scale=sm_scale, indices=indices, n_selections=n_selections,
    )  # fmt: skip
  kernels = load_kernels((DENSE if indices is None else SELECTED)[backend])
  options = sm_scale, kernels, blocks or kernels.BlockSizes()
  if n_selections == 1:
    indices = indices if indices is None else fold_indices(indices, 1, k.shape[1])
    constants = q, k, lse, start, end, indices
    return _op(constants, index_q, index_k, index_weights, *options)
  q, k, lse, index_q, index_weights = (
      by_group(x, n_selections) for x in (q, k, lse, index_q, index_weights)
  )
  constants = (q, k, lse, _indices_by_group(indices, n_selections)), (start, end)
  return _op_of_groups(constants, index_q, index_k, index_weights, *options)


def _indices_by_group(indices, n_selections):
  if indices is None or indices.ndim == 4:
    return indices if indices is None else jnp.moveaxis(indices, 2, 0)
  return jnp.broadcast_to(indices, (n_selections, *indices.shape))


def _check_constants(q, k, lse, n_selections):
  if q.shape[-1] != k.shape[-1] or q.shape[2] % k.shape[2]:
    raise ValueError(
        f'must be q [B, T, H, E], k [B, S, G, E] with G dividing H; got {q.shape}, {k.shape}.'
    )
  if lse.shape != q.shape[:3]:
    raise ValueError(f'lse must be {q.shape[:3]}, one per query and head; got {lse.shape}.')
  if n_selections not in (1, k.shape[2]):
    raise ValueError(f'{n_selections=} must be 1 or the number of key heads, {k.shape[2]}.')


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _op(constants, index_q, index_k, index_weights, sm_scale, kernels, blocks):
  return _fwd(constants, index_q, index_k, index_weights, sm_scale, kernels, blocks)[0]


def _fwd(constants, index_q, index_k, index_weights, sm_scale, kernels, blocks):
  kl, sums = kernels.forward(
      constants, index_q, index_k, index_weights, sm_scale=sm_scale, blocks=blocks
  )
  return kl, (constants, (index_q, index_k, index_weights, *sums))


def _bwd(sm_scale, kernels, blocks, saved, dkl):
  constants, residuals = saved
  return None, *kernels.backward(constants, residuals, dkl, sm_scale=sm_scale, blocks=blocks)


_op.defvjp(_fwd, _bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _op_of_groups(constants, index_q, index_k, index_weights, sm_scale, kernels, blocks):
  """Returns the mean over key heads, which are on axis 0 of all but index keys and intervals."""
  inputs = constants, index_q, index_k, index_weights
  return _fwd_of_groups(*inputs, sm_scale, kernels, blocks)[0]


def _fwd_of_groups(constants, index_q, index_k, index_weights, sm_scale, kernels, blocks):
  of_groups, interval = constants

  def compare(rows):
    (q, k, lse, indices), index_q, index_weights = rows
    inputs = (q, k, lse, *interval, indices), index_q, index_k, index_weights
    return kernels.forward(*inputs, sm_scale=sm_scale, blocks=blocks)

  kl, sums = jax.lax.map(compare, (of_groups, index_q, index_weights))
  return jnp.mean(kl, axis=0), (constants, index_q, index_k, index_weights, sums)


def _bwd_of_groups(sm_scale, kernels, blocks, saved, dkl):
  (of_groups, interval), index_q, index_k, index_weights, sums = saved
  dkl = dkl / index_q.shape[0]

  def differentiate(dindex_k, rows):
    (q, k, lse, indices), index_q, index_weights, sums = rows
    constants = q, k, lse, *interval, indices
    residuals = index_q, index_k, index_weights, *sums
    dindex_q, dkeys, dweights = kernels.backward(
        constants, residuals, dkl, sm_scale=sm_scale, blocks=blocks
    )
    return dindex_k + dkeys, (dindex_q, dweights)

  rows = of_groups, index_q, index_weights, sums
  dindex_k = jnp.zeros(index_k.shape, jnp.float32)
  dindex_k, (dindex_q, dweights) = jax.lax.scan(differentiate, dindex_k, rows)
  return None, dindex_q, dindex_k.astype(index_k.dtype), dweights


_op_of_groups.defvjp(_fwd_of_groups, _bwd_of_groups)
