# SPDX-License-Identifier: Apache-2.0
"""The lightning indexer's selection and attention to it, in one op, for inference."""

import jax
from jaxtyping import Array, Float, Int

from dsa_jax.kernels.backend import load_kernels
from dsa_jax.kernels.groups import fold_keys
from dsa_jax.kernels.index_topk.op import check_selection, index_topk
from dsa_jax.kernels.sparse_attention.op import check_attention, sparse_attention
from dsa_jax.kernels.visibility import sees_nothing


@jax.named_scope('indexed_attention')
def indexed_attention(
    q: Float[Array, 'B T H E'],
    k: Float[Array, 'B S G P'],
    v: Float[Array, 'B S G V'] | None,
    index_q: Float[Array, 'B T I J'],
    index_k: Float[Array, 'B S J'],
    index_weights: Float[Array, 'B T I'],
    start: Int[Array, 'B T'],
    end: Int[Array, 'B T'],
    *,
    topk: int,
    n_selections: int = 1,
    v_dim: int | None = None,
    sm_scale: float,
    backend: str,
) -> tuple[Float[Array, 'B T H V'], Int[Array, 'B T ... {topk}']]:
  """Attends to what `index_topk` selects, with the numbers of the two ops.

  They run one after the other. On a TPU whose VMEM holds too few of the keys, SparseCores bring
  selected rows together while the TensorCore selects for the next queries.

  Args:
    q: Queries; see `sparse_attention`.
    k: Keys; see there.
    v: Values, or None; see there.
    index_q: Index queries; see `index_topk`.
    index_k: Index keys; see there.
    index_weights: Head weights, scale folded in.
    start: int32; the first key position that each query sees.
    end: int32; one past the last.
    topk: K, how many keys a query attends to.
    n_selections: 1, or G for a selection for each key head; see `index_topk`.
    v_dim: The width of the value and of the output; only where `v` is None.
    sm_scale: Softmax scale.
    backend: Which implementation. Never falls back to another.

  Returns:
    The attention output in `q`'s dtype, and the selection as `index_topk` returns it. Neither
    carries gradients.
  """
  index_inputs = index_q, index_k, index_weights, start, end
  check_selection(*index_inputs, topk, n_selections)
  check_attention(q, k, v, v_dim)
  q, k, v = jax.lax.stop_gradient((q, k, v))
  is_latent = v is None and k.shape[2:] == (1, q.shape[-1]) and n_selections == 1
  if backend == 'tpu' and is_latent and not sees_nothing(q, k.shape[1]):
    kernels = load_kernels('dsa_jax.kernels.indexed_attention.tpu')
    kv = fold_keys(k)
    inputs, blocks = (q, kv, index_q, index_k), kernels.BlockSizes()
    plan = kernels.plan_if_it_pays(*inputs, topk=topk, v_dim=v_dim, blocks=blocks)
    if plan is not None:
      index_inputs = jax.lax.stop_gradient(index_inputs)
      return kernels.forward(q, kv, *index_inputs, plan=plan, sm_scale=sm_scale)
  indices = index_topk(*index_inputs, topk=topk, n_selections=n_selections, backend=backend)
  out, _ = sparse_attention(q, k, v, indices, v_dim=v_dim, sm_scale=sm_scale, backend=backend)
  return out, indices
