# SPDX-License-Identifier: Apache-2.0
"""Attention of each query to the interval of keys it sees: the teacher and the baseline."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.kernels.backend import Blocks, check_backend, load_kernels
from dsa_jax.kernels.dense_attention.reference import dense_attention_reference
from dsa_jax.kernels.groups import by_group, join_groups
from dsa_jax.kernels.visibility import (
    attend_nothing,
    check_indices,
    check_intervals,
    sees_nothing,
)
from dsa_jax.kernels.xla.softmax import logits_delta

KERNELS = {
    'xla': 'dsa_jax.kernels.dense_attention.xla',
    'tpu': 'dsa_jax.kernels.dense_attention.tpu',
    'gpu': 'dsa_jax.kernels.dense_attention.gpu',
}


@jax.named_scope('dense_attention')
def dense_attention(
    q: Float[Array, 'B T H E'],
    k: Float[Array, 'B S G E'],
    v: Float[Array, 'B S G V'],
    start: Int[Array, 'B T'],
    end: Int[Array, 'B T'],
    *,
    sm_scale: float,
    indices: Int[Array, 'B T K'] | Int[Array, 'B T G K'] | None = None,
    backend: str,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, 'B T H V'], Float[Array, 'B T H']]:
  """Attends each query to the keys start <= s < end, in linear memory.

  Args:
    q: Queries; head h reads key head h // (H / G).
    k: Keys; G divides H.
    v: Values.
    start: int32; the first key position that each query sees.
    end: int32; one past the last. start = end sees nothing.
    sm_scale: Softmax scale, YaRN's factor included.
    indices: If given, attention is restricted to these positions within the interval, which all
      heads or each key head's share; -1 or >= S is an empty slot. The numbers are those of
      `sparse_attention`, at the cost of dense attention, which is the cheaper of the two where the
      context is short.
    backend: Which implementation. Never falls back to another.
    blocks: The kernels' own BlockSizes; their defaults if None. They cannot change the result.

  Returns:
    The attention output in `q`'s dtype, and the float32 log-sum-exp of the logits in nats. A row
    that sees nothing gives out 0, lse -inf and zero gradients. Both carry gradients.
  """
  check_backend(backend)
  check_intervals(q, start, end)
  check_indices(q, k, indices)
  if k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1] or q.shape[2] % k.shape[2]:
    raise ValueError(
        'must be q [B, T, H, E], k [B, S, G, E], v [B, S, G, V] with G dividing H; got '
        f'{q.shape}, {k.shape}, {v.shape}.'
    )
  if not q.dtype == k.dtype == v.dtype:
    raise ValueError(f'q, k and v must share a dtype; got {q.dtype}, {k.dtype} and {v.dtype}.')
  if sees_nothing(q, k.shape[1]):
    return attend_nothing(q, v.shape[-1])
  if backend == 'reference':
    return dense_attention_reference(q, k, v, start, end, sm_scale=sm_scale, indices=indices)
  kernels = load_kernels(KERNELS[backend])
  blocks = blocks or kernels.BlockSizes()
  attend = lambda q, k, v, indices: _op(
      q, k, v, start, end, indices, sm_scale, kernels, blocks
  )
  if indices is None or indices.ndim == 3:
    return attend(q, k, v, indices)
  n_groups = k.shape[2]
  inputs = *(by_group(x, n_groups) for x in (q, k, v)), jnp.moveaxis(indices, 2, 0)
  out, lse = jax.lax.map(lambda x: attend(*x), inputs)  # Each mask is of one key head.
  return join_groups(out), join_groups(lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _op(q, k, v, start, end, indices, sm_scale, kernels, blocks):
  return kernels.forward(q, k, v, start, end, indices, sm_scale=sm_scale, blocks=blocks)


def _fwd(q, k, v, start, end, indices, sm_scale, kernels, blocks):
  out, lse = _op(q, k, v, start, end, indices, sm_scale, kernels, blocks)
  return (out, lse), (q, k, v, start, end, indices, out, lse)


def _bwd(sm_scale, kernels, blocks, saved, cotangents):
  dq, dk, dv = backward(sm_scale, kernels, blocks, saved, cotangents)
  return dq, dk, dv, None, None, None


def backward(sm_scale, kernels, blocks, saved, cotangents):
  """Returns the gradients of q, k and v. The compile report compiles it."""
  *inputs, out, lse = saved
  dout, dlse = cotangents
  delta = logits_delta(out, lse, dout, dlse)
  return kernels.backward((*inputs, lse), dout, delta, sm_scale=sm_scale, blocks=blocks)


_op.defvjp(_fwd, _bwd)
