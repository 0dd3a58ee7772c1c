# SPDX-License-Identifier: Apache-2.0
"""How rows of keys, and float32 sums for them, lie in the memory of a TPU.

A row lies in whole lines of 128 words, two 16-bit channels to a word, so that copying a line is one
load and one store.
"""

from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.tpu.shards import SPARE, Shards

LANES = 128


class Rows(NamedTuple):
  """The layout of a row of `width` channels: `lines` lines of 128 words of 32 bits."""

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
  def words(self) -> jnp.dtype:
    """The dtype of the words of a packed row."""
    if self.dtype not in (jnp.bfloat16, jnp.float32):
      raise ValueError(f'keys on a TPU must be bfloat16 or float32; got {self.dtype}.')
    return jnp.dtype(jnp.int32) if self.dtype.itemsize == 2 else self.dtype

  @property
  def bytes(self) -> int:
    return self.lines * LANES * 4

  @property
  def sum_bytes(self) -> int:
    """Bytes of the float32 sums of a row."""
    return 4 * self.channels


def pad_channels(x: jax.Array) -> jax.Array:
  """Appends zeros up to whole blocks of 128 channels."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])


def pack(x: jax.Array, shards: Shards) -> jax.Array:
  """Packs keys [B, S, E] to [B, shards, lines, 128]; spare rows of zeros end each shard."""
  rows = Rows(x.shape[-1], x.dtype)
  words = rows.words
  begins = [shards.begin(i) for i in range(shards.n)]
  x = jnp.pad(pad_channels(x), [(0, 0), (0, begins[-1] + shards.size - x.shape[1]), (0, 0)])
  x = jnp.stack([x[:, i : i + shards.size] for i in begins], axis=1)
  x = x.reshape(*x.shape[:3], rows.blocks, LANES)
  fill = rows.lines * words.itemsize // x.dtype.itemsize - rows.blocks
  x = jnp.pad(x, [(0, 0), (0, 0), (0, SPARE), (0, fill), (0, 0)])
  if x.dtype.itemsize == 2:
    halves = jnp.split(jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32), 2, axis=3)
    x = jax.lax.bitcast_convert_type(halves[0] | halves[1] << 16, words)
  return x.reshape(x.shape[0], shards.n, shards.stored * rows.lines, LANES)


def unpack(rows: Rows, lines: list[jax.Array]) -> jax.Array:
  """Returns n rows, [n, channels], from the lines of all of them, [n, 128] each."""
  if rows.dtype.itemsize == 2:
    low = [_upper_half(x << 16, rows.dtype) for x in lines]
    high = [_upper_half(x & jnp.int32(-65536), rows.dtype) for x in lines]
    lines = (low + high)[: rows.blocks]
  return jnp.concatenate(lines, axis=1)


def _upper_half(words, dtype):
  """Returns the bfloat16 in the upper half of words whose lower half is zero."""
  return jax.lax.bitcast_convert_type(words, jnp.float32).astype(dtype)


def zero_sums(batch: int, rows: Rows, shards: Shards) -> jax.Array:
  """Returns float32 sums for packed keys, [B, shards, lines, 128], all zero."""
  return jnp.zeros((batch, shards.n, shards.stored * rows.blocks, LANES))


def unpack_sums(x: jax.Array, shards: Shards, n_keys: int, width: int) -> jax.Array:
  """Returns sums [B, S, width] of sums that lie like packed float32 keys."""
  x = x.reshape(x.shape[0], shards.n, shards.stored, -1)[:, :, : shards.size, :width]
  begins = [shards.begin(i) for i in range(shards.n)]
  total = jnp.zeros((x.shape[0], begins[-1] + shards.size, width))
  for i, begin in enumerate(begins):
    total = total.at[:, begin : begin + shards.size].add(x[:, i])
  return total[:, :n_keys]
