# SPDX-License-Identifier: Apache-2.0
"""Texts that are written side by side, on the device. One leaves, and another takes its slot."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt
import numpy as np

from dsa_jax.inference.cache import Cache
from dsa_jax.inference.draw import draw
from dsa_jax.inference.programs import Reader, read


class Slots(NamedTuple):
  """What is known of the text in each slot."""

  cache: Cache
  logits: Float[Array, 'B W']  # Those of the next token.
  keys: Key[Array, 'B']  # The random state of each text.
  left: Int[Array, 'B']  # How many more tokens each text may get. 0: the slot is free.


class Written(NamedTuple):
  """What a step has written."""

  ids: Int[Array, 'B']
  counts: Bool[Array, 'B']  # Whether there is a text that goes on with its id.
  log_probs: Float[Array, 'B']  # Of the ids, by the model: before temperature, top-k and top-p.


def free_slots(cache: Cache, vocab_size: int) -> Slots:
  """Returns as many free slots as an empty cache has sequences."""
  n = len(cache.length)
  keys = jnp.tile(jax.random.key(0)[None], n)
  return Slots(cache, jnp.zeros((n, vocab_size), jnp.float32), keys, jnp.zeros(n, jnp.int32))


@functools.partial(jax.jit, donate_argnums=0)
def join(
    slots: Slots,
    slot: Int[Array, ''] | int,
    cache: Cache,
    logits: Float[Array, '1 W'],
    seed: UInt[Array, ''] | np.uint32,
    number: Int[Array, ''] | int,
    left: Int[Array, ''] | int,
) -> Slots:
  """Puts a text into a slot.

  Args:
    slots: All slots.
    slot: The number of the one that is free.
    cache: What was read of the text, alone.
    logits: Those of its next token.
    seed: Its random state depends on the seed and on `number`, and not on the slot.
    number: What tells the text from all others with this seed.
    left: How many tokens it may get.
  """
  key = jax.random.fold_in(jax.random.key(seed), number)
  own = Slots(cache, logits, key[None], jnp.asarray(left, jnp.int32)[None])
  put = lambda every, one: jax.lax.dynamic_update_index_in_dim(every, one[0], slot, 0)
  return jax.tree.map(put, slots, own)


@jax.jit
def copy_of(slots: Slots, slot: Int[Array, ''] | int) -> Cache:
  """Returns what the cache holds of one slot."""
  return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), slots.cache)


@functools.partial(jax.jit, static_argnames=('top_k', 'reader'), donate_argnames='slots')
def write(
    weights: list[Array],
    slots: Slots,
    kept: Bool[Array, 'B'],
    temperature: Float[Array, ''] | float,
    top_p: Float[Array, ''] | float,
    stop: Int[Array, 'N'],
    *,
    top_k: int,
    reader: Reader,
) -> tuple[Written, Slots]:
  """Draws the next token of every text, and reads it where the text goes on behind it.

  Args:
    weights: Those of `reader`.
    slots: All slots.
    kept: A text that is not kept leaves before anything is drawn.
    temperature: See `SampleConfig`, as for `top_p` and `top_k`.
    top_p: See there.
    stop: Ids that end a text.
    top_k: See there.
    reader: What reads.
  """
  position_keys = jax.vmap(jax.random.fold_in)(slots.keys, slots.cache.length)
  ids = draw(slots.logits, position_keys, temperature, top_k, top_p)
  goes_on = kept & jnp.all(ids[:, None] != stop, axis=1)
  counts = goes_on & (slots.left > 0)
  log_probs = jnp.take_along_axis(jax.nn.log_softmax(slots.logits), ids[:, None], axis=1)[:, 0]
  left = jnp.where(counts, slots.left - 1, 0)
  n_new = (left > 0).astype(jnp.int32)
  logits, cache = read(weights, slots.cache, ids[:, None], n_new, slots.logits, reader=reader)
  return Written(ids, counts, log_probs), Slots(cache, logits, slots.keys, left)
