# SPDX-License-Identifier: Apache-2.0
"""What a whole chip can do at best, and which share of that is reached."""

import dataclasses

from dsa_jax.chips import DEVICES
from dsa_jax.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """The peaks of one chip, which may be several devices to jax. Products are dense."""

  name: str
  bf16: float  # FLOP/s
  fp8: float  # FLOP/s; equal to `bf16` where the matrix units do not run FP8 faster.
  bandwidth: float  # Bytes of memory per second.
  memory: float  # Bytes.


CHIPS = {
    key: Chip(
        name=device.name,
        bf16=device.per_chip * device.bf16,
        fp8=device.per_chip * device.fp8,
        bandwidth=device.per_chip * device.bandwidth,
        memory=device.per_chip * device.memory,
    )
    for key, device in DEVICES.items()
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
  """The shares of a chip's peaks that are reached."""

  weights: float  # The share of FLOP/s in products with weights and in index scores of a prompt.
  context: float  # The share of FLOP/s in attention and in index scores of decoding.
  bandwidth: float = 0.8  # The share of bytes per second. It is stated, not fitted.
  # The share of `context` that attention reaches where it gathers quantised rows. It is stated.
  gather: float = 1.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not 0 < getattr(self, field.name) <= 1:
        raise ConfigError(f'{field.name}={getattr(self, field.name)} must be in (0, 1].')


# experiments/cost_claim fitted `weights` and `context` to the published curves of an H800; other
# chips borrow them. In decode FlashMLA dequantises each gathered row before it multiplies, which
# keeps it at 410 TFLOP/s where its dense kernel reaches 660 (on an H800; its README of 2025-09-29).
FITTED = {
    'prefill': Efficiency(weights=0.366, context=0.604),
    'decode': Efficiency(weights=0.266, context=0.606, gather=410 / 660),
}
