# SPDX-License-Identifier: Apache-2.0
"""The chip that a program is traced for: its VMEM, and how much of it kernels may take."""

from jax.experimental.pallas import tpu as pltpu

LEAST_VMEM = 64 * 2**20  # Of all chips that the kernels are compiled for.


def vmem_bytes() -> int:
  """Returns the bytes of VMEM of the chip, or the least of all chips where there is none to ask.

  Ops ask once, before they plan. Plans and kernels are told.
  """
  return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else LEAST_VMEM


def compiler_params(vmem: int) -> pltpu.CompilerParams:
  """Returns how kernels are compiled whose plan is made for so many bytes of VMEM."""
  return pltpu.CompilerParams(vmem_limit_bytes=int(0.95 * vmem), disable_bounds_checks=True)
