# SPDX-License-Identifier: Apache-2.0
"""Reads new tokens after those that a cache holds: prefill in chunks, and decoding."""

from collections.abc import Iterator
import typing
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Key
import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.inference import storage
from dsa_jax.inference.cache import Cache
from dsa_jax.inference.storage import Span, Store
from dsa_jax.kernels import dense_attention, index_topk, indexed_attention, sparse_attention
from dsa_jax.kernels.backend import packs_all_keys
from dsa_jax.nn.attention.types import Attention, Views
from dsa_jax.nn.block import Block, add
from dsa_jax.nn.indexer import IndexInputs
from dsa_jax.nn.transformer import Transformer, are_full, layers_of_stacks, with_every_indexer
from dsa_jax.selection import Candidates, check_rule, find_rule


class Reading(NamedTuple):
  """What `extend` returns."""

  hidden: Float[Array, 'B T D']  # After the final norm; `Transformer.logits` turns it into logits.
  cache: Cache
  selected: Int[Array, 'L B T K']  # Positions; [L, B, T, 0] where attention is dense.


def extend(
    model: Transformer,
    cache: Cache,
    tokens: Int[Array, 'B T'],
    n_new: Int[Array, 'B'],
    *,
    attention: Attention,
    backend: str,
    rule: str = 'indexer',
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
  """
  _check(attention, rule)
  cfg, capacity, n_tokens = model.cfg, cache.capacity(model.cfg), tokens.shape[1]
  position = cache.length[:, None] + jnp.arange(n_tokens, dtype=jnp.int32)
  counted = (jnp.arange(n_tokens) < n_new[:, None]) & (position < capacity)
  at, end = jnp.where(counted, position, -1), jnp.where(counted, position + 1, 0)
  packs = packs_all_keys(backend, n_tokens, cfg.index_topk, capacity)
  in_one_op = attention == 'sparse' and rule == 'indexer' and packs and not cfg.shares_indexers

  def layer(carry, inputs):
    x, kv, index_key, selected = carry
    block, i, slot, is_full, key = inputs
    span, index_span = (i * capacity, capacity), (slot * capacity, capacity)
    views = block.attn.views(block.attn_norm(x), jnp.zeros_like(end), end)
    kv = storage.write(kv, views.kv, at, span)
    if block.attn.indexer is not None:
      index_key = storage.write(index_key, views.index.k, jnp.where(is_full, at, -1), index_span)
    if in_one_op:
      out, selected = select_and_attend(views, kv, span, index_key, index_span, end, cfg, backend)
    else:
      if attention != 'dense' and block.attn.indexer is not None:
        args = views, kv, span, index_key, index_span, end, cfg, backend, rule, key
        own = lambda: select(*args)
        selected = jax.lax.cond(is_full, own, lambda: selected)
      out = attend(views.absorbed_q, kv, span, selected, end, cfg, attention, backend)
    x, _ = block.feed_forward(add(x, block.attn.from_latents(out)), counted, backend)
    return (x, kv, index_key, selected), selected

  x = model.embed[...][tokens].astype(cfg.dtype)  # Casts what is read, not the whole table.
  k = 0 if attention == 'dense' else cfg.index_topk
  carry = x, cache.kv, cache.index_key, jnp.full((*tokens.shape, k), -1, jnp.int32)
  selections = []
  for inputs in layers_of(model):
    carry, selected = jax.lax.scan(layer, carry, inputs)
    selections.append(selected)
  x, kv, index_key, _ = carry
  length = cache.length + jnp.sum(counted, axis=1, dtype=jnp.int32)
  return Reading(model.norm(x), Cache(kv, index_key, length), jnp.concatenate(selections))


def _check(attention: str, rule: str):
  check_rule(rule)
  if attention not in typing.get_args(Attention):
    raise ConfigError(f'{attention=} must be one of {typing.get_args(Attention)}.')


class Layers(NamedTuple):
  """The layers of a stack, as `extend` scans them."""

  blocks: Block
  number: np.ndarray  # Of each layer, counted from the first one of the model.
  # Which index keys of the cache are a layer's own, or those of the layer whose selection it shares.
  slot: np.ndarray
  is_full: np.ndarray  # Whether a layer selects for itself.
  keys: Key[Array, 'L']  # For rules that draw lots. They are those of a pass without a cache.


def layers_of(model: Transformer) -> Iterator[Layers]:
  """Yields the layers of each stack that the model has."""
  full = are_full(model.cfg, range(model.cfg.n_layers))
  slot = np.maximum(np.cumsum(full) - 1, 0)
  keys = model.layer_keys()
  for name, layers in layers_of_stacks(model.cfg).items():
    if blocks := getattr(model, name):
      i = np.arange(layers.start, layers.stop)
      yield Layers(with_every_indexer(blocks, full[i]), i, slot[i], full[i], keys[i])


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
) -> Int[Array, 'B T K']:
  """Returns the positions that a rule selects from what the cache holds of a layer.

  The main attention is shown to the rule in MQA form, the only one that the cache has.
  """
  index = views.index
  if rule == 'indexer':
    return select_by_scores(index, index_key, index_span, end, cfg.index_topk, backend)
  candidates = Candidates(
      index_q=index_key.match(index.q),
      index_k=storage.read_layer(index_key, index_span).decode(index.q.dtype),
      index_weights=index.weights,
      q=kv.match(views.absorbed_q),
      k=storage.read_layer(kv, span).decode(views.kv.dtype)[:, :, None],
      start=jnp.zeros_like(end),
      end=end,
      key=key,
      choice=None,
      sm_scale=cfg.sm_scale,
      topk=cfg.index_topk,
      backend=backend,
  )
  return find_rule(rule)(candidates)


def select_by_scores(
    index: IndexInputs,
    store: Store,
    span: Span,
    end: Int[Array, 'B T'],
    topk: int,
    backend: str,
) -> Int[Array, 'B T {topk}']:
  """Returns the positions with the highest index scores; copies no index key where it can."""
  q, keys = index.q, store.as_array(index.q.dtype)
  if keys is None:
    q, keys = store.match(q), storage.read_layer(store, span).decode(q.dtype)
    span = None  # The keys are those of this layer alone.
  start = jnp.zeros_like(end)
  return index_topk(q, keys, index.weights, start, end, topk=topk, backend=backend, span=span)


def attend(
    q: Float[Array, 'B T H P'],
    store: Store,
    span: Span,
    selected: Int[Array, 'B T K'],
    end: Int[Array, 'B T'],
    cfg: ModelConfig,
    attention: Attention,
    backend: str,
) -> Float[Array, 'B T H C']:
  """Returns the mean latent that each head reads from a layer."""
  dtype, v_dim, sizes = q.dtype, cfg.kv_lora_rank, {'sm_scale': cfg.sm_scale, 'backend': backend}
  q = store.match(q)
  if attention == 'sparse':
    keys, indices = keys_of_selected(store, span, selected, dtype, backend)
    return sparse_attention(q, keys, indices, v_dim=v_dim, **sizes)[0]
  indices = selected if attention == 'masked' else None
  keys = storage.read_layer(store, span).decode(dtype)[:, :, None]
  # The keys stand for the values, too: cutting the latents out would copy them all.
  start = jnp.zeros_like(end)
  return dense_attention(q, keys, keys, start, end, indices=indices, **sizes)[0][..., :v_dim]


def keys_of_selected(
    store: Store, span: Span, selected: Int[Array, 'B T K'], dtype: DTypeLike, backend: str
) -> tuple[Float[Array, 'B S P'], Int[Array, 'B T K']]:
  """Returns the keys that sparse attention gathers from, and which of them each query selected.

  The keys are the whole store where the op can read it as it is. Otherwise they are the layer where
  many rows are selected, and the selected rows alone where few are.
  """
  batch, n_queries, k = selected.shape
  whole = store.as_array(dtype)
  if whole is not None and not packs_all_keys(backend, n_queries, k, span[1]):
    return whole, storage.rows_of(selected, span)
  if n_queries * k >= span[1]:
    return storage.read_layer(store, span).decode(dtype), selected
  rows = storage.gather(store, selected, span).decode(dtype)
  slots = jnp.arange(n_queries * k, dtype=jnp.int32).reshape(n_queries, k)
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
) -> tuple[Float[Array, 'B T H C'], Int[Array, 'B T K']]:
  """Returns what `attend` and `select` return, from one op that may do both at one time."""
  keys = storage.read_layer(kv, span).decode(views.kv.dtype)
  index_keys = storage.read_layer(index_key, index_span).decode(views.index.q.dtype)
  return indexed_attention(
      kv.match(views.absorbed_q),
      keys,
      index_key.match(views.index.q),
      index_keys,
      views.index.weights,
      jnp.zeros_like(end),
      end,
      topk=cfg.index_topk,
      v_dim=cfg.kv_lora_rank,
      sm_scale=cfg.sm_scale,
      backend=backend,
  )
