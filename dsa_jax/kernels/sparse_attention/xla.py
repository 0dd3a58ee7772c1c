# SPDX-License-Identifier: Apache-2.0
"""Attention to a selection, a block of query rows at a time: gather, attend, scatter back.

Where the value begins the key, every product reads the gathered rows as they lie, [K, E], at their
full width: copying the value channels out or the selection to the last axis would cost more than
the products themselves. Where values lie beside keys, each is gathered for its own products. With
several key heads a pass takes so few folded queries that what it gathers stays in a core's cache:
with few heads for each key, the products wait for memory otherwise.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.groups import fold_heads, fold_indices, unfold_heads
from dsa_jax.kernels.products import einsum
from dsa_jax.kernels.xla.rows import gather_rows, scan_rows, scatter_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result."""

  block_t: int = 8  # Query rows per pass, whose selection is gathered at one time.
  gathered: int = 2**19  # With several key heads, at most so many bytes are gathered at one time.


def forward(
    q, kv, indices, *, n_groups: int, v_dim: int, sm_scale: float, blocks: BlockSizes
):
  """Returns the output and the log-sum-exp, as the op does; keys are folded, see `groups`.

  The key is the last channels of a row of `kv`, as many as `q` has.
  """

  def attend(_, rows):
    q, indices = rows
    keys, values = _gather(kv, indices, q.shape[-1], v_dim)
    logits = einsum('BTKE,BTHE->BTKH', keys, q)
    # Logits are turned before the softmax, which then runs along memory; XLA would turn products.
    logits = jnp.swapaxes(sm_scale * logits + _mask(indices, kv)[..., None], 2, 3)
    logits = jax.lax.optimization_barrier(logits)
    top = jnp.max(logits, axis=3, keepdims=True)
    weights = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0))
    total = jnp.sum(weights, axis=3, keepdims=True)
    out = einsum('BTHK,BTKE->BTHE', weights, values)[..., :v_dim]
    out = out / jnp.where(total > 0, total, 1)
    return None, (out.astype(q.dtype), (top + jnp.log(total))[..., 0])

  return _scan_folded(attend, None, (q,), indices, kv, n_groups, blocks)[1]


def backward(
    residuals, dout, delta, *, n_groups: int, v_dim: int, sm_scale: float, blocks: BlockSizes
):
  """Returns the gradients of q and kv; see `logits_delta` for delta."""
  q, kv, indices, lse = residuals
  lse = jnp.where(lse > -jnp.inf, lse, 0)

  def step(dkv, rows):
    q, lse, dout, delta, indices = rows
    keys, values = _gather(kv, indices, q.shape[-1], v_dim)
    wide = lambda x, before: jnp.pad(
        x, [(0, 0)] * 3 + [(before, kv.shape[-1] - before - x.shape[-1])]
    )
    both = wide(q, kv.shape[-1] - q.shape[-1]), wide(dout, 0)
    both = jnp.concatenate(both, axis=2)  # The rows of q and of dout, as wide as those of keys.
    if keys is values:
      dots = einsum('BTKE,BTHE->BTKH', keys, both)
      logits, dprobs = jnp.split(dots, 2, axis=-1)
    else:
      logits = einsum('BTKE,BTHE->BTKH', keys, q)
      dprobs = einsum('BTKV,BTHV->BTKH', values, dout)
    logits = sm_scale * logits + _mask(indices, kv)[..., None]
    probs = jnp.exp(logits - lse[:, :, None])
    dlogits = sm_scale * probs * (dprobs - delta[:, :, None])
    if keys is values:
      dq = einsum('BTKH,BTKE->BTHE', dlogits, keys)
    else:  # Of few heads, turned ones are the faster.
      turned = jax.lax.optimization_barrier(jnp.swapaxes(dlogits, 2, 3))
      dq = einsum('BTHK,BTKE->BTHE', turned, keys)
    weights = jnp.concatenate([dlogits, probs], axis=-1)
    drows = einsum('BTKH,BTHE->BTKE', weights, both)
    return scatter_rows(dkv, indices, drows), dq.astype(q.dtype)

  dkv, rows = jnp.zeros(kv.shape, jnp.float32), (q, lse, dout, delta)
  dkv, dq = _scan_folded(step, dkv, rows, indices, kv, n_groups, blocks)
  return dq, dkv.astype(kv.dtype)


def _scan_folded(step: Callable, carry, rows, indices, kv, n_groups: int, blocks: BlockSizes):
  """Scans blocks of rows [B, T, H, ...] and of indices, folded; see `scan_rows`."""
  n_keys = kv.shape[1] // n_groups
  if n_groups == 1:
    return scan_rows(step, carry, (*rows, fold_indices(indices, 1, n_keys)), blocks.block_t)
  bytes_per_row = kv.shape[0] * indices.shape[-1] * kv.shape[2] * kv.dtype.itemsize
  block = max(blocks.gathered // bytes_per_row, 1)

  def step_folded(carry, rows):
    *rows, indices = rows
    folded = [fold_heads(x, n_groups) for x in rows]
    folded.append(fold_indices(indices, n_groups, n_keys))
    carry, out = scan_rows(step, carry, tuple(folded), block)
    return carry, jax.tree.map(lambda x: unfold_heads(x, n_groups), out)

  return scan_rows(step_folded, carry, (*rows, indices), blocks.block_t)


def _gather(kv, indices, width: int, v_dim: int):
  """Returns selected keys and values; the same rows if their channels overlap."""
  if v_dim + width > kv.shape[2]:
    rows = gather_rows(kv, indices)
    return rows, rows
  return gather_rows(kv[..., -width:], indices), gather_rows(kv[..., :v_dim], indices)


def _mask(indices, kv):
  """Returns what is added to the logits of [B, T, K] slots, alike for all heads: they vectorise."""
  return jnp.where((indices >= 0) & (indices < kv.shape[1]), 0.0, -jnp.inf)
