# SPDX-License-Identifier: Apache-2.0
"""Reads on from where a cache ends: prefill in chunks, and decoding, are the same function."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from dsa_jax.inference import cache as caches
from dsa_jax.inference.cache import Cache
from dsa_jax.kernels import dense_attention, index_topk, indexed_attention, sparse_attention
from dsa_jax.nn.attention.mla import MLA
from dsa_jax.nn.attention.types import Attention
from dsa_jax.nn.transformer import Transformer, add, are_full, layers_of_stacks, with_every_indexer


class Reading(NamedTuple):
  """What came of new tokens."""

  hidden: Float[Array, 'B T D']  # After the final norm; `Transformer.logits` turns it into logits.
  cache: Cache
  selected: Int[Array, 'L B T K']  # Positions; [L, 0] where attention is dense.


def extend(
    model: Transformer,
    cache: Cache,
    tokens: Int[Array, 'B T'],
    n_new: Int[Array, 'B'],
    *,
    attention: Attention,
    backend: str,
) -> Reading:
  """Reads up to T new tokens of each sequence, and keeps them.

  Nothing depends on T, on the other sequences or on the capacity but the cost: the numbers are those
  of one pass over the whole text.

  Args:
    model: The model.
    cache: What was read before; donate it, it is updated in place.
    tokens: Token ids; of row b, the first `n_new[b]` count and the rest is padding.
    n_new: At most what the cache has room for; more is lost.
    attention: 'sparse'; 'masked', the same numbers at the cost of 'dense'; or 'dense'.
    backend: Of the kernels.
  """
  cfg = model.cfg
  capacity = jax.tree.leaves(cache.kv)[0].shape[1] // cfg.n_layers
  position = cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
  counted = (jnp.arange(tokens.shape[1]) < n_new[:, None]) & (position < capacity)
  end = jnp.where(counted, position + 1, 0)
  at = jnp.where(counted, position, -1)
  full = are_full(cfg, range(cfg.n_layers))
  many = tokens.shape[1] * cfg.index_topk >= capacity
  at_once = backend == 'tpu' and attention == 'sparse' and many and full.all()
  slot = np.maximum(np.cumsum(full) - 1, 0)  # Of each layer's index keys, its own or its owner's.

  def layer(carry, inputs):
    x, kv, index_key, selected = carry
    block, i, slot, is_full = inputs
    reader = _Reader(block.attn, capacity, i, slot, is_full, end, at, attention, at_once, backend)
    out, kv, index_key, selected = reader.read(block.attn_norm(x), kv, index_key, selected)
    x, _ = block.feed_forward(add(x, out), counted)
    return (x, kv, index_key, selected), selected

  x = model.embed[...].astype(cfg.dtype)[tokens]
  k = 0 if attention == 'dense' else cfg.index_topk
  carry = x, cache.kv, cache.index_key, jnp.full((*tokens.shape, k), -1, jnp.int32)
  selections = []
  for name, layers in layers_of_stacks(cfg).items():
    if blocks := getattr(model, name):
      ids = np.arange(layers.start, layers.stop)
      inputs = with_every_indexer(blocks, full[ids]), ids, slot[ids], full[ids]
      carry, selected = jax.lax.scan(layer, carry, inputs)
      selections.append(selected)
  x, kv, index_key, _ = carry
  length = cache.length + jnp.sum(counted, axis=1, dtype=jnp.int32)
  return Reading(model.norm(x), Cache(kv, index_key, length), jnp.concatenate(selections))


class _Reader(NamedTuple):
  """One layer's attention over the cache."""

  attn: MLA
  capacity: int
  layer: Int[Array, '']
  slot: Int[Array, '']
  is_full: Bool[Array, '']
  end: Int[Array, 'B T']
  at: Int[Array, 'B T']
  attention: str
  at_once: bool  # Whether many queries select and attend in one op, each layer for itself.
  backend: str

  def read(self, x: Float[Array, 'B T D'], kv: Any, index_key: Any, selected: Any):
    """Attends from the normed `x`; returns the output and what is handed on."""
    start = jnp.zeros_like(self.end)
    seen = self.attn.views(x, start, self.end)
    kv = caches.write(kv, caches.encode(kv, seen.kv, self._v_dim), self._rows(self.at, self.layer))
    if self.attn.indexer is not None:
      new = caches.encode(index_key, seen.index.k, self._v_dim)
      at = jnp.where(self.is_full, self._rows(self.at, self.slot), -1)
      index_key = caches.write(index_key, new, at)
      if self.attention != 'dense' and not self.at_once:
        own = lambda: self._select(seen.index, index_key, start)
        selected = jax.lax.cond(self.is_full, own, lambda: selected)
    how = {'sm_scale': self.attn.cfg.sm_scale, 'backend': self.backend}
    if self.at_once:
      index_q, index_k = self._index_of_layer(seen.index, index_key)
      index = index_q, index_k, seen.index.weights, start, self.end
      keys = self._keys(kv, x.dtype)
      q = caches.widen(seen.absorbed_q, keys.shape[-1])
      how |= {'topk': self.attn.cfg.index_topk, 'v_dim': self._v_dim}
      out, selected = indexed_attention(q, keys, *index, **how)
    elif self.attention == 'sparse':
      keys, indices = self._chosen(kv, selected, x.dtype)
      q = caches.widen(seen.absorbed_q, keys.shape[-1])
      out, _ = sparse_attention(q, keys, indices, v_dim=self._v_dim, **how)
    else:
      indices = selected if self.attention == 'masked' else None
      keys = self._keys(kv, x.dtype)[:, :, None]
      q = caches.widen(seen.absorbed_q, keys.shape[-1])
      out, _ = dense_attention(  # Keys for values, too: cutting the latents out would copy them all.
          q, keys, keys, start, self.end, indices=indices, **how
      )
      out = out[..., : self._v_dim]
    return self.attn.from_latents(out), kv, index_key, selected

  def _select(self, index, index_key, start):
    how = {'topk': self.attn.cfg.index_topk, 'backend': self.backend}
    if isinstance(index_key, jax.Array) and index_key.dtype == index.q.dtype:
      q, keys = index.q, index_key
      how['span'] = self.slot * self.capacity, self.capacity  # Read where they are.
    else:
      q, keys = self._index_of_layer(index, index_key)
    return index_topk(q, keys, index.weights, start, self.end, **how)

  def _index_of_layer(self, index, index_key):
    """Index queries, and this layer's keys, as the ops read them."""
    keys = caches.decode(caches.read_layer(index_key, self.slot, self.capacity), index.q.dtype)
    q = caches.rotate(index.q) if isinstance(index_key, caches.QuantizedKey) else index.q
    return q, keys

  def _chosen(self, kv: Any, selected: Int[Array, 'B T K'], dtype: Any):
    """What sparse attention gathers from, and where: nothing is copied that it can read as it is."""
    batch, n_rows, k = selected.shape
    many = n_rows * k >= self.capacity
    packs_all = many and self.backend == 'tpu'
    if isinstance(kv, jax.Array) and kv.dtype == dtype and not packs_all:
      return kv, self._rows(selected, self.layer)
    if many:
      return self._keys(kv, dtype), selected
    rows = caches.decode(caches.gather(kv, self._rows(selected, self.layer)), dtype)
    slots = jnp.arange(n_rows * k, dtype=jnp.int32).reshape(n_rows, k)
    return rows.reshape(batch, n_rows * k, -1), jnp.where(selected >= 0, slots, -1)

  def _keys(self, kv: Any, dtype: Any) -> Float[Array, 'B S E']:
    """All that this layer keeps."""
    return caches.decode(caches.read_layer(kv, self.layer, self.capacity), dtype)

  def _rows(self, positions, layer):
    return jnp.where(positions >= 0, layer * self.capacity + positions, -1)

  @property
  def _v_dim(self) -> int:
    return self.attn.cfg.kv_lora_rank
