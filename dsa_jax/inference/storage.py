# SPDX-License-Identifier: Apache-2.0
"""Storage formats of a cache: rows as they come, latents, rows of GQA and index keys in FP8.

Each format has three methods. `encode` brings new rows into the format and `decode` brings stored
rows back. `as_array` returns the stored rows if an op can read them without decoding, and otherwise
None. Formats of index keys also have `match`, which changes queries so that their products with
decoded keys are those of the original queries with the keys as they were before `encode`. Formats
of rows also have a `width`; a stored row has the parts of all key heads side by side.

All layers of a cache lie side by side in one store. A span, (first row, number of rows), names one
layer of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int
import numpy as np

from dsa_jax.kernels.xla.rows import gather_rows

TILE = 128  # Latent channels that share a scale.
LARGEST = 448.0  # The largest number of E4M3.

Span = tuple[Int[Array, ''] | int, int]


class PlainRows(NamedTuple):
  """Rows in their own dtype."""

  rows: Float[Array, '*rows W']  # Zeros may follow the channels of a row.

  @property
  def width(self) -> int:
    return self.rows.shape[-1]

  def encode(self, new: Float[Array, 'B T E']) -> 'PlainRows':
    return PlainRows(widen(new.astype(self.rows.dtype), self.rows.shape[-1]))

  def decode(self, dtype: DTypeLike) -> Float[Array, '*rows W']:
    return self.rows.astype(dtype)

  def match(self, q: Float[Array, 'B T H E']) -> Float[Array, 'B T H W']:
    return widen(q, self.rows.shape[-1])

  def as_array(self, dtype: DTypeLike) -> Float[Array, '*rows W'] | None:
    return self.rows if self.rows.dtype == dtype else None


class QuantizedLatents(NamedTuple):
  """Latents in FP8 with scales, and their rotary keys, which are never quantised."""

  codes: Float[Array, '*rows C']  # float8_e4m3fn.
  scale: Float[Array, '*rows N']  # float32 powers of two, one for every 128 channels.
  rope: Float[Array, '*rows R']  # bfloat16. Zeros may follow the channels of a row.

  @property
  def width(self) -> int:
    return self.codes.shape[-1] + self.rope.shape[-1]

  @classmethod
  def quantize(cls, rows: Float[Array, '*rows E'], v_dim: int) -> 'QuantizedLatents':
    """Returns rows of `v_dim` latent channels and a rotary key."""
    latent, rope = jnp.split(rows, [v_dim], axis=-1)
    return cls(*_quantize(latent, TILE), rope.astype(jnp.bfloat16))

  def encode(self, new: Float[Array, 'B T E']) -> 'QuantizedLatents':
    rows = self.quantize(new, self.codes.shape[-1])
    return rows._replace(rope=widen(rows.rope, self.rope.shape[-1]))

  def decode(self, dtype: DTypeLike) -> Float[Array, '*rows W']:
    scale = jnp.repeat(self.scale, TILE, axis=-1)[..., : self.codes.shape[-1]]
    latent = (self.codes.astype(jnp.float32) * scale).astype(dtype)
    return jnp.concatenate([latent, self.rope.astype(dtype)], axis=-1)

  def as_array(self, dtype: DTypeLike) -> None:
    return None


class QuantizedRows(NamedTuple):
  """Values and keys of GQA in FP8 with scales, two for each key head: one for either half of its part.

  So values and keys of one width have a scale each.
  """

  codes: Float[Array, '*rows W']  # float8_e4m3fn.
  scale: Float[Array, '*rows N']  # float32 powers of two.

  @property
  def width(self) -> int:
    return self.codes.shape[-1]

  @classmethod
  def quantize(cls, rows: Float[Array, '*rows W'], n_scales: int) -> 'QuantizedRows':
    return cls(*_quantize(rows, rows.shape[-1] // n_scales))

  def encode(self, new: Float[Array, 'B T W']) -> 'QuantizedRows':
    return self.quantize(new, self.scale.shape[-1])

  def decode(self, dtype: DTypeLike) -> Float[Array, '*rows W']:
    scale = jnp.repeat(self.scale, self.width // self.scale.shape[-1], axis=-1)
    return (self.codes.astype(jnp.float32) * scale).astype(dtype)

  def as_array(self, dtype: DTypeLike) -> None:
    return None


class QuantizedKeys(NamedTuple):
  """Index keys in FP8 with scales. They are rotated before they are quantised, and stay rotated."""

  codes: Float[Array, '*rows J']  # float8_e4m3fn.
  scale: Float[Array, '*rows 1']  # float32 powers of two, one for each key.

  @classmethod
  def quantize(cls, rows: Float[Array, '*rows J']) -> 'QuantizedKeys':
    return cls(*_quantize(rows, rows.shape[-1]))

  def encode(self, new: Float[Array, 'B T J']) -> 'QuantizedKeys':
    return self.quantize(rotate(new))

  def decode(self, dtype: DTypeLike) -> Float[Array, '*rows J']:
    return (self.codes.astype(jnp.float32) * self.scale).astype(dtype)

  def match(self, q: Float[Array, 'B T I J']) -> Float[Array, 'B T I J']:
    return rotate(q)

  def as_array(self, dtype: DTypeLike) -> None:
    return None


Store = PlainRows | QuantizedLatents | QuantizedRows | QuantizedKeys


def write(
    store: Store, new: Float[Array, 'B T E'], positions: Int[Array, 'B T'], span: Span
) -> Store:
  """Returns the store with new rows at positions of a layer; a row at position -1 is dropped."""
  rows = rows_of(positions, span)

  def put(old, new):
    where = jnp.where(rows >= 0, rows, old.shape[1])
    scatter = jax.vmap(lambda o, w, n: o.at[w].set(n, mode='drop'))

    def scatter_bits(old, where, new):
      return from_bits(scatter(as_bits(old), where, as_bits(new)), old.dtype)

    return jax.lax.platform_dependent(old, where, new, cpu=scatter_bits, default=scatter)

  return jax.tree.map(put, store, store.encode(new))


def as_bits(x: jax.Array) -> jax.Array:
  """Returns integers in place of narrow floats: XLA:CPU would widen the store to scatter into it."""
  narrow = {2: jnp.uint16, 1: jnp.uint8}.get(x.dtype.itemsize)
  return x if narrow is None else jax.lax.bitcast_convert_type(x, narrow)


def from_bits(bits: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Undoes `as_bits`."""
  return jax.lax.bitcast_convert_type(bits, dtype)


def read_layer(store: Store, span: Span) -> Store:
  """Copies all rows of a layer, [B, S, ...]."""
  return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, *span, axis=1), store)


def gather(store: Store, positions: Int[Array, 'B T K'], span: Span) -> Store:
  """Copies chosen rows of a layer, [B, T, K, ...]; a position of -1 gives zeros."""
  return jax.tree.map(lambda x: gather_rows(x, rows_of(positions, span)), store)


def rows_of(positions: Int[Array, '*any'], span: Span) -> Int[Array, '*any']:
  """Returns the numbers of a layer's rows in the store; -1 stays -1."""
  return jnp.where(positions >= 0, span[0] + positions, -1)


def widen(x: Float[Array, '*rows E'], width: int) -> Float[Array, '*rows W']:
  """Appends zeros to the channels until there are `width`."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def rotate(x: Float[Array, '*rows J']) -> Float[Array, '*rows J']:
  """Spreads every channel over all J, a power of two, as DeepSeek's own service does before FP8.

  The rotation is orthonormal and its own inverse: rotated queries and keys keep their products.

  Source:
    `rotate_activation` in DeepSeek-V3.2-Exp inference/model.py at commit 87e509a2: the Hadamard
    matrix in Sylvester's order.
  """
  matrix = np.ones((1, 1), np.float32)
  while len(matrix) < x.shape[-1]:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  rotated = jnp.matmul(x, matrix * len(matrix) ** -0.5, preferred_element_type=jnp.float32)
  return rotated.astype(x.dtype)


def _quantize(x, tile: int):
  """Returns FP8 codes and, for every `tile` channels, the smallest power of two that fits them.

  Source:
    `act_quant_kernel` with scale_fmt ue8m0, DeepSeek-V3.2-Exp inference/kernel.py at commit
    87e509a2.
  """
  x = x.astype(jnp.float32)
  n_tiles = -(-x.shape[-1] // tile)
  pad = [(0, 0)] * (x.ndim - 1) + [(0, n_tiles * tile - x.shape[-1])]
  tiles = jnp.abs(jnp.pad(x, pad)).reshape(*x.shape[:-1], n_tiles, tile)
  largest = jnp.maximum(tiles.max(axis=-1), 1e-4)
  fraction, exponent = jnp.frexp(largest * (1 / LARGEST))  # fraction in [0.5, 1).
  scale = jnp.ldexp(jnp.float32(1), jnp.where(fraction == 0.5, exponent - 1, exponent))
  scaled = x / jnp.repeat(scale, tile, axis=-1)[..., : x.shape[-1]]
  return jnp.clip(scaled, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn), scale
