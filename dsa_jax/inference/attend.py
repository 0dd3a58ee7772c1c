# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens to what the cache holds of a layer, and what they select of it.

Selections are positions. Everything that attends turns them into rows of this device, and merges what
the devices have read of theirs.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Key

from dsa_jax.config import ModelConfig
from dsa_jax.inference import positions, storage
from dsa_jax.inference.cache import match_rows, split_rows
from dsa_jax.inference.piece import Held, Piece
from dsa_jax.inference.split_rules import select_by_rule
from dsa_jax.inference.split_selection import select_by_scores
from dsa_jax.inference.storage import Span, Store
from dsa_jax.kernels import dense_attention, indexed_attention, sparse_attention
from dsa_jax.kernels.backend import packs_all_keys
from dsa_jax.nn.attention.layer import Attention as AttentionLayer
from dsa_jax.nn.attention.types import Views, row_keys


def select(
    layer: AttentionLayer, views: Views, held: Held, piece: Piece, key: Key[Array, '']
) -> Int[Array, 'B T *G K']:
  """Returns the positions that the rule selects from what the cache holds of a layer.

  The main attention is shown to the rule as rows, the only form that the cache has.
  """
  if piece.rule != 'indexer':
    return select_by_rule(layer, views, held, piece, key)
  return select_by_scores(
      views.index, held.index_key, held.index_span, piece.end, layer.cfg, piece.backend, piece.shared
  )


def attend(
    layer: AttentionLayer, views: Views, held: Held, piece: Piece, selected: Int[Array, 'B T *G K']
) -> Float[Array, 'B T D']:
  """Returns what the heads of this device make of the selected rows, or of all that they see."""
  q, cfg = match_rows(views.row_q, held.kv, layer.cfg.row_dim, held.n_heads), layer.cfg
  rows = None if piece.attention == 'dense' else _own_rows(layer, selected)
  if piece.attention == 'sparse':
    keys, indices = keys_of_selected(held.kv, held.span, rows, q.dtype, piece.backend)
    out, lse = sparse_attention(
        q, split_rows(keys, held.n_heads), None, indices,
        v_dim=cfg.row_value_dim, sm_scale=cfg.sm_scale, backend=piece.backend,
    )  # fmt: skip
  else:
    keys = split_rows(storage.read_layer(held.kv, held.span).decode(q.dtype), held.n_heads)
    start, end = jnp.zeros_like(piece.end), positions.rows_before(piece.end)
    out, lse = attend_rows(q, keys, start, end, rows, cfg, piece.backend)
  out, lse = positions.of_all_devices(out, lse)
  return layer.from_rows(out, views.q_latent, lse)


def _own_rows(layer: AttentionLayer, selected: Int[Array, 'B T *G K']) -> Int[Array, 'B T *G K']:
  """Returns the rows of this device that its heads have selected; -1 in the place of all others."""
  return positions.row_of(selected if selected.ndim == 3 else layer.own_key_heads(selected))


def attend_rows(
    q: Float[Array, 'B T H E'],
    rows: Float[Array, 'B S G P'],
    start: Int[Array, 'B T'],
    end: Int[Array, 'B T'],
    indices: Int[Array, 'B T *G K'] | None,
    cfg: ModelConfig,
    backend: str,
) -> tuple[Float[Array, 'B T H C'], Float[Array, 'B T H']]:
  """Returns what each head reads from rows, all that it sees or the given ones, and the log-sum-exp."""
  # Latents stand for the values with their rotary keys: cutting them out would copy them all.
  values = rows if cfg.attention == 'mla' else rows[..., : cfg.row_value_dim]
  out, lse = dense_attention(
      q, row_keys(rows, q), values, start, end,
      indices=indices, sm_scale=cfg.sm_scale, backend=backend,
  )  # fmt: skip
  return out[..., : cfg.row_value_dim], lse


def attend_window(
    layer: AttentionLayer, views: Views, held: Held, piece: Piece
) -> Float[Array, 'B T D']:
  """Returns, as `attend`, what heads make of the window; copies the rows of windows only."""
  end = piece.end
  n_positions = end.shape[1] + layer.window - 1
  base = jnp.maximum(jnp.max(end, axis=1, keepdims=True) - n_positions, 0)
  n_rows = min(positions.most_rows(n_positions), held.span[1])
  base_row = jnp.minimum(positions.rows_before(base), held.span[1] - n_rows)
  rows = base_row[..., None] + jnp.arange(n_rows, dtype=jnp.int32)
  keys = storage.gather(held.kv, rows, held.span).decode(views.row_q.dtype)[:, 0]
  first = layer.first_seen(jnp.zeros_like(end), end)
  start, end = (jnp.maximum(positions.rows_before(x) - base_row, 0) for x in (first, end))
  q = match_rows(views.row_q, held.kv, layer.cfg.row_dim, held.n_heads)
  out, lse = attend_rows(
      q, split_rows(keys, held.n_heads), start, end, None, layer.cfg, piece.backend
  )
  out, lse = positions.of_all_devices(out, lse)
  return layer.from_rows(out, views.q_latent, lse)


def all_visible(end: Int[Array, 'B T'], cfg: ModelConfig) -> Int[Array, 'B T *G K']:
  """Returns what the indexer selects where no query sees more keys than it may: all of them."""
  end = end.reshape(*end.shape, *[1] * len(cfg.selection_shape))
  position = jnp.broadcast_to(jnp.arange(cfg.index_topk, dtype=jnp.int32), cfg.selection_shape)
  return jnp.where(position < end, position, -1)


def attend_short(
    layer: AttentionLayer, views: Views, held: Held, piece: Piece, selected: Int[Array, 'B T *G K']
) -> Float[Array, 'B T D']:
  """Returns what `attend` does, of the first rows in MHA form: the selection, or all of them."""
  span = held.span[0], min(positions.most_rows(piece.short), held.span[1])
  rows = split_rows(storage.read_layer(held.kv, span).decode(views.q.dtype), held.n_heads)
  k, v = layer.expanded(rows[..., : layer.cfg.row_dim])
  out, lse = dense_attention(
      views.q, k, v, jnp.zeros_like(piece.end), positions.rows_before(piece.end),
      indices=None if piece.sees_all else _own_rows(layer, selected),
      sm_scale=layer.cfg.sm_scale, backend=piece.backend,
  )  # fmt: skip
  out, lse = positions.of_all_devices(out, lse)
  return layer.join_heads(out, views.q_latent, lse)


def keys_of_selected(
    store: Store, span: Span, selected: Int[Array, 'B T *G K'], dtype: DTypeLike, backend: str
) -> tuple[Float[Array, 'B S W'], Int[Array, 'B T *G K']]:
  """Returns the keys that sparse attention gathers from, and which of them each query selected.

  The keys are the whole store where the op can read it as it is. Otherwise they are the layer where
  many rows are selected, and the selected rows alone where few are.
  """
  batch, n_queries, *shape = selected.shape
  k = math.prod(shape)
  whole = store.as_array(dtype)
  if whole is not None and not packs_all_keys(backend, n_queries, k, span[1]):
    return whole, storage.rows_of(selected, span)
  if n_queries * k >= span[1]:
    return storage.read_layer(store, span).decode(dtype), selected
  rows = storage.gather(store, selected.reshape(batch, n_queries, k), span).decode(dtype)
  slots = jnp.arange(n_queries * k, dtype=jnp.int32).reshape(n_queries, *shape)
  return rows.reshape(batch, n_queries * k, -1), jnp.where(selected >= 0, slots, -1)


def select_and_attend(
    layer: AttentionLayer, views: Views, held: Held, piece: Piece
) -> tuple[Float[Array, 'B T D'], Int[Array, 'B T *G K']]:
  """Returns what `attend` and `select` return, from one op that may do both at one time."""
  cfg, index, end = layer.cfg, views.index, piece.end
  keys = storage.read_layer(held.kv, held.span).decode(views.rows.dtype)
  index_keys = storage.read_layer(held.index_key, held.index_span).decode(index.q.dtype)
  out, selected = indexed_attention(
      match_rows(views.row_q, held.kv, cfg.row_dim, held.n_heads),
      split_rows(keys, held.n_heads),
      None,
      held.index_key.match(index.q),
      index_keys,
      index.weights,
      jnp.zeros_like(end),
      end,
      topk=cfg.index_topk,
      n_selections=cfg.index_n_selections,
      v_dim=cfg.row_value_dim,
      sm_scale=cfg.sm_scale,
      backend=piece.backend,
  )
  return layer.from_rows(out, views.q_latent, None), selected
