# SPDX-License-Identifier: Apache-2.0
"""What a selection rule may look at."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int, Key


class Candidates(NamedTuple):
  """One layer's queries and keys, in the indexer's view and in the main attention's.

  Compiled away where a rule does not use it. The indexer's view is None in a layer that has none.
  """

  index_q: Float[Array, 'B T I J'] | None
  index_k: Float[Array, 'B S J'] | None
  index_weights: Float[Array, 'B T I'] | None
  q: Float[Array, 'B T H E']
  k: Float[Array, 'B S H E']
  start: Int[Array, 'B T']
  end: Int[Array, 'B T']
  key: Key[Array, '']  # Differs from layer to layer and from step to step.
  choice: Int[Array, ''] | None  # Which of several rules selects; see `selection.find_rule`.
  sm_scale: float
  topk: int
  backend: str


Rule = Callable[[Candidates], jax.Array]  # To int32 [B, T, K] positions, ascending, then -1.
