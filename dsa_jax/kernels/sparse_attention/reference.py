# SPDX-License-Identifier: Apache-2.0
"""The definition of attention to a selection."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.kernels.groups import by_group, join_groups
from dsa_jax.kernels.products import einsum
from dsa_jax.kernels.xla.rows import gather_rows


def sparse_attention_reference(
    q: Float[Array, 'B T H E'],
    k: Float[Array, 'B S G E'],
    v: Float[Array, 'B S G V'],
    indices: Int[Array, 'B T K'] | Int[Array, 'B T G K'],
    *,
    sm_scale: float,
) -> tuple[Float[Array, 'B T H V'], Float[Array, 'B T H']]:
  """See `sparse_attention`. Gathers the selection of each key head, then attends to all of it."""
  n_groups = k.shape[2]

  def attend(q, k, v, indices):
    filled = ((indices >= 0) & (indices < k.shape[1]))[:, :, None]
    keys, values = (gather_rows(x, indices).astype(jnp.float32) for x in (k, v))
    logits = sm_scale * einsum('BTHE,BTKE->BTHK', q.astype(jnp.float32), keys)
    logits = jnp.where(filled, logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1, where=filled)
    probs = jnp.exp(logits - jnp.where(lse > -jnp.inf, lse, 0)[..., None])
    return einsum('BTHK,BTKV->BTHV', probs, values).astype(q.dtype), lse

  axes = 0, 2, 2, (2 if indices.ndim == 4 else None)
  out, lse = jax.vmap(attend, in_axes=axes)(by_group(q, n_groups), k, v, indices)
  return join_groups(out), join_groups(lse)
