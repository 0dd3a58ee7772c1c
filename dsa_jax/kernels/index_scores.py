# SPDX-License-Identifier: Apache-2.0
"""The logits of the lightning indexer: the definition, and what the backends compute in blocks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsa_jax.kernels.products import einsum


def index_scores(
    q: Float[Array, 'B T I J'],
    k: Float[Array, 'B S J'],
    weights: Float[Array, 'B T I'],
) -> Float[Array, 'B T S']:
  """Scores every key for every query.

  scores[b, t, s] = sum_i weights[b, t, i] * relu(dot(q[b, t, i], k[b, s]))

  No visibility is applied, and all [B, T, S] scores exist at once: this is for definitions, plots
  and blocks of rows.

  Args:
    q: Index queries, rotated. Not scaled.
    k: Index keys, normalised and rotated; one head, shared by all I.
    weights: Raw head weights of either sign, times `(index_n_heads * index_head_dim)**-0.5`.

  Returns:
    float32 scores without unit: their order within a row selects, their softmax within a row
    is what the indexer's loss sees.

  Source:
    DeepSeek-V3.2-Exp report, eq. 1; `Indexer.forward` in inference/model.py at commit
    87e509a2, less its FP8 quantisation and Hadamard rotation. Earlier copies rotate q and k
    wrongly: do not compare with them.
  """
  dots = einsum('BTIJ,BSJ->BTIS', q, k)
  return weigh(dots, weights, axis=2)


def weigh(
    dots: Float[Array, 'B T ...'], weights: Float[Array, 'B T I'], *, axis: int
) -> Float[Array, 'B T S']:
  """Returns sum_i weights[b, t, i] * relu(dots) of dots whose heads are on `axis`, 2 or 3.

  It adds term by term, which XLA does in one pass; a sum over the axis takes two or three on a CPU.
  """
  heads = jnp.moveaxis(dots, axis, 0), jnp.moveaxis(weights.astype(jnp.float32), 2, 0)
  return sum(weight[..., None] * jax.nn.relu(dot) for dot, weight in zip(*heads))


def check_index_inputs(q: jax.Array, k: jax.Array, weights: jax.Array, n_selections: int = 1):
  if q.dtype != k.dtype:
    raise ValueError(f'index q and k must share a dtype; got {q.dtype} and {k.dtype}.')
  if q.shape[:3] != weights.shape or q.shape[-1] != k.shape[-1] or q.shape[0] != k.shape[0]:
    raise ValueError(
        'index inputs must be q [B, T, I, J], k [B, S, J], weights [B, T, I]; got '
        f'{q.shape}, {k.shape}, {weights.shape}.'
    )
  if n_selections < 1 or q.shape[2] % n_selections:
    raise ValueError(f'{n_selections=} must divide the {q.shape[2]} index heads.')
