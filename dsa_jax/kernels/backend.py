# SPDX-License-Identifier: Apache-2.0
"""Names of the backends, and the one place that picks a default."""

import logging

import jax

BACKENDS = ('reference', 'xla', 'tpu')


def default_backend() -> str:
  """Returns the backend for this platform and logs it; entry points call it once.

  The portable `xla` backend serves every platform until a kernel for it exists.
  """
  logging.info('kernels: backend xla on platform %s', jax.default_backend())
  return 'xla'


def check_backend(backend: str):
  if backend not in BACKENDS:
    raise ValueError(f'{backend=} must be one of {BACKENDS}.')
