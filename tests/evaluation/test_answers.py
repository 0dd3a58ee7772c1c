# SPDX-License-Identifier: Apache-2.0
"""Arms answer tasks; what they have answered is kept, and scored by kind, length and depth."""

import dataclasses
import datetime
import json
import re

import laws
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.data.sources import DataConfig
from dsa_jax.data.text import VOCAB_SIZE
from dsa_jax.data.tokenizer import Bytes
from dsa_jax.evaluation import answers, page
from dsa_jax.evaluation.answers import answer_quizzes, collect_answers, make_quizzes
from dsa_jax.evaluation.settings import Settings
from dsa_jax.evaluation.subject import Subject
from dsa_jax.inference.load import StoredModel
from dsa_jax.inference.sampler import Sampler
from dsa_jax.reporting.progress import StepProgress

CFG = dataclasses.replace(
    laws.CFG, vocab_size=VOCAB_SIZE, n_layers=1, n_dense_layers=1, max_seq_len=2048, index_topk=900
)


class Reader(Sampler):
  """In place of a sampler: it reads codes as well as they can be read, or in the first half alone."""

  def __init__(self, share):
    self.tokenizer, self.share, self.calls = Bytes(), share, []

  def generate(self, prompts, config):
    self.calls.append((len(prompts), config.max_new_tokens))
    texts = [bytes(prompt[1:]).decode() for prompt in prompts]
    seen = [text[: round(self.share * len(text))] for text in texts]
    codes = [' and '.join(re.findall(r'A code of the \w+ \w+ is (\d+)', text)) for text in seen]
    return [list(code.encode())[: config.max_new_tokens] for code in codes]


@pytest.fixture
def subject(tmp_path):
  """What tasks need of one; its tokenizer is bytes."""
  (tmp_path / 'text.txt').write_text('\n'.join(
      f'Line {i} has the words {" ".join(chr(97 + (i + j) % 26) * 4 + chr(97 + i // 26) for j in range(4))}.'
      for i in range(150)
  ))  # fmt: skip
  settings = Settings(
      checkpoint='', out=tmp_path / 'out', index_topk=(900,), rules=('indexer',), batch_size=2, examples=5,
      tasks=('single', 'multi_query'), lengths=(700, 1400), backend='xla', haystack=str(tmp_path / 'text.txt'),
  )  # fmt: skip
  stored = StoredModel(tmp_path / 'checkpoints' / 'sparse', None, {})
  return Subject(settings, stored, CFG, DataConfig(), [], None, {})


def test_scores_by_kind_length_and_depth(subject, monkeypatch):
  readers = {'dense': Reader(1.0), 'indexer@900': Reader(0.6)}
  monkeypatch.setattr(answers, '_sampler', lambda subject, arm, tokenizer: readers[arm.name])
  quizzes = make_quizzes(subject)
  answered = answer_quizzes(subject, quizzes, StepProgress(quiet=True))
  results = collect_answers(quizzes, answered)
  assert set(results['scores']['dense'].values()) == {1.0}
  depths = results['by_depth']['indexer@900']
  assert [depths[f'{depth}% of 1400'] for depth in (0, 25, 75, 100)] == [1, 1, 0, 0]
  assert list(depths)[:2] == ['0% of 700', '25% of 700'] and depths.keys() == results['by_depth']['dense'].keys()
  assert 0 < results['scores']['indexer@900']['multi_query-1400'] < 1
  assert all(n == 2 and room < 80 for n, room in readers['dense'].calls)  # One program for all batches.

  # What has been answered is not asked again, unless the tasks are others.
  n_calls = len(readers['dense'].calls)
  again = answer_quizzes(subject, quizzes, StepProgress(quiet=True))
  assert again == answered and len(readers['dense'].calls) == n_calls
  (subject.settings.out / 'answers' / 'dense' / 'single-700.json').write_text(json.dumps({'digest': 'other'}))
  answer_quizzes(subject, quizzes, StepProgress(quiet=True))
  assert len(readers['dense'].calls) == n_calls + 3

  arms = {'dense': {'index_topk': None}, 'indexer@900': {'index_topk': 900}}
  shown = {'arms': arms, 'tasks': results, 'acted': {}, 'equal_arms': [], 'self_test': {}, 'measures': {}}
  (_, (header, rows)), (_, (_, by_depth)) = page._task_tables(shown)
  assert header == ['task, tokens', 'dense', 'indexer@900'] and len(by_depth) == 10
  assert [row[0] for row in rows] == ['single, 700', 'multi_query, 700', 'mean, 700',
                                      'single, 1400', 'multi_query, 1400', 'mean, 1400']  # fmt: skip
  assert rows[0][1] == '100.0%'
  [(_, (header, means))] = page._task_means(shown)
  assert header == ['arm', '700 tokens', '1,400 tokens'] and means[0] == ['dense', '100.0%', '100.0%']
  assert 'its tasks of [700] tokens leave nothing out' in page.warnings(shown)[0]


def test_answers_are_as_the_tokenizer_writes_them(subject):
  class Spaced(Bytes):
    def stream(self, ids):
      return ' '.join(super().stream(ids))

  [single, *_] = make_quizzes(subject)
  [code] = single.tasks[0].answers
  assert answers._as_written(single.tasks[0], Bytes()) == [code]
  assert answers._as_written(single.tasks[0], Spaced()) == [' '.join(code)]


def test_prompts_of_base_and_of_instruct_models(subject):
  text = lambda quiz: bytes(quiz.prompts[0][1:]).decode()
  [base, *_] = make_quizzes(subject)
  assert text(base).endswith(base.tasks[0].prefix)
  fields = {'prompt': 'instruct', 'chat': 'User: {prompt}\nModel:'}
  chat = dataclasses.replace(subject, settings=dataclasses.replace(subject.settings, **fields))
  [instruct, *_] = make_quizzes(chat)
  assert text(instruct).startswith('User: ') and text(instruct).endswith(f'{instruct.tasks[0].question}\nModel:')
  assert all(len(p) + t.room <= 700 for p, t in zip(instruct.prompts, instruct.tasks))
  assert instruct.tasks[0].room > base.tasks[0].room


def test_an_instruct_model_is_asked_by_its_own_template(subject, tmp_path):
  settings = dataclasses.replace(subject.settings, prompt='instruct')
  asked = dataclasses.replace(subject, settings=settings)
  with pytest.raises(ConfigError, match='the checkpoint has no chat template'):
    make_quizzes(asked)
  template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<bot>"
  template += '{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}'
  (tmp_path / 'chat_template.jinja').write_text(template)
  stored = subject.stored._replace(folder=tmp_path)
  (tmp_path / 'config.json').write_text('{}')
  [instruct, *_] = make_quizzes(dataclasses.replace(asked, stored=stored))
  (tmp_path / 'chat_template.jinja').write_text(template + "{{ strftime_now('%d %b %Y') }}")
  begun = datetime.datetime(2024, 2, 29)
  [dated, *_] = make_quizzes(dataclasses.replace(asked, stored=stored, moment=begun))
  assert bytes(dated.prompts[0][1:]).decode().endswith('<bot>29 Feb 2024')
  (tmp_path / 'chat_template.jinja').write_text('{% for m in messages %}{{ m.content.text }}{% endfor %}')
  with pytest.raises(ConfigError, match='chat template drops a message of text'):
    make_quizzes(dataclasses.replace(asked, stored=stored))
  text = bytes(instruct.prompts[0][1:]).decode()
  assert text.startswith('<user>') and text.endswith(f'{instruct.tasks[0].question}<bot>')


def test_a_model_answers(subject, monkeypatch):
  """The sampler is that of the arm, and an answer is text."""
  small = dataclasses.replace(CFG, index_topk=8)
  settings = dataclasses.replace(
      subject.settings, index_topk=(8,), tasks=('single',), lengths=(320,), examples=2
  )
  subject = dataclasses.replace(subject, cfg=small, settings=settings)
  subject.__dict__['params'] = laws.weights(small)
  answered = answer_quizzes(subject, make_quizzes(subject), StepProgress(quiet=True))
  assert answered.keys() == {'dense', 'indexer@8'}
  for of_arm in answered.values():
    assert len(of_arm['single-320']['texts']) == 2 and set(of_arm['single-320']['scores']) <= {0.0, 1.0}
