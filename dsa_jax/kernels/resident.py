# SPDX-License-Identifier: Apache-2.0
"""Selected keys on a TPU: shards of keys lie in VMEM, and kernels copy the rows a query selects.

A row copied within VMEM takes about two cycles, one fetched from HBM by its own DMA twenty or more.
A shard is as many keys as VMEM holds; a long context is a few shards, one after the other. A row
lies in whole lines of 128 words, two 16-bit channels to a word, so that a copy is one load and
one store, and cost depends on what is selected, neither on where nor on what neighbours select.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
GROUP = 16  # Rows copied or added without a branch between them.
SPARE = 8  # Rows of zeros behind each shard, where slots of other shards point.


class Rows(NamedTuple):
  """How one row of `width` channels lies in VMEM: `lines` lines of 128 words of 32 bits."""

  width: int
  dtype: jnp.dtype

  @property
  def blocks(self) -> int:
    """Blocks of 128 channels."""
    return pl.cdiv(self.width, LANES)

  @property
  def lines(self) -> int:
    return pl.cdiv(self.blocks * self.dtype.itemsize, 4)

  @property
  def channels(self) -> int:
    """The width that kernels compute with."""
    return self.blocks * LANES

  @property
  def bytes(self) -> int:
    return self.lines * LANES * 4


class Shards(NamedTuple):
  """How many keys lie in VMEM at one time, and how many times."""

  n: int
  size: int

  @property
  def stored(self) -> int:
    return self.size + SPARE


def make_shards(n_keys: int, bytes_per_key: int, budget: int) -> Shards:
  """Even shards, as few as the budget of VMEM bytes allows."""
  most = max(budget // bytes_per_key - SPARE, SPARE)
  n = pl.cdiv(n_keys, most)
  return Shards(n, pl.cdiv(pl.cdiv(n_keys, n), 8) * 8)


def vmem_bytes() -> int:
  """What the chip has; the least of all chips where there is none to ask."""
  return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else 64 * 2**20


def pad_channels(x: jax.Array) -> jax.Array:
  """Zeros up to whole blocks of 128 channels."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])


def pack(x: jax.Array, shards: Shards) -> jax.Array:
  """Keys [B, S, E] to [B, shards, lines, 128] as `Rows` has them, spare rows of zeros behind."""
  rows = Rows(x.shape[-1], x.dtype)
  x = jnp.pad(pad_channels(x), [(0, 0), (0, shards.n * shards.size - x.shape[1]), (0, 0)])
  x = x.reshape(x.shape[0], shards.n, shards.size, rows.blocks, LANES)
  words = rows.lines * 4 // x.dtype.itemsize  # Blocks that fill the lines.
  x = jnp.pad(x, [(0, 0), (0, 0), (0, SPARE), (0, words - rows.blocks), (0, 0)])
  if x.dtype.itemsize == 2:
    halves = jnp.split(jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32), 2, axis=3)
    x = jax.lax.bitcast_convert_type(halves[0] | halves[1] << 16, jnp.int32)
  return x.reshape(x.shape[0], shards.n, shards.stored * rows.lines, LANES)


def sums_shape(packed: jax.Array, rows: Rows, shards: Shards) -> tuple[int, ...]:
  """The shape of float32 sums for packed keys."""
  return (*packed.shape[:2], shards.stored * rows.blocks, LANES)


def unpack_sums(x: jax.Array, shards: Shards, n_keys: int, width: int) -> jax.Array:
  """float32 sums [B, shards, lines, 128], laid out like packed float32 keys, to [B, S, width]."""
  x = x.reshape(x.shape[0], shards.n, shards.stored, -1)[:, :, : shards.size]
  return x.reshape(x.shape[0], -1, x.shape[-1])[:, :n_keys, :width]


def sort_slots(indices: jax.Array, n_keys: int) -> jax.Array:
  """Indices in ascending order, empty slots last and as the largest int32."""
  empty = jnp.iinfo(jnp.int32).max
  slots = jnp.where((indices >= 0) & (indices < n_keys), indices, empty)
  ascending = jnp.all(slots[..., 1:] >= slots[..., :-1])
  return jax.lax.cond(ascending, lambda x: x, functools.partial(jnp.sort, axis=-1), slots)


def locate(slots: jax.Array, shard: jax.Array, shards: Shards, tile: int):
  """Where a shard's rows are among sorted slots [B, T, K], and where those rows lie in the shard.

  Returns:
    The first slot and one past the last, [B, T, 2]; rows within the shard, [B, T, K + tile],
    those of other shards and the padding pointing to spare rows.
  """
  begin = shard * shards.size
  count = lambda bound: jnp.sum(slots < bound, axis=-1, dtype=jnp.int32)
  spans = jnp.stack([count(begin), count(begin + shards.size)], axis=-1)
  local = jnp.where(slots < begin + shards.size, slots - begin, shards.size)
  local = jnp.maximum(local, 0)  # Of earlier shards: never read.
  return spans, jnp.pad(local, [(0, 0), (0, 0), (0, tile)], constant_values=shards.size)


def copy_rows(rows: Rows, source, target, slot, n):
  """Copies the rows `slot(0), slot(1), ... slot(n - 1)` of a shard to the beginning of a buffer.

  Up to GROUP - 1 more are copied after them.
  """

  def group(g, _):
    for r in range(GROUP):
      line = g * GROUP + r
      found = source[pl.ds(slot(line) * rows.lines, rows.lines), :]
      target[pl.ds(line * rows.lines, rows.lines), :] = found
    return 0

  jax.lax.fori_loop(0, pl.cdiv(n, GROUP), group, 0)


def add_rows(lines: int, source, target, slot, n):
  """Adds float32 rows of a buffer to the rows `slot(i)` of a shard of sums.

  The rows of a group are distinct, but for spare ones: all loads may precede all stores.
  """

  def group(g, _):
    where = [slot(g * GROUP + r) * lines for r in range(GROUP)]
    sums = [
        target[pl.ds(at, lines), :] + source[pl.ds((g * GROUP + r) * lines, lines), :]
        for r, at in enumerate(where)
    ]
    for at, x in zip(where, sums):
      target[pl.ds(at, lines), :] = x
    return 0

  jax.lax.fori_loop(0, pl.cdiv(n, GROUP), group, 0)


def read_rows(rows: Rows, buffer, n, tile: int) -> jax.Array:
  """The first n of `tile` rows of a buffer as [tile, channels], zeros behind them."""
  lines = [buffer[pl.ds(c, tile, stride=rows.lines), :] for c in range(rows.lines)]
  filled = jax.lax.broadcasted_iota(jnp.int32, (tile, LANES), 0) < n
  lines = [jnp.where(filled, x, 0) for x in lines]
  if rows.dtype.itemsize == 2:
    low = [_upper_half(x << 16, rows.dtype) for x in lines]
    high = [_upper_half(x & jnp.int32(-65536), rows.dtype) for x in lines]
    lines = (low + high)[: rows.blocks]
  return jnp.concatenate(lines, axis=1)


def write_sums(buffer, x: jax.Array):
  """Writes [tile, channels] float32 to a buffer, row by row."""
  tile, blocks = x.shape[0], x.shape[1] // LANES
  for c in range(blocks):
    buffer[pl.ds(c, tile, stride=blocks), :] = x[:, c * LANES : (c + 1) * LANES]


def _upper_half(words, dtype):
  """The bfloat16 in the upper half of words whose lower half is zero."""
  return jax.lax.bitcast_convert_type(words, jnp.float32).astype(dtype)
