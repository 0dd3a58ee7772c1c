# SPDX-License-Identifier: Apache-2.0
"""The peaks of every chip that this package computes with: the only place where they stand."""

from typing import NamedTuple

GIB = 2.0**30


class Device(NamedTuple):
  """One device as jax sees it. The peaks are the vendor's, for dense products."""

  name: str
  bf16: float  # FLOP/s.
  fp8: float  # FLOP/s; equal to `bf16` where the matrix units do not run FP8 faster.
  bandwidth: float  # Bytes of HBM per second.
  memory: float  # Bytes of HBM.
  per_chip: int = 1  # Devices that make up one chip, as it is sold and priced.
  hertz: float | None = None  # The clock.
  granted: float | None = None  # GiB of HBM that libtpu grants one program, by its own message.
  gathered: float | None = None  # Bytes per second that SparseCores gather in rows of 512 bytes.
  kinds: tuple[str, ...] = ()  # What jax calls it, as `device_kind`.


# TPUs: https://docs.cloud.google.com/tpu/docs/tpu7x, which compares three generations, per chip.
#   It gives the bandwidth of v5p as 2765 GB/s and that of v6e as 1638 GB/s. The cycles in
#   experiments/kernel_speed/compile_report_*.json were computed with 2.76 and 1.64 TB/s, which
#   therefore stay here. It gives the memory of v5p as 95 GiB, although libtpu grants 95.74.
#   A chip of tpu7x is two devices. No clock of it is published, and 2.2 GHz is assumed. The rate of
#   its gathers is what tpu-inference says it reaches with eight streams; nobody has published that
#   of v5p or v6e.
# H100, H200: NVIDIA's data sheets of the SXM boards, whose figures with sparsity are twice these.
# H800: FlashMLA's notes of April 2025 give 990 TFLOP/s and 3.35 TB/s. NVIDIA's figure for the same
#   tensor cores is 989.4, but the fitted shares in cost/chips.py are shares of 990 (of 989.4, one
#   of them would be 0.605 instead of 0.604), so it stays. FP8 and memory are those of the H100 SXM.
DEVICES = {
    'h100': Device(
        'H100', bf16=989.4e12, fp8=1979e12, bandwidth=3.35e12, memory=80e9,
        kinds=('NVIDIA H100 80GB HBM3',),
    ),
    'h800': Device(
        'H800', bf16=990e12, fp8=1979e12, bandwidth=3.35e12, memory=80e9, kinds=('NVIDIA H800',)
    ),
    'h200': Device(
        'H200', bf16=989.4e12, fp8=1979e12, bandwidth=4.8e12, memory=141e9, kinds=('NVIDIA H200',)
    ),
    'v5p': Device(
        'TPU v5p', bf16=459e12, fp8=459e12, bandwidth=2.76e12, memory=95 * GIB,
        hertz=1.75e9, granted=95.74, kinds=('TPU v5', 'TPU v5p'),
    ),
    'v6e': Device(
        'TPU v6e', bf16=918e12, fp8=918e12, bandwidth=1.64e12, memory=32 * GIB, hertz=1.75e9,
        kinds=('TPU v6e', 'TPU v6 lite'),
    ),
    'tpu7x': Device(
        'TPU7x', bf16=1153.5e12, fp8=2307e12, bandwidth=3.69e12, memory=96 * GIB,
        per_chip=2, hertz=2.2e9, granted=94.75, gathered=1e12, kinds=('TPU7x',),
    ),
}  # fmt: skip


def device_of_kind(kind: str) -> Device | None:
  """Returns the device that jax calls by this name, or None if it is not in the table."""
  return next((device for device in DEVICES.values() if kind in device.kinds), None)
