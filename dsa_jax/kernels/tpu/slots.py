# SPDX-License-Identifier: Apache-2.0
"""Selected keys in ascending order, and where the rows of one shard are among them."""

import functools

import jax
import jax.numpy as jnp

from dsa_jax.kernels.tpu.shards import Shards


def sort_slots(indices: jax.Array, n_keys: int) -> jax.Array:
  """Returns indices in ascending order, empty slots last and as the largest int32."""
  empty = jnp.iinfo(jnp.int32).max
  slots = jnp.where((indices >= 0) & (indices < n_keys), indices, empty)
  ascending = jnp.all(slots[..., 1:] >= slots[..., :-1])
  return jax.lax.cond(ascending, lambda x: x, functools.partial(jnp.sort, axis=-1), slots)


def split(slots: jax.Array, i: jax.Array, shards: Shards, units: tuple[int, ...]) -> jax.Array:
  """Returns how many of sorted slots [B, T, K] are read before shard i.

  Slots in reach may be read on either side of the border: their number is chosen so that the total
  is a multiple of the last of the units for which that is possible.
  """
  count = lambda bound: jnp.sum(slots < bound, axis=-1, dtype=jnp.int32)
  border, reach = i * shards.share, shards.reach * ((i > 0) & (i < shards.n))
  least = n = count(border - reach)
  most = count(border + reach)
  for unit in units:
    whole = most // unit * unit
    n = jnp.where(whole >= least, whole, n)
  return n


def locate(slots: jax.Array, shard: jax.Array, part, shards: Shards, line: int, tile: int):
  """Finds a shard's rows among sorted slots [B, T, K].

  Returns:
    The first slot of the shard, at the beginning of a line, and how many slots it has, [B, T, 2];
    and the row of each slot within the shard, [B, T, a line and a tile more than K], which is a
    spare row for slots of other shards.
  """
  first, end = part
  slot = jnp.arange(slots.shape[-1])
  inside = (slot >= first[..., None]) & (slot < end[..., None])
  local = jnp.where(inside, slots - shards.begin(shard), shards.size)
  padding = -slots.shape[-1] % line + line + tile
  local = jnp.pad(local, [(0, 0), (0, 0), (0, padding)], constant_values=shards.size)
  right = -first % line
  return jnp.stack([first + right, end - first], axis=-1), shift(local, right, line)


def shift(x: jax.Array, places: jax.Array, line: int) -> jax.Array:
  """Rolls rows [..., N] to the right, each by its own number of places, fewer than a line."""

  def step(i, x):
    moves = (places >> i & 1)[..., None] == 1
    return jnp.where(moves, jnp.roll(x, 1 << i, axis=-1), x)

  return jax.lax.fori_loop(0, (line - 1).bit_length(), step, x)
