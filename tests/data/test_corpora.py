# SPDX-License-Identifier: Apache-2.0
"""Every format gives the same rows, and names what is wrong with a file."""

import bz2
import gzip
import json
import os
import pathlib
import struct
import tracemalloc

import corpora_cases as cases
import numpy as np
import pyarrow
from pyarrow import parquet
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.data.corpora import files, raw, tokens
from dsa_jax.data.packing import PACKINGS

TEXTS = cases.documents()


@pytest.fixture(scope='module')
def corpora(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpora')
  return cases.write(folder, TEXTS)


def rows_of(tmp_path, fields, **others):
  mixture = cases.config(tmp_path, fields, **others).rows(64, 'train')
  (rows,) = mixture.sources
  return [rows[i] for i in range(len(rows))]


def assert_same(left, right):
  assert len(left) == len(right) > 20
  for a, b in zip(left, right, strict=True):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y)
      assert x.dtype == y.dtype


@pytest.mark.parametrize('packing', PACKINGS)
def test_every_format_gives_the_same_rows(corpora, tmp_path, packing):
  by_format = {
      name: rows_of(tmp_path, fields, packing=packing, validation_share=0.0)
      for name, fields in corpora.items()
  }
  for name in set(by_format) - {'text', 'flat', 'npy'}:
    assert_same(by_format['text'], by_format[name])
  assert_same(by_format['flat'], by_format['npy'])  # Their documents end with an id more.


@pytest.mark.parametrize('name', ['jsonl', 'parquet', 'arrow', 'tokens', 'gzip', 'zstd'])
def test_splits_go_by_the_text(corpora, tmp_path, name):
  want = rows_of(tmp_path, corpora['text'], validation_share=0.3)
  assert_same(want, rows_of(tmp_path, corpora[name], validation_share=0.3))


def test_rows_do_not_depend_on_how_files_are_cut(corpora, tmp_path, monkeypatch):
  whole = {name: rows_of(tmp_path, corpora[name]) for name in ('text', 'jsonl', 'parquet')}
  monkeypatch.setattr(raw, 'PIECE', 500)
  monkeypatch.setattr(raw, 'READ', 64)
  for name, rows in whole.items():
    assert_same(rows, rows_of(tmp_path / 'other', corpora[name]))


def test_lines_of_any_length_belong_to_one_piece(tmp_path, monkeypatch):
  lines = [json.dumps({'text': 'x' * n}) + '\n' for n in (1, 40, 3, 300, 0, 17, 64, 1)]
  (tmp_path / 'a.jsonl').write_text(''.join(lines))
  source = raw.JsonLines(files=str(tmp_path / 'a.jsonl'))
  for size in range(1, 80):
    monkeypatch.setattr(raw, 'PIECE', size)
    texts = [text for piece in source.pieces() for text in source.documents(piece)]
    assert [len(text) for text in texts] == [1, 40, 3, 300, 0, 17, 64, 1], size


def test_a_line_without_an_end_and_empty_lines(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(b'\n{"text": "a"}\r\n\n  \n{"text": "b"}')
  source = raw.JsonLines(files=str(tmp_path / 'a.jsonl'))
  assert [x for piece in source.pieces() for x in source.documents(piece)] == [b'a', b'b']


def test_files_that_are_no_text_stop_a_job_or_are_left_out(tmp_path):
  (tmp_path / 'a.txt').write_text('words ' * 20)
  (tmp_path / 'b.txt').write_bytes(gzip.compress(b'words'))
  fields = dict(format='text', files=str(tmp_path / '*.txt'))
  with pytest.raises(ConfigError, match=r"b.txt: it is no plain text \(gzip.*unpack.*damaged='drop'"):
    cases.config(tmp_path, fields).rows(8, 'train')
  known = cases.config(tmp_path, fields, damaged='drop', validation_share=0.0).about_documents(8)
  [of_source] = known.values()
  assert of_source['documents'] == 1 and of_source['left_out']['damaged'] == 1


@pytest.mark.parametrize(
    'line, reason',
    [
        ('[1]', 'it holds a list, not an object'),
        ('{"text": 1}', "the field 'text' is a int"),
        ('{"texts": "a"}', "the field 'text' is missing"),
        ('{"text": null}', "the field 'text' is a NoneType"),
        ('{"text": "a', 'it is no JSON'),
        (r'{"text": "\ud800"}', 'is no Unicode text'),
    ],
)
def test_lines_that_are_no_documents(tmp_path, line, reason):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n' + line + '\n{"text": "b"}\n')
  fields = dict(format='jsonl', files=str(tmp_path / 'a.jsonl'))
  with pytest.raises(ConfigError, match=rf'a.jsonl, the line at byte 14: .*{reason}'):
    cases.config(tmp_path, fields).rows(8, 'train')
  config = cases.config(tmp_path, fields, damaged='drop', validation_share=0.0)
  assert config.about_documents(8)['one']['documents'] == 2


def test_text_that_is_no_utf8_is_named_with_its_place(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'caf\xe9 au lait')
  fields = dict(format='text', files=str(tmp_path / 'a.txt'))
  with pytest.raises(ConfigError, match='a.txt: it is no UTF-8 at byte 3'):
    cases.config(tmp_path, fields).rows(8, 'train')
  (tmp_path / 'a.txt').write_bytes(b'\xe9\x02')  # A control character makes it no worse.
  (tmp_path / 'b.txt').write_bytes(b'text')
  fields = dict(format='text', files=str(tmp_path / '*.txt'))
  known = cases.config(tmp_path, fields, damaged='drop', validation_share=0.0).about_documents(8)
  assert known['one']['documents'] == known['one']['left_out']['damaged'] == 1


@pytest.mark.parametrize('name', ['packed.jsonl.gz', 'packed.jsonl.zst', 'rows.parquet'])
@pytest.mark.parametrize('share', [0.5, 0.95])
def test_a_file_that_is_cut_short_is_named(corpora, tmp_path, name, share):
  folder = os.path.dirname(corpora['jsonl']['files'])
  content = open(os.path.join(folder, name), 'rb').read()
  (tmp_path / name).write_bytes(content[: int(share * len(content))])
  kind = 'parquet' if name.endswith('parquet') else 'jsonl'
  fields = dict(format=kind, files=str(tmp_path / name))
  with pytest.raises(ConfigError, match=f'{name} .*(could not be read|is no whole Parquet)'):
    cases.config(tmp_path, fields, damaged='drop').rows(8, 'train')


def test_an_arrow_file_that_is_cut_short_is_named(corpora, tmp_path):
  cases.save_dataset(tmp_path / 'a', pyarrow.table({'text': TEXTS}))
  path = tmp_path / 'a' / 'data-00001-of-00002.arrow'
  whole, fields = path.read_bytes(), dict(format='arrow', files=str(tmp_path / 'a'))
  for less in 700, 8:  # Behind a batch, too, where only the mark of the end is missing.
    path.write_bytes(whole[:-less])
    with pytest.raises(ConfigError, match='data-00001-of-00002.arrow is damaged near row'):
      cases.config(tmp_path, fields).rows(8, 'train')
  path.unlink()
  with pytest.raises(ConfigError, match='is not whole: it lacks data-00001-of-00002.arrow'):
    cases.config(tmp_path, fields).rows(8, 'train')


def test_columns_must_be_there_and_hold_strings(tmp_path):
  parquet.write_table(pyarrow.table({'a': [1], 'b': ['x']}), tmp_path / 'a.parquet')
  fields = dict(format='parquet', files=str(tmp_path / 'a.parquet'))
  with pytest.raises(ConfigError, match=r"no column 'text'; its columns are \['a', 'b'\]"):
    cases.config(tmp_path, fields).rows(8, 'train')
  with pytest.raises(ConfigError, match="column 'a' holds int64, and must hold strings"):
    cases.config(tmp_path, fields | {'field': 'a'}).rows(8, 'train')


def test_nulls_and_dictionaries_in_columns(tmp_path):
  column = pyarrow.array(['aa', None, 'bb', 'aa']).dictionary_encode()
  parquet.write_table(pyarrow.table({'text': column}), tmp_path / 'a.parquet')
  source = raw.Parquet(files=str(tmp_path / 'a.parquet'))
  documents = [x for piece in source.pieces() for x in source.documents(piece)]
  assert [x for x in documents if isinstance(x, bytes)] == [b'aa', b'bb', b'aa']
  assert documents[1].where.endswith('a.parquet, row 1') and 'is null' in documents[1].reason


def test_saved_datasets_that_are_not_one(tmp_path):
  source = lambda: raw.Arrow(files=str(tmp_path)).pieces()
  with pytest.raises(ConfigError, match='no dataset that `save_to_disk` wrote'):
    source()
  (tmp_path / 'state.json').write_text('{"_data_files": [], "_indices_files": [{"filename": "i"}]}')
  with pytest.raises(ConfigError, match='flatten_indices'):
    source()
  (tmp_path / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  with pytest.raises(ConfigError, match=r"one of its folders \['train', 'test'\]"):
    source()


def test_files_are_globs_folders_lists_and_addresses(tmp_path):
  import fsspec

  for name in ('b.jsonl', 'a.jsonl.gz', 'c.txt', 'in/d[1].jsonl', '.hidden/e.jsonl'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('x')
  (tmp_path / 'empty.jsonl').touch()
  names = lambda *args: [os.path.relpath(x, tmp_path) for x in files.expand(*args)]
  root = str(tmp_path)
  assert names(root, ('.jsonl',)) == ['a.jsonl.gz', 'b.jsonl', 'empty.jsonl', 'in/d[1].jsonl']
  assert names(f'{root}/**/*.jsonl') == ['b.jsonl', 'empty.jsonl', 'in/d[1].jsonl']
  assert names([f'{root}/c.txt', f'{root}/b*.jsonl', f'{root}/c.txt']) == ['c.txt', 'b.jsonl']
  assert names(f'{root}/in/d[1].jsonl') == ['in/d[1].jsonl']  # A name before a glob.
  memory = fsspec.filesystem('memory')
  memory.pipe('/corpus/a.jsonl', b'{"text": "far"}\n')
  memory.pipe('/corpus/b.jsonl.gz', __import__('gzip').compress(b'{"text": "away"}\n'))
  source = raw.JsonLines(files='memory://corpus/*.jsonl*')
  assert [x for piece in source.pieces() for x in source.documents(piece)] == [b'far', b'away']
  for pattern in (f'{root}/*.parquet', f'{root}/empty.jsonl', 'memory://corpus/*.txt'):
    with pytest.raises(ConfigError, match='matches no file that holds anything'):
      files.expand(pattern)
  with pytest.raises(ConfigError, match='nowhere://'):
    files.expand('nowhere://bucket/*.jsonl')


def test_files_of_no_bytes(tmp_path):
  (tmp_path / 'a.txt').write_text('text')
  for name in ('b.txt', 'c.parquet', 'd.jsonl.gz', 'e.jsonl'):
    (tmp_path / name).touch()
  (tmp_path / 'f.jsonl').write_text('{"text": "x"}')
  path = lambda name: str(tmp_path / name)
  texts = dict(format='text', files=path('*.txt'))
  about = cases.config(tmp_path, texts, validation_share=0.0).about_documents(8)['one']
  assert about['documents'] == 1 and about['left_out'] == {'empty': 1, 'damaged': 0, 'length': 0}
  lines = dict(format='jsonl', files=path('*.jsonl'))
  assert cases.config(tmp_path, lines, validation_share=0.0).about_documents(8)['one']['documents'] == 1
  parquet.write_table(pyarrow.table({'text': ['x']}), tmp_path / 'g.parquet')
  (tmp_path / 'h.jsonl.gz').write_bytes(gzip.compress(b'{"text": "x"}'))
  for kind, names in ('parquet', '*.parquet'), ('jsonl', '*.jsonl.gz'):  # One was cut to nothing.
    with pytest.raises(ConfigError, match='no whole Parquet|which no compressed file has'):
      cases.config(tmp_path, dict(format=kind, files=path(names))).rows(8, 'train')


def test_a_byte_order_mark_is_no_text(tmp_path):
  mark = b'\xef\xbb\xbf'
  (tmp_path / 'a.jsonl').write_bytes(mark + b'{"text": "x"}\r\n{"text": "y"}\r\n')
  (tmp_path / 'a.txt').write_bytes(mark + b'x')
  read = lambda source: [x for piece in source.pieces() for x in source.documents(piece)]
  assert read(raw.JsonLines(files=str(tmp_path / 'a.jsonl'))) == [b'x', b'y']
  assert read(raw.Text(files=str(tmp_path / 'a.txt'))) == [b'x']


def test_a_compressed_file_with_bad_bytes_is_named(corpora, tmp_path):
  content = bytearray(pathlib.Path(corpora['gzip']['files']).read_bytes())
  content[300:340] = bytes(40)
  (tmp_path / 'a.jsonl.gz').write_bytes(content)
  fields = dict(format='jsonl', files=str(tmp_path / 'a.jsonl.gz'))
  with pytest.raises(ConfigError, match='a.jsonl.gz could not be read to its end'):
    cases.config(tmp_path, fields, damaged='drop').rows(8, 'train')


def test_arrow_files_of_both_kinds(tmp_path):
  table = pyarrow.table({'text': ['a', 'bb', 'ccc']})
  for kind in ('stream', 'file'):
    with getattr(pyarrow.ipc, f'new_{kind}')(str(tmp_path / f'{kind}.arrow'), table.schema) as writer:
      writer.write_table(table, max_chunksize=2)
  source = raw.Arrow(files=str(tmp_path / '*.arrow'))
  documents = [x for piece in source.pieces() for x in source.documents(piece)]
  assert documents == [b'a', b'bb', b'ccc'] * 2


def test_columns_that_are_hard_to_name(tmp_path):
  columns = {'a.b': ['x'], 's': [{'b': 'y'}], 'large': pyarrow.array(['z'], pyarrow.large_string())}
  parquet.write_table(pyarrow.table(columns), tmp_path / 'a.parquet')
  source = lambda field: raw.Parquet(files=str(tmp_path / 'a.parquet'), field=field)
  read = lambda field: [x for p in source(field).pieces() for x in source(field).documents(p)]
  assert read('a.b') == [b'x'] and read('large') == [b'z']
  with pytest.raises(ConfigError, match=r"no column 's.b'; its columns are \['a.b', 's', 'large'\]"):
    read('s.b')
  with pytest.raises(ConfigError, match="the column 's' holds struct<b: string>"):
    read('s')
  twice = pyarrow.table([pyarrow.array(['x'])] * 2, names=['text', 'text'])
  parquet.write_table(twice, tmp_path / 'a.parquet')
  with pytest.raises(ConfigError, match="several columns 'text'"):
    read('text')


def test_token_files_are_globs_too(corpora, tmp_path):
  for name in ('tokens', 'megatron'):
    whole, part = corpora[name]['files'], corpora[name]['files'][:-2]
    want = rows_of(tmp_path, corpora[name])
    assert_same(want, rows_of(tmp_path, corpora[name] | {'files': f'{part}*'}))
    with pytest.raises(ConfigError, match='matches nothing on this machine: no .*/none'):
      rows_of(tmp_path, corpora[name] | {'files': whole[: -len(name)] + 'none*'})
    with pytest.raises(ConfigError, match='must be a local path'):
      rows_of(tmp_path, corpora[name] | {'files': 'gs://bucket/x'})
  assert_same(want, rows_of(tmp_path, corpora['megatron'] | {'files': f'{whole}.bin'}))


def test_memory_holds_a_part_of_a_token_file(tmp_path, monkeypatch):
  """Not the whole file, nor a whole document, when its documents are found and its ids looked at."""
  ids = np.tile(np.arange(1, 251, dtype=np.uint16), 10_000)
  ids[[100, 90_000, -1]] = 0
  ids.tofile(tmp_path / 'a.bin')
  streams, peaks = [], []
  for scanned in tokens.SCANNED, 2**14:
    monkeypatch.setattr(tokens, 'SCANNED', scanned)
    tracemalloc.start()
    streams.append(tokens.FlatTokens(str(tmp_path / 'a.bin'), 'uint16', 0, tmp_path / f'{scanned}.npy'))
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert peaks[1] < 2**19 < ids.nbytes < peaks[0]
  assert streams[0].about.tolist() == streams[1].about.tolist() and len(streams[0].about) == 3
  assert streams[1].vocab_size == 251


def test_ids_that_are_no_ids(tmp_path):
  for ids in ([1, -3, 0], [1, 2**40, 0]):
    np.save(tmp_path / 'a.npy', np.array(ids))
    fields = dict(format='flat', files=str(tmp_path / 'a.npy'), separator=0)
    with pytest.raises(ConfigError, match=f'has ids from {min(ids)} to {max(ids)}; ids are 0 or more'):
      cases.config(tmp_path, fields).rows(8, 'train')


def test_ids_are_not_read_as_narrower_ones(tmp_path):
  """Every second token would be 0, and half of the loss with it."""
  rng = np.random.default_rng(0)
  for n_ids in 50_257, 256_000:
    path = tmp_path / f'{n_ids}.bin'
    np.append(rng.integers(2, n_ids, 100), 1).astype('uint32').tofile(path)
    with pytest.raises(ConfigError, match="looks like ids of four bytes.*dtype='uint32'"):
      tokens.FlatTokens(str(path), 'uint16', 1, tmp_path / 'index.npy')
    assert tokens.FlatTokens(str(path), 'uint32', 1, tmp_path / f'{n_ids}.npy').vocab_size <= n_ids
    path = tmp_path / f'{n_ids}_of_eight.bin'
    np.append(rng.integers(2, n_ids, 99), 1).astype('int64').tofile(path)
    for dtype in 'uint16', 'uint32':
      with pytest.raises(ConfigError, match='looks like ids of eight bytes.*save them as .npy'):
        tokens.FlatTokens(str(path), dtype, 1, tmp_path / 'index.npy')
  pairs = np.stack([rng.integers(100, 900, 50), rng.integers(1, 10, 50)], 1).astype('uint32')  # A word and a digit.
  pairs.tofile(tmp_path / 'pairs.bin')
  assert tokens.FlatTokens(str(tmp_path / 'pairs.bin'), 'uint32', 9, tmp_path / 'pairs.npy').read(0, 2).tolist() == pairs[0].tolist()
  few = rng.integers(0, 16, 100).astype('uint16')  # An alphabet of 16 letters.
  few.tofile(tmp_path / 'few.bin')
  stream = tokens.FlatTokens(str(tmp_path / 'few.bin'), 'uint16', 1, tmp_path / 'few.npy')
  assert stream.read(0, 100).tolist() == few.tolist()


@pytest.mark.parametrize('kind, pack', [('gzip', gzip.compress), ('bzip2', bz2.compress)])
def test_lines_that_are_packed_are_named(tmp_path, kind, pack):
  """Although damaged lines may be dropped: all would be."""
  (tmp_path / 'a.jsonl').write_bytes(pack(b'{"text": "one"}\n' * 100))
  fields = dict(format='jsonl', files=str(tmp_path / 'a.jsonl'))
  for tokenized in 'ahead', 'on_the_fly':
    with pytest.raises(ConfigError, match=f'a.jsonl holds no lines of JSON, but {kind}'):
      cases.config(tmp_path, fields, damaged='drop', tokenized=tokenized).rows(8, 'train')


def test_an_id_that_does_not_fit_is_not_written_as_another(tmp_path):
  with pytest.raises(ConfigError, match='gave a document the id 65543, which exceeds'):
    tokens.write_part(tmp_path / 'part', [np.array([1, 65543], np.uint32)], 'uint16')
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('number, dtype', [(20240520, 'uint16'), (20240801, 'uint32')])
def test_a_header_holds_no_ids(tmp_path, number, dtype):
  header = np.zeros(256, np.int32)
  header[:3] = number, 1, 100
  (tmp_path / 'a.bin').write_bytes(header.tobytes() + np.arange(100).astype(dtype).tobytes())
  with pytest.raises(ConfigError, match='a.bin has the header of llm.c: strip it'):
    tokens.FlatTokens(str(tmp_path / 'a.bin'), dtype, 0, tmp_path / 'index.npy')


@pytest.mark.parametrize('dtype', ['uint16', 'uint32'])
def test_any_id_may_come_first(tmp_path, dtype):
  """Also those whose bytes begin lzma, gzip, a file of `compress` or UTF-16."""
  for first in 93, 35615, 40223, 65279:
    np.array([first, 0, 0, 7, 0], dtype).tofile(tmp_path / 'a.bin')
    stream = tokens.FlatTokens(str(tmp_path / 'a.bin'), dtype, 0, tmp_path / f'{first}.npy')
    assert stream.read(0, 2).tolist() == [first, 0] and stream.vocab_size == first + 1
  with pytest.raises(ConfigError, match='could not be read as token ids'):
    tokens.FlatTokens(str(tmp_path), dtype, 0, tmp_path / 'none.npy')


def test_flat_and_megatron_files_that_will_not_do(corpora, tmp_path):
  flat = corpora['flat']
  with pytest.raises(ConfigError, match=r'separator=999 stands nowhere'):
    cases.config(tmp_path, flat | {'separator': 999}).rows(8, 'train')
  with pytest.raises(ConfigError, match="dtype='int8' must be"):
    cases.config(tmp_path, flat | {'dtype': 'int8'})
  np.savez(tmp_path / 'a.npz', np.zeros(8, np.uint16))
  with pytest.raises(ConfigError, match='a.npz is no bare file of ids, but compressed: unpack it'):
    cases.config(tmp_path, flat | {'files': str(tmp_path / 'a.npz')}).rows(8, 'train')
  np.save(tmp_path / 'two.npy', np.zeros((2, 2), np.uint16))
  with pytest.raises(ConfigError, match=r'ids in one dimension; it holds uint16 \(2, 2\)'):
    cases.config(tmp_path, flat | {'files': str(tmp_path / 'two.npy')}).rows(8, 'train')
  cases.write_megatron(tmp_path / 'm', TEXTS)
  fields = dict(format='megatron', files=str(tmp_path / 'm'))
  whole = (tmp_path / 'm.bin').read_bytes()
  (tmp_path / 'm.bin').write_bytes(whole[:-10])
  with pytest.raises(ConfigError, match='they do not belong together, or one is not whole'):
    cases.config(tmp_path, fields).rows(8, 'train')
  (tmp_path / 'm.bin').write_bytes(whole)
  index = (tmp_path / 'm.idx').read_bytes()
  (tmp_path / 'm.idx').write_bytes(index[:-8] + struct.pack('<q', 99))
  with pytest.raises(ConfigError, match='its documents do not divide its 60 sequences'):
    cases.config(tmp_path, fields).rows(8, 'train')
  (tmp_path / 'm.idx').write_bytes(index[:-10])
  with pytest.raises(ConfigError, match='m.idx is not whole'):
    cases.config(tmp_path, fields).rows(8, 'train')
  (tmp_path / 'm.idx').write_bytes(index[:20])
  with pytest.raises(ConfigError, match='m.idx is not whole'):
    cases.config(tmp_path, fields).rows(8, 'train')
  first, second = index[34:38], index[38:42]  # Lengths. Their sum does not tell that they changed places.
  (tmp_path / 'm.idx').write_bytes(index[:34] + second + first + index[42:])
  with pytest.raises(ConfigError, match='its sequences do not lie one behind the other'):
    cases.config(tmp_path, fields).rows(8, 'train')
  (tmp_path / 'm.idx').write_bytes(b'no index')
  with pytest.raises(ConfigError, match="no index of Megatron's"):
    cases.config(tmp_path, fields).rows(8, 'train')
  (tmp_path / 'm.bin').unlink()
  with pytest.raises(ConfigError, match='there is no file .*m.bin'):
    cases.config(tmp_path, fields).rows(8, 'train')
