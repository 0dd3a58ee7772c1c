# SPDX-License-Identifier: Apache-2.0
"""python -m dsa_jax.compile: see `report`."""

from dsa_jax.compile import report

if __name__ == '__main__':
  report.main()
