# SPDX-License-Identifier: Apache-2.0
"""Rows on their way to the devices that own their groups, and back; none is dropped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.parallel import collectives, shard


class Slices(NamedTuple):
  """What a device sends, G slices to each of N devices, and how long what it receives is.

  The arguments of `jax.lax.ragged_all_to_all`, each of N * G, device by device.
  """

  starts: Int[Array, 'M']  # Of each slice among the rows sent.
  sizes: Int[Array, 'M']
  places: Int[Array, 'M']  # Where its receiver puts it.
  received: Int[Array, 'M']  # Sizes.


class Journey(NamedTuple):
  """Rows by group, from all devices to the owners of the groups; and the same rows back."""

  there: Slices
  back: Slices
  sizes: Int[Array, 'G']  # Rows that arrive for each group here, one group after the other.


def plan_journey(sizes: Int[Array, 'X'], *axes: str) -> Journey:
  """Plans for rows that lie group by group, within `shard.shard_mapped`.

  Args:
    sizes: This device's rows of each of all groups.
    *axes: Of the mesh; each of its N devices owns as many groups, in order.
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
  """Returns what this device receives, zeros where nothing is put.

  Args:
    rows: What it has.
    slices: What of it goes where.
    n_rows: As many as may arrive.
    *axes: Of the mesh.
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
  """`send` for CPUs, whose compiler has no ragged exchange: from the rows of all devices."""
  everyone = collectives.all_gather(rows[None], *axes, dim=0)
  swap = lambda a: jax.lax.all_to_all(a, axes, 0, 0, tiled=True)
  starts, places = swap(slices.starts), swap(slices.places)
  row = jnp.arange(n_rows)[:, None]
  inside = (row >= places) & (row < places + slices.received)
  of_slice = jnp.argmax(inside, axis=1)
  sender = of_slice // (len(starts) // len(everyone))
  found = everyone[sender, starts[of_slice] + row[:, 0] - places[of_slice]]
  return jnp.where(inside.any(axis=1, keepdims=True), found, 0)
