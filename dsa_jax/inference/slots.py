# SPDX-License-Identifier: Apache-2.0
"""Texts that are written side by side, on the device. One leaves, and another takes its slot."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key, UInt
import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.inference.cache import Cache, shapes_of
from dsa_jax.inference.drafts import Drafts, guess_next, no_drafts
from dsa_jax.inference.draw import draw
from dsa_jax.inference.programs import Reader, agreed, logits_of, of_texts, read, read_hidden
from dsa_jax.inference.shares import Shares, make_texts
from dsa_jax.inference.storage import as_bits, from_bits
from dsa_jax.parallel import collectives


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


def check_logits(log_prob: float, prompt: int):
  """Raises a ConfigError if the logits of a prompt's text are not finite, so that nothing is drawn."""
  if np.isnan(log_prob):
    raise not_finite(prompt)


def not_finite(prompt: int, n_others: int = 0) -> ConfigError:
  """Returns the error that says so of a prompt, and maybe of others."""
  others = f', nor are those of {n_others} other texts' if n_others else ''
  return ConfigError(
      f'the logits behind prompt {prompt} are not finite{others}, so no token can be drawn: weights are '
      'NaN or infinite, or numbers overflow. Look at the checkpoint, or load it in a wider dtype.'
  )


def free_slots(
    cache: Cache, cfg: ModelConfig, *, drafts: bool, shares: Shares | None = None
) -> Slots:
  """Returns as many free slots as an empty cache has sequences."""
  n = len(cache.length)
  return Slots(cache, *make_texts(_nothing, cfg, shapes_of(cache), drafts, n_texts=n, shares=shares))


def _nothing(cfg: ModelConfig, cache: Cache, drafts: bool):
  """Returns what free slots have beside their cache."""
  n = len(cache.length)
  logits, keys = jnp.zeros((n, cfg.vocab_size), jnp.float32), jnp.tile(jax.random.key(0)[None], n)
  return logits, keys, jnp.zeros(n, jnp.int32), no_drafts(cache, cfg) if drafts else None


def filled_slots(
    cache: Cache,
    logits: Float[Array, 'B W'],
    seed: np.uint32,
    left: int,
    *,
    shares: Shares | None = None,
) -> Slots:
  """Returns slots of texts that have been read together; text i is the first of prompt i.

  `write` takes the arrays for its own.
  """
  n = len(cache.length)
  numbers = np.uint32(seed), np.uint32(left)
  return Slots(cache, logits, *make_texts(_begun, n, n_texts=n, shares=shares, numbers=numbers), None)


def key_of(seed, prompt, sample) -> Key[Array, '']:
  """Returns the random state of a text: it depends on these alone, whoever else is written."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), sample)


@functools.partial(jax.jit, static_argnames='n')
def _begun(n: int, seed, left):
  """Returns the random states of texts, and how many tokens each may get."""
  keys = jax.vmap(key_of, (None, 0, None))(seed, jnp.arange(n), 0)
  return keys, jnp.full(n, left, jnp.int32)


@functools.partial(jax.jit, static_argnames='shares', donate_argnums=0)
def join(
    slots: Slots,
    slot: Int[Array, ''] | int,
    cache: Cache,
    drafts: Drafts | None,
    logits: Float[Array, '1 W'],
    seed: UInt[Array, ''] | np.uint32,
    prompt: Int[Array, ''] | int,
    sample: Int[Array, ''] | int,
    left: Int[Array, ''] | int,
    *,
    shares: Shares | None = None,
) -> Slots:
  """Puts a text into a slot.

  Args:
    slots: All slots.
    slot: The number of the one that is free.
    cache: What was read of the text, alone.
    drafts: What the MTP layer has read of it, if there are drafts.
    logits: Those of its next token.
    seed: Its random state depends on the seed, its prompt and its sample, and not on the slot.
    prompt: The number of its prompt.
    sample: Its number among the texts of this prompt.
    left: How many tokens it may get.
    shares: What the devices of a mesh have of the slots, and of the text.
  """
  key = key_of(seed, prompt, sample)
  own = Slots(cache, logits, key[None], jnp.asarray(left, jnp.int32)[None], drafts)
  put = lambda every, one: jax.lax.dynamic_update_index_in_dim(every, one[0], slot, 0)
  if shares is None:
    return jax.tree.map(put, slots, own)
  axes = shares.sequences(len(slots.left))

  def put_here(every, one, slot):
    place, is_here = _place(every, slot, axes)
    old = jax.lax.dynamic_index_in_dim(every, place, 0)
    return jax.lax.dynamic_update_slice_in_dim(every, jnp.where(is_here, one, old), place, 0)

  specs, one = shares.specs(slots, len(slots.left)), shares.specs(own, 1)
  run = lambda slots, own, slot: jax.tree.map(lambda x, y: put_here(x, y, slot), slots, own)
  return shares.run(run, (specs, one, P()), specs)(slots, own, jnp.asarray(slot))


@functools.partial(jax.jit, static_argnames='shares')
def copy_of(
    slots: Slots, slot: Int[Array, ''] | int, *, shares: Shares | None = None
) -> tuple[Cache, Drafts | None]:
  """Returns what the caches hold of one slot."""
  caches, cut = (slots.cache, slots.drafts), jax.lax.dynamic_slice_in_dim
  if shares is None:
    return jax.tree.map(lambda x: cut(x, slot, 1), caches)
  n = len(slots.left)
  axes = shares.sequences(n)

  def copy(every, slot):
    place, is_here = _place(every, slot, axes)
    bits = as_bits(cut(every, place, 1))
    return from_bits(collectives.psum(jnp.where(is_here, bits, 0), *axes), every.dtype)

  run = lambda caches, slot: jax.tree.map(lambda x: copy(x, slot), caches)
  in_specs = shares.specs(caches, n), P()
  return shares.run(run, in_specs, shares.specs(caches, 1))(caches, jnp.asarray(slot))


def _place(every, slot, axes):
  """Returns the place of a slot among those of this device, and whether it is one of them."""
  place = slot - collectives.axis_index(*axes) * len(every)
  return jnp.clip(place, 0, len(every) - 1), (place >= 0) & (place < len(every))


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
  args = slots, kept, temperature, top_p, stop
  if (shares := reader.shares) is None:
    return _write(weights, *args, top_k=top_k, reader=reader)
  n = len(kept)
  reader, axes = of_texts(reader, n), shares.sequences(n)

  def run(weights, *args):
    written, slots = _write(weights, *args, top_k=top_k, reader=reader)
    return jax.tree.map(lambda x: collectives.all_gather(x, *axes, dim=0), written), slots

  specs = shares.specs((slots, kept), n)
  in_specs = list(shares.weights), *specs, P(), P(), P()
  return shares.run(run, in_specs, (P(), specs[0]))(weights, *args)


def _write(weights, slots, kept, temperature, top_p, stop, *, top_k: int, reader: Reader):

  def draw_at(position, logits):
    keys = jax.vmap(jax.random.fold_in)(slots.keys, position)
    ids = agreed(draw(logits, keys, temperature, top_k, top_p), reader)
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
