# SPDX-License-Identifier: Apache-2.0
"""The rule that no other can beat: it looks at the attention itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsa_jax.kernels import dense_attention
from dsa_jax.kernels.groups import by_group
from dsa_jax.kernels.mean_attention import mean_attention
from dsa_jax.kernels.select_topk import select_topk
from dsa_jax.kernels.visibility import visible_keys
from dsa_jax.kernels.xla.rows import map_rows
from dsa_jax.selection.candidates import Candidates


def largest_mass(c: Candidates) -> Int[Array, 'B T *G K']:
  """Selects the keys with the largest attention probability, averaged over the heads that select."""
  # Only the log-sum-exp is needed, so one channel stands for the values.
  _, lse = dense_attention(
      c.q, c.k, c.k[..., :1], c.start, c.end, sm_scale=c.sm_scale, backend=c.backend
  )

  def select(rows):
    q, lse, start, end = rows
    seen = visible_keys(start, end, jnp.arange(c.k.shape[1]))
    if c.n_selections == 1:
      mass = mean_attention(q, c.k, lse, seen, c.sm_scale)
      return select_topk(mass, start, end, topk=c.topk)

    def select_for(own):  # A key head, and the heads that share it.
      q, k, lse = own
      mass = mean_attention(q, k, lse, seen, c.sm_scale)
      return select_topk(mass, start, end, topk=c.topk)

    own = tuple(by_group(x, c.n_selections) for x in (q, c.k, lse))
    return jnp.moveaxis(jax.lax.map(select_for, own), 0, 2)

  return map_rows(select, (c.q, lse, c.start, c.end), block=64)
