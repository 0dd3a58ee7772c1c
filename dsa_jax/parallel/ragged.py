# SPDX-License-Identifier: Apache-2.0
"""A ragged exchange: rows travel to the devices that own their groups, and back. None is dropped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.parallel import collectives


class Slices(NamedTuple):
  """The slices that a device sends, G to each of N devices, and the sizes of those it receives.

  They are the arguments of `jax.lax.ragged_all_to_all`: M = N * G numbers each, device by device.
  """

  starts: Int[Array, 'M']  # The first row of each slice among the rows that are sent.
  sizes: Int[Array, 'M']  # The rows of each slice.
  places: Int[Array, 'M']  # The row at which its receiver puts each slice.
  received: Int[Array, 'M']  # The rows of each slice that arrives here.


class Journey(NamedTuple):
  """The exchange that takes rows to the owners of their groups, and the one that takes them back."""

  there: Slices  # From the devices that have the rows to the owners of the groups.
  back: Slices  # From the owners to where the rows came from.
  sizes: Int[Array, 'G']  # The rows of each group of this device, which arrive group by group.


def plan_journey(sizes: Int[Array, 'X'], *axes: str) -> Journey:
  """Returns the exchanges for rows that lie group by group, within `shard.shard_mapped`.

  Args:
    sizes: The number of rows that this device has of each group.
    *axes: Axes of the mesh. Each of the N devices along them owns equally many groups, in order.
  """
  n, me = collectives.axis_size(*axes), collectives.axis_index(*axes)
  sizes = collectives.all_gather(sizes[None], *axes, dim=0).reshape(n, n, -1)  # Sender, owner, group.
  starts = _starts(sizes.reshape(n, -1)).reshape(sizes.shape)
  by_owner = sizes.transpose(1, 2, 0)  # Owners put together what belongs to one group.
  places = _starts(by_owner.reshape(n, -1)).reshape(by_owner.shape).transpose(2, 0, 1)
  sent, received = (jnp.ravel(a) for a in (sizes[me], sizes[:, me]))
  there = Slices(starts[me].ravel(), sent, places[me].ravel(), received)
  back = Slices(places[:, me].ravel(), received, starts[:, me].ravel(), sent)
  return Journey(there, back, sizes[:, me].sum(axis=0))


def _starts(sizes):
  return jnp.cumsum(sizes, axis=-1) - sizes


def send(rows: Float[Array, 'A D'], slices: Slices, n_rows: int, *axes: str) -> Float[Array, 'B D']:
  """Returns the rows that this device receives, and zeros where none is put.

  Args:
    rows: The rows that it sends.
    slices: Where each slice of them goes.
    n_rows: The largest number of rows that may arrive.
    *axes: Axes of the mesh.
  """
  if collectives.axis_size(*axes) == 1:
    return rows
  return jax.lax.platform_dependent(
      rows, *slices,
      cpu=lambda rows, *slices: send_by_gather(rows, Slices(*slices), n_rows, *axes),
      default=lambda rows, *slices: jax.lax.ragged_all_to_all(
          rows, jnp.zeros((n_rows, *rows.shape[1:]), rows.dtype), *slices, axis_name=axes
      ),
  )  # fmt: skip


def send_by_gather(rows, slices: Slices, n_rows: int, *axes: str):
  """Does what `send` does by an all-gather: XLA has no ragged exchange for CPUs."""
  everyone = collectives.all_gather(rows[None], *axes, dim=0)
  swap = lambda a: jax.lax.all_to_all(a, axes, 0, 0, tiled=True)
  starts, places = swap(slices.starts), swap(slices.places)
  row = jnp.arange(n_rows)[:, None]
  inside = (row >= places) & (row < places + slices.received)
  of_slice = jnp.argmax(inside, axis=1)
  sender = of_slice // (len(starts) // len(everyone))
  arrived = everyone[sender, starts[of_slice] + row[:, 0] - places[of_slice]]
  return jnp.where(inside.any(axis=1, keepdims=True), arrived, 0)
