# SPDX-License-Identifier: Apache-2.0
"""Scores and exact selection, a block of query rows at a time."""

import dataclasses

from dsa_jax.kernels.index_scores import index_scores
from dsa_jax.kernels.rows import map_rows
from dsa_jax.kernels.select_topk import select_topk


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
  """They change the speed, never the result."""

  block_t: int = 128  # Query rows whose scores exist at one time.


def forward(q, k, weights, start, end, *, topk: int, blocks: BlockSizes):
  def select(rows):
    q, weights, start, end = rows
    return select_topk(index_scores(q, k, weights), start, end, topk=topk)

  return map_rows(select, (q, weights, start, end), blocks.block_t)
