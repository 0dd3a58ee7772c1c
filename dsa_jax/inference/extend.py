# SPDX-License-Identifier: Apache-2.0
"""Reads new tokens after those that a cache holds: prefill in chunks, and decoding."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import numpy as np

from dsa_jax.inference import positions, storage
from dsa_jax.inference.attend import (
    all_visible,
    attend,
    attend_short,
    attend_window,
    select,
    select_and_attend,
)
from dsa_jax.inference.cache import Cache, flat_rows
from dsa_jax.inference.piece import Held, Piece, piece_of
from dsa_jax.nn.attention.types import Attention
from dsa_jax.nn.block import Block
from dsa_jax.nn.scan import in_order, scan
from dsa_jax.nn.transformer import Transformer, are_full, look_up
from dsa_jax.parallel import collectives, shard
from dsa_jax.parallel.mesh import TOKENS


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
    shared: tuple[str, ...] = TOKENS,
) -> Reading:
  """Reads up to T new tokens of each sequence, and keeps them in the cache.

  Pieces of any size, in any batch, give the numbers of one pass over the whole text. Within
  `jax.shard_map` over all axes of a mesh, each device has its shards of the weights and of the cache,
  see `positions`, and reads the same tokens as the devices along `shared`.

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
    shared: Axes of the mesh along which devices read the same tokens. The axes beside TOKENS are those
      of `SEQUENCES`, where these split no batch.
  """
  sizes = dict(
      cfg=model.cfg, capacity=cache.capacity(model.cfg), attention=attention, backend=backend,
      rule=rule, shared=shared,
  )  # fmt: skip
  piece = piece_of(cache.length, n_new, tokens.shape[1], visible=visible, **sizes)
  x = embedded(model, piece.own(tokens))
  stores = cache.kv, cache.index_key, cache.window_kv
  carry = model.into_streams(x), stores, _nothing_selected(piece)
  read = functools.partial(read_layer, piece)
  (x, (kv, index_key, window_kv), _), selections = run_layers(model, layers, read, carry)
  selections = collectives.all_gather(selections, *piece.spread, dim=2)
  cache = Cache(kv, index_key, piece.length, window_kv)
  return Reading(piece.all(model.final(x)), cache, selections)


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
    shared: tuple[str, ...] = TOKENS,
) -> tuple[Float[Array, 'B T D'], Cache]:
  """Reads new tokens by the MTP layer, which has a cache of its own.

  Args:
    model: The model, which has that layer.
    cache: The rows of one layer.
    hidden: What `extend` has returned of the tokens.
    next_tokens: The tokens behind them.
    n_new: New tokens of each sequence.
    capacity: Rows that this device's cache has for each sequence.
    attention: See `extend`, as for the rest.
    backend: See there.
    rule: See there.
    shared: See there.

  Returns:
    The hidden states that `Transformer.logits` turns into logits of the tokens behind the next ones, and
    the cache.
  """
  sizes = dict(
      cfg=model.cfg, capacity=capacity, attention=attention, backend=backend, rule=rule,
      shared=shared,
  )  # fmt: skip
  piece = piece_of(cache.length, n_new, next_tokens.shape[1], visible=0, **sizes)
  join = jax.tree.map(lambda x: x, model.mtp)  # A new module; the given one stays as it is.
  join.block = None
  join, hidden = shard.gather_weights(join, hidden.dtype), piece.own(hidden)
  x = join.joined(hidden, embedded(model, piece.own(next_tokens)))
  carry = x, (cache.kv, cache.index_key, None), _nothing_selected(piece)
  facts = LayerFacts(0, 0, True, model.layer_keys()[-1])
  (x, (kv, index_key, _), _), _ = read_layer(piece, carry, model.mtp.block, facts)
  return piece.all(model.mtp.norm(x)), Cache(kv, index_key, piece.length)


def embedded(model: Transformer, tokens: Int[Array, 'B T']) -> Float[Array, 'B T D']:
  """Returns the embeddings of tokens. It casts what is read, not the whole table."""
  table, dtype = model.embed[...], model.cfg.dtype
  if collectives.axis_size('fsdp', 'tensor') == 1:
    return table[tokens].astype(dtype)
  x = collectives.psum(look_up(table, tokens, dtype), 'tensor')
  return collectives.all_to_all(x, 'fsdp', split=0, join=2)


def _nothing_selected(piece: Piece) -> Int[Array, 'B T *G K']:
  shape = (0,) if piece.attention == 'dense' else piece.cfg.selection_shape
  return jnp.full((*piece.at.shape, *shape), -1, jnp.int32)


def read_layer(
    piece: Piece, carry: Any, block: Block, facts: 'LayerFacts'
) -> tuple[Any, Int[Array, 'B T *G K']]:
  """Runs a layer, whose new rows it writes into the cache; returns the carry and the selection."""
  x, (kv, index_key, window_kv), selected = carry
  i, slot, is_full, key = facts
  attn, end = shard.gather_weights(block.attn, x.dtype), piece.end
  # A layer that reads an earlier one's rows finds them where that layer has written them.
  none = None if attn.reads < 0 else jnp.zeros((*end.shape, 1, attn.cfg.row_dim), x.dtype)
  views = attn.views(block.attention_input(x), jnp.zeros_like(end), end, none, gathers=False)
  at, rows = positions.row_of(piece.all(piece.at)), attn.own_key_heads(piece.all(views.rows))
  span, index_span = (i * piece.capacity, piece.capacity), (slot * piece.capacity, piece.capacity)
  is_apart = attn.window > 0 and window_kv is not None
  store = window_kv if is_apart else kv
  if attn.reads < 0:
    store = storage.write(store, flat_rows(rows, store), at, span)
  kv, window_kv = (kv, store) if is_apart else (store, window_kv)
  if attn.indexer is not None:
    new, at = piece.all(views.index.k), jnp.where(is_full, at, -1)
    index_key = storage.write(index_key, new, at, index_span)
  held = Held(store, span, index_key, index_span, rows.shape[2])
  if attn.window:
    out, chosen = attend_window(attn, views, held, piece), jnp.full_like(selected, -1)
  elif piece.is_one_op:
    out, chosen = select_and_attend(attn, views, held, piece)
    selected = chosen
  else:
    if piece.attention != 'dense' and attn.indexer is not None:
      own = lambda: all_visible(end, piece.cfg) if piece.sees_all else select(attn, views, held, piece, key)
      selected = jax.lax.cond(is_full, own, lambda: selected)
    run = attend_short if piece.short else attend
    out, chosen = run(attn, views, held, piece, selected), selected
  if attn.splits_heads:
    out = collectives.psum(out, 'tensor')
  x = feed_forward(piece, block, block.add_attention(x, out))
  return (x, (kv, index_key, window_kv), selected), chosen


def feed_forward(
    piece: Piece, block: Block, x: Float[Array, 'B T *M D']
) -> Float[Array, 'B T *M D']:
  """Applies the second half of a layer, on each device to a share of the tokens that it has in common."""
  n = collectives.axis_size(*piece.shared)
  if n == 1:
    return block.feed_forward(x, piece.counted, piece.backend)[0]
  n_tokens = piece.counted.size
  n_rows = -(-n_tokens // n) * n  # What is missing is filled with tokens again: it costs no expert.

  def own(x):
    rows = jnp.resize(x.reshape(n_tokens, *x.shape[2:]), (n_rows, *x.shape[2:]))
    return collectives.own_shard(rows[None], *piece.shared, dim=1)

  out, _ = block.feed_forward(own(x), own(piece.counted), piece.backend)
  return collectives.all_gather(out, *piece.shared, dim=1)[:, :n_tokens].reshape(x.shape)


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
    for section, weights in model.sections(copies=False):
      carry, selected = scan(section, layer, carry, weights, section.facts(facts))
      selections.append(in_order(selected))
    return carry, jnp.concatenate(selections)
  for i, block in enumerate(layers):
    number, slot, is_full = int(facts.number[i]), int(facts.slot[i]), bool(facts.is_full[i])
    carry, selected = layer(carry, block, LayerFacts(number, slot, is_full, facts.keys[i]))
    selections.append(selected)
  return carry, jnp.stack(selections)


def facts_of(model: Transformer) -> LayerFacts:
  """Returns what `extend` knows of all layers."""
  cfg = model.cfg
  full = are_full(cfg, range(cfg.n_layers))
  apart = np.array([cfg.has_window_sizes and i in cfg.window_layers for i in range(cfg.n_layers)])
  own = np.array([not (apart[i] or cfg.reads_rows(i)) for i in range(cfg.n_layers)])
  number = np.where(apart, np.cumsum(apart), np.cumsum(own)) - 1
  number = number[list(cfg.kv_sources)] if cfg.kv_sources else number
  slot = np.maximum(np.cumsum(full) - 1, 0)
  return LayerFacts(number, slot, full, model.layer_keys()[:-1])
