# SPDX-License-Identifier: Apache-2.0
"""The arrays that a training step reads."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
  """Token rows with their targets and visible intervals, `[B, T]` each (`[T]` for one row).

  The query at position t may see the keys start <= s < end. Its RoPE position is t - start, so a
  document looks the same wherever it lies in a row. A padding position has start = end = t: it
  sees nothing and weighs nothing.
  """

  tokens: np.ndarray  # int32.
  targets: np.ndarray  # int32, the next token; any token of the vocabulary where the weight is 0.
  weights: np.ndarray  # float32, 1 where the target counts in the language-model loss, else 0.
  start: np.ndarray  # int32, the first position of t's document in this row.
  end: np.ndarray  # int32, t + 1.
