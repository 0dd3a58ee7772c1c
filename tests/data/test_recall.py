# SPDX-License-Identifier: Apache-2.0
"""The recall task: every answer is in the context, and nowhere in particular."""

import dataclasses

import numpy as np
import pytest

from dsa_jax.data.recall import N_NOISE, Recall
from dsa_jax.data.sources import DataConfig

TASK = Recall(seq_len=96, n_keys=40, n_values=10, n_pairs=12, n_queries=8, n_rows=1000, seed=0)
CONTEXT = TASK.seq_len - TASK.n_queries
FIRST_PAIR = TASK.n_keys + TASK.n_values
FIRST_NOISE = FIRST_PAIR + TASK.n_keys * TASK.n_values
FULL = dataclasses.replace(TASK, seq_len=20)
REPEATING = dataclasses.replace(TASK, n_pairs=3)


def _pairs(task: Recall, tokens: np.ndarray) -> dict[int, tuple[int, int]]:
  """Reads key -> (value, position) from the context; fails if a key occurs twice."""
  pairs = {}
  for t, token in enumerate(tokens[: task.seq_len - task.n_queries]):
    if FIRST_PAIR <= token < FIRST_NOISE:
      key, value = divmod(int(token) - FIRST_PAIR, task.n_values)
      assert key not in pairs
      pairs[key] = (value, t)
  return pairs


@pytest.mark.parametrize('task', [TASK, FULL, REPEATING], ids=['sparse', 'full', 'repeating'])
def test_each_query_is_answered_by_its_pair(task):
  context_len = task.seq_len - task.n_queries
  for i in range(50):
    row = task[i]
    pairs = _pairs(task, row.tokens)
    assert len(pairs) == task.n_pairs
    assert (row.tokens[:context_len] >= FIRST_NOISE).sum() == context_len - task.n_pairs
    asked = row.tokens[context_len:].tolist()
    answers = [task.n_keys + pairs[key][0] for key in asked]
    assert row.targets[context_len:].tolist() == answers
    if task.n_queries <= task.n_pairs:
      assert len(set(asked)) == len(asked)
    assert row.weights.tolist() == [0] * context_len + [1] * task.n_queries


def test_a_row_is_one_causal_document_in_the_vocabulary():
  assert TASK.vocab_size == 40 + 10 + 400 + N_NOISE
  used = set()
  for i in range(TASK.n_rows):
    row = TASK[i]
    assert row.tokens[1:CONTEXT].tolist() == row.targets[: CONTEXT - 1].tolist()
    assert row.start.tolist() == [0] * TASK.seq_len
    assert row.end.tolist() == list(range(1, TASK.seq_len + 1))
    used |= set(row.tokens.tolist()) | set(row.targets.tolist())
    assert [array.dtype for array in row] == [np.int32, np.int32, np.float32, np.int32, np.int32]
  assert used == set(range(TASK.vocab_size))


def test_evidence_is_uniform_over_the_context():
  at = []
  for i in range(TASK.n_rows):
    tokens = TASK[i].tokens
    pairs = _pairs(TASK, tokens)
    at += [pairs[int(key)][1] for key in tokens[CONTEXT:]]
  # In units of the context: a uniform variable has mean 1/2 and standard deviation 1/sqrt(12).
  # The tolerance is five standard errors of 8000 draws for the mean, and about as much for the
  # deviation.
  at = np.array(at) / (CONTEXT - 1)
  assert at.min() == 0 and at.max() == 1
  assert abs(at.mean() - 1 / 2) < 5 / np.sqrt(12 * len(at))
  assert abs(at.std() - 1 / np.sqrt(12)) < 0.01
  counts = np.histogram(at, bins=8, range=(0, 1))[0]
  np.testing.assert_allclose(counts, len(at) / 8, rtol=0.15)


def test_keys_values_and_queries_are_drawn_uniformly():
  keys, values, ranks = np.zeros(40), np.zeros(10), np.zeros(12)
  for i in range(TASK.n_rows):
    tokens = TASK[i].tokens
    pairs = _pairs(TASK, tokens)
    order = list(pairs)
    for key in tokens[CONTEXT:]:
      ranks[order.index(key)] += 1
    for key, (value, _) in pairs.items():
      keys[key] += 1
      values[value] += 1
  for counts in (keys, values, ranks):
    np.testing.assert_allclose(counts, counts.mean(), rtol=0.25)


def test_a_row_depends_on_the_seed_and_its_index_alone():
  shorter = dataclasses.replace(TASK, n_rows=10)
  other = dataclasses.replace(TASK, seed=1)
  for i in range(10):
    for a, b in zip(TASK[i], shorter[i], strict=True):
      np.testing.assert_array_equal(a, b)
  rows = {tuple(source[i].tokens.tolist()) for source in (TASK, other) for i in range(10)}
  assert len(rows) == 20


def test_the_number_of_rows_costs_nothing_and_bounds_the_index():
  many = dataclasses.replace(TASK, n_rows=10**9)
  assert len(many) == 10**9
  assert many[10**9 - 1].tokens.shape == (96,)
  for i in (-1, 1000):
    with pytest.raises(IndexError, match=f'row {i} of 1000'):
      TASK[i]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'seq_len': 19}, r'n_pairs=12 and self.n_queries=8 take 20 tokens.*self.seq_len=19'),
        ({'n_keys': 11}, r'n_pairs=12 must not exceed self.n_keys=11'),
        ({'n_values': 0}, 'n_values=0 must be at least 1'),
        ({'n_queries': 0}, 'n_queries=0 must be at least 1'),
        ({'n_rows': 0}, 'n_rows=0 must be at least 1'),
        ({'seed': -1}, 'seed=-1 must not be negative'),
    ],
)
def test_numbers_that_do_not_fit_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TASK, **change)


@pytest.mark.parametrize('per_pair, per_query', [(64, 8), (64, 32), (16, 64)])
def test_few_pairs_or_few_queries_change_no_vocabulary(per_pair, per_query):
  config = DataConfig(source='recall', tokens_per_pair=per_pair, tokens_per_query=per_query)
  assert config.vocab_size == DataConfig(source='recall').vocab_size
  assert len(config.rows(1024, 'train')) > 0
