# SPDX-License-Identifier: Apache-2.0
"""The cache keeps of every token that was read a row for attention, and an index key."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.inference.storage import (
    PlainRows,
    QuantizedKeys,
    QuantizedLatents,
    QuantizedRows,
    Store,
    widen,
)  # fmt: skip

LINE = 128  # Channels that a TPU keeps side by side.
FORMATS = ('float32', 'bfloat16', 'fp8')


class Cache(NamedTuple):
  """The tokens of a batch of sequences.

  All layers lie side by side: row `layer * capacity + position` of `kv` is a token's in that layer. On
  a mesh, that is so of each device's share, see `positions`, and the shares lie side by side.
  Layers that share another's selection or attend within a window keep no index keys, so `index_key`
  counts only the F layers with an indexer.
  """

  # Rows [B, L * S, G * P], the parts of key heads side by side, each maybe with zeros behind it.
  kv: PlainRows | QuantizedLatents | QuantizedRows
  index_key: PlainRows | QuantizedKeys  # Rows [B, F * S, J].
  length: Int[Array, 'B']  # Tokens that each sequence holds.

  def capacity(self, cfg: ModelConfig) -> int:
    """Returns S, the number of tokens that each sequence can hold."""
    return jax.tree.leaves(self.kv)[0].shape[1] // cfg.n_layers


def init_cache(
    cfg: ModelConfig,
    batch: int,
    capacity: int,
    *,
    fmt: str = 'bfloat16',
    whole_lines: bool = False,
    n_heads: int = 0,
) -> Cache:
  """Returns an empty cache.

  Args:
    cfg: The model.
    batch: Number of sequences.
    capacity: Tokens that each sequence can hold.
    fmt: 'bfloat16', 'float32', or 'fp8'. The last has scales in float32. Of MLA it holds latents and
      index keys in FP8 and rotary keys in bfloat16, 788 bytes per token and layer for DeepSeek-V3.2's
      sizes. Of GQA it holds all in FP8.
    whole_lines: Appends zeros to the rows of key heads up to a multiple of 128 channels, for a TPU.
      XLA would otherwise save the padding by transposing the whole array, twice in every step.
    n_heads: The key heads of a row. 0: those of the model. Where several devices need one key head, each
      has it for itself.

  Raises:
    ConfigError: A size or the format is out of range.

  Source:
    The FP8 layout is that of FlashMLA's and DeepGEMM's READMEs, less their interleaving in memory.
  """
  if fmt not in FORMATS:
    raise ConfigError(f'{fmt=} must be one of {FORMATS}.')
  if batch < 1 or not 1 <= capacity <= cfg.max_seq_len:
    raise ConfigError(
        f'{batch=} must be at least 1, and {capacity=} within 1 and {cfg.max_seq_len=}.'
    )
  if fmt == 'fp8' and cfg.index_head_dim & (cfg.index_head_dim - 1):
    raise ConfigError(f'{fmt=} rotates index keys: {cfg.index_head_dim=} must be a power of two.')
  n_heads = n_heads or cfg.row_heads
  width = n_heads * (cfg.row_dim + (-cfg.row_dim % LINE if whole_lines else 0))
  n_rows, n_index_rows = cfg.n_layers * capacity, len(cfg.full_layers) * capacity
  length = jnp.zeros(batch, jnp.int32)
  if fmt != 'fp8':
    kv = PlainRows(jnp.zeros((batch, n_rows, width), fmt))
    index_key = PlainRows(jnp.zeros((batch, n_index_rows, cfg.index_head_dim), fmt))
    return Cache(kv, index_key, length)
  kv = jnp.zeros((1, 1, width))
  if cfg.attention == 'mla':
    kv = QuantizedLatents.quantize(kv, cfg.kv_lora_rank)
  else:
    kv = QuantizedRows.quantize(kv, 2 * n_heads)
  index_key = QuantizedKeys.quantize(jnp.zeros((1, 1, cfg.index_head_dim)))
  repeat = lambda store, n: jax.tree.map(lambda x: jnp.tile(x, (batch, n, 1)), store)
  return Cache(repeat(kv, n_rows), repeat(index_key, n_index_rows), length)


def shapes_of(cache: Cache) -> Cache:
  """Returns the shapes and dtypes of a cache, which are hashable."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)


def flat_rows(rows: Float[Array, 'B T G P'], store: Store) -> Float[Array, 'B T W']:
  """Returns rows as a cache stores them."""
  wide = widen(rows, store.width // rows.shape[2])
  return wide.reshape(*wide.shape[:2], -1)


def split_rows(flat: Float[Array, '*rows W'], n_heads: int) -> Float[Array, '*rows G P']:
  """Returns stored rows of so many key heads as attention reads them."""
  return flat.reshape(*flat.shape[:-1], n_heads, -1)


def match_rows(
    q: Float[Array, 'B T H E'], store: Store, row_dim: int, n_heads: int
) -> Float[Array, 'B T H E2']:
  """Appends as many zeros to queries as stand behind the keys of stored rows."""
  return widen(q, q.shape[-1] + store.width // n_heads - row_dim)


def bytes_per_token(cfg: ModelConfig, fmt: str = 'bfloat16') -> int:
  """Returns the bytes that one token takes in all layers."""
  cache = jax.eval_shape(lambda: init_cache(cfg, 1, 1, fmt=fmt))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.kv, cache.index_key)))
