# SPDX-License-Identifier: Apache-2.0
"""Names of the backends, and the one place that picks a default."""

import logging

import jax

BACKENDS = ('reference', 'xla', 'tpu', 'gpu')


def default_backend() -> str:
  """Returns the backend for this platform and logs it; entry points call it once.

  The portable `xla` backend serves every platform that has no kernels of its own, GPUs other than
  Hopper's included: the kernels take more shared memory than those have.
  """
  platform = jax.default_backend()
  is_hopper = platform == 'gpu' and _compute_capability().startswith('9.')
  backend = platform if platform == 'tpu' or is_hopper else 'xla'
  logging.info('kernels: backend %s on platform %s', backend, platform)
  return backend


def _compute_capability() -> str:
  return str(getattr(jax.local_devices()[0], 'compute_capability', ''))  # AMD's begin with gfx.


def check_backend(backend: str):
  if backend not in BACKENDS:
    raise ValueError(f'{backend=} must be one of {BACKENDS}.')
