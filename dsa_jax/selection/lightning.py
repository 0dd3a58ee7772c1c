# SPDX-License-Identifier: Apache-2.0
"""The rule of DeepSeek Sparse Attention: the highest scores of the lightning indexer."""

from jaxtyping import Array, Int

from dsa_jax.kernels import index_topk
from dsa_jax.selection.candidates import Candidates


def indexer(c: Candidates) -> Int[Array, 'B T *G K']:
  """Selects the keys that the trained indexer scores highest."""
  return index_topk(
      c.index_q, c.index_k, c.index_weights, c.start, c.end,
      topk=c.topk, n_selections=c.n_selections, backend=c.backend,
  )  # fmt: skip
