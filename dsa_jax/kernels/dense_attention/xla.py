# SPDX-License-Identifier: Apache-2.0
"""Attention to an interval by online softmax, blocks of rows times the blocks of keys they see."""

import dataclasses

import jax
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.products import einsum
from dsa_jax.kernels.visibility import selected_keys, visible_keys
from dsa_jax.kernels.xla.rows import add_block, key_range, map_rows, pad_axis, scan_rows, take_block


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result."""

  block_t: int = 128  # Query rows per pass.
  block_s: int = 128  # Keys at one time.


def forward(q, k, v, start, end, indices, *, sm_scale: float, blocks: BlockSizes):
  """Returns the output and the log-sum-exp, as the op does."""
  n_groups, n_keys, block_s = k.shape[2], k.shape[1], min(blocks.block_s, k.shape[1])
  k, v = pad_axis(k, 1, block_s), pad_axis(v, 1, block_s)
  end = jnp.minimum(end, n_keys)  # Never the padding.

  def attend(rows):
    q, start, end, indices = rows
    q = _split_heads(q, n_groups)
    chosen = None if indices is None else pad_axis(selected_keys(indices, n_keys), 2, block_s)

    def attend_block(j, state):
      top, total, out = state
      logits = _logits(q, k, start, end, chosen, j, block_s, sm_scale)
      new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
      safe = jnp.where(new_top > -jnp.inf, new_top, 0)
      shrink = jnp.exp(top - safe)
      weights = jnp.exp(logits - safe[..., None])
      value = einsum('BGMTS,BSGV->BGMTV', weights, take_block(v, j, block_s))
      return (
          new_top,
          total * shrink + jnp.sum(weights, axis=-1),
          out * shrink[..., None] + value,
      )

    shape = q.shape[:-1]
    state = (
        jnp.full(shape, -jnp.inf),
        jnp.zeros(shape),
        jnp.zeros((*shape, v.shape[-1])),
    )
    first, last = key_range(start, end, n_keys, block_s)
    top, total, out = jax.lax.fori_loop(first, last, attend_block, state)
    out = out / jnp.where(total > 0, total, 1)[..., None]
    return _join_heads(out).astype(q.dtype), _join_heads((top + jnp.log(total))[..., None])[..., 0]

  return map_rows(attend, (q, start, end, indices), blocks.block_t)


def backward(residuals, dout, delta, *, sm_scale: float, blocks: BlockSizes):
  """Returns the gradients of q, k and v; see `logits_delta` for delta."""
  q, k, v, start, end, indices, lse = residuals
  n_groups, n_keys, block_s = k.shape[2], k.shape[1], min(blocks.block_s, k.shape[1])
  k, v = pad_axis(k, 1, block_s), pad_axis(v, 1, block_s)
  end = jnp.minimum(end, n_keys)  # Never the padding.

  def step(dkv, rows):
    q, start, end, indices, lse, dout, delta = rows
    q, dout = _split_heads(q, n_groups), _split_heads(dout, n_groups)
    lse, delta = (_split_heads(x[..., None], n_groups) for x in (lse, delta))
    lse = jnp.where(lse > -jnp.inf, lse, 0)
    chosen = None if indices is None else pad_axis(selected_keys(indices, n_keys), 2, block_s)

    def differentiate_block(j, state):
      dk, dv, dq = state
      k_block, v_block = take_block(k, j, block_s), take_block(v, j, block_s)
      probs = jnp.exp(_logits(q, k, start, end, chosen, j, block_s, sm_scale) - lse)
      dprobs = einsum('BGMTV,BSGV->BGMTS', dout, v_block)
      dlogits = sm_scale * probs * (dprobs - delta)
      dk = add_block(dk, j, einsum('BGMTS,BGMTE->BSGE', dlogits, q))
      dv = add_block(dv, j, einsum('BGMTS,BGMTV->BSGV', probs, dout))
      return dk, dv, dq + einsum('BGMTS,BSGE->BGMTE', dlogits, k_block)

    first, last = key_range(start, end, n_keys, block_s)
    dq = jnp.zeros(q.shape, jnp.float32)
    dk, dv, dq = jax.lax.fori_loop(first, last, differentiate_block, (*dkv, dq))
    return (dk, dv), _join_heads(dq).astype(q.dtype)

  dkv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  rows = (q, start, end, indices, lse, dout, delta)
  (dk, dv), dq = scan_rows(step, dkv, rows, blocks.block_t)
  return dq, dk[:, :n_keys].astype(k.dtype), dv[:, :n_keys].astype(v.dtype)


def _logits(q, k, start, end, chosen, j, block_s, sm_scale):
  """Returns the logits of rows and key block `j`, [B, G, M, T, S]; -inf where not visible."""
  visible = visible_keys(start, end, j * block_s + jnp.arange(block_s))
  if chosen is not None:
    visible &= jax.lax.dynamic_slice_in_dim(chosen, j * block_s, block_s, axis=2)
  logits = einsum('BGMTE,BSGE->BGMTS', q, take_block(k, j, block_s))
  return jnp.where(visible[:, None, None], sm_scale * logits, -jnp.inf)


def _split_heads(x, n_groups):
  """Turns [B, T, H, E] to [B, G, M, T, E]: M heads share each key head."""
  b, t, h, e = x.shape
  return jnp.moveaxis(x.reshape(b, t, n_groups, h // n_groups, e), 1, 3)


def _join_heads(x):
  b, g, m, t, e = x.shape
  return jnp.moveaxis(x, 3, 1).reshape(b, t, g * m, e)
