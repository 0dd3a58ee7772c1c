# SPDX-License-Identifier: Apache-2.0
"""Selections held against the true attention of their layer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from dsa_jax import selection
from dsa_jax.kernels import dense_attention, sparse_attention
from dsa_jax.nn.attention.types import Measures, Mode, Selections, Views
from dsa_jax.parallel import collectives
from dsa_jax.parallel.mesh import TOKENS
from dsa_jax.selection import measures


def measure_selections(
    layer,
    views: Views,
    selections: Selections,
    start: Int[Array, 'B T'],
    end: Int[Array, 'B T'],
    key: Key[Array, ''],
    mode: Mode,
) -> dict[str, Measures]:
  """Compares what each rule of `mode.measure` selected with all that the queries see."""
  scale, backend = layer.cfg.sm_scale, mode.backend
  lse_visible = dense_attention(
      views.q, views.k, views.v, start, end, sm_scale=scale, backend=backend
  )[1]
  if 'oracle' in selections:
    oracle = selections['oracle']
  else:
    oracle = selection.find_rule('oracle')(views.candidates(start, end, key, layer.cfg, backend))

  def compare(chosen: Int[Array, 'B T *G K']) -> Measures:
    lse = sparse_attention(
        views.row_q, views.rows, None, chosen,
        v_dim=layer.cfg.row_value_dim, sm_scale=scale, backend=backend,
    )[1]  # fmt: skip
    return Measures(
        indices=chosen,
        captured_mass=measures.captured_mass(lse, lse_visible),
        topk_recall=measures.over_key_heads(measures.overlap(oracle, chosen)),
        neighbour_overlap=measures.over_key_heads(_neighbour_overlap(chosen)),
        selected_distance=measures.over_key_heads(measures.selected_distance(chosen, end)),
    )

  stacked = jax.lax.map(compare, jnp.stack([selections[rule] for rule in mode.measure]))
  return {rule: jax.tree.map(lambda x: x[i], stacked) for i, rule in enumerate(mode.measure)}


def measure_window(
    layer, start: Int[Array, 'B T'], end: Int[Array, 'B T'], mode: Mode
) -> dict[str, Measures]:
  """Returns measures of a layer that attends to all that it sees, which is its window.

  It selects nothing, so its indices are -1. It leaves out nothing of its attention.
  """
  n_seen = end - layer.first_seen(start, end)
  sees = (n_seen > 0).astype(jnp.float32)
  measured = Measures(
      indices=jnp.full((*end.shape, *layer.cfg.selection_shape), -1, jnp.int32),
      captured_mass=sees,
      topk_recall=sees,
      neighbour_overlap=sees * (n_seen - 1) / jnp.maximum(n_seen, 1),
      selected_distance=sees * (n_seen - 1) / 2,
  )
  return {rule: measured for rule in mode.measure}


def _neighbour_overlap(chosen):
  """Returns the overlap for this device's tokens; the one before its first is another device's."""
  overlap = measures.neighbour_overlap(collectives.all_gather(chosen, *TOKENS, dim=1))
  here = collectives.axis_index(*TOKENS) * chosen.shape[1]
  return jax.lax.dynamic_slice_in_dim(overlap, here, chosen.shape[1], axis=1)
