# SPDX-License-Identifier: Apache-2.0
"""Rows hold every token once, targets follow their tokens, and documents do not see each other."""

import numpy as np
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.data import packing
from dsa_jax.data.corpora.tokens import ABOUT, TokenStream


class Memory(TokenStream):
  """Documents of given lengths; every token is its own place in the stream, from 1 on."""

  def __init__(self, lengths):
    self.about = np.zeros(len(lengths), ABOUT)
    self.about['tokens'] = lengths
    self.about['hash'] = np.arange(len(lengths))
    self.vocab_size, self.tokenizer, self.place = sum(lengths) + 1, '', 'memory'

  def read(self, first, n):
    return np.arange(first + 1, first + n + 1, dtype=np.uint32)


def rows_of(lengths, seq_len, kind, documents=None):
  documents = np.arange(len(lengths)) if documents is None else np.array(documents)
  rows = packing.Rows(Memory(lengths), documents, seq_len, kind)
  return rows, [rows[i] for i in range(len(rows))]


LENGTHS = {
  'short': [3, 1, 4, 1, 5, 9, 2, 6],
  'of_a_row': [8, 8, 16, 8],
  'long': [1, 50, 3, 8, 17, 9, 7],
  'one': [1],
  'drawn': np.random.default_rng(0).integers(1, 40, size=100).tolist(),
}  # fmt: skip


@pytest.mark.parametrize('kind', ['concat', 'best_fit'])
@pytest.mark.parametrize('lengths', LENGTHS.values(), ids=LENGTHS)
def test_every_token_is_read_once_with_its_target(kind, lengths):
  _, rows = rows_of(lengths, 8, kind)
  tokens = np.concatenate([row.tokens[row.end > row.start] for row in rows])
  np.testing.assert_array_equal(np.sort(tokens), np.arange(1, sum(lengths) + 1))
  last = set(np.cumsum(lengths).tolist())
  for row in rows:
    has_target = (row.end > row.start) & ~np.isin(row.tokens, list(last))
    np.testing.assert_array_equal(row.weights, has_target)
    np.testing.assert_array_equal(row.targets[has_target], row.tokens[has_target] + 1)


@pytest.mark.parametrize('kind', packing.PACKINGS)
@pytest.mark.parametrize('lengths', LENGTHS.values(), ids=LENGTHS)
def test_a_token_sees_its_own_document_up_to_itself(kind, lengths):
  document = np.repeat(np.arange(len(lengths)), lengths)
  for row in rows_of(lengths, 8, kind)[1]:
    for t, (start, end) in enumerate(zip(row.start, row.end)):
      if start == end:
        assert start == t and row.tokens[t] == 0
        continue
      assert end == t + 1
      seen = row.tokens[start:end]
      np.testing.assert_array_equal(seen, np.arange(row.tokens[t] - t + start, row.tokens[t] + 1))
      assert len(set(document[seen - 1])) == 1
      before_it = row.tokens[start - 1] if start else 0
      assert not before_it or document[before_it - 1] != document[seen[0] - 1] or before_it + 1 != seen[0]


@pytest.mark.parametrize('kind', ['concat', 'best_fit'])
def test_some_documents_are_read_alone(kind):
  _, rows = rows_of([3, 5, 4, 6], 8, kind, documents=[3, 1])
  tokens = np.concatenate([row.tokens[row.end > row.start] for row in rows])
  np.testing.assert_array_equal(np.sort(tokens), [*range(4, 9), *range(13, 19)])


def test_best_fit_cuts_only_what_is_longer_than_a_row():
  lengths = np.random.default_rng(1).integers(1, 100, size=500).tolist()
  fit, _ = rows_of(lengths, 64, 'best_fit')
  concat, _ = rows_of(lengths, 64, 'concat')
  about, other = packing.about(fit), packing.about(concat)
  assert about['cut'] == sum(n > 64 for n in lengths) < other['cut']
  assert about['filled'] > 0.97 and about['tokens'] == other['tokens'] == sum(lengths)


@pytest.mark.parametrize('lengths', LENGTHS.values(), ids=LENGTHS)
def test_full_rows_are_each_of_one_document(lengths):
  rows, read = rows_of(lengths, 8, 'full')
  ends = np.cumsum(lengths)
  begins = [begin + i for begin, n in zip(ends - lengths, lengths) for i in range(0, n - 7, 8)]
  assert [row.tokens.tolist() for row in read] == [[*range(at + 1, at + 9)] for at in begins]
  for row, begin in zip(read, begins):
    np.testing.assert_array_equal(row.start, 0)
    np.testing.assert_array_equal(row.end, np.arange(1, 9))
    has_target = ~np.isin(row.tokens, ends)
    np.testing.assert_array_equal(row.weights, has_target)
    np.testing.assert_array_equal(row.targets, np.where(has_target, row.tokens + 1, 0))
  if read:
    about = packing.about(rows)
    assert about['tokens'] == 8 * len(read) and about['filled'] == 1
    assert about['cut'] == sum(n > 8 for n in lengths)


def test_full_rows_are_of_documents_that_fill_one():
  stream = Memory([1, 5, 10, 20])
  choose = lambda seq_len, **fields: packing.choose(
      stream, 'train', None, 0, packing.PackingConfig(packing='full', **fields).of_rows(seq_len)
  ).tolist()
  assert choose(10) == [2, 3] and choose(11) == [3] and choose(5, min_tokens=8) == [2, 3]
  with pytest.raises(ConfigError, match="min_tokens=21, max_tokens=0, packing.packing='full'"):
    choose(21)
  with pytest.raises(ConfigError, match='fills each row of 16 tokens .* max_tokens=12 leaves all'):
    choose(16, max_tokens=12)
  of_rows = packing.PackingConfig(min_tokens=3).of_rows(8)
  assert of_rows == packing.PackingConfig(min_tokens=3)  # Other packings read shorter documents, too.


def test_about_counts_lengths_and_what_queries_see():
  rows, _ = rows_of([1, 2, 3, 4, 8], 8, 'best_fit')
  about = packing.about(rows)
  assert about['lengths'] == [1, 2, 1, 1] and about['documents'] == 5 and about['cut'] == 0
  np.testing.assert_allclose(about['context'], np.array([5, 4 + 3, 1 + 4 + 0, 1]) / 18)


def test_which_documents_are_chosen():
  stream = Memory([1, 5, 10, 20, 40, 0])
  config = lambda **fields: packing.PackingConfig(**fields)
  choose = lambda split='train', share=None, seed=0, **fields: packing.choose(
      stream, split, share, seed, config(**fields)
  ).tolist()
  assert choose() == [0, 1, 2, 3, 4]
  assert choose(min_tokens=5, max_tokens=20) == [1, 2, 3]
  assert choose(long_tokens=20, long_times=3) == [0, 1, 2, 3, 4, 3, 4, 3, 4]
  halves = [set(choose(split, 0.5, seed=7)) for split in ('train', 'validation')]
  assert halves[0] | halves[1] == {0, 1, 2, 3, 4} and not halves[0] & halves[1]
  with pytest.raises(ConfigError, match='memory has no document for train, of 6'):
    choose(min_tokens=50)
  with pytest.raises(ConfigError, match='has no document of two tokens or more for train, of 6'):
    choose(max_tokens=1)


def test_validation_reads_long_documents_once():
  stream, twice = Memory([1, 5, 10]), packing.PackingConfig(long_tokens=5, long_times=2)
  assert packing.choose(stream, 'train', None, 0, twice).tolist() == [0, 1, 2, 1, 2]
  assert packing.choose(stream, 'validation', None, 0, twice).tolist() == [0, 1, 2]


def test_documents_of_other_lengths_are_counted_on_their_side():
  stream, bounds = Memory([1, 5, 10, 20, 40, 0]), packing.PackingConfig(min_tokens=5, max_tokens=20)
  assert packing.count_left_out(stream, 'train', None, 0, bounds) == 2
  sides = [packing.count_left_out(stream, x, 0.5, 7, bounds) for x in ('train', 'validation')]
  assert sum(sides) == 2


def test_the_split_is_stable_and_has_its_share():
  grown = Memory([2] * 4000)
  small = Memory([2] * 1000)
  of = lambda stream, seed: packing.choose(stream, 'validation', 0.1, seed, packing.PackingConfig())
  first = of(grown, 0)
  np.testing.assert_array_equal(first[first < 1000], of(small, 0))
  assert 330 < len(first) < 470
  assert len(np.intersect1d(first, of(grown, 1))) < 80


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'packing': 'tight'}, "packing='tight' must be one of"),
        ({'min_tokens': -1}, 'min_tokens=-1 must not be negative'),
        ({'long_times': 0}, 'long_times=0 must be at least 1'),
        ({'min_tokens': 9, 'max_tokens': 8}, 'must not be below'),
    ],
)
def test_fields_out_of_range(fields, message):
  with pytest.raises(ConfigError, match=message):
    packing.PackingConfig(**fields)
