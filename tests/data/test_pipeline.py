# SPDX-License-Identifier: Apache-2.0
"""Batches: each row once an epoch, a new order every epoch, and an exact resume."""

import json

import numpy as np
import pytest

from dsa_jax.data import pipeline, text
from dsa_jax.data.batch import Batch
from dsa_jax.data.recall import Recall

N_ROWS = 30
# A list is a source too. Row i starts with token i.
SOURCE = [
    Batch(
        tokens=np.array([i, 100], np.int32),
        targets=np.array([100, i], np.int32),
        weights=np.array([1, 0], np.float32),
        start=np.zeros(2, np.int32),
        end=np.array([1, 2], np.int32),
    )
    for i in range(N_ROWS)
]


def _rows(batches: list[Batch]) -> list[int]:
  return [int(i) for batch in batches for i in batch.tokens[:, 0]]


def _take(iterator, n: int) -> list[Batch]:
  return [next(iterator) for _ in range(n)]


def _assert_same(left: list[Batch], right: list[Batch]):
  for a, b in zip(left, right, strict=True):
    for name, x, y in zip(Batch._fields, a, b, strict=True):
      np.testing.assert_array_equal(x, y, err_msg=name)


def test_a_batch_stacks_the_arrays_of_its_rows():
  batch = next(pipeline.make_iterator(SOURCE, batch_size=4, seed=0))
  assert isinstance(batch, Batch)
  rows = [SOURCE[i] for i in _rows([batch])]
  for name in Batch._fields:
    array = getattr(batch, name)
    assert type(array) is np.ndarray and array.shape == (4, 2), name
    assert array.dtype == getattr(rows[0], name).dtype, name
    np.testing.assert_array_equal(array, [getattr(row, name) for row in rows], err_msg=name)


def test_every_epoch_takes_each_row_once_in_a_new_order():
  # 4 does not divide 30: the eighth batch holds rows of two epochs.
  rows = _rows(_take(pipeline.make_iterator(SOURCE, batch_size=4, seed=0), 30))
  epochs = [rows[i : i + N_ROWS] for i in range(0, 4 * N_ROWS, N_ROWS)]
  assert all(sorted(epoch) == list(range(N_ROWS)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_the_order_and_seeds_share_no_epoch():
  def epochs(seed):
    rows = _rows(_take(pipeline.make_iterator(SOURCE, batch_size=10, seed=seed), 9))
    return [tuple(rows[i : i + N_ROWS]) for i in range(0, 3 * N_ROWS, N_ROWS)]

  assert epochs(0) == epochs(0)
  assert len({epoch for seed in range(3) for epoch in epochs(seed)}) == 9


@pytest.mark.parametrize('n_before', [0, 1, 7, 23])
@pytest.mark.parametrize('source', ['text', 'recall'])
def test_a_saved_state_resumes_with_the_same_batches(source, n_before):
  if source == 'text':
    rows = text.PackedText([bytes([i]) * (i + 3) for i in range(20)], seq_len=8)
  else:
    rows = Recall(seq_len=24, n_keys=8, n_values=4, n_pairs=4, n_queries=2, n_rows=10**9, seed=5)
  iterator = pipeline.make_iterator(rows, batch_size=3, seed=7)
  _take(iterator, n_before)
  saved = json.dumps(iterator.get_state())
  expected = _take(iterator, 12)

  fresh = pipeline.make_iterator(rows, batch_size=3, seed=7)
  fresh.set_state(json.loads(saved))
  _assert_same(_take(fresh, 12), expected)
  assert fresh.get_state() == iterator.get_state()

  # And on an iterator that has already read ahead.
  iterator.set_state(json.loads(saved))
  _assert_same(_take(iterator, 12), expected)


def test_reading_the_state_changes_nothing():
  plain = pipeline.make_iterator(SOURCE, batch_size=4, seed=0)
  watched = pipeline.make_iterator(SOURCE, batch_size=4, seed=0)
  states = []
  for _ in range(12):
    states.append(json.dumps(watched.get_state()))
    _assert_same([next(watched)], [next(plain)])
  assert len(set(states)) == 12


@pytest.mark.parametrize('batch_size', [1, N_ROWS])
def test_the_smallest_and_the_largest_batch(batch_size):
  n = 2 * N_ROWS // batch_size
  rows = _rows(_take(pipeline.make_iterator(SOURCE, batch_size, seed=0), n))
  assert sorted(rows) == sorted(2 * list(range(N_ROWS)))


def test_first_batches_are_fixed_and_distinct():
  batches = pipeline.first_batches(SOURCE, batch_size=4, n_batches=7, seed=0)
  assert [batch.tokens.shape for batch in batches] == [(4, 2)] * 7
  assert len(set(_rows(batches))) == 28
  _assert_same(batches, pipeline.first_batches(SOURCE, batch_size=4, n_batches=7, seed=0))
  assert _rows(batches) != _rows(pipeline.first_batches(SOURCE, 4, 7, seed=1))
  everything = pipeline.first_batches(SOURCE, batch_size=10, n_batches=3, seed=0)
  assert sorted(_rows(everything)) == list(range(N_ROWS))


@pytest.mark.parametrize(
    ('batch_size', 'seed', 'message'),
    [
        (0, 0, 'batch_size=0 must be at least 1'),
        (31, 0, 'batch_size=31 must not exceed the 30 rows'),
        (4, -1, 'seed=-1 must not be negative'),
    ],
)
def test_arguments_out_of_range_are_named(batch_size, seed, message):
  with pytest.raises(ValueError, match=message):
    pipeline.make_iterator(SOURCE, batch_size, seed)
  with pytest.raises(ValueError, match=message):
    pipeline.first_batches(SOURCE, batch_size, 1, seed)


def test_too_few_rows_for_the_first_batches():
  with pytest.raises(ValueError, match='n_batches=8 of batch_size=4 need 32 .* source has 30'):
    pipeline.first_batches(SOURCE, batch_size=4, n_batches=8, seed=0)
  with pytest.raises(ValueError, match='n_batches=0 must be at least 1'):
    pipeline.first_batches(SOURCE, batch_size=4, n_batches=0, seed=0)
