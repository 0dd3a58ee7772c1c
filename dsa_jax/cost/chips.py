# SPDX-License-Identifier: Apache-2.0
"""What chips can do at best, and which share of it is reached."""

import dataclasses

from dsa_jax.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """The peaks of one chip, dense, without sparsity."""

  name: str
  bf16: float  # FLOP/s
  fp8: float  # FLOP/s; that of bf16 where the matrix units have no FP8.
  bandwidth: float  # Bytes of memory per second.
  memory: float  # Bytes.


# H800: 990 TFLOP/s and 3.35 TB/s as FlashMLA's notes of April 2025 have them, FP8 as for H200.
# Others: peaks as in the vendors' tables; tpu7x is a chip of two devices; v6e's FP8 runs at the
# rate of bf16. Memory: the vendors' tables.
CHIPS = {
    'h800': Chip(name='H800', bf16=990e12, fp8=1979e12, bandwidth=3.35e12, memory=80e9),
    'h200': Chip(name='H200', bf16=990e12, fp8=1979e12, bandwidth=4.8e12, memory=141e9),
    'v5p': Chip(name='TPU v5p', bf16=459e12, fp8=459e12, bandwidth=2.76e12, memory=95e9),
    'v6e': Chip(name='TPU v6e', bf16=918e12, fp8=918e12, bandwidth=1.64e12, memory=32e9),
    'tpu7x': Chip(name='TPU7x', bf16=2307e12, fp8=4614e12, bandwidth=7.37e12, memory=192e9),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
  """Shares of a chip's peaks that are reached."""

  weights: float  # Of FLOP/s, in products with weights, and in index scores of a prompt.
  context: float  # Of FLOP/s, in attention, and in index scores of decoding.
  bandwidth: float = 0.8  # Of bytes per second. Stated, not fitted.
  gather: float = 1.0  # Of `context`, in attention that gathers quantised rows. Stated.

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not 0 < getattr(self, field.name) <= 1:
        raise ConfigError(f'{field.name}={getattr(self, field.name)} must be in (0, 1].')


# `weights` and `context` by experiments/cost_claim, to the published curves of an H800; other chips
# borrow them. In decode FlashMLA dequantises each gathered row before it multiplies, which keeps it
# at 410 TFLOP/s where its dense kernel reaches 660 (H800; its README of 2025-09-29).
FITTED = {
    'prefill': Efficiency(weights=0.366, context=0.604),
    'decode': Efficiency(weights=0.266, context=0.606, gather=410 / 660),
}
