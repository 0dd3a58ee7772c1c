# SPDX-License-Identifier: Apache-2.0
"""Which keys a query may see: the interval start <= s < end, and nothing else."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible_keys(
    start: Int[Array, 'B T'], end: Int[Array, 'B T'], positions: Int[Array, 'S']
) -> Bool[Array, 'B T S']:
  """Says which of the keys at `positions` each query sees."""
  return (positions >= start[..., None]) & (positions < end[..., None])


def selected_keys(indices: Int[Array, 'B T K'], n_keys: int) -> Bool[Array, 'B T S']:
  """Says which keys each query selected; indices that are no position select none."""
  batch, rows, _ = indices.shape
  b, t = jnp.ix_(jnp.arange(batch), jnp.arange(rows))
  where = jnp.where(indices >= 0, indices, n_keys)
  chosen = jnp.zeros((batch, rows, n_keys), bool)
  return chosen.at[b[..., None], t[..., None], where].set(True, mode='drop')


def sees_nothing(q: Array, n_keys: int) -> bool:
  """Says whether there are no queries or no keys at all, of which kernels could make no block."""
  return 0 in (*q.shape[:2], n_keys)


def attend_nothing(q: Float[Array, 'B T H E'], width: int):
  """Returns what attention gives queries that see nothing: an output of that width, and lse."""
  return jnp.zeros((*q.shape[:3], width), q.dtype), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)


def check_indices(q: jax.Array, k: jax.Array, indices: jax.Array | None):
  if indices is None or indices.shape[:-1] in (q.shape[:2], (*q.shape[:2], k.shape[2])):
    return
  shared, own = (*q.shape[:2], 'K'), (*q.shape[:2], k.shape[2], 'K')
  raise ValueError(
      f'indices must be {shared}, K per query, or {own}, K per query and key head; got '
      f'{indices.shape}.'
  )


def check_intervals(q: jax.Array, start: jax.Array, end: jax.Array):
  for name, x in (('start', start), ('end', end)):
    if x.shape != q.shape[:2] or x.dtype != jnp.int32:
      raise ValueError(
          f'{name} must be int32 {q.shape[:2]}, one per query; got {x.dtype} {x.shape}.'
      )
