# SPDX-License-Identifier: Apache-2.0
"""Tells whether a compiler would get the same program again."""

import hashlib
from typing import Any

from dsa_jax.versions import installed


def fingerprint(program: str, expected: Any, compilers: tuple[str, ...]) -> str:
  """Returns a hash of what a compiler gets, of its version, and of what is expected of the result.

  The code that reads the result is not in it: whoever changes that makes the committed rows anew.

  Args:
    program: The lowered program, kernels included, without locations in source files.
    expected: The loops and rows by which the compiler's schedule is read.
    compilers: The packages that compile it.
  """
  parts = program, repr(expected), repr(installed(compilers))
  return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]
