# SPDX-License-Identifier: Apache-2.0
"""What training costs while it runs: tokens per second, utilisation, and the memory of a device."""

from collections.abc import Callable
import time

import jax

from dsa_jax.chips import device_of_kind
from dsa_jax.data.batch import Batch

# Metrics that differ from run to run of one config.
OF_THE_MACHINE = ('tokens_per_second', 'mfu', 'device_memory_gib')


class Meter:
  """Reads the machine between steps."""

  def __init__(
      self, batch_tokens: int, step: int, flops: Callable[[Batch], float], n_devices: int
  ):
    """Starts to measure.

    Args:
      batch_tokens: The tokens of a step.
      step: The step after which it starts.
      flops: The model FLOPs of a batch.
      n_devices: The devices that share a step.
    """
    self._batch_tokens, self._step, self._time = batch_tokens, step, time.monotonic()
    self._flops_of, self._flops = flops, {}
    device = device_of_kind(jax.local_devices()[0].device_kind)
    self._peak = n_devices * device.bf16 if device else None

  def count(self, step: int, batch: Batch):
    """Counts the FLOPs of a step. This process may hold only some of its rows."""
    if self._peak:
      self._flops[step] = self._flops_of(batch) * self._batch_tokens / batch.tokens.size

  def read(self, step: int) -> dict[str, float]:
    """Returns tokens per second since the last reading, and the most memory a device has used.

    `mfu` is the share of the devices' peak in bfloat16 that the model's FLOPs make up. It is left
    out where the peak is not known, as on a CPU, and so is memory where jax does not report it. The
    seconds include looks at the validation data and checkpoints.
    """
    now = time.monotonic()
    tokens, seconds = self._batch_tokens * (step - self._step), max(now - self._time, 1e-9)
    self._step, self._time = step, now
    speed = {'tokens_per_second': tokens / seconds}
    if self._peak:
      flops = sum(self._flops.pop(counted) for counted in sorted(self._flops) if counted <= step)
      speed['mfu'] = flops / (seconds * self._peak)
    return speed | device_memory()


def device_memory() -> dict[str, float]:
  """Returns the peak of the local device that has used the most, in GiB, if jax reports it."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s['peak_bytes_in_use'] for s in stats if 'peak_bytes_in_use' in s]
  return {'device_memory_gib': max(peaks) / 2**30} if peaks else {}
