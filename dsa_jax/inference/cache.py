# SPDX-License-Identifier: Apache-2.0
"""What is kept of every token that was read: a latent with its rotary key, and an index key."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.kernels.xla.rows import gather_rows

TILE = 128  # Latent channels that share a scale.
LINE = 128  # Channels that a TPU keeps side by side.
LARGEST = 448.0  # Of E4M3.
FORMATS = ('float32', 'bfloat16', 'fp8')


class QuantizedKV(NamedTuple):
  """A latent in FP8 with its scales, and the rotary key, which is never quantised."""

  latent: Float[Array, '*rows C']  # float8_e4m3fn.
  scale: Float[Array, '*rows N']  # float32 powers of two, one for every 128 channels.
  rope: Float[Array, '*rows R']  # bfloat16.


class QuantizedKey(NamedTuple):
  """An index key in FP8 with its scale, rotated: queries that meet it must be rotated as well."""

  key: Float[Array, '*rows J']  # float8_e4m3fn.
  scale: Float[Array, '*rows 1']  # float32, a power of two.


class Cache(NamedTuple):
  """The tokens of a batch of sequences, all layers side by side: row `layer * capacity + position`.

  Layers that share another's selection keep no index keys.
  """

  kv: Any  # [B, L * S, C + R or more], what is more being zeros, or a QuantizedKV of such rows.
  index_key: Any  # [B, F * S, J] for the F layers with an indexer, or a QuantizedKey.
  length: Int[Array, 'B']  # Tokens held of each sequence.


def init_cache(
    cfg: ModelConfig, batch: int, capacity: int, *, fmt: str = 'bfloat16', whole_lines: bool = False
) -> Cache:
  """Returns an empty cache.

  Args:
    cfg: The model.
    batch: Sequences.
    capacity: Tokens that each can hold.
    fmt: 'bfloat16', 'float32', or 'fp8': FP8 latents and index keys with float32 scales, and
      bfloat16 rotary keys, 788 bytes per token and layer for DeepSeek-V3.2's sizes.
    whole_lines: Fills up what is not FP8 to whole lines of 128 channels, for a TPU: XLA would save
      the padding by turning the array, and turn it back and forth, all of it, in every step.

  Raises:
    ValueError: A size or the format is out of range.

  Source:
    The FP8 layout of FlashMLA's and DeepGEMM's READMEs, less their interleaving in memory.
  """
  if fmt not in FORMATS:
    raise ConfigError(f'{fmt=} must be one of {FORMATS}.')
  if batch < 1 or not 1 <= capacity <= cfg.max_seq_len:
    raise ConfigError(f'{batch=} must be at least 1 and {capacity=} within 1 and {cfg.max_seq_len=}.')
  if fmt == 'fp8' and cfg.index_head_dim & (cfg.index_head_dim - 1):
    raise ConfigError(f'{fmt=} rotates index keys: {cfg.index_head_dim=} must be a power of two.')
  rows = lambda layers, width: jnp.zeros((batch, layers * capacity, width), fmt)
  n_full, width = len(cfg.full_layers), cfg.kv_lora_rank + cfg.qk_rope_head_dim
  width += -width % LINE if whole_lines else 0
  length = jnp.zeros(batch, jnp.int32)
  if fmt != 'fp8':
    return Cache(rows(cfg.n_layers, width), rows(n_full, cfg.index_head_dim), length)
  empty = lambda layers, width: jnp.zeros((batch, layers * capacity, width), jnp.float32)
  kv = quantize_kv(empty(cfg.n_layers, width), cfg.kv_lora_rank)
  return Cache(kv, quantize_key(empty(n_full, cfg.index_head_dim)), length)


def bytes_per_token(cfg: ModelConfig, fmt: str = 'bfloat16') -> int:
  """Returns what one token takes in all layers."""
  cache = jax.eval_shape(lambda: init_cache(cfg, 1, 1, fmt=fmt))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.kv, cache.index_key)))


def encode(like: Any, rows: Float[Array, 'B T E'], v_dim: int) -> Any:
  """Brings new rows into the form of a cache's `kv` or `index_key`."""
  if isinstance(like, QuantizedKV):
    return quantize_kv(rows, v_dim)
  if isinstance(like, QuantizedKey):
    return quantize_key(rotate(rows))
  return widen(rows.astype(like.dtype), like.shape[-1])


def widen(x: Float[Array, '*rows E'], width: int) -> Float[Array, '*rows W']:
  """Zeros behind the channels, until there are so many."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def decode(rows: Any, dtype: Any) -> Float[Array, '*rows E']:
  """The inverse of `encode`, but for what rounding took; keys of a QuantizedKey stay rotated."""
  if isinstance(rows, QuantizedKV):
    latent = rows.latent.astype(jnp.float32)
    scale = jnp.repeat(rows.scale, TILE, axis=-1)[..., : latent.shape[-1]]
    return jnp.concatenate([(latent * scale).astype(dtype), rows.rope.astype(dtype)], axis=-1)
  if isinstance(rows, QuantizedKey):
    return (rows.key.astype(jnp.float32) * rows.scale).astype(dtype)
  return rows.astype(dtype)


def write(store: Any, rows: Any, at: Int[Array, 'B T']) -> Any:
  """Puts rows where `at` says; a negative place, or one beyond the end, puts nothing."""

  def put(store, rows):
    where = jnp.where(at >= 0, at, store.shape[1])
    return jax.vmap(lambda s, w, r: s.at[w].set(r, mode='drop'))(store, where, rows)

  return jax.tree.map(put, store, rows)


def read_layer(store: Any, layer: Int[Array, ''], capacity: int) -> Any:
  """Copies one layer's rows out, [B, S, ...]."""
  cut = lambda x: jax.lax.dynamic_slice_in_dim(x, layer * capacity, capacity, axis=1)
  return jax.tree.map(cut, store)


def gather(store: Any, indices: Int[Array, 'B T K']) -> Any:
  """Copies chosen rows out, [B, T, K, ...]; zeros where an index is no row."""
  return jax.tree.map(lambda x: gather_rows(x, indices), store)


def quantize_kv(rows: Float[Array, '*rows E'], v_dim: int) -> QuantizedKV:
  latent, rope = jnp.split(rows, [v_dim], axis=-1)
  codes, scale = _quantize(latent, TILE)
  return QuantizedKV(codes, scale, rope.astype(jnp.bfloat16))


def quantize_key(rows: Float[Array, '*rows J']) -> QuantizedKey:
  return QuantizedKey(*_quantize(rows, rows.shape[-1]))


def rotate(x: Float[Array, '*rows J']) -> Float[Array, '*rows J']:
  """Spreads every channel over all J, a power of two, as DeepSeek's own service does before FP8.

  Orthonormal, and its own inverse: rotated queries and keys have the products they had.

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
  """FP8 codes, and for every `tile` channels the smallest power of two under which they fit.

  Source:
    `act_quant_kernel` with scale_fmt ue8m0, DeepSeek-V3.2-Exp inference/kernel.py at commit 87e509a2.
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
