# SPDX-License-Identifier: Apache-2.0
"""Finding, splitting and packing text, against rows written out by hand."""

import bz2
import gzip
import io
import json
import lzma
import pathlib
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.data import text
from dsa_jax.data.batch import Batch
from dsa_jax.data.pipeline import make_iterator
from dsa_jax.data.sources import DataConfig

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


@pytest.mark.parametrize('folder', ['sub', 'v[2]'])
def test_a_folder_is_told_how_to_name_its_files(corpus, folder):
  (corpus / 'v[2]').mkdir()
  (corpus / 'v[2]' / 'c.txt').write_text('ccc')
  with pytest.raises(ConfigError, match='give a glob of the files in this folder') as error:
    text.find_files(str(corpus / folder))
  better = str(error.value).split('such as ')[1].removesuffix('.')
  assert corpus / folder / 'c.txt' in text.find_files(better)


@pytest.mark.parametrize('name', ['v[2].txt', 'v[2]/*.txt', 'v[2]/**/c.txt', 'v[2]/c[d].txt'])
def test_brackets_of_a_name_are_to_be_escaped(corpus, name):
  (corpus / 'v[2]').mkdir()
  for path in ('v[2].txt', 'v[2]/c.txt', 'v[2]/c[d].txt'):
    (corpus / path).write_text('text')
  with pytest.raises(ConfigError, match='give a glob that escapes the brackets') as error:
    text.find_files(str(corpus / name))
  better = str(error.value).split('of a name: ')[1].removesuffix('.')
  assert text.find_files(better)


def test_one_file_is_told_what_to_do(corpus):
  with pytest.raises(ConfigError, match='got 1: cut the text into several, .*split --line-bytes'):
    text.split_files([corpus / 'a.txt'], 0.5)


@pytest.mark.parametrize('share', [0.05, 0.5, 0.9])
def test_files_of_one_name_are_split_with_a_warning(share, caplog):
  files = [pathlib.Path(f'/books/{i}/data/doc.txt') for i in range(20)]
  train, validation = text.split_files(files, share)
  assert {len(train), len(validation)} == {1, 19}
  [record] = caplog.records
  assert f'validation has {len(validation)} of 20 files' in record.getMessage()
  assert f'asks for {share:.0%}' in record.getMessage()
  assert '20 are named data/doc.txt' in record.getMessage()


@pytest.mark.parametrize('n', [2, 20, 1000])
def test_a_usual_split_warns_of_nothing(n, caplog):
  text.split_files(_paths(n), 0.2)
  assert not caplog.records


def _parquet() -> bytes:
  return b'PAR1' + b'\x15\x04abc' * 3 + b'PAR1'


def _numpy(save) -> bytes:
  buffer = io.BytesIO()
  save(buffer, np.arange(300, dtype=np.uint8) + 1)
  return buffer.getvalue()


def _zip() -> bytes:
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w') as archive:
    archive.writestr('a.txt', 'text')
  return buffer.getvalue()


def _tar() -> bytes:
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w') as archive:
    archive.addfile(tarfile.TarInfo('a.txt'))
  return buffer.getvalue()


WORDS = 'All work and no play makes Jack a dull boy. ' * 20
OTHERS = {
    'gzip': gzip.compress(WORDS.encode()),
    'bzip2': bz2.compress(WORDS.encode()),
    'bzip2 ': bz2.compress(b''),
    'xz': lzma.compress(WORDS.encode()),
    'lzma': lzma.compress(WORDS.encode(), lzma.FORMAT_ALONE),
    'Zstandard': b'\x28\xb5\x2f\xfd' + b'\x24\x05)' + b'words',
    'lz4': b'\x04\x22\x4d\x18' + b'words',
    'zip': _zip(),
    'tar': _tar(),
    'Parquet': _parquet(),
    'numpy': _numpy(np.save),
    'zip ': _numpy(np.savez),
    'UTF-16': WORDS.encode('utf-16'),
    'UTF-16 ': b'\xfe\xff' + WORDS.encode('utf-16-be'),
    'UTF-32': WORDS.encode('utf-32'),
    'UTF-32 ': b'\x00\x00\xfe\xff' + WORDS.encode('utf-32-be'),
    'NUL': WORDS.encode('utf-16-le'),
    'NUL ': WORDS.encode() * 100 + b'\x00',
    'control characters': bytes(range(1, 255)) * 4,
    'git-lfs pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n',
    **{'pickle' + ' ' * i: pickle.dumps({'text': [WORDS, 1]}, protocol=i) for i in range(6)},
}


@pytest.mark.parametrize('format', OTHERS)
def test_what_is_no_text_is_refused_by_its_content(corpus, format):
  """Whatever its name says, and among whatever other files."""
  for name in ('z.txt', 'z.gz'):
    (corpus / name).write_bytes(OTHERS[format])
  data = DataConfig(files=f'{corpus}/**/*', validation_share=0.5)
  with pytest.raises(ConfigError) as error:
    for split in ('train', 'validation'):
      data.rows(8, split)
  assert re.search(rf'z\.(txt|gz) \([^)]*{format.strip()}', str(error.value))
  with pytest.raises(ConfigError, match=r'no plain text: .*z.txt \(.*, .*z.gz \('):
    text.PackedText.from_files([corpus / 'z.txt', corpus / 'a.txt', corpus / 'z.gz'], seq_len=8)


def test_a_long_list_of_other_files_is_cut(corpus):
  files = [corpus / f'{i}.gz' for i in range(13)]
  for file in files:
    file.write_bytes(OTHERS['gzip'])
  with pytest.raises(ConfigError, match=r'9.gz \(gzip\) and 3 more\. Unpack'):
    text.PackedText.from_files(files, seq_len=8)


@pytest.mark.parametrize(
    'content',
    [
        b'\xef\xbb\xbf' + WORDS.encode(), 'größer, 大'.encode(), 'größer'.encode('latin-1'), b'.',
        b'N.', b'PAR1 is how Parquet begins', b'BZh9 too', b'PK', b'\x80', b'I am.', b'abc.',
        b'ORC', b'(lp0\n', b'7z', b'%PDF', b'\x14 \x15 3 gr\x94\xe1er\x1a',
        pytest.param(b'\xe9\x02' + 999 * b'\xe9', id='one control character of 1001'),
    ],
    ids=repr,
)  # fmt: skip
def test_texts_of_all_kinds_are_read(corpus, content):
  (corpus / 'a.txt').write_bytes(content)
  source = text.PackedText.from_files([corpus / 'a.txt'], seq_len=1 + len(content) or 2)
  assert bytes(source[0].tokens[1:].tolist()) == content


@pytest.mark.parametrize('seed', [2**32, 2**63, 2**64])
def test_seeds_out_of_range(seed):
  for make in (
      lambda: DataConfig(seed=seed),
      lambda: text.PackedText([b'abc'], 8, seed),
      lambda: make_iterator(text.PackedText([b'abc'], 2), 1, seed),
  ):
    with pytest.raises(ConfigError, match=f'seed={seed} must be at most 4294967295'):
      make()


def test_other_integers_out_of_range():
  with pytest.raises(ConfigError, match='tokens_per_pair=0 must be at least 1'):
    DataConfig(source='recall', tokens_per_pair=0)
  with pytest.raises(ConfigError, match='n_keys=.* and .*n_values=.* make .* tokens'):
    DataConfig(source='recall', n_keys=2**20, n_values=2**20).vocab_size
