# SPDX-License-Identifier: Apache-2.0
"""The selection by index scores where devices share the work: exact, and the same on all of them."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.config import ModelConfig
from dsa_jax.inference import positions, storage
from dsa_jax.inference.storage import Span, Store
from dsa_jax.kernels import index_scores, index_topk
from dsa_jax.kernels.xla.rows import pad_axis
from dsa_jax.nn.indexer import IndexInputs
from dsa_jax.parallel import collectives

FEW = 8  # So many new tokens are as good as one, as where drafts are verified.


def select_by_scores(
    index: IndexInputs,
    store: Store,
    span: Span,
    end: Int[Array, 'B T'],
    cfg: ModelConfig,
    backend: str,
    shared: tuple[str, ...],
) -> Int[Array, 'B T *G K']:
  """Returns the positions with the highest index scores; copies no index key where it can.

  Args:
    index: Queries and head weights of the new tokens.
    store: The index keys of this device.
    span: Those of the layer.
    end: One past the last position that each query sees.
    cfg: The model.
    backend: Which kernels run.
    shared: Axes of the mesh along which devices have the same queries.
  """
  if collectives.axis_size(*shared) == 1:
    return _topk(index, store, span, end, cfg, backend)
  if end.shape[1] > FEW:
    return _select_for_own_queries(index, store, span, end, cfg, backend, shared)
  return _select_among_own_keys(index, store, span, end, cfg, backend, shared)


def _topk(index, store, span, end, cfg, backend):
  """Returns the rows with the highest scores among those before `end` in the span."""
  q, keys = index.q, store.as_array(index.q.dtype)
  if keys is None:
    q, keys = store.match(q), storage.read_layer(store, span).decode(q.dtype)
    span = None  # The keys are those of this layer alone.
  start = jnp.zeros_like(end)
  return index_topk(
      q, keys, index.weights, start, end,
      topk=cfg.index_topk, n_selections=cfg.index_n_selections, backend=backend, span=span,
  )  # fmt: skip


def _select_for_own_queries(index, store, span, end, cfg, backend, shared):
  """Selects for a share of the queries among all keys of the layer, which are all-gathered.

  Where there are many queries, the keys are less than the scores.
  """
  keys = jax.tree.map(positions.in_order, storage.read_layer(store, span))
  n = collectives.axis_size(*shared)  # What fills up the shares sees no key.
  own = lambda x: collectives.own_shard(pad_axis(x, 1, n), *shared, dim=1)
  index = index._replace(q=own(index.q), weights=own(index.weights))
  whole = 0, jax.tree.leaves(keys)[0].shape[1]
  selected = _topk(index, keys, whole, own(end), cfg, backend)
  return collectives.all_gather(selected, *shared, dim=1)[:, : end.shape[1]]


def _select_among_own_keys(index, store, span, end, cfg, backend, shared):
  """Selects among a share of the keys, and then among what all devices have selected.

  Devices that hold the same rows score a part of them each. Their selections are all-gathered with
  their scores. Ties go to the lowest position.
  """
  others = tuple(axis for axis in shared if axis != 'context')
  if span[1] % collectives.axis_size(*others):
    others = ()
  n_rows = span[1] // collectives.axis_size(*others)
  first = collectives.axis_index(*others) * n_rows
  span = span[0] + first, n_rows
  own_end = jnp.clip(positions.rows_before(end) - first, 0, n_rows)
  rows = _topk(index, store, span, own_end, cfg, backend)
  scores = _scores_of(index, store, span, rows)
  position = positions.position_of(jnp.where(rows >= 0, rows + first, -1))
  gather = lambda x: collectives.all_gather(x, 'context', *others, dim=x.ndim - 1)
  _, best = jax.lax.sort((-gather(scores), gather(position)), num_keys=2)
  best = best[..., : cfg.index_topk]
  last = jnp.iinfo(best.dtype).max
  best = jnp.sort(jnp.where(best >= 0, best, last), axis=-1)
  return jnp.where(best < last, best, -1)


def _scores_of(
    index: IndexInputs, store: Store, span: Span, rows: Int[Array, 'B T *G K']
) -> Float[Array, 'B T *G K']:
  """Returns the scores of selected rows; -inf where nothing is selected."""
  batch, n_queries, *groups, k = rows.shape
  n = batch * n_queries * math.prod(groups)
  keys = storage.gather(store, rows.reshape(batch, -1, k), span).decode(index.q.dtype)
  q = store.match(index.q)
  width = q.shape[-1]
  scores = index_scores(
      q.reshape(n, 1, -1, width), keys.reshape(n, k, width), index.weights.reshape(n, 1, -1)
  )
  return jnp.where(rows >= 0, scores.reshape(rows.shape), -jnp.inf)
