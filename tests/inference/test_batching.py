# SPDX-License-Identifier: Apache-2.0
"""Many texts in a running batch: each is what it would be alone."""

import dataclasses

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders

from dsa_jax.config import ConfigError
from dsa_jax.data.text import VOCAB_SIZE
from dsa_jax.data.tokenizer import Bytes, Pretrained
from dsa_jax.inference import slots
from dsa_jax.inference.batching import FEWEST, Text, chunk_width, n_common
from dsa_jax.inference.sampler import SampleConfig, Sampler
from dsa_jax.nn.attention.types import Mode

CFG = dataclasses.replace(laws.CFG, vocab_size=VOCAB_SIZE, max_seq_len=64)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7], [1, 8, 2, 8, 1, 8] * 6, [5], [6, 6, 6]]
GREEDY = SampleConfig(max_new_tokens=12)
DRAWN = SampleConfig(max_new_tokens=9, temperature=1.5, seed=3)


@pytest.fixture(scope='module')
def sampler():
  sampler = Sampler(laws.model_of(laws.weights(CFG), CFG))
  list(sampler.complete(PROMPTS, GREEDY, slots=1))  # Compiles.
  return sampler


def ids_by_prompt(completions) -> list[list[int]]:
  return [x.ids for x in sorted(completions, key=lambda x: (x.prompt, x.sample))]


@pytest.mark.parametrize('n_slots', [2, *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 8))])
@pytest.mark.parametrize('config', [GREEDY, DRAWN], ids=['greedy', 'drawn'])
def test_is_what_each_text_is_in_a_batch_of_its_own(sampler, config, n_slots):
  completions = list(sampler.complete(PROMPTS, config, slots=n_slots))
  assert ids_by_prompt(completions) == sampler.generate(PROMPTS, config)
  assert {x.ended_by for x in completions} == {'length'}
  assert [x.prompt_tokens for x in sorted(completions)] == [len(prompt) for prompt in PROMPTS]


def test_samples_differ_and_do_not_feel_who_is_missing(sampler):
  every = list(sampler.complete(PROMPTS, DRAWN, samples=3, slots=4))
  drawn = {(x.prompt, x.sample): x.ids for x in every}
  assert len(drawn) == 3 * len(PROMPTS) and len(set(map(tuple, drawn.values()))) > len(PROMPTS)
  done = {at for at in drawn if sum(at) % 2}
  rest = sampler.complete(PROMPTS, DRAWN, samples=3, slots=2, without=done)
  assert {(x.prompt, x.sample): x.ids for x in rest} == {at: drawn[at] for at in drawn.keys() - done}


def test_more_samples_are_those_that_they_would_have_been_at_once(sampler):
  prompts = [PROMPTS[1]] * 3  # Equal ones, so that equal draws would show.
  drawn = lambda n: {(x.prompt, x.sample): x.ids for x in sampler.complete(prompts, DRAWN, samples=n)}
  few, more = drawn(1), drawn(3)
  assert {at: more[at] for at in few} == few
  assert len(set(map(tuple, more.values()))) == 9


def test_texts_end_by_an_id(sampler):
  [[*ids], *_] = sampler.generate(PROMPTS, GREEDY)
  config = dataclasses.replace(GREEDY, stop=(ids[4],))
  completions = list(sampler.complete(PROMPTS, config, slots=2))
  assert ids_by_prompt(completions) == sampler.generate(PROMPTS, config)
  first = next(x for x in completions if x.prompt == 0)
  assert first.ended_by == 'stop' and first.ids == ids[: ids.index(ids[4])]


def test_texts_end_by_an_id_of_the_tokenizer_unless_others_are_named(sampler, monkeypatch):
  [[*ids], *_] = sampler.generate(PROMPTS, GREEDY)
  ends = Bytes()
  ends.stop = (ids[4],)
  monkeypatch.setattr(sampler, 'tokenizer', ends)
  [cut] = ids_by_prompt(sampler.complete(PROMPTS[:1], GREEDY))  # It names no ids.
  assert cut == ids[: ids.index(ids[4])]
  assert ids_by_prompt(sampler.complete(PROMPTS[:1], dataclasses.replace(GREEDY, stop=()))) == [ids]


def test_texts_end_by_a_text_and_the_next_one_is_whole(sampler):
  """The step after the one that ends a text has begun by then; its id must go nowhere."""
  text = sampler.tokenizer
  whole = list(sampler.complete(PROMPTS, GREEDY, slots=2))
  shown = {x.prompt: x.text for x in whole}
  assert len(shown[0]) > 3
  stop = shown[0][2:4]
  config = dataclasses.replace(GREEDY, stop_texts=(stop, 'never'))
  completions = {x.prompt: x for x in sampler.complete(PROMPTS, config, slots=1)}
  assert completions[0].text == shown[0][: shown[0].index(stop)]
  assert completions[0].ended_by == 'stop' and len(completions[0].ids) < 12
  assert ''.join(text.stream(completions[0].ids)).startswith(completions[0].text + stop)
  for i, completion in completions.items():
    assert completion.text == shown[i].partition(stop)[0]


@pytest.mark.parametrize('stop, want', [(' b', ''), ('\n', ' b'), ('c', ' b\n')])
def test_a_stop_text_may_begin_a_text_or_be_the_last_of_it(tmp_path, stop, want):
  """A row of bytes is text only when it has ended."""
  words = {word: i for i, word in enumerate(['?', '▁a', '▁b', '<0x0A>'])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, '?'))
  space, fallback = decoders.Replace('▁', ' '), decoders.ByteFallback()
  tokenizer.decoder = decoders.Sequence([space, fallback, decoders.Fuse(), decoders.Strip(' ', 1, 0)])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  config = SampleConfig(max_new_tokens=2, stop_texts=(stop,))
  text = Text(0, 0, [1], Pretrained(tmp_path / 'tokenizer.json'), config)
  for i in 2, 3:
    if not text.ended_by:
      text.add_step(np.array([i]), np.array([True]), np.zeros(1), ends=False)
  completion = text.completion()
  assert completion.text == want
  assert completion.ended_by == ('length' if stop == 'c' else 'stop')


def test_log_probabilities_are_those_of_a_whole_pass(sampler):
  model = laws.model_of(laws.weights(CFG), CFG)
  mode = Mode(attention='sparse', backend='xla')
  for completion in sampler.complete(PROMPTS[:2], DRAWN, slots=2):
    prompt = PROMPTS[completion.prompt]
    tokens = np.array([prompt + completion.ids], np.int32)
    end = np.arange(1, tokens.shape[1] + 1, dtype=np.int32)[None]
    logits = jax.jit(lambda t, e: model(t, jnp.zeros_like(e), e, mode).logits)(tokens, end)
    log_probs = jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1])
    want = log_probs[np.arange(len(completion.ids)), np.array(completion.ids)]
    np.testing.assert_allclose(completion.log_probs, want, atol=1e-4)


def test_what_prompts_have_in_common_is_read_once(sampler):
  shared = list(range(1, 41))
  prompts = [shared + [7], shared + [8, 9], shared, shared[:20] + [9, 9], [9, *shared]]
  fresh = sampler.generate(prompts, GREEDY)
  completions = list(sampler.complete(prompts, GREEDY, slots=1))
  assert ids_by_prompt(completions) == fresh
  assert [x.reused_tokens for x in sorted(completions)] == [0, 40, 39, 20, 0]
  turned = list(sampler.complete([prompts[0], [5], prompts[1]], GREEDY, slots=3))
  assert ids_by_prompt(turned) == [fresh[0], *sampler.generate([[5]], GREEDY), fresh[1]]
  assert sorted(turned)[2].reused_tokens == 40  # From the slot of the first.


def test_nothing_compiles_when_texts_join_and_leave(sampler):
  lengths = 3, 9, 17, 30, 1, 12, 25
  texts = [[1 + i, *range(n)] for i, n in enumerate(lengths)]
  list(sampler.complete(texts[:4], GREEDY, slots=3))
  n_programs = lambda: (slots.write._cache_size(), slots.join._cache_size())
  before = n_programs()
  assert len(list(sampler.complete(texts, DRAWN, slots=3))) == len(texts)
  assert n_programs() == before


@pytest.mark.parametrize(
    'prompts, options, message',
    [
        ([[1], []], {}, 'prompt 1 is empty'),
        ([[1], [1] * 60], {}, r'prompt 1 has 60 tokens and 12 are to follow.*64'),
        ([[1], [999]], {}, 'prompt 1 holds id 999'),
        ([[1]], dict(slots=0), r'slots=0 must be at least 1'),
        ([[1]], dict(samples=0), r'samples=0 and slots=8 must be at least 1'),
    ],
)
def test_errors_come_before_anything_is_read(sampler, prompts, options, message):
  with pytest.raises(ConfigError, match=message):
    sampler.complete(prompts, GREEDY, **options)


def test_stop_texts_end_texts_and_not_ids(sampler):
  config = dataclasses.replace(GREEDY, stop_texts=('x',))
  prefix = sampler.read([[1, 2]], 12)
  for misuse in (lambda: sampler.generate([[1]], config), lambda: sampler.steps(prefix, config)):
    with pytest.raises(ConfigError, match=r"stop_texts=\('x',\) would change nothing"):
      misuse()


def test_no_prompts(sampler):
  assert list(sampler.complete([], GREEDY)) == []


def test_chunks_have_few_widths():
  assert {chunk_width(n, 512) for n in range(1, 2000)} == {32, 128, 512}
  assert {chunk_width(n, 4) for n in range(1, 20)} == {4} and FEWEST == 32
  assert n_common([1, 2, 3], [1, 2, 4]) == 2 and n_common([1], [1, 2]) == 1 and n_common([], [1]) == 0
