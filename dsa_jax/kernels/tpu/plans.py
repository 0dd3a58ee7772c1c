# SPDX-License-Identifier: Apache-2.0
"""What the plan of an op says of each of its kernels; the compile report reads it."""

from typing import NamedTuple


class KernelPlan(NamedTuple):
  """One kernel of an op: the grid that it is called with, and its work for one query.

  The work is that of a query which sees half of the keys and whose selection is spread evenly.
  """

  grid: tuple[int, ...]
  # The depth of each loop of the compiled kernel and its trips for one query, in the order of the
  # compiler's schedule. The grid itself is the loop of depth 1.
  loops: list[tuple[int, float]]
  hbm_bytes: float = 0.0  # Bytes through HBM of selected rows there, and of their queries.
