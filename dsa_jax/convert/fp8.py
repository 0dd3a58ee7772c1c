# SPDX-License-Identifier: Apache-2.0
"""FP8 weights in blocks of 128 x 128, each with a float32 scale, as DeepSeek releases them."""

import ml_dtypes
import numpy as np

BLOCK = 128
LARGEST = 448.0  # Of E4M3.

_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
  """Of the scales of a weight of that shape; blocks at the edges may be partial."""
  return tuple(-(-n // BLOCK) for n in shape)


def dequantize(weight: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Multiplies every block by its scale: `weight_scale_inv` is no inverse, despite its name.

  Exact in float32 where scales are powers of two; in bfloat16 too, which has the bits of E4M3.
  """
  out = np.empty(weight.shape, dtype)
  codes = weight.view(np.uint8)
  for i, row in enumerate(scale):  # A band of rows at a time: float32 copies stay small.
    band = np.s_[i * BLOCK : (i + 1) * BLOCK]
    out[band] = _VALUES[codes[band]] * np.repeat(row, BLOCK)[: weight.shape[1]]
  return out


def block_scales(weight: np.ndarray) -> np.ndarray:
  """Returns the smallest power of two (ue8m0) for each block under which its values fit E4M3."""
  scale = np.empty(scale_shape(weight.shape), np.float32)
  starts = np.arange(0, weight.shape[1], BLOCK)
  for i in range(len(scale)):
    band = np.abs(weight[i * BLOCK : (i + 1) * BLOCK].astype(np.float32)).max(axis=0)
    largest = np.maximum(np.maximum.reduceat(band, starts), 1e-12)  # Zeros need a scale, too.
    fraction, exponent = np.frexp(largest / np.float32(LARGEST))  # fraction in [0.5, 1).
    scale[i] = np.ldexp(np.float32(1), np.where(fraction == 0.5, exponent - 1, exponent))
  return scale


def quantize(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """Divides every block by its scale and rounds to E4M3, to nearest even."""
  out = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
  for i, row in enumerate(scale):
    band = np.s_[i * BLOCK : (i + 1) * BLOCK]
    scaled = weight[band].astype(np.float32) / np.repeat(row, BLOCK)[: weight.shape[1]]
    out[band] = np.clip(scaled, -LARGEST, LARGEST)
  return out
