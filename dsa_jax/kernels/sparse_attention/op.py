# SPDX-License-Identifier: Apache-2.0
"""Attention of each query to its own selected tokens."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.kernels.backend import Blocks, check_backend, load_kernels
from dsa_jax.kernels.groups import fold_keys
from dsa_jax.kernels.sparse_attention.reference import sparse_attention_reference
from dsa_jax.kernels.visibility import attend_nothing, check_indices, sees_nothing
from dsa_jax.kernels.xla.softmax import logits_delta

KERNELS = {
    'xla': 'dsa_jax.kernels.sparse_attention.xla',
    'tpu': 'dsa_jax.kernels.sparse_attention.tpu',
    'gpu': 'dsa_jax.kernels.sparse_attention.gpu',
}


@jax.named_scope('sparse_attention')
def sparse_attention(
    q: Float[Array, 'B T H E'],
    k: Float[Array, 'B S G P'],
    v: Float[Array, 'B S G V'] | None,
    indices: Int[Array, 'B T K'] | Int[Array, 'B T G K'],
    *,
    v_dim: int | None = None,
    sm_scale: float,
    backend: str,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, 'B T H V'], Float[Array, 'B T H']]:
  """Attends each query to its own K selected tokens, which all heads or each key head's share.

  Args:
    q: Queries; head h reads key head h // (H / G). Those of MLA are absorbed: C latent channels,
      then R rotary ones (E = C + R).
    k: Keys; G divides H, and is 1 in MLA. A token that nothing selects may hold NaN.
    v: Values, and then P = E. None says that `k` holds rows which begin with the value, `v_dim`
      channels wide, and end with the key, E channels wide. In MLA both share channels: P = E. A
      cache of grouped heads holds each value before its key: P = v_dim + E.
    indices: Positions of tokens, distinct within a row, in any order; -1 or >= S is an empty slot.
      Whoever selects sees to causality.
    v_dim: The width of the value and of the output; only where `v` is None.
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
  check_attention(q, k, v, v_dim)
  check_indices(q, k, indices)
  if sees_nothing(q, k.shape[1]):
    return attend_nothing(q, v_dim if v is None else v.shape[-1])
  if backend == 'reference':
    v = k[..., :v_dim] if v is None else v
    return sparse_attention_reference(q, k[..., -q.shape[-1] :], v, indices, sm_scale=sm_scale)
  if v is not None:
    k, v_dim = jnp.concatenate([v, k], axis=-1), v.shape[-1]
  if backend != 'xla' and k.shape[-1] > q.shape[-1]:  # Their products read whole rows.
    q = jnp.pad(q, [(0, 0)] * 3 + [(k.shape[-1] - q.shape[-1], 0)])
  kernels = load_kernels(KERNELS[backend])
  options = k.shape[2], v_dim, sm_scale, kernels, blocks or kernels.BlockSizes()
  return _op(q, fold_keys(k), indices, *options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def _op(q, kv, indices, n_groups, v_dim, sm_scale, kernels, blocks):
  sizes = dict(n_groups=n_groups, v_dim=v_dim, sm_scale=sm_scale)
  return kernels.forward(q, kv, indices, **sizes, blocks=blocks)


def _fwd(q, kv, indices, n_groups, v_dim, sm_scale, kernels, blocks):
  out, lse = _op(q, kv, indices, n_groups, v_dim, sm_scale, kernels, blocks)
  return (out, lse), (q, kv, indices, out, lse)


def backward(n_groups, v_dim, sm_scale, kernels, blocks, residuals, cotangents):
  """Returns the gradients of q and of folded keys, and None for the indices."""
  q, kv, indices, out, lse = residuals
  dout, dlse = cotangents
  delta = logits_delta(out, lse, dout, dlse)
  sizes = dict(n_groups=n_groups, v_dim=v_dim, sm_scale=sm_scale)
  dq, dkv = kernels.backward((q, kv, indices, lse), dout, delta, **sizes, blocks=blocks)
  return dq, dkv, None


_op.defvjp(_fwd, backward)


def check_attention(q, k, v, v_dim: int | None):
  given = [k] if v is None else [k, v]
  widths = q.shape[-1] > k.shape[-1] or (v is not None and q.shape[-1] != k.shape[-1])
  wrong = widths or q.shape[0] != k.shape[0] or q.shape[2] % k.shape[2]
  if wrong or given[-1].shape[:3] != k.shape[:3] or any(x.dtype != q.dtype for x in given):
    got = ', '.join(f'{x.dtype} {x.shape}' for x in (q, *given))
    raise ValueError(
        'must be q [B, T, H, E], k [B, S, G, E], v [B, S, G, V] of one dtype with G dividing H, '
        f'and k at least as wide as q where v is None; got {got}.'
    )
  if (v is None) == (v_dim is None):
    given = f'{v_dim=} beside v' if v_dim is not None else 'neither v nor v_dim'
    raise ValueError(f'v must be given, or v_dim where the value begins the key; got {given}.')
  if v is None and not 0 < v_dim <= k.shape[-1]:
    raise ValueError(f'{v_dim=} must be within 1 and the width of k, {k.shape[-1]}.')
