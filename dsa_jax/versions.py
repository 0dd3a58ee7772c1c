# SPDX-License-Identifier: Apache-2.0
"""What depends on the version of a library, and nowhere else: see "Which jax" in tests/README.md."""

import jax

JAX_SERIES = '.'.join(jax.__version__.split('.')[:2])  # As '0.10': a series pins its compilers.
