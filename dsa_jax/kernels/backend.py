# SPDX-License-Identifier: Apache-2.0
"""Names of the backends, and the one place that picks a default."""

import logging

import jax

BACKENDS = ('reference', 'xla', 'tpu', 'gpu')


def default_backend() -> str:
  """Returns the backend for this platform and logs it; entry points call it once.

  The portable `xla` backend serves every platform that has no kernels of its own; on AMD's GPUs,
  which jax calls gpu, too, ask for it.
  """
  platform = jax.default_backend()
  backend = platform if platform in ('tpu', 'gpu') else 'xla'
  logging.info('kernels: backend %s on platform %s', backend, platform)
  return backend


def check_backend(backend: str):
  if backend not in BACKENDS:
    raise ValueError(f'{backend=} must be one of {BACKENDS}.')
