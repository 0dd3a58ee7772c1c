# SPDX-License-Identifier: Apache-2.0
"""What depends on the version of a library, and nowhere else: see "Which jax" in tests/README.md."""

import importlib.metadata

import jax

JAX = tuple(int(part) for part in jax.__version__.split('.')[:2])
JAX_SERIES = '{}.{}'.format(*JAX)  # As '0.10': a series pins its compilers.
# What Mosaic GPU's `load` takes after the reference to read all of it: until jax 0.12, an index.
LOAD_WHOLE = () if JAX >= (0, 12) else ((),)

# What compiles kernels, of which a report's rows are.
TPU_COMPILERS = 'jaxlib', 'libtpu'
GPU_COMPILERS = 'jaxlib', 'jax-cuda13-plugin', 'jax-cuda13-pjrt', 'nvidia-cuda-nvcc'


def installed(packages: tuple[str, ...]) -> dict[str, str]:
  """Returns the versions of those packages that are installed."""
  versions = {}
  for name in packages:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass
  return versions
