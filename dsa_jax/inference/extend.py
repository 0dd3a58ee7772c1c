# SPDX-License-Identifier: Apache-2.0
"""Reads new tokens after those that a cache holds: prefill in chunks, and decoding."""

from collections.abc import Callable, Sequence
import functools
import math
import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Key
import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.inference import storage
from dsa_jax.inference.cache import Cache, flat_rows, match_rows, split_rows
from dsa_jax.inference.storage import Span, Store
from dsa_jax.kernels import dense_attention, index_topk, indexed_attention, sparse_attention
from dsa_jax.kernels.backend import packs_all_keys
from dsa_jax.nn.attention.layer import Attention as AttentionLayer
from dsa_jax.nn.attention.types import Attention, Views, row_keys
from dsa_jax.nn.block import Block
from dsa_jax.nn.indexer import IndexInputs
from dsa_jax.nn.scan import in_order, scan
from dsa_jax.nn.transformer import Transformer, are_full
from dsa_jax.selection import Candidates, check_rule, find_rule

FEW = 8  # So many new tokens are as good as one, as where drafts are verified.
SHORT = 2  # Times K. Beyond as many tokens, gathering selected rows takes less than a mask.


class Reading(NamedTuple):
  """What `extend` returns."""

  hidden: Float[Array, 'B T D']  # After the final norm; `Transformer.logits` turns it into logits.
  cache: Cache
  # Positions; [L, B, T, 0] where attention is dense. They are -1 in a layer with a window.
  selected: Int[Array, 'L B T *G K']


def extend(
    model: Transformer,
    cache: Cache,
    tokens: Int[Array, 'B T'],
    n_new: Int[Array, 'B'],
    *,
    attention: Attention,
    backend: str,
    rule: str = 'indexer',
    layers: Sequence[Block] | None = None,
    visible: int = 0,
) -> Reading:
  """Reads up to T new tokens of each sequence, and keeps them in the cache.

  Pieces of any size, in any batch, give the numbers of one pass over the whole text.

  Args:
    model: The model.
    cache: The tokens that were read before. Donate it to have it updated in place.
    tokens: Token ids. The first `n_new[b]` of row b count; the rest is padding.
    n_new: New tokens of each sequence. Those that the cache has no room for are lost.
    attention: 'sparse'; 'masked', the same numbers at the cost of 'dense'; or 'dense'.
    backend: Which kernels run.
    rule: What selects, a key of `dsa_jax.selection.RULES`.
    layers: The layers one by one, as `Transformer.block` returns them, in place of the model's. They
      are unrolled: XLA:CPU copies the weights of each layer that it takes from a stack.
    visible: No new token sees more than so many; 0: than the capacity. Where they are few, 'sparse'
      attends under a mask, in MHA form.
  """
  cfg, capacity = model.cfg, cache.capacity(model.cfg)
  sizes = dict(cfg=cfg, capacity=capacity, attention=attention, backend=backend, rule=rule)
  piece = _piece_of(cache.length, n_new, tokens.shape[1], visible=visible, **sizes)
  x = model.embed[...][tokens].astype(cfg.dtype)  # Casts what is read, not the whole table.
  stores = cache.kv, cache.index_key, cache.window_kv
  carry = model.into_streams(x), stores, _nothing_selected(piece)
  read = functools.partial(read_layer, piece)
  (x, (kv, index_key, window_kv), _), selections = run_layers(model, layers, read, carry)
  length = cache.length + jnp.sum(piece.counted, axis=1, dtype=jnp.int32)
  return Reading(model.final(x), Cache(kv, index_key, length, window_kv), selections)


def extend_mtp(
    model: Transformer,
    cache: Cache,
    hidden: Float[Array, 'B T D'],
    next_tokens: Int[Array, 'B T'],
    n_new: Int[Array, 'B'],
    *,
    capacity: int,
    attention: Attention,
    backend: str,
    rule: str = 'indexer',
) -> tuple[Float[Array, 'B T D'], Cache]:
  """Reads new tokens by the MTP layer, which has a cache of its own.

  Args:
    model: The model, which has that layer.
    cache: The rows of one layer.
    hidden: What `extend` has returned of the tokens.
    next_tokens: The tokens behind them.
    n_new: New tokens of each sequence.
    capacity: Tokens that each sequence of the cache can hold.
    attention: See `extend`, as for the rest.
    backend: See there.
    rule: See there.

  Returns:
    The hidden states that `Transformer.logits` turns into logits of the tokens behind the next ones, and
    the cache.
  """
  sizes = dict(cfg=model.cfg, capacity=capacity, attention=attention, backend=backend, rule=rule)
  piece = _piece_of(cache.length, n_new, next_tokens.shape[1], visible=0, **sizes)
  x = model.mtp.joined(hidden, model.embed[...][next_tokens].astype(model.cfg.dtype))
  carry = x, (cache.kv, cache.index_key, None), _nothing_selected(piece)
  facts = LayerFacts(0, 0, True, model.layer_keys()[-1])
  (x, (kv, index_key, _), _), _ = read_layer(piece, carry, model.mtp.block, facts)
  length = cache.length + jnp.sum(piece.counted, axis=1, dtype=jnp.int32)
  return model.mtp.norm(x), Cache(kv, index_key, length)


def _piece_of(length, n_new, width: int, *, visible: int, **sizes) -> 'Piece':
  _check(sizes['attention'], sizes['rule'])
  position = length[:, None] + jnp.arange(width, dtype=jnp.int32)
  counted = (jnp.arange(width) < n_new[:, None]) & (position < sizes['capacity'])
  most = short_context(width, sizes['cfg'].index_topk, sizes['backend'])
  return Piece(
      counted=counted,
      at=jnp.where(counted, position, -1),
      end=jnp.where(counted, position + 1, 0),
      short=visible if sizes['attention'] == 'sparse' and visible <= most else 0,
      **sizes,
  )


def _nothing_selected(piece: 'Piece') -> Int[Array, 'B T *G K']:
  shape = (0,) if piece.attention == 'dense' else piece.cfg.selection_shape
  return jnp.full((*piece.at.shape, *shape), -1, jnp.int32)


class Piece(NamedTuple):
  """What all layers are told of the new tokens and of how to attend."""

  counted: Bool[Array, 'B T']  # Which tokens are no padding and have room.
  at: Int[Array, 'B T']  # Their positions; -1 elsewhere.
  end: Int[Array, 'B T']  # One past the last key that each sees.
  cfg: ModelConfig
  capacity: int
  attention: str
  backend: str
  rule: str
  short: int  # 'sparse' attends to the first so many keys under a mask. 0: it gathers.

  @property
  def sees_all(self) -> bool:
    """Whether the indexer has nothing to choose, because no query sees more than its budget."""
    return 0 < self.short <= self.cfg.index_topk and self.rule == 'indexer'

  @property
  def is_one_op(self) -> bool:
    """Whether one op selects and attends."""
    topk, n_tokens = self.cfg.index_topk, self.at.shape[1]
    packs = packs_all_keys(self.backend, n_tokens, topk, self.capacity)
    learned = self.attention == 'sparse' and self.rule == 'indexer'
    return learned and packs and not (self.cfg.shares_indexers or self.cfg.attention_sinks)


def read_layer(
    piece: Piece, carry: Any, block: Block, facts: 'LayerFacts'
) -> tuple[Any, Int[Array, 'B T *G K']]:
  """Runs a layer, whose new rows it writes into the cache; returns the carry and the selection."""
  x, (kv, index_key, window_kv), selected = carry
  i, slot, is_full, key = facts
  attn, end, cfg, backend = block.attn, piece.end, block.attn.cfg, piece.backend
  span, index_span = (i * piece.capacity, piece.capacity), (slot * piece.capacity, piece.capacity)
  # A layer that reads an earlier one's rows finds them where that layer has written them.
  none = None if attn.reads < 0 else jnp.zeros((*end.shape, 1, cfg.row_dim), x.dtype)
  views = attn.views(block.attention_input(x), jnp.zeros_like(end), end, none)
  is_apart = attn.window > 0 and window_kv is not None
  rows = window_kv if is_apart else kv
  if attn.reads < 0:
    rows = storage.write(rows, flat_rows(views.rows, rows), piece.at, span)
  kv, window_kv = (kv, rows) if is_apart else (rows, window_kv)
  if attn.indexer is not None:
    at = jnp.where(is_full, piece.at, -1)
    index_key = storage.write(index_key, views.index.k, at, index_span)
  stores = kv, index_key, window_kv
  if attn.window:
    out, lse = attend_window(attn, views.row_q, rows, span, end, backend)
    out = attn.from_rows(out, views.q_latent, lse)
    x, _ = block.feed_forward(block.add_attention(x, out), piece.counted, backend)
    return (x, stores, selected), jnp.full_like(selected, -1)
  if piece.is_one_op:
    lse = None
    out, selected = select_and_attend(views, kv, span, index_key, index_span, end, cfg, backend)
  elif piece.attention != 'dense' and attn.indexer is not None:
    args = views, kv, span, index_key, index_span, end, cfg, backend, piece.rule, key
    own = lambda: all_visible(end, cfg) if piece.sees_all else select(*args)
    selected = jax.lax.cond(is_full, own, lambda: selected)
  if piece.short:
    chosen = None if piece.sees_all else selected
    out, lse = attend_short(attn, views.q, kv, (span[0], piece.short), chosen, end, backend)
  elif not piece.is_one_op:
    out, lse = attend(views.row_q, kv, span, selected, end, cfg, piece.attention, backend)
  join = attn.join_heads if piece.short else attn.from_rows
  out = join(out, views.q_latent, lse)
  x, _ = block.feed_forward(block.add_attention(x, out), piece.counted, backend)
  return (x, stores, selected), selected


def _check(attention: str, rule: str):
  check_rule(rule)
  if attention not in typing.get_args(Attention):
    raise ConfigError(f'{attention=} must be one of {typing.get_args(Attention)}.')


def short_context(n_tokens: int, topk: int, backend: str) -> int:
  """Returns up to how many visible keys 'sparse' attends under a mask; 0: never.

  Few queries would not pay for the keys and values of all heads.
  """
  return SHORT * topk if backend == 'xla' and n_tokens > FEW else 0


class LayerFacts(NamedTuple):
  """What `extend` knows of each layer beside its weights, or of one layer."""

  number: np.ndarray | int  # Which rows of its store are a layer's own.
  # Which index keys of the cache are a layer's own, or those of the layer whose selection it shares.
  slot: np.ndarray | int
  is_full: np.ndarray | bool  # Whether a layer selects for itself.
  keys: Key[Array, '*L']  # For rules that draw lots. They are those of a pass without a cache.


def run_layers(
    model: Transformer, layers: Sequence[Block] | None, layer: Callable, carry: Any
) -> tuple[Any, Int[Array, 'L B T *G K']]:
  """Scans the model's sections, or runs the given layers; returns the carry and all selections."""
  selections, facts = [], facts_of(model)
  if layers is None:
    for section, weights in model.sections():
      carry, selected = scan(section, layer, carry, weights, section.facts(facts))
      selections.append(in_order(selected))
    return carry, jnp.concatenate(selections)
  for i, block in enumerate(layers):
    number, slot, is_full = int(facts.number[i]), int(facts.slot[i]), bool(facts.is_full[i])
    carry, selected = layer(carry, block, LayerFacts(number, slot, is_full, facts.keys[i]))
    selections.append(selected)
  return carry, jnp.stack(selections)


def facts_of(model: Transformer) -> LayerFacts:
  cfg = model.cfg
  full = are_full(cfg, range(cfg.n_layers))
  apart = np.array([cfg.has_window_sizes and i in cfg.window_layers for i in range(cfg.n_layers)])
  own = np.array([not (apart[i] or cfg.reads_rows(i)) for i in range(cfg.n_layers)])
  number = np.where(apart, np.cumsum(apart), np.cumsum(own)) - 1
  number = number[list(cfg.kv_sources)] if cfg.kv_sources else number
  slot = np.maximum(np.cumsum(full) - 1, 0)
  return LayerFacts(number, slot, full, model.layer_keys()[:-1])


def select(
    views: Views,
    kv: Store,
    span: Span,
    index_key: Store,
    index_span: Span,
    end: Int[Array, 'B T'],
    cfg: ModelConfig,
    backend: str,
    rule: str,
    key: Key[Array, ''],
) -> Int[Array, 'B T *G K']:
  """Returns the positions that a rule selects from what the cache holds of a layer.

  The main attention is shown to the rule as rows, the only form that the cache has.
  """
  index = views.index
  if rule == 'indexer':
    return select_by_scores(index, index_key, index_span, end, cfg, backend)
  q = match_rows(views.row_q, kv, cfg)
  rows = split_rows(storage.read_layer(kv, span).decode(views.rows.dtype), cfg)
  candidates = Candidates(
      index_q=index_key.match(index.q),
      index_k=storage.read_layer(index_key, index_span).decode(index.q.dtype),
      index_weights=index.weights,
      q=q,
      k=row_keys(rows, q),
      start=jnp.zeros_like(end),
      end=end,
      key=key,
      choice=None,
      sm_scale=cfg.sm_scale,
      topk=cfg.index_topk,
      backend=backend,
      n_selections=cfg.index_n_selections,
  )
  return find_rule(rule)(candidates)


def select_by_scores(
    index: IndexInputs,
    store: Store,
    span: Span,
    end: Int[Array, 'B T'],
    cfg: ModelConfig,
    backend: str,
) -> Int[Array, 'B T *G K']:
  """Returns the positions with the highest index scores; copies no index key where it can."""
  q, keys = index.q, store.as_array(index.q.dtype)
  if keys is None:
    q, keys = store.match(q), storage.read_layer(store, span).decode(q.dtype)
    span = None  # The keys are those of this layer alone.
  start = jnp.zeros_like(end)
  return index_topk(
      q, keys, index.weights, start, end,
      topk=cfg.index_topk, n_selections=cfg.index_n_selections, backend=backend, span=span,
  )  # fmt: skip


def attend(
    q: Float[Array, 'B T H E'],
    store: Store,
    span: Span,
    selected: Int[Array, 'B T *G K'],
    end: Int[Array, 'B T'],
    cfg: ModelConfig,
    attention: Attention,
    backend: str,
) -> tuple[Float[Array, 'B T H C'], Float[Array, 'B T H']]:
  """Returns what each head reads from the rows of a layer, and the log-sum-exp of its logits."""
  dtype = q.dtype
  q = match_rows(q, store, cfg)
  if attention == 'sparse':
    keys, indices = keys_of_selected(store, span, selected, dtype, backend)
    keys = split_rows(keys, cfg)
    return sparse_attention(
        q, keys, None, indices, v_dim=cfg.row_value_dim, sm_scale=cfg.sm_scale, backend=backend
    )
  indices = selected if attention == 'masked' else None
  rows = split_rows(storage.read_layer(store, span).decode(dtype), cfg)
  return attend_rows(q, rows, jnp.zeros_like(end), end, indices, cfg, backend)


def attend_rows(
    q: Float[Array, 'B T H E'],
    rows: Float[Array, 'B S G P'],
    start: Int[Array, 'B T'],
    end: Int[Array, 'B T'],
    indices: Int[Array, 'B T *G K'] | None,
    cfg: ModelConfig,
    backend: str,
) -> tuple[Float[Array, 'B T H C'], Float[Array, 'B T H']]:
  """Returns, as `attend`, what each head reads from rows: all that it sees, or the given ones."""
  # Latents stand for the values with their rotary keys: cutting them out would copy them all.
  values = rows if cfg.attention == 'mla' else rows[..., : cfg.row_value_dim]
  out, lse = dense_attention(
      q, row_keys(rows, q), values, start, end,
      indices=indices, sm_scale=cfg.sm_scale, backend=backend,
  )  # fmt: skip
  return out[..., : cfg.row_value_dim], lse


def attend_window(
    layer: AttentionLayer,
    q: Float[Array, 'B T H E'],
    store: Store,
    span: Span,
    end: Int[Array, 'B T'],
    backend: str,
) -> tuple[Float[Array, 'B T H C'], Float[Array, 'B T H']]:
  """Returns, as `attend`, what each head reads in the window; copies the rows of windows only."""
  cfg, first = layer.cfg, layer.first_seen(jnp.zeros_like(end), end)
  n_rows = min(end.shape[1] + layer.window - 1, span[1])
  base = jnp.maximum(jnp.max(end, axis=1, keepdims=True) - n_rows, 0)
  positions = base[..., None] + jnp.arange(n_rows, dtype=jnp.int32)
  rows = storage.gather(store, positions, span).decode(q.dtype)[:, 0]
  start, end = (jnp.maximum(x - base, 0) for x in (first, end))
  q = match_rows(q, store, cfg)
  return attend_rows(q, split_rows(rows, cfg), start, end, None, cfg, backend)


def all_visible(end: Int[Array, 'B T'], cfg: ModelConfig) -> Int[Array, 'B T *G K']:
  """Returns what the indexer selects where no query sees more keys than it may: all of them."""
  end = end.reshape(*end.shape, *[1] * len(cfg.selection_shape))
  position = jnp.broadcast_to(jnp.arange(cfg.index_topk, dtype=jnp.int32), cfg.selection_shape)
  return jnp.where(position < end, position, -1)


def attend_short(
    layer: AttentionLayer,
    q: Float[Array, 'B T H E'],
    store: Store,
    span: Span,
    selected: Int[Array, 'B T *G K'] | None,
    end: Int[Array, 'B T'],
    backend: str,
) -> tuple[Float[Array, 'B T H V'], Float[Array, 'B T H']]:
  """Returns, as `attend` but in MHA form, what each head reads: the selection, or all in the span."""
  rows = split_rows(storage.read_layer(store, span).decode(q.dtype), layer.cfg)
  k, v = layer.expanded(rows[..., : layer.cfg.row_dim])
  sizes = {'sm_scale': layer.cfg.sm_scale, 'backend': backend}
  return dense_attention(q, k, v, jnp.zeros_like(end), end, indices=selected, **sizes)


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
    views: Views,
    kv: Store,
    span: Span,
    index_key: Store,
    index_span: Span,
    end: Int[Array, 'B T'],
    cfg: ModelConfig,
    backend: str,
) -> tuple[Float[Array, 'B T H C'], Int[Array, 'B T *G K']]:
  """Returns what `attend` and `select` return, from one op that may do both at one time."""
  keys = storage.read_layer(kv, span).decode(views.rows.dtype)
  index_keys = storage.read_layer(index_key, index_span).decode(views.index.q.dtype)
  return indexed_attention(
      match_rows(views.row_q, kv, cfg),
      split_rows(keys, cfg),
      None,
      index_key.match(views.index.q),
      index_keys,
      views.index.weights,
      jnp.zeros_like(end),
      end,
      topk=cfg.index_topk,
      n_selections=cfg.index_n_selections,
      v_dim=cfg.row_value_dim,
      sm_scale=cfg.sm_scale,
      backend=backend,
  )
