# SPDX-License-Identifier: Apache-2.0
"""Drafts by the MTP layer change how many steps a text takes, and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.data.text import VOCAB_SIZE
from dsa_jax.inference.cache import init_cache
from dsa_jax.inference.drafts import no_drafts
from dsa_jax.inference.extend import extend, extend_mtp
from dsa_jax.inference.sampler import SampleConfig, Sampler
from dsa_jax.nn.attention.types import Mode

CFG = dataclasses.replace(laws.CFG, vocab_size=VOCAB_SIZE, max_seq_len=64, n_mtp_layers=1)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7], [1, 8, 2, 8, 1, 8] * 6, [5], [6, 6, 6]]
GREEDY = SampleConfig(max_new_tokens=20, stop=())
DRAWN = SampleConfig(max_new_tokens=15, temperature=1.5, seed=3, stop=())


def model_of(**changes):
  cfg = dataclasses.replace(CFG, **changes)
  return laws.model_of(laws.weights(cfg), cfg)


def foreseeing(model):
  """Makes each token follow from the one before it, so that the MTP layer guesses right often.

  Layers add next to nothing; what is left is a function of the last token alone.
  """
  small = lambda path, x: x * 0.02 if any(getattr(k, 'key', k) == 'wo' for k in path) else x
  return jax.tree_util.tree_map_with_path(small, model)


def compiled(sampler):
  list(sampler.complete(PROMPTS, GREEDY, slots=1))
  return sampler


@pytest.fixture(scope='module')
def model():
  return model_of()


@pytest.fixture(scope='module')
def plain(model):
  return compiled(Sampler(model))


@pytest.fixture(scope='module')
def drafting(model):
  return compiled(Sampler(model, drafts=True))


def by_prompt(completions):
  return sorted(completions, key=lambda x: (x.prompt, x.sample))


@pytest.mark.parametrize('n_slots', [pytest.param(1, marks=pytest.mark.nightly), 3])
@pytest.mark.parametrize('config', [GREEDY, DRAWN], ids=['greedy', 'drawn'])
def test_texts_are_those_without_drafts(plain, drafting, config, n_slots):
  want = by_prompt(plain.complete(PROMPTS, config, slots=n_slots))
  actual = by_prompt(drafting.complete(PROMPTS, config, slots=n_slots))
  assert [x.ids for x in actual] == [x.ids for x in want]
  for x, y in zip(actual, want):
    np.testing.assert_allclose(x.log_probs, y.log_probs, atol=1e-4)
    assert x.ended_by == y.ended_by == 'length'
    assert len(x.ids) / 2 <= x.steps <= len(x.ids) == y.steps


def test_the_mtp_layer_reads_on_as_in_one_pass(model):
  """Pieces of the text, through its own cache, give the hidden states of a whole pass."""
  tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, VOCAB_SIZE)
  behind = jnp.roll(tokens, -1, axis=1)
  end = jnp.broadcast_to(jnp.arange(1, 25, dtype=jnp.int32), (2, 24))
  mode = Mode(attention='sparse', backend='xla')
  forward = lambda t, b, e: model(t, jnp.zeros_like(e), e, mode, next_tokens=b).mtp_hidden
  whole = jax.jit(forward)(tokens, behind, end)
  sizes = dict(attention='sparse', backend='xla')
  read = jax.jit(functools.partial(extend, model, **sizes))
  read_mtp = jax.jit(functools.partial(extend_mtp, model, capacity=24, **sizes))
  cache = init_cache(CFG, 2, 24, fmt='float32')
  own, n = no_drafts(cache, CFG).cache, jnp.full(2, 8, jnp.int32)
  for first in 0, 8, 16:
    reading = read(cache, tokens[:, first : first + 8], n)
    cache = reading.cache
    hidden, own = read_mtp(own, reading.hidden, behind[:, first : first + 8], n)
    np.testing.assert_allclose(hidden, whole[:, first : first + 8], atol=1e-4)


def test_every_guess_is_what_a_whole_pass_of_the_mtp_layer_says():
  """So the number of steps is known beforehand. It is smaller than that of tokens."""
  model = foreseeing(model_of())
  want = by_prompt(Sampler(model).complete(PROMPTS, GREEDY, slots=2))
  actual = by_prompt(Sampler(model, drafts=True).complete(PROMPTS, GREEDY, slots=2))
  assert [x.ids for x in actual] == [x.ids for x in want]
  mode = Mode(attention='sparse', backend='xla')
  guess = jax.jit(lambda t, b, e: model(t, 0 * e, e, mode, next_tokens=b).mtp_logits.argmax(-1))
  for prompt, completion in zip(PROMPTS, actual):
    text = np.zeros(64, np.int32)
    written = prompt + completion.ids
    text[: len(written)] = written
    end = np.arange(1, 65, dtype=np.int32)[None]
    guesses = np.asarray(guess(text[None], np.roll(text, -1)[None], end))[0]
    at, steps = len(prompt), 0
    while at < len(written):
      is_right = at + 1 < len(written) and guesses[at - 1] == written[at + 1]
      at, steps = at + (2 if is_right else 1), steps + 1
    assert completion.steps == steps
  assert sum(x.steps for x in actual) < sum(x.steps for x in want)


def test_a_guess_that_ends_the_text(plain, drafting):
  for config in (GREEDY, DRAWN):
    for at in range(1, 8):
      ids = plain.generate(PROMPTS[:1], config)[0]
      stopping = dataclasses.replace(config, stop=(ids[at],))
      want = by_prompt(plain.complete(PROMPTS, stopping, slots=2))
      actual = by_prompt(drafting.complete(PROMPTS, stopping, slots=2))
      assert [(x.ids, x.ended_by) for x in actual] == [(x.ids, x.ended_by) for x in want]


def test_prompts_with_a_common_beginning(plain, drafting):
  shared = list(range(1, 37))
  prompts = [shared + [7], shared + [8, 9], shared, shared[:20] + [9, 9], [9, *shared]]
  actual = by_prompt(drafting.complete(prompts, GREEDY, slots=1))
  assert [x.ids for x in actual] == plain.generate(prompts, GREEDY)
  assert [x.reused_tokens for x in actual] == [0, 35, 35, 19, 0]


def test_without_an_mtp_layer():
  with pytest.raises(ConfigError, match='drafts=True needs an MTP layer.*n_mtp_layers=0'):
    Sampler(model_of(n_mtp_layers=0), drafts=True)
