# SPDX-License-Identifier: Apache-2.0
"""Everything that depends on the version of a library. See "Which jax" in tests/README.md."""

import importlib.metadata

import jax

JAX = tuple(int(part) for part in jax.__version__.split('.')[:2])
JAX_SERIES = '{}.{}'.format(*JAX)  # Such as '0.10'. Each series pins its compilers.
# The arguments after the reference with which Mosaic GPU's `load` reads all of it. Before jax 0.12,
# it took an index.
LOAD_WHOLE = () if JAX >= (0, 12) else ((),)

# The packages that compile kernels. A row of the compile report belongs to one version of them.
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
