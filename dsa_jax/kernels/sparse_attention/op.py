# SPDX-License-Identifier: Apache-2.0
"""Attention of each query to its own selected tokens."""

import functools

import jax
from jaxtyping import Array, Float, Int

from dsa_jax.kernels.backend import Blocks, check_backend, load_kernels
from dsa_jax.kernels.sparse_attention.reference import sparse_attention_reference
from dsa_jax.kernels.visibility import check_indices
from dsa_jax.kernels.xla.softmax import logits_delta

KERNELS = {
    'xla': 'dsa_jax.kernels.sparse_attention.xla',
    'tpu': 'dsa_jax.kernels.sparse_attention.tpu',
    'gpu': 'dsa_jax.kernels.sparse_attention.gpu',
}


@jax.named_scope('sparse_attention')
def sparse_attention(
    q: Float[Array, 'B T H E'],
    kv: Float[Array, 'B S E'],
    indices: Int[Array, 'B T K'],
    *,
    v_dim: int,
    sm_scale: float,
    backend: str,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, 'B T H {v_dim}'], Float[Array, 'B T H']]:
  """Attends each query to its own K selected tokens; every head shares the selection.

  Args:
    q: Absorbed queries: C latent channels, then R rotary ones (E = C + R).
    kv: One vector per token, shared by all heads; its first `v_dim` channels are the value.
      A token that nothing selects may hold NaN.
    indices: Positions in `kv`, distinct within a row, in any order; -1 or >= S is an empty slot.
      Whoever selects sees to causality.
    v_dim: C, the width of the value and of the output.
    sm_scale: Softmax scale, YaRN's factor included; never derived from E.
    backend: Which implementation. Never falls back to another.
    blocks: The backend's own BlockSizes; its defaults if None. They cannot change the result.

  Returns:
    The attention output in `q`'s dtype, and the float32 log-sum-exp of the logits in nats. A row
    without any selected token gives out 0, lse -inf and zero gradients. Both carry gradients.

  Source:
    DeepSeek-V3.2-Exp report, eq. 2 and appendix A (MQA mode).
  """
  check_backend(backend)
  check_indices(q, indices)
  check_attention(q, kv, v_dim)
  if backend == 'reference':
    return sparse_attention_reference(q, kv, indices, v_dim=v_dim, sm_scale=sm_scale)
  kernels = load_kernels(KERNELS[backend])
  return _op(q, kv, indices, v_dim, sm_scale, kernels, blocks or kernels.BlockSizes())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _op(q, kv, indices, v_dim, sm_scale, kernels, blocks):
  return kernels.forward(q, kv, indices, v_dim=v_dim, sm_scale=sm_scale, blocks=blocks)


def _fwd(q, kv, indices, v_dim, sm_scale, kernels, blocks):
  out, lse = _op(q, kv, indices, v_dim, sm_scale, kernels, blocks)
  return (out, lse), (q, kv, indices, out, lse)


def backward(v_dim, sm_scale, kernels, blocks, residuals, cotangents):
  """Returns the gradients of q and kv, and None for the indices."""
  q, kv, indices, out, lse = residuals
  dout, dlse = cotangents
  delta = logits_delta(out, lse, dout, dlse)
  dq, dkv = kernels.backward(
      (q, kv, indices, lse), dout, delta, v_dim=v_dim, sm_scale=sm_scale, blocks=blocks
  )
  return dq, dkv, None


_op.defvjp(_fwd, backward)


def check_attention(q, kv, v_dim: int):
  if q.shape[0] != kv.shape[0] or q.shape[-1] != kv.shape[-1] or q.dtype != kv.dtype:
    raise ValueError(
        'must be q [B, T, H, E], kv [B, S, E] of one dtype; got '
        f'{q.dtype} {q.shape}, {kv.dtype} {kv.shape}.'
    )
  if not 0 < v_dim <= kv.shape[-1]:
    raise ValueError(f'{v_dim=} must be within 1 and the width of kv, {kv.shape[-1]}.')
