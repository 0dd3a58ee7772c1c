# SPDX-License-Identifier: Apache-2.0
"""Attention to a selection, a block of query rows at a time: gather, attend, scatter back."""

import dataclasses

import jax.numpy as jnp

from dsa_jax.kernels.rows import gather_rows, map_rows, scan_rows, scatter_rows

_f32 = {'preferred_element_type': jnp.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
  """They change the speed, never the result."""

  block_t: int = 16  # Query rows whose selection is gathered at one time.


def forward(q, kv, indices, *, v_dim: int, sm_scale: float, blocks: BlockSizes):
  def attend(rows):
    q, indices = rows
    chosen, logits = _logits(q, kv, indices, sm_scale)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum('BTHK,BTKV->BTHV', weights, chosen[..., :v_dim], **_f32)
    out = out / jnp.where(total > 0, total, 1)
    return out.astype(q.dtype), (top + jnp.log(total))[..., 0]

  return map_rows(attend, (q, indices), blocks.block_t)


def backward(residuals, cotangents, *, v_dim: int, sm_scale: float, blocks: BlockSizes):
  q, kv, indices, out, lse = residuals
  dout, dlse = cotangents
  delta = jnp.sum(out.astype(jnp.float32) * dout, axis=-1) - jnp.where(lse > -jnp.inf, dlse, 0)

  def step(dkv, rows):
    q, indices, lse, dout, delta = rows
    chosen, logits = _logits(q, kv, indices, sm_scale)
    probs = jnp.exp(logits - jnp.where(lse > -jnp.inf, lse, 0)[..., None])
    dprobs = jnp.einsum('BTHV,BTKV->BTHK', dout, chosen[..., :v_dim], **_f32)
    dlogits = sm_scale * probs * (dprobs - delta[..., None])
    dq = jnp.einsum('BTHK,BTKE->BTHE', dlogits, chosen, **_f32)
    dchosen = jnp.einsum('BTHK,BTHE->BTKE', dlogits, q, **_f32)
    dvalue = jnp.einsum('BTHK,BTHV->BTKV', probs, dout, **_f32)
    dchosen = dchosen.at[..., :v_dim].add(dvalue)
    return scatter_rows(dkv, indices, dchosen), dq.astype(q.dtype)

  dkv = jnp.zeros(kv.shape, jnp.float32)
  dkv, dq = scan_rows(step, dkv, (q, indices, lse, dout, delta), blocks.block_t)
  return dq, dkv.astype(kv.dtype)


def _logits(q, kv, indices, sm_scale):
  chosen = gather_rows(kv, indices)  # B T K E
  filled = (indices >= 0) & (indices < kv.shape[1])
  logits = sm_scale * jnp.einsum('BTHE,BTKE->BTHK', q, chosen, **_f32)
  return chosen, jnp.where(filled[:, :, None], logits, -jnp.inf)
