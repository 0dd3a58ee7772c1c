# SPDX-License-Identifier: Apache-2.0
"""Drafts: the MTP layer guesses the token behind the next one, so that a step may write two.

A guess counts if it is what the model itself then draws at that position. A text is therefore what it
would be without drafts, to the token, whether tokens are drawn or the likeliest are taken.

Source:
  DeepSeek-V3 report, section 5.4.3, which decodes with one draft of the same layer. That a guess may
  stand for a distribution that is certain of it: Leviathan et al. 2023, arXiv:2211.17192.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsa_jax.config import ModelConfig
from dsa_jax.inference.cache import Cache
from dsa_jax.inference.extend import extend_mtp
from dsa_jax.inference.programs import Reader, agreed, logits_of, of_texts, read_hidden
from dsa_jax.nn.transformer import Transformer


class Drafts(NamedTuple):
  """What the MTP layer has read of each text, and what it is to read when the next token is known."""

  cache: Cache  # The rows of its one layer.
  hidden: Float[Array, 'B 2 D']  # The final hidden states of the tokens that wait.
  guess: Int[Array, 'B']  # The token behind the first of them, if two wait.
  waiting: Int[Array, 'B']  # How many tokens wait: 1, or 2 after a guess that counted.


def no_drafts(cache: Cache, cfg: ModelConfig) -> Drafts:
  """Returns the drafts of texts of which nothing was read, beside their cache."""
  capacity, n = cache.capacity(cfg), len(cache.length)
  one_layer = lambda x: jnp.zeros((n, capacity, x.shape[2]), x.dtype)
  kv, index_key = (jax.tree.map(one_layer, store) for store in (cache.kv, cache.index_key))
  own = Cache(kv, index_key, jnp.zeros(n, jnp.int32))
  hidden = jnp.zeros((n, 2, cfg.dim), cfg.dtype)
  return Drafts(own, hidden, jnp.zeros(n, jnp.int32), jnp.ones(n, jnp.int32))


def guess_next(
    model: Transformer,
    drafts: Drafts,
    tokens: Int[Array, 'B'],
    goes_on: Bool[Array, 'B'],
    *,
    capacity: int,
    reader: Reader,
) -> tuple[Int[Array, 'B'], Cache]:
  """Reads the tokens that wait, now that the next ones are known.

  Returns:
    The likeliest tokens behind the next ones, and the cache of the MTP layer.
  """
  two = drafts.waiting == 2
  behind = jnp.stack([jnp.where(two, drafts.guess, tokens), tokens], axis=1)
  n_new = jnp.where(goes_on, drafts.waiting, 0)
  hidden, cache = _read(model, drafts.cache, drafts.hidden, behind, n_new, capacity, reader)
  last = jnp.take_along_axis(hidden, (drafts.waiting - 1)[:, None, None], axis=1)
  guess = jnp.argmax(logits_of(model, last, reader)[:, 0], axis=-1).astype(jnp.int32)
  return agreed(guess, reader), cache


@functools.partial(
    jax.jit, static_argnames=('reader', 'visible'), donate_argnames=('cache', 'drafts')
)
def read_chunk_with_drafts(
    weights: list[Array],
    cache: Cache,
    drafts: Drafts,
    tokens: Int[Array, 'B T'],
    behind: Int[Array, 'B T'],
    n_new: Int[Array, 'B'],
    n_known: Int[Array, 'B'],
    *,
    reader: Reader,
    visible: int,
) -> tuple[Float[Array, 'B W'], Cache, Drafts]:
  """Reads a chunk of prompts, at least one token of each.

  Args:
    weights: Those of `reader`.
    cache: What was read before.
    drafts: What the MTP layer has read of as many tokens.
    tokens: The tokens.
    behind: The tokens behind them.
    n_new: How many tokens of each row count.
    n_known: Of how many of them the token behind is known; the last of a prompt waits.
    reader: What reads.
    visible: See `extend`.

  Returns:
    The logits behind the last token, the cache and the drafts.
  """
  args = cache, drafts, tokens, behind, n_new, n_known
  if (shares := reader.shares) is None:
    return _read_chunk(weights, *args, reader=reader, visible=visible)
  run = functools.partial(_read_chunk, reader=of_texts(reader, len(tokens)), visible=visible)
  specs = shares.specs(args, len(tokens))
  out_specs = shares.specs(tokens, len(tokens)), *specs[:2]
  return shares.run(run, (list(shares.weights), *specs), out_specs)(weights, *args)


def _read_chunk(weights, cache, drafts, tokens, behind, n_new, n_known, *, reader, visible):
  model, reading = read_hidden(weights, cache, tokens, n_new, reader=reader, visible=visible)
  capacity = cache.capacity(model.cfg)
  _, own = _read(model, drafts.cache, reading.hidden, behind, n_known, capacity, reader)
  last = jnp.take_along_axis(reading.hidden, (n_new - 1)[:, None, None], axis=1)
  hidden = jnp.concatenate([last, jnp.zeros_like(last)], axis=1)
  drafts = Drafts(own, hidden, drafts.guess, jnp.ones_like(drafts.waiting))
  return logits_of(model, last, reader)[:, 0], reading.cache, drafts


def _read(model, cache, hidden, behind, n_new, capacity, reader):
  return extend_mtp(
      model, cache, hidden, behind, n_new,
      capacity=capacity, attention=reader.attention, backend=reader.backend, rule=reader.rule,
      shared=reader.shared,
  )  # fmt: skip
