# SPDX-License-Identifier: Apache-2.0
"""The positions of a sequence, dealt out in turn to the devices along the mesh axis `context`.

Position p lies on device p % C, in row p // C. So the devices hold equal shares of a text of any
length, and what a query sees is an interval of the rows of each. On one device rows are positions.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.parallel import collectives


def row_of(position: Int[Array, '*any']) -> Int[Array, '*any']:
  """Returns the rows in which this device keeps positions; -1 for those of other devices, and for -1."""
  n, me = _places()
  if n == 1:
    return position
  return jnp.where((position >= 0) & (position % n == me), position // n, -1)


def position_of(row: Int[Array, '*any']) -> Int[Array, '*any']:
  """Returns the positions of this device's rows; -1 stays -1."""
  n, me = _places()
  return row if n == 1 else jnp.where(row >= 0, row * n + me, -1)


def rows_before(position: Int[Array, '*any']) -> Int[Array, '*any']:
  """Returns how many rows of this device come before each position."""
  n, me = _places()
  return position if n == 1 else (position + n - 1 - me) // n


def most_rows(n_positions: int) -> int:
  """Returns how many rows of a device successive positions take at most."""
  return -(-n_positions // _places()[0])


def of_all_devices(
    out: Float[Array, 'B T H C'], lse: Float[Array, 'B T H']
) -> tuple[Float[Array, 'B T H C'], Float[Array, 'B T H']]:
  """Merges what heads have read of each device's rows, by the log-sum-exp of their logits."""
  if _places()[0] == 1:
    return out, lse
  top = collectives.pmax(lse, 'context')
  top = jnp.where(jnp.isfinite(top), top, 0)
  weight = jnp.exp(lse - top)[..., None]
  both = jnp.concatenate([weight * out.astype(jnp.float32), weight], axis=-1)
  both = collectives.psum(both, 'context')
  total = both[..., -1]
  merged = both[..., :-1] / jnp.where(total > 0, total, 1)[..., None]
  return merged.astype(out.dtype), jnp.log(total) + top


def in_order(rows: Float[Array, 'B S any']) -> Float[Array, 'B S2 any']:
  """All-gathers rows of all devices in the order of their positions."""
  n, _ = _places()
  if n == 1:
    return rows
  of_each = collectives.all_gather(rows[:, :, None], 'context', dim=2)
  return of_each.reshape(rows.shape[0], -1, *rows.shape[2:])


def _places():
  """Returns how many devices share the positions, and which of them this one is."""
  return collectives.axis_size('context'), collectives.axis_index('context')
