# SPDX-License-Identifier: Apache-2.0
"""Attention to a selection, a block of query rows at a time: gather, attend, scatter back.

Every product reads the gathered rows as they lie, [K, E], at their full width: copying the value
channels out or the selection to the last axis would cost more than the products themselves.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.groups import fold_heads, fold_indices, unfold_heads
from dsa_jax.kernels.xla.rows import gather_rows, map_rows, scan_rows, scatter_rows

_f32 = {'preferred_element_type': jnp.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result."""

  block_t: int = 8  # Query rows per pass, whose selection is gathered at one time.


def forward(
    q, kv, indices, *, n_groups: int, v_dim: int, sm_scale: float, blocks: BlockSizes
):
  """Returns the output and the log-sum-exp, as the op does; keys are folded, see `groups`."""
  n_keys = kv.shape[1] // n_groups

  def attend(rows):
    q, indices = rows
    q, indices = fold_heads(q, n_groups), fold_indices(indices, n_groups, n_keys)
    chosen = gather_rows(kv, indices)
    logits = jnp.einsum('BTKE,BTHE->BTKH', chosen, q, **_f32)
    # Logits are turned before the softmax, which then runs along memory; XLA would turn products.
    logits = jnp.swapaxes(sm_scale * logits + _mask(indices, kv)[..., None], 2, 3)
    logits = jax.lax.optimization_barrier(logits)
    top = jnp.max(logits, axis=3, keepdims=True)
    weights = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0))
    total = jnp.sum(weights, axis=3, keepdims=True)
    out = jnp.einsum('BTHK,BTKE->BTHE', weights, chosen, **_f32)[..., :v_dim]
    out = out / jnp.where(total > 0, total, 1)
    results = out.astype(q.dtype), (top + jnp.log(total))[..., 0]
    return tuple(unfold_heads(x, n_groups) for x in results)

  return map_rows(attend, (q, indices), max(blocks.block_t // n_groups, 1))


def backward(
    residuals, dout, delta, *, n_groups: int, v_dim: int, sm_scale: float, blocks: BlockSizes
):
  """Returns the gradients of q and kv; see `logits_delta` for delta."""
  q, kv, indices, lse = residuals
  n_keys = kv.shape[1] // n_groups
  lse = jnp.where(lse > -jnp.inf, lse, 0)

  def step(dkv, rows):
    q, indices, lse, dout, delta = rows
    indices = fold_indices(indices, n_groups, n_keys)
    q, lse, dout, delta = (fold_heads(x, n_groups) for x in (q, lse, dout, delta))
    chosen = gather_rows(kv, indices)
    dout = jnp.pad(dout, [(0, 0)] * 3 + [(0, kv.shape[-1] - v_dim)])
    both = jnp.concatenate([q, dout], axis=2)  # Both have dots with the same keys.
    logits, dprobs = jnp.split(jnp.einsum('BTKE,BTHE->BTKH', chosen, both, **_f32), 2, axis=-1)
    logits = sm_scale * logits + _mask(indices, kv)[..., None]
    probs = jnp.exp(logits - lse[:, :, None])
    dlogits = sm_scale * probs * (dprobs - delta[:, :, None])
    dq = jnp.einsum('BTKH,BTKE->BTHE', dlogits, chosen, **_f32)
    weights = jnp.concatenate([dlogits, probs], axis=-1)
    dchosen = jnp.einsum('BTKH,BTHE->BTKE', weights, both, **_f32)
    dkv = scatter_rows(dkv, indices, dchosen)
    return dkv, unfold_heads(dq.astype(q.dtype), n_groups)

  dkv = jnp.zeros(kv.shape, jnp.float32)
  rows = q, indices, lse, dout, delta
  dkv, dq = scan_rows(step, dkv, rows, max(blocks.block_t // n_groups, 1))
  return dq, dkv.astype(kv.dtype)


def _mask(indices, kv):
  """Returns what is added to the logits of [B, T, K] slots, alike for all heads: they vectorise."""
  return jnp.where((indices >= 0) & (indices < kv.shape[1]), 0.0, -jnp.inf)
