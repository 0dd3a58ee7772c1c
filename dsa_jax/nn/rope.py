# SPDX-License-Identifier: Apache-2.0
"""Rotary positions, in the two channel orders in use."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from dsa_jax.config import ModelConfig


def rope_frequencies(cfg: ModelConfig, width: int) -> np.ndarray:
  """Returns the radians per position of each of the `width` / 2 channel pairs, in float64.

  All kinds but the default one divide the slow frequencies by `rope_factor`. The result depends on
  the configuration only, never on the length of the sequence at hand.

  Source:
    arXiv 2306.15595 for 'linear', 2309.00071 for 'yarn', and the config.json of Llama 3.1 for
    'llama3'.
  """
  frequencies = cfg.rope_theta ** (-np.arange(0, width, 2) / width)
  if cfg.rope_kind == 'default':
    return frequencies
  slow = SLOWNESS[cfg.rope_kind](cfg, frequencies)
  return frequencies * (1 - slow) + frequencies / cfg.rope_factor * slow


def index_rope_frequencies(cfg: ModelConfig, width: int) -> np.ndarray:
  """Returns those of the indexer, the slow ones of which `index_rope_factor` divides once more.

  An indexer has seen how pairs of channels that turn less than once in a row change within the rows that it
  learned from, and no more. In longer rows, the factor keeps their angles within these.
  """
  frequencies = rope_frequencies(cfg, width)
  if cfg.index_rope_factor == 1:
    return frequencies
  turns = cfg.index_original_seq_len * frequencies / (2 * math.pi)
  first = max(np.count_nonzero(turns >= cfg.beta_fast) - 1, 0)  # From here on a pair is slowed a little,
  last = np.count_nonzero(turns > cfg.beta_slow)  # and from here on by all of the factor, as in YaRN.
  slow = np.clip((np.arange(width // 2) - first) / max(last - first, 0.001), 0, 1)
  return frequencies * (1 - slow) + frequencies / cfg.index_rope_factor * slow


def _all_slow(cfg: ModelConfig, frequencies: np.ndarray) -> np.ndarray:
  return np.ones_like(frequencies)


def _llama3_slowness(cfg: ModelConfig, frequencies: np.ndarray) -> np.ndarray:
  """Returns 1 for few turns over the original length, 0 for many, and blends those in between."""
  turns = cfg.original_seq_len * frequencies / (2 * math.pi)
  return np.clip((cfg.high_freq_factor - turns) / (cfg.high_freq_factor - cfg.low_freq_factor), 0, 1)


def _yarn_slowness(cfg: ModelConfig, frequencies: np.ndarray) -> np.ndarray:
  """Blends by the number of the channel pair, as YaRN does."""
  width = 2 * len(frequencies)

  def channel_of(turns: float) -> float:
    """Returns the channel pair that makes `turns` turns over the original length."""
    wavelength = cfg.original_seq_len / (2 * math.pi * turns)
    return width * math.log(wavelength) / (2 * math.log(cfg.rope_theta))

  low = min(max(math.floor(channel_of(cfg.beta_fast)), 0), width - 1)
  high = min(max(math.ceil(channel_of(cfg.beta_slow)), 0), width - 1)
  high = high + 0.001 if low == high else high
  return np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)


def scaled(frequencies: np.ndarray, log_factors: Float[Array, 'R2']) -> Float[Array, 'R2']:
  """Returns frequencies times learned factors, which are given by their logarithms.

  Source:
    `MistralLarge4TextRotaryEmbedding` in `transformers` 5.24.0 (LeRoPE).
  """
  return jnp.asarray(frequencies, jnp.float32) * jnp.exp(log_factors)


SLOWNESS = {'linear': _all_slow, 'llama3': _llama3_slowness, 'yarn': _yarn_slowness}


def apply_rope(
    x: Float[Array, 'B T H R'],
    positions: Int[Array, 'B T'],
    frequencies: np.ndarray | Float[Array, 'R2'],
    *,
    interleaved: bool,
) -> Float[Array, 'B T H R']:
  """Rotates pairs of channels by position times frequency, in float32.

  Args:
    x: Queries or keys.
    positions: Positions that count from the beginning of the token's document.
    frequencies: See `rope_frequencies`.
    interleaved: True pairs channels (2i, 2i+1), as MLA does; False pairs (i, i + R/2), as
      DeepSeek's indexer and Llama do. The order of the channels is kept. There is no default, because the
      wrong pairing shows only beyond `index_topk` tokens.
  """
  angle = positions[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  half = x.shape[-1] // 2
  y = x.astype(jnp.float32)
  if interleaved:
    even, odd = y[..., 0::2], y[..., 1::2]
  else:
    even, odd = y[..., :half], y[..., half:]
  even, odd = even * cos - odd * sin, odd * cos + even * sin
  if interleaved:
    y = jnp.stack([even, odd], axis=-1).reshape(x.shape)
  else:
    y = jnp.concatenate([even, odd], axis=-1)
  return y.astype(x.dtype)
