# SPDX-License-Identifier: Apache-2.0
"""Tells whether a compiler would be given the same program again."""

import hashlib
from typing import Any

from dsa_jax.versions import installed


def fingerprint(program: str, expected: Any, compilers: tuple[str, ...]) -> str:
  """Returns a hash of what a compiler is given, of its version, and of what is read from it.

  The code that reads is not in it: whoever changes that makes the committed rows anew.

  Args:
    program: The lowered program, kernels included, without locations in source files.
    expected: The loops and rows by which the compiler's schedule is read.
    compilers: The packages that compile it.
  """
  parts = program, repr(expected), repr(installed(compilers))
  return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]
