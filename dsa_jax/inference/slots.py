# SPDX-License-Identifier: Apache-2.0
"""Texts that are written side by side, on the device. One leaves, and another takes its slot."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int, Key, UInt
import numpy as np

from dsa_jax.config import ModelConfig
from dsa_jax.inference.cache import Cache
from dsa_jax.inference.drafts import Drafts, guess_next, no_drafts
from dsa_jax.inference.draw import draw
from dsa_jax.inference.programs import Reader, logits_of, read, read_hidden


class Slots(NamedTuple):
  """What is known of the text in each slot."""

  cache: Cache
  logits: Float[Array, 'B W']  # Those of the next token.
  keys: Key[Array, 'B']  # The random state of each text.
  left: Int[Array, 'B']  # How many more tokens each text may get. 0: the slot is free.
  drafts: Drafts | None  # None: no token is guessed.


class Written(NamedTuple):
  """What a step has written of each text: one token, or two with drafts."""

  ids: Int[Array, 'B N']
  counts: Bool[Array, 'B N']  # Whether there is a text that goes on with the id.
  log_probs: Float[Array, 'B N']  # Of the ids, by the model: before temperature, top-k and top-p.
  ends: Bool[Array, 'B']  # Whether an id that ends a text was drawn.


def free_slots(cache: Cache, cfg: ModelConfig, *, drafts: bool) -> Slots:
  """Returns as many free slots as an empty cache has sequences."""
  n = len(cache.length)
  return Slots(
      cache=cache,
      logits=jnp.zeros((n, cfg.vocab_size), jnp.float32),
      keys=jnp.tile(jax.random.key(0)[None], n),
      left=jnp.zeros(n, jnp.int32),
      drafts=no_drafts(cache, cfg) if drafts else None,
  )


def filled_slots(
    cache: Cache, logits: Float[Array, 'B W'], seed: UInt[Array, ''] | np.uint32, left: int
) -> Slots:
  """Returns slots of texts that have been read together; text i is the one of this number.

  `write` takes the arrays for its own.
  """
  n = len(cache.length)
  return Slots(cache, logits, _keys_of(seed, n), jnp.full(n, left, jnp.int32), None)


@functools.partial(jax.jit, static_argnames='n')
def _keys_of(seed, n):
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(n))


@functools.partial(jax.jit, donate_argnums=0)
def join(
    slots: Slots,
    slot: Int[Array, ''] | int,
    cache: Cache,
    drafts: Drafts | None,
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
    drafts: What the MTP layer has read of it, if there are drafts.
    logits: Those of its next token.
    seed: Its random state depends on the seed and on `number`, and not on the slot.
    number: What tells the text from all others with this seed.
    left: How many tokens it may get.
  """
  key = jax.random.fold_in(jax.random.key(seed), number)
  own = Slots(cache, logits, key[None], jnp.asarray(left, jnp.int32)[None], drafts)
  put = lambda every, one: jax.lax.dynamic_update_index_in_dim(every, one[0], slot, 0)
  return jax.tree.map(put, slots, own)


@jax.jit
def copy_of(slots: Slots, slot: Int[Array, ''] | int) -> tuple[Cache, Drafts | None]:
  """Returns what the caches hold of one slot."""
  cut = lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1)
  return jax.tree.map(cut, (slots.cache, slots.drafts))


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

  With drafts, the token behind it is guessed and read, too. It counts if it is what is then drawn.

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

  def draw_at(position, logits):
    keys = jax.vmap(jax.random.fold_in)(slots.keys, position)
    ids = draw(logits, keys, temperature, top_k, top_p)
    log_probs = jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0] - logsumexp(logits, axis=1)
    return ids, jnp.any(ids[:, None] == stop, axis=1), log_probs

  ids, ends, log_probs = draw_at(slots.cache.length, slots.logits)
  counts = kept & ~ends & (slots.left > 0)
  left = jnp.where(counts, slots.left - 1, 0)
  slots = slots._replace(left=left)
  if slots.drafts is None:
    n_new = (left > 0).astype(jnp.int32)
    logits, cache = read(weights, slots.cache, ids[:, None], n_new, slots.logits, reader=reader)
    written = Written(ids[:, None], counts[:, None], log_probs[:, None], ends)
    return written, slots._replace(cache=cache, logits=logits)
  *second, ends_later, slots = _read_with_guess(weights, slots, ids, draw_at, reader)
  pairs = [jnp.stack(pair, axis=1) for pair in zip((ids, counts, log_probs), second)]
  return Written(*pairs, ends | ends_later), slots


def _read_with_guess(weights, slots, ids, draw_at, reader):
  """Reads a token of each text, and a guess of the next one.

  Returns:
    The guess, whether it counts, its log-probability, whether it ends the text, and the slots.
  """
  model, _ = jax.tree.unflatten(reader.structure, weights)
  goes_on, before, drafts = slots.left > 0, slots.cache.length, slots.drafts
  capacity = slots.cache.capacity(model.cfg)
  guess, own = guess_next(model, drafts, ids, goes_on, capacity=capacity, reader=reader)
  both = jnp.stack([ids, guess], axis=1)
  _, reading = read_hidden(weights, slots.cache, both, jnp.where(goes_on, 2, 0), reader=reader)
  logits = logits_of(model, reading.hidden, reader)
  drawn, ends, log_probs = draw_at(before + 1, logits[:, 0])
  right = goes_on & (drawn == guess)
  ends &= right
  logits = jnp.where(right[:, None], logits[:, 1], logits[:, 0])
  return guess, right & ~ends, log_probs, ends, slots._replace(
      cache=reading.cache._replace(length=before + jnp.where(goes_on, 1 + right, 0)),
      logits=jnp.where(goes_on[:, None], logits, slots.logits),
      left=jnp.where(right, jnp.where(ends, 0, slots.left - 1), slots.left),
      drafts=Drafts(own, reading.hidden, guess, jnp.where(right, 2, 1)),
  )
