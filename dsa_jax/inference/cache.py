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

  Layers lie side by side: row `i * capacity + position` of `kv` is a token's in the i-th layer that has
  rows there. On a mesh, that is so of each device's share, see `positions`, and the shares lie side by
  side.
  Layers that share another's selection or attend within a window keep no index keys, so `index_key`
  counts only the F layers with an indexer. Layers with a window that have sizes of their own are
  counted apart, and their rows lie in `window_kv`. Layers that read another's rows have none.
  """

  # Rows [B, any * S, G * P], the parts of key heads side by side, each maybe with zeros behind it.
  kv: PlainRows | QuantizedLatents | QuantizedRows
  index_key: PlainRows | QuantizedKeys  # Rows [B, F * S, J].
  length: Int[Array, 'B']  # Tokens that each sequence holds.
  window_kv: PlainRows | QuantizedLatents | None = None  # Rows as those of `kv`, of another width.

  def capacity(self, cfg: ModelConfig) -> int:
    """Returns S, the number of tokens that each sequence can hold, or of those on this device."""
    return jax.tree.leaves(self.kv)[0].shape[1] // (cfg.n_layers - _n_apart(cfg) - cfg.n_readers)


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
  n_apart, n_index_rows = _n_apart(cfg), len(cfg.full_layers) * capacity
  rows = lambda cfg, n, n_heads: _empty_rows(
      cfg, batch, n * capacity, fmt, whole_lines, n_heads or cfg.row_heads
  )
  if fmt == 'fp8':
    index_key = QuantizedKeys.quantize(jnp.zeros((1, 1, cfg.index_head_dim)))
    index_key = _repeated(index_key, batch, n_index_rows)
  else:
    index_key = PlainRows(jnp.zeros((batch, n_index_rows, cfg.index_head_dim), fmt))
  window_kv = rows(cfg.of_windows, n_apart, 0) if n_apart else None
  length = jnp.zeros(batch, jnp.int32)
  kv = rows(cfg, cfg.n_layers - n_apart - cfg.n_readers, n_heads)
  return Cache(kv, index_key, length, window_kv)


def _n_apart(cfg: ModelConfig) -> int:
  """Returns the number of layers whose rows lie in a store of their own."""
  return len(cfg.window_layers) if cfg.has_window_sizes else 0


def _empty_rows(
    cfg: ModelConfig, batch: int, n_rows: int, fmt: str, whole_lines: bool, n_heads: int
) -> PlainRows | QuantizedLatents | QuantizedRows:
  # In FP8 each half of a key head's part has a scale.
  multiple = LINE if whole_lines else 2 if fmt == 'fp8' and cfg.attention == 'gqa' else 1
  width = n_heads * (cfg.row_dim + -cfg.row_dim % multiple)
  if fmt != 'fp8':
    return PlainRows(jnp.zeros((batch, n_rows, width), fmt))
  row = jnp.zeros((1, 1, width))
  if cfg.attention == 'mla':
    return _repeated(QuantizedLatents.quantize(row, cfg.kv_lora_rank), batch, n_rows)
  return _repeated(QuantizedRows.quantize(row, 2 * n_heads), batch, n_rows)


def _repeated(store: Store, batch: int, n: int) -> Store:
  return jax.tree.map(lambda x: jnp.tile(x, (batch, n, 1)), store)


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
