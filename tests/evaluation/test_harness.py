# SPDX-License-Identifier: Apache-2.0
"""Likelihoods and continuations for lm-evaluation-harness, against the model's own logits."""

import copy
import dataclasses
import json
import shutil
import sys
import types

import jax
import laws
import numpy as np
import pytest
from saved_run import save_run

from dsa_jax import lm_eval as ours
from dsa_jax.config import ConfigError
from dsa_jax.data.text import VOCAB_SIZE
from dsa_jax.data.tokenizer import Bytes
from dsa_jax.evaluation.harness import Harness
from dsa_jax.nn.attention.types import Mode

CFG = dataclasses.replace(laws.CFG, vocab_size=VOCAB_SIZE, n_layers=1, n_dense_layers=1, max_seq_len=48)
PAIRS = [('the cat', ' sat'), ('', 'a'), ('x ', 'yz'), ('a long context of thirty letters', ' and more')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return save_run(tmp_path_factory.mktemp('run'), CFG)


@pytest.fixture(scope='module')
def harness(folder):
  return Harness(folder, batch_size=3)


@pytest.fixture(scope='module')
def logprobs():
  """Returns the log-probabilities of every next token of a text, by the definition."""
  model, mode = laws.model_of(laws.weights(CFG), CFG), Mode(attention='sparse', backend='xla')
  forward = jax.jit(lambda tokens, start, end: jax.nn.log_softmax(model(tokens, start, end, mode).logits[0]))

  def of(ids):
    tokens, position = np.zeros((1, 48), np.int32), np.arange(48, dtype=np.int32)[None]
    tokens[0, : len(ids)] = ids
    return np.asarray(forward(tokens, np.zeros_like(position), position + 1))[: len(ids)]

  return of


def test_bytes_of_another_vocabulary_are_refused_before_weights_are_read(folder, tmp_path):
  target = tmp_path / 'checkpoints' / 'sparse'
  shutil.copytree(folder, target)
  (tmp_path / 'config.json').write_text(json.dumps({'model': dataclasses.asdict(CFG) | {'vocab_size': 999}}))
  with pytest.raises(ConfigError, match='of another alphabet than a text in bytes'):
    Harness(target)  # Weights would be of another model.


def test_likelihoods(harness, logprobs):
  for (context, continuation), (got, is_likeliest) in zip(PAIRS, harness.likelihoods(PAIRS), strict=True):
    ids = Bytes().encode(context + continuation)
    n = len(ids) - len(Bytes().encode(context.rstrip()))
    of_next = logprobs(ids[:-1])[-n:]
    np.testing.assert_allclose(got, of_next[np.arange(n), ids[-n:]].sum(), rtol=1e-4)
    assert is_likeliest == (of_next.argmax(-1) == ids[-n:]).all()
  assert harness._mode.attention == 'sparse'


def test_the_likeliest_continuation_is_known_as_such(harness, logprobs):
  likeliest = lambda context: int(logprobs(Bytes().encode(context))[-1].argmax())
  contexts = (a + b for a in 'abcdefgh' for b in 'ijklmnop')
  context, best = next((c, chr(i)) for c in contexts if 33 <= (i := likeliest(c)) < 127)
  answers = harness.likelihoods([(context, best), (context, '~' if best != '~' else '!')])
  assert [is_likeliest for _, is_likeliest in answers] == [True, False]


def test_a_context_that_is_too_long_loses_its_beginning(harness, logprobs):
  context, continuation = 'abcdefgh' * 10, 'xy'
  ids = Bytes().encode(context + continuation)[-49:]
  want = logprobs(ids[:-1])[[-2, -1], ids[-2:]].sum()
  np.testing.assert_allclose(harness.likelihoods([(context, continuation)])[0][0], want, rtol=1e-4)


def test_rolling_scores_every_token_once(harness, logprobs):
  short, long = 'hello there', 'abcdefgh' * 9
  got = harness.rolling([short, long])
  ids = Bytes().encode(short)
  np.testing.assert_allclose(got[0], logprobs(ids)[np.arange(len(ids) - 1), ids[1:]].sum(), rtol=1e-4)
  ids = Bytes().encode(long)  # 73 ids: 48 targets, and then 24 more behind as much as can be read.
  first = logprobs(ids[:48])[np.arange(48), ids[1:49]].sum()
  second = logprobs(ids[-49:-1])[np.arange(24, 48), ids[-24:]].sum()
  np.testing.assert_allclose(got[1], first + second, rtol=1e-4)


def test_continuations_end_where_the_task_says(harness):
  ask = lambda **given: harness.continuations([('the cat', {'max_gen_toks': 20} | given)])[0]
  text = ask()
  assert text and text == harness._sampler('the cat', max_new_tokens=20)
  assert ask(until=[text[2:4]]) == text[: text.index(text[2:4])]
  assert ask(until=text[3]) == text[: text.index(text[3])]
  assert len(ask(max_gen_toks=5)) <= 5
  assert harness.continuations([('x' * 100, {'max_gen_toks': 500})])  # The end of the context counts.
  assert ask(until=['', text[3]]) == text[: text.index(text[3])]
  drawn = {'max_gen_toks': 20, 'do_sample': True, 'temperature': 2.0}
  assert len({*harness.continuations([('the cat', drawn)] * 2)}) == 2
  assert harness.continuations([('the cat', drawn | {'top_k': 1})] * 2) == [text] * 2


def test_a_context_is_never_cut_to_nothing(harness, monkeypatch):
  own, prompts = copy.copy(harness), []
  note = lambda prompt, config, until: prompts.append((len(prompt), config.max_new_tokens)) or ''
  monkeypatch.setattr(own, '_continue', note)
  own.continuations([('x' * 100, given) for given in ({}, {'max_gen_toks': 500}, {'max_gen_toks': 10})])
  assert prompts == [(24, 24), (24, 24), (38, 10)]
  own.continuations([('x', {'max_gen_toks': 40})])  # Both fit.
  assert prompts[-1][0] < 8 and prompts[-1][1] == 40


def test_texts_of_tokenizers_without_a_first_id(harness, monkeypatch):
  """What ends documents stands in front of a text that has nothing before it, and of no other."""

  class Bare(Bytes):
    stop = (65,)

    def encode(self, text):
      return [*text.encode()]

  bare = copy.copy(harness)
  bare.tokenizer, rows = Bare(), []
  monkeypatch.setattr(bare, '_score', lambda own: rows.extend(own) or [(0.0, True)] * len(own))
  bare.likelihoods([('ab', 'c'), ('', 'c')])
  bare.rolling(['abc'])
  assert [(bytes(row.ids), row.n_scored) for row in rows] == [(b'abc', 1), (b'Ac', 1), (b'Aabc', 3)]


def test_what_a_tokenizer_puts_behind_a_text_is_not_scored(harness, monkeypatch):
  class Ending(Bytes):
    def encode(self, text):
      return [*super().encode(text), 65]

    def encode_prompt(self, text):
      return super().encode(text)

  own = copy.copy(harness)
  own.tokenizer, rows = Ending(), []
  monkeypatch.setattr(own, '_score', lambda given: rows.extend(given) or [(0.0, True)] * len(given))
  own.likelihoods([('ab', 'c'), ('', 'c')])
  own.rolling(['abc'])
  assert [(row.ids[1:], row.n_scored) for row in rows] == [([*b'abc'], 1), ([*b'c'], 1), ([*b'abc'], 3)]


def test_other_attention_and_what_will_not_do(folder):
  dense = Harness(folder, attention='dense', max_length=32)
  assert dense._mode.attention == 'dense' and dense.max_length == 32
  for wrong, message in (
      ({'attention': 'dense', 'index_topk': 3}, 'would change nothing'),
      ({'max_length': 49}, 'max_length=49 must be within 2 and the 48'),
      ({'batch_size': 0}, 'batch_size=0'),
      ({'rule': 'best'}, "'best' must be one of"),
      ({'backend': 'best'}, "backend='best' must be one of"),
      ({'backend': 'tpu'}, 'its kernels run on a TPU'),
      ({'index_topk': 49}, 'index_topk=49'),
  ):
    with pytest.raises(ConfigError, match=message):
      Harness(folder, **wrong)


def test_within_the_harness(folder, tmp_path, monkeypatch):
  """A task from a local file, with no network."""
  pytest.importorskip('lm_eval')
  import lm_eval

  for name in 'HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE':
    monkeypatch.setenv(name, '1')
  lines = [{'question': 'the cat', 'choices': [' sat', ' ran'], 'answer': 0} for _ in range(4)]
  (tmp_path / 'task.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  task = {
      'task': 'local', 'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'test': str(tmp_path / 'task.jsonl')}},
      'test_split': 'test', 'output_type': 'multiple_choice', 'doc_to_text': '{{question}}',
      'doc_to_choice': '{{choices}}', 'doc_to_target': 'answer', 'metric_list': [{'metric': 'acc'}],
  }  # fmt: skip
  model = ours.register()(str(folder), attention='sparse')
  results = lm_eval.simple_evaluate(model=model, tasks=[task])
  assert results['results']['local']['acc,none'] in (0.0, 1.0)


def test_without_the_harness(monkeypatch):
  monkeypatch.setitem(sys.modules, 'lm_eval.api.model', None)
  with pytest.raises(ConfigError, match='needs lm-evaluation-harness: pip install lm_eval'):
    ours.register()


def test_what_the_harness_calls(folder, harness, monkeypatch):
  """Two names stand in for the harness, so this holds wherever it is not installed."""
  request = lambda *args: types.SimpleNamespace(args=args)
  registry = types.SimpleNamespace(register_model=lambda name: lambda kind: known.setdefault(name, kind))
  known, package = {}, types.ModuleType('lm_eval')
  package.__path__ = []
  modules = {
      'lm_eval': package, 'lm_eval.api': package, 'lm_eval.api.model': types.SimpleNamespace(LM=object),
      'lm_eval.api.registry': registry,
  }  # fmt: skip
  for name, module in modules.items():
    monkeypatch.setitem(sys.modules, name, module)
  assert ours.register() is known['dsa_jax']
  model = known['dsa_jax'](str(folder), batch_size='3', device=None, attention='sparse')
  assert model.loglikelihood([request(*pair) for pair in PAIRS]) == harness.likelihoods(PAIRS)
  assert model.loglikelihood_rolling([request('abc')]) == harness.rolling(['abc'])
  [text] = model.generate_until([request('the cat', {'max_gen_toks': 8, 'until': ['\n\n']})])
  assert harness.continuations([('the cat', {'max_gen_toks': 8})])[0].startswith(text)
  for wrong, message in (
      ({'batch_size': 'auto'}, "batch_size='auto' must be a number"),
      ({'pretrained': 'x'}, r"has no \['pretrained'\]; it has .*'checkpoint'"),
      ({'max_length': 'long'}, "max_length='long' must be a number"),
      ({'checkpoint': ''}, 'name the checkpoint'),
  ):
    with pytest.raises(ConfigError, match=message):
      known['dsa_jax'](**{'checkpoint': str(folder)} | wrong)
