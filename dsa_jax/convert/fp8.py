# SPDX-License-Identifier: Apache-2.0
"""Quantises weights to FP8 as DeepSeek does: each block of 128 x 128 has a float32 scale."""

import ml_dtypes
import numpy as np

BLOCK = 128
LARGEST = 448.0  # The largest number of E4M3.

_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
  """Returns the shape of a weight's scales; blocks at the edges may be partial."""
  return tuple(-(-n // BLOCK) for n in shape)


def dequantize(weight: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns every block times its scale: `weight_scale_inv` is no inverse, despite its name.

  Where scales are powers of two, this is exact in float32, and in bfloat16 too, whose mantissa
  holds that of E4M3.
  """
  out = np.empty(weight.shape, dtype)
  codes = weight.view(np.uint8)
  for i, row in enumerate(scale):  # One band of rows at a time keeps the float32 copies small.
    band = np.s_[i * BLOCK : (i + 1) * BLOCK]
    out[band] = _VALUES[codes[band]] * np.repeat(row, BLOCK)[: weight.shape[1]]
  return out


def block_scales(weight: np.ndarray) -> np.ndarray:
  """Returns, for each block, the smallest power of two (ue8m0) that lets its values fit E4M3."""
  scale = np.empty(scale_shape(weight.shape), np.float32)
  starts = np.arange(0, weight.shape[1], BLOCK)
  for i in range(len(scale)):
    band = np.abs(weight[i * BLOCK : (i + 1) * BLOCK].astype(np.float32)).max(axis=0)
    largest = np.maximum(np.maximum.reduceat(band, starts), 1e-12)  # Zeros need a scale too.
    fraction, exponent = np.frexp(largest / np.float32(LARGEST))  # fraction in [0.5, 1).
    scale[i] = np.ldexp(np.float32(1), np.where(fraction == 0.5, exponent - 1, exponent))
  return scale


def quantize(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """Returns every block divided by its scale and rounded to the nearest E4M3, ties to even."""
  out = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
  for i, row in enumerate(scale):
    band = np.s_[i * BLOCK : (i + 1) * BLOCK]
    scaled = weight[band].astype(np.float32) / np.repeat(row, BLOCK)[: weight.shape[1]]
    out[band] = np.clip(scaled, -LARGEST, LARGEST)
  return out
