# SPDX-License-Identifier: Apache-2.0
"""Rotary positions with YaRN's frequencies, in the two channel orders that DeepSeek uses."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from dsa_jax.config import ModelConfig


def rope_frequencies(cfg: ModelConfig) -> np.ndarray:
  """Returns the radians per position of each of the R/2 channel pairs, in float64.

  YaRN keeps the fast frequencies, divides the slow ones by `rope_factor`, and blends those in
  between. The result depends on the configuration only, never on the length of the sequence at
  hand.
  """
  width = cfg.qk_rope_head_dim
  frequencies = cfg.rope_theta ** (-np.arange(0, width, 2) / width)
  if not cfg.uses_yarn:
    return frequencies

  def channel_of(turns: float) -> float:
    """Returns the channel pair that makes `turns` turns over the original length."""
    wavelength = cfg.original_seq_len / (2 * math.pi * turns)
    return width * math.log(wavelength) / (2 * math.log(cfg.rope_theta))

  low = min(max(math.floor(channel_of(cfg.beta_fast)), 0), width - 1)
  high = min(max(math.ceil(channel_of(cfg.beta_slow)), 0), width - 1)
  high = high + 0.001 if low == high else high
  slow = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
  return frequencies * (1 - slow) + frequencies / cfg.rope_factor * slow


def apply_rope(
    x: Float[Array, 'B T H R'],
    positions: Int[Array, 'B T'],
    frequencies: np.ndarray,
    *,
    interleaved: bool,
) -> Float[Array, 'B T H R']:
  """Rotates pairs of channels by position times frequency, in float32.

  Args:
    x: Queries or keys.
    positions: Positions that count from the beginning of the token's document.
    frequencies: See `rope_frequencies`.
    interleaved: True pairs channels (2i, 2i+1), as MLA does; False pairs (i, i + R/2), as
      DeepSeek's indexer does. The order of the channels is kept. There is no default, because the
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
