# SPDX-License-Identifier: Apache-2.0
"""What training costs while it runs: tokens per second, and the memory of a device."""

import time

import jax

# Metrics that differ from run to run of one config.
OF_THE_MACHINE = ('tokens_per_second', 'device_memory_gib')


class Meter:
  """Reads the machine between steps."""

  def __init__(self, batch_tokens: int, step: int):
    """Starts to measure, after so many steps of so many tokens each."""
    self._batch_tokens, self._step, self._time = batch_tokens, step, time.monotonic()

  def read(self, step: int) -> dict[str, float]:
    """Returns tokens per second since the last reading, and the most memory a device has used.

    The seconds include looks at the validation data and checkpoints. Memory is left out where jax
    does not report it, as on a CPU.
    """
    now = time.monotonic()
    tokens, seconds = self._batch_tokens * (step - self._step), max(now - self._time, 1e-9)
    self._step, self._time = step, now
    return {'tokens_per_second': tokens / seconds} | device_memory()


def device_memory() -> dict[str, float]:
  """Returns the peak of the local device that has used the most, in GiB, if jax reports it."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s['peak_bytes_in_use'] for s in stats if 'peak_bytes_in_use' in s]
  return {'device_memory_gib': max(peaks) / 2**30} if peaks else {}
