# SPDX-License-Identifier: Apache-2.0
"""The selection by any rule: it is shown whole texts, although devices share them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Key

from dsa_jax.inference import positions, storage
from dsa_jax.inference.cache import match_rows, split_rows
from dsa_jax.inference.piece import Held, Piece
from dsa_jax.inference.split_selection import FEW
from dsa_jax.kernels.xla.rows import pad_axis
from dsa_jax.nn.attention.layer import Attention as AttentionLayer
from dsa_jax.nn.attention.types import Views, row_keys
from dsa_jax.parallel import collectives
from dsa_jax.selection import Candidates, find_rule


def select_by_rule(
    layer: AttentionLayer, views: Views, held: Held, piece: Piece, key: Key[Array, '']
) -> Int[Array, 'B T *G K']:
  """Returns the positions that the rule of a piece selects.

  The rule is shown the keys and heads of all devices that share a text. Those that it does not look at
  are not gathered, because the compiler drops them. Devices that have the same queries select for a
  share of them each, if these are many.
  """
  n_queries = piece.end.shape[1]
  shared = piece.shared if n_queries > FEW else ()
  n = collectives.axis_size(*shared)  # What fills up the shares sees no key.
  own = lambda x: collectives.own_shard(pad_axis(x, 1, n), *shared, dim=1)
  cfg, index, end = layer.cfg, views.index, own(piece.end)
  q = match_rows(views.row_q, held.kv, cfg.row_dim, held.n_heads)
  if layer.splits_heads:
    q = collectives.all_gather(q, 'tensor', dim=2)
  candidates = Candidates(
      index_q=own(held.index_key.match(index.q)),
      index_k=_all_rows(held.index_key, held.index_span).decode(index.q.dtype),
      index_weights=own(index.weights),
      q=own(q),
      k=row_keys(_all_key_heads(layer, held, views.rows.dtype), q),
      start=jnp.zeros_like(end),
      end=end,
      key=key,
      choice=None,
      sm_scale=cfg.sm_scale,
      topk=cfg.index_topk,
      backend=piece.backend,
      n_selections=cfg.index_n_selections,
      row=piece.row,
  )
  selected = find_rule(piece.rule)(candidates)
  return collectives.all_gather(selected, *shared, dim=1)[:, :n_queries]


def _all_rows(store: storage.Store, span: storage.Span) -> storage.Store:
  """Returns the rows that all devices keep of a layer, in the order of their positions."""
  return jax.tree.map(positions.in_order, storage.read_layer(store, span))


def _all_key_heads(
    layer: AttentionLayer, held: Held, dtype: DTypeLike
) -> Float[Array, 'B S G P']:
  """Returns the rows of all devices with all key heads, each of them once."""
  rows = split_rows(_all_rows(held.kv, held.span).decode(dtype), held.n_heads)
  if rows.shape[2] == layer.cfg.row_heads:
    return rows
  rows = collectives.all_gather(rows, 'tensor', dim=2)
  return rows[:, :, :: rows.shape[2] // layer.cfg.row_heads]
