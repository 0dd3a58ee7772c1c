# SPDX-License-Identifier: Apache-2.0
"""The indexer's loss in one layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsa_jax.kernels import index_kl
from dsa_jax.nn.attention.types import Mode
from dsa_jax.nn.indexer import IndexInputs


class Divergence(NamedTuple):
  """Computes KL(attention || indexer) where the mode asks for it."""

  mode: Mode
  sm_scale: float
  n_selections: int  # Of a query.
  is_full: Bool[Array, ''] | None  # Whether the layer selects for itself. None: every layer does.

  def __call__(
      self,
      q: Float[Array, 'B T H E'],
      k: Float[Array, 'B S G E'],
      lse: Float[Array, 'B T H'],
      index: IndexInputs | None,
      start: Int[Array, 'B T'],
      end: Int[Array, 'B T'],
      indices: Int[Array, 'B T *G K'] | None,
  ) -> Float[Array, 'B T'] | None:
    """Returns nats for each query; zeros in a layer without an indexer of its own.

    The divergence is over the selected keys that `indices` names, or over all visible ones.
    """
    if not self.mode.index_loss:
      return None
    nothing = jnp.zeros(start.shape)
    if index is None:
      return nothing

    def loss(index: IndexInputs):
      return index_kl(
          q, k, lse, *index, start, end,
          indices=indices, n_selections=self.n_selections, sm_scale=self.sm_scale,
          backend=self.mode.backend,
      )  # fmt: skip

    if self.is_full is None:
      return loss(index)
    return jax.lax.cond(self.is_full, loss, lambda _: nothing, index)
