# SPDX-License-Identifier: Apache-2.0
"""Tasks of long context: they fit, they can be answered from their text, and they are always the same."""

import collections
import re

import pytest

from dsa_jax.config import ConfigError
from dsa_jax.evaluation import tasks
from dsa_jax.evaluation.tasks import DEPTHS, KINDS, Haystack, make_task, score

NUMBERS = 'one two three four five six seven eight nine ten eleven twelve'.split()
TEXT = ' '.join(
    f'The {"abcdefghij"[i % 10] * 4}{"klmnopqrst"[i // 10 % 10]} man of {i} walked {NUMBERS[i % 12]} miles to the sea'
    ' and back again.'
    for i in range(300)
)
HAYSTACK = Haystack.of(TEXT)
words = lambda text: len(text.split())


@pytest.mark.parametrize('kind', KINDS)
def test_tasks_fill_their_length_and_can_be_answered(kind):
  for length in 300, 1200:
    for measure, scale in ((words, 1), (len, 8)):
      task = make_task(kind, HAYSTACK, scale * length, 1, measure)
      assert 0.85 * scale * length < task.n_tokens <= scale * length
      assert measure(task.base_prompt) < task.n_tokens
      assert score(task.answers, task.context) == 1
      assert len(set(task.answers)) == len(task.answers)
      shown = f'{task.question} {task.prefix}'
      assert not any(score([answer], shown) for answer in task.answers)
  again = [make_task(kind, Haystack.of(TEXT), 300, number, words) for number in (1, 1, 2)]
  assert again[0] == again[1] and again[0].context != again[2].context


@pytest.mark.parametrize('kind', ['single', 'multi_key', 'question'])
def test_what_is_asked_for_lies_at_its_depth(kind):
  for number, depth in enumerate(DEPTHS):
    task = make_task(kind, HAYSTACK, 3000, number, words)
    [answer] = task.answers
    [*places] = (match.start() for match in re.finditer(re.escape(answer), task.context))
    assert task.depth == depth
    assert min(abs(place / len(task.context) - depth) for place in places) < 0.03


def test_a_sentence_that_is_asked_for_lies_nowhere_else():
  small = HAYSTACK._replace(sentences=HAYSTACK.sentences[:60])  # It comes several times.
  task = make_task('question', small, 3000, 2, words)
  [quoted] = re.findall('"(.*)"', task.question)
  assert task.context.count(quoted) == 1 and task.context.count(small.sentences[1]) > 1


def test_who_repeats_the_question_has_not_answered():
  asked = tuple('above answer common list most question which words'.split())
  task = make_task('common_words', HAYSTACK._replace(words=asked + HAYSTACK.words[:5]), 300, 0, words)
  assert {*task.answers} == {*HAYSTACK.words[:5]} and 'common' in task.context


def test_needles_beside_each_other():
  kinds = {kind: make_task(kind, HAYSTACK, 1000, 0, words) for kind in KINDS}
  codes = {kind: re.findall(r'A code of the (\w+ \w+) is (\d+)\.', x.context) for kind, x in kinds.items()}
  assert len(codes['single']) == 1 and len(codes['multi_key']) == 1 + tasks.DISTRACTORS
  assert len({place for place, _ in codes['multi_value']}) == 1
  for kind in 'multi_value', 'multi_query':
    assert {code for _, code in codes[kind]} == set(kinds[kind].answers)


def test_variables_follow_their_chain():
  task = make_task('variables', HAYSTACK, 1000, 3, words)
  given = re.findall(r'Set VAR (\w+) = (?:VAR )?(\w+)\.', task.context)
  values = {}
  for name, value in given:  # In the order of the text.
    values[name] = values.get(value, value)
  [wanted] = re.findall(r'value (\d+)', task.question)
  assert {name for name, value in values.items() if value == wanted} == set(task.answers)
  assert len(given) == 2 * (tasks.HOPS + 1)


@pytest.mark.parametrize('length', [150, 400, 3000])
def test_common_and_frequent_words_lead_clearly(length):
  for kind, n in (('common_words', tasks.COMMON), ('frequent_words', tasks.FREQUENT)):
    task = make_task(kind, HAYSTACK, length, 0, words)
    counts = collections.Counter(re.findall(r'[a-z]+', task.context)).most_common(n + 1)
    assert {word for word, _ in counts[:n]} == set(task.answers)
    assert counts[n - 1][1] > counts[n][1]


def test_scores_are_of_whole_words():
  assert score(('123', 'abc'), 'They are 123 and ABC.') == 1
  assert score(('123', 'abc'), 'They are 1234 and abc') == 0.5
  assert score(('a.c',), 'abc') == 0


def test_what_does_not_fit():
  with pytest.raises(ConfigError, match='a task of multi_key takes .* length=40 is too short'):
    make_task('multi_key', HAYSTACK, 40, 0, words)
  with pytest.raises(ConfigError, match='has 1 sentences and'):
    Haystack.of('There is only one sentence here.')
