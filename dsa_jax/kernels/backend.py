# SPDX-License-Identifier: Apache-2.0
"""The names of the backends, the one place that picks a default, and the one that loads them."""

import importlib
import logging
from types import ModuleType

import jax

BACKENDS = ('reference', 'xla', 'tpu', 'gpu')

# The context / K at which a forward and backward pass of `sparse_attention` takes as long as one of
# `dense_attention` with `indices`. experiments/kernel_speed measures it; see its README. It has not
# been measured on a TPU or a GPU yet.
CROSSOVER = {'reference': 1, 'xla': 4, 'tpu': 1, 'gpu': 1}


class Blocks:
  """Base class of every backend's `BlockSizes`, which say into what a kernel cuts its work."""


def default_backend() -> str:
  """Returns the backend for this platform and logs it; entry points call it once.

  Every platform that has no kernels of its own gets the portable `xla` backend. So do GPUs other
  than Hopper's: the kernels take more shared memory than those have.
  """
  platform = jax.default_backend()
  is_hopper = platform == 'gpu' and _compute_capability().startswith('9.')
  backend = platform if platform == 'tpu' or is_hopper else 'xla'
  logging.info('kernels: backend %s on platform %s', backend, platform)
  return backend


def why_not_here(backend: str) -> str:
  """Returns why the kernels of a backend cannot run on this machine; '' where they can."""
  platform = jax.default_backend()
  if backend == 'tpu' and platform != 'tpu':
    return f'its kernels run on a TPU, and jax finds a {platform} here; xla runs everywhere.'
  if backend == 'gpu' and not (platform == 'gpu' and _compute_capability().startswith('9.')):
    return f'its kernels run on a Hopper GPU, and jax finds a {platform} here; xla runs everywhere.'
  return ''


def _compute_capability() -> str:
  return str(getattr(jax.local_devices()[0], 'compute_capability', ''))  # AMD's begin with gfx.


def check_backend(backend: str):
  if backend not in BACKENDS:
    raise ValueError(f'{backend=} must be one of {BACKENDS}.')


def faster_attention(backend: str, seq_len: int, topk: int) -> str:
  """Returns 'masked' or 'sparse': the same numbers, at the lower cost."""
  return 'sparse' if seq_len > CROSSOVER[backend] * topk else 'masked'


def packs_all_keys(backend: str, n_queries: int, topk: int, n_keys: int) -> bool:
  """Returns whether `sparse_attention` copies all keys it is given, those that nothing selects included.

  Whoever holds more than `n_keys` should then cut them out first.
  """
  return backend == 'tpu' and n_queries * topk >= n_keys


def load_kernels(module: str) -> ModuleType:
  """Imports a backend's module of an op, and with it that backend's compiler.

  Ops call it when they are asked for the backend. Nothing else imports those modules, so a jax that
  lacks one compiler serves all other backends.

  Raises:
    ImportError: jax lacks what the module needs.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ImportError(
        f'{module} needs what is missing here: {error}. This is jax {jax.__version__}; another '
        f'version may have it, and the backend xla runs everywhere.',
        name=error.name,
    ) from error
