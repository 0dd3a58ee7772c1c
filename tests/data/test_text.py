# SPDX-License-Identifier: Apache-2.0
"""Finding, splitting and packing text, against rows written out by hand."""

import json
import pathlib

import numpy as np
import pytest

from dsa_jax.data import text
from dsa_jax.data.batch import Batch

BOS, PAD = text.BOS, text.PAD


@pytest.fixture
def corpus(tmp_path):
  """Five files in two folders, one file empty, and a folder named like a file."""
  for name, content in {
      'b.txt': b'bb',
      'a.txt': b'a',
      'sub/c.txt': b'ccc',
      'sub/empty.txt': b'',
      'sub/d.py': b'd',
  }.items():
    path = tmp_path / 'books' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  (tmp_path / 'books' / 'folder.txt').mkdir()
  return tmp_path / 'books'


def _assert_row(row: Batch, **expected):
  assert set(expected) == set(Batch._fields)
  for name, value in expected.items():
    array = getattr(row, name)
    assert array.dtype == (np.float32 if name == 'weights' else np.int32), name
    assert array.tolist() == value, name


def _documents(n: int, longest: int, seed: int) -> list[bytes]:
  rng = np.random.default_rng(seed)
  return [rng.bytes(rng.integers(1, longest, endpoint=True)) for _ in range(n)]


def test_short_documents_share_a_row_and_the_last_row_is_padded():
  # Seed 1 lays the documents in the order given.
  source = text.PackedText([b'ab', b'c', b'def'], seq_len=6, seed=1)
  assert len(source) == 2
  a, b, c, d, e, f = b'abcdef'
  _assert_row(
      source[0],
      tokens=[BOS, a, b, BOS, c, BOS],
      targets=[a, b, PAD, c, PAD, d],
      weights=[1, 1, 0, 1, 0, 1],
      start=[0, 0, 0, 3, 3, 5],
      end=[1, 2, 3, 4, 5, 6],
  )
  _assert_row(
      source[1],
      tokens=[d, e, f, PAD, PAD, PAD],
      targets=[e, f, PAD, PAD, PAD, PAD],
      weights=[1, 1, 0, 0, 0, 0],
      start=[0, 0, 0, 3, 4, 5],
      end=[1, 2, 3, 3, 4, 5],
  )


def test_a_long_document_continues_with_a_new_interval_and_loses_no_target():
  source = text.PackedText([bytes([0, 1, 2, 3, 4, 255])], seq_len=3)
  assert len(source) == 3
  _assert_row(
      source[0],
      tokens=[BOS, 0, 1],
      targets=[0, 1, 2],
      weights=[1, 1, 1],
      start=[0, 0, 0],
      end=[1, 2, 3],
  )
  _assert_row(
      source[1],
      tokens=[2, 3, 4],
      targets=[3, 4, 255],
      weights=[1, 1, 1],
      start=[0, 0, 0],
      end=[1, 2, 3],
  )
  _assert_row(
      source[2],
      tokens=[255, PAD, PAD],
      targets=[PAD, PAD, PAD],
      weights=[0, 0, 0],
      start=[0, 1, 2],
      end=[1, 1, 2],
  )


def test_documents_that_fill_the_rows_exactly_need_no_padding():
  source = text.PackedText([b'abc', b'def'], seq_len=4, seed=1)
  rows = [source[i] for i in range(len(source))]
  assert [row.tokens.tolist() for row in rows] == [[BOS, *b'abc'], [BOS, *b'def']]
  assert [row.weights.tolist() for row in rows] == [[1, 1, 1, 0]] * 2


@pytest.mark.parametrize('seq_len', [2, 7, 64])
def test_every_byte_appears_once_in_order_and_no_target_crosses_a_boundary(seq_len):
  documents = _documents(n=50, longest=40, seed=0)
  source = text.PackedText(documents, seq_len, seed=3)
  rows = [source[i] for i in range(len(source))]
  tokens, targets, weights, start, end = (np.concatenate(arrays) for arrays in zip(*rows))

  body, padding = tokens[tokens != PAD], tokens == PAD
  assert len(body) == sum(len(document) + 1 for document in documents)
  assert not padding[: len(body)].any() and padding.sum() < seq_len
  packed = [bytes(part[1:].tolist()) for part in np.split(body, np.flatnonzero(body == BOS))[1:]]
  assert sorted(packed) == sorted(documents)
  assert packed != documents

  # A counted target is the next token of the same document, and each byte is one exactly once.
  document = np.cumsum(tokens == BOS)
  counted = np.flatnonzero(weights)
  assert set(weights.tolist()) == {0, 1}
  assert (targets[counted] == tokens[counted + 1]).all()
  assert (document[counted] == document[counted + 1]).all()
  assert not padding[counted].any()
  assert len(counted) == sum(map(len, documents))
  assert targets.min() >= 0 and targets.max() < text.VOCAB_SIZE

  position = np.arange(len(tokens)) % seq_len
  row = np.arange(len(tokens)) // seq_len
  for t in range(len(tokens)):
    seen = row[t] * seq_len + np.arange(start[t], end[t])
    same = (row == row[t]) & (document == document[t]) & (position <= position[t]) & ~padding
    assert seen.tolist() == ([] if padding[t] else np.flatnonzero(same).tolist())


def test_the_seed_orders_the_documents():
  documents = _documents(n=20, longest=9, seed=1)

  def stream(seed):
    source = text.PackedText(documents, 16, seed)
    return np.concatenate([source[i].tokens for i in range(len(source))]).tolist()

  assert stream(0) == stream(0)
  assert stream(0) != stream(1)


def test_packed_text_is_a_sequence_and_checks_its_arguments():
  source = text.PackedText([b'abc'], seq_len=2)
  assert len(list(source)) == len(source) == 2
  for i in (-1, 2):
    with pytest.raises(IndexError, match=f'row {i} of 2'):
      source[i]
  with pytest.raises(ValueError, match='seq_len=1 must be at least 2'):
    text.PackedText([b'abc'], seq_len=1)
  with pytest.raises(ValueError, match='no documents'):
    text.PackedText([], seq_len=8)
  with pytest.raises(ValueError, match='seed=-1 must not be negative'):
    text.PackedText([b'abc'], seq_len=8, seed=-1)


def test_from_files_reads_bytes(corpus):
  source = text.PackedText.from_files([corpus / 'sub/c.txt'], seq_len=4)
  assert [row.tokens.tolist() for row in source] == [[BOS, *b'ccc']]


def test_a_glob_finds_non_empty_files_in_order(corpus, monkeypatch):
  def names(pattern):
    return [path.relative_to(corpus).as_posix() for path in text.find_files(pattern)]

  assert names(f'{corpus}/*.txt') == ['a.txt', 'b.txt']
  assert names(f'{corpus}/**/*.txt') == ['a.txt', 'b.txt', 'sub/c.txt']
  assert names(f'{corpus}/**/**') == ['a.txt', 'b.txt', 'sub/c.txt', 'sub/d.py']
  monkeypatch.setenv('HOME', str(corpus.parent))
  assert names('~/books/sub/*') == ['sub/c.txt', 'sub/d.py']
  monkeypatch.chdir(corpus)
  assert names('*.txt') == ['a.txt', 'b.txt']


@pytest.mark.parametrize('name', ['*.rst', 'sub', 'sub/empty.txt'])
def test_a_glob_without_a_match_says_what_to_give(corpus, name):
  with pytest.raises(ValueError, match='matches no file that holds anything; give a glob') as info:
    text.find_files(f'{corpus}/{name}')
  assert f'pattern={str(corpus / name)!r}' in str(info.value)


@pytest.mark.parametrize('pattern', [None, ''])
def test_the_standard_library_is_the_default(pattern):
  files = text.find_files(pattern)
  assert sum(path.stat().st_size for path in files) > 2_000_000
  assert {path.suffix for path in files} == {'.py'}
  assert {'json/decoder.py', 'asyncio/events.py'} < {'/'.join(path.parts[-2:]) for path in files}
  root = pathlib.Path(json.__file__).parents[1]  # json is a package in every Python.
  folders = {part for path in files for part in path.relative_to(root).parts[:-1]}
  assert not folders & {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'}
  assert files == text.find_files(pattern)


def test_a_missing_standard_library_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setattr(text.sysconfig, 'get_path', lambda name: str(tmp_path / name))
  with pytest.raises(ValueError, match='pattern=None .* no standard library in source form'):
    text.find_files(None)


def _paths(n: int, root: str = '/one/corpus') -> list[pathlib.Path]:
  return [pathlib.Path(root) / f'folder{i % 7}' / f'file{i}.txt' for i in range(n)]


def test_a_split_is_a_partition_of_the_expected_share_in_the_order_given():
  files = _paths(1000)
  train, validation = text.split_files(files, 0.2)
  assert not set(train) & set(validation)
  assert set(train) | set(validation) == set(files)
  assert train == [f for f in files if f in set(train)]
  # Six standard deviations of a binomial of 1000 at 0.2.
  assert abs(len(validation) - 200) < 76
  assert (train, validation) == text.split_files(files, 0.2)
  assert validation != text.split_files(files, 0.2, seed=1)[1]


def test_a_files_side_depends_on_its_own_name_only():
  train, validation = text.split_files(_paths(200), 0.3)
  more_train, more_validation = text.split_files(
      _paths(1000)[::-1] + [pathlib.Path('/new/new.txt')], 0.3
  )
  assert set(train) < set(more_train) and set(validation) < set(more_validation)
  _, moved = text.split_files(_paths(200, root='/elsewhere'), 0.3)
  assert [path.parts[-2:] for path in moved] == [path.parts[-2:] for path in validation]


def test_a_split_is_the_same_in_every_process_and_version():
  # Computed once: a change here moves files between train and validation under saved runs.
  _, validation = text.split_files(_paths(20), 0.2)
  assert [path.name for path in validation] == [f'file{i}.txt' for i in (1, 2, 5, 6, 8)]


@pytest.mark.parametrize('share', [1e-9, 1 - 1e-9])
@pytest.mark.parametrize('n', [2, 5])
def test_neither_side_is_empty(share, n):
  train, validation = text.split_files(_paths(n), share)
  assert (len(train), len(validation)) == ((n - 1, 1) if share < 0.5 else (1, n - 1))


def test_same_names_in_different_trees_still_split():
  files = [pathlib.Path('/one/a/x.txt'), pathlib.Path('/two/a/x.txt')]
  assert sorted(map(len, text.split_files(files, 0.5))) == [1, 1]


@pytest.mark.parametrize('share', [0.0, 1.0, -0.1, 5.0])
def test_a_share_outside_0_and_1_is_an_error(share):
  with pytest.raises(ValueError, match=f'validation_share={share} must lie between 0 and 1'):
    text.split_files(_paths(9), share)


def test_too_few_files_is_an_error():
  for files in ([], _paths(1), _paths(1) * 2):
    with pytest.raises(ValueError, match=f'at least 2 different files, got {len(set(files))}'):
      text.split_files(files, 0.5)
