# SPDX-License-Identifier: Apache-2.0
"""The inputs of a selection rule."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int, Key


class Candidates(NamedTuple):
  """One layer's queries and keys, as the indexer sees them and as the main attention does.

  What a rule does not use is compiled away. The indexer's arrays are None in a layer without one.
  The main attention's have one key for each head, or in front of a cache one latent for all heads
  (G = 1, MQA form); their products are the same. A query's own position is `end - 1`.
  """

  index_q: Float[Array, 'B T I J'] | None
  index_k: Float[Array, 'B S J'] | None
  index_weights: Float[Array, 'B T I'] | None
  q: Float[Array, 'B T H E']
  k: Float[Array, 'B S G E']
  start: Int[Array, 'B T']
  end: Int[Array, 'B T']
  key: Key[Array, '']  # It differs from layer to layer and from step to step; all rows share it.
  choice: Int[Array, ''] | None  # The number of the rule that selects; see `find_rule`.
  sm_scale: float
  topk: int
  backend: str
  n_selections: int = 1  # G where each key head has a selection of its own.
  # The numbers of the rows in the batch, which several devices may share. None: from 0 on.
  row: Int[Array, 'B'] | None = None


# Returns int32 positions [B, T, K], ascending, then -1. Where `n_selections` is above 1, a rule may
# return [B, T, G, K] instead.
Rule = Callable[[Candidates], jax.Array]
