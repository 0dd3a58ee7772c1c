# SPDX-License-Identifier: Apache-2.0
"""Processes that tests start with several simulated devices."""

import os


def devices(n: int) -> dict[str, str]:
  """Returns what to add to the environment; programs compile as quickly as in tests themselves."""
  count = f'--xla_force_host_platform_device_count={n}'
  patience = '--xla_cpu_collective_call_terminate_timeout_seconds=600'  # A busy machine takes its time.
  return {'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {count} {patience}', 'JAX_PLATFORMS': 'cpu'}
