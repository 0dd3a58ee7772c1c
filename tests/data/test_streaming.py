# SPDX-License-Identifier: Apache-2.0
"""Raw files that are tokenized while training reads them, against the same tokenized ahead."""

import collections
import json
import logging
import os
import shutil

import corpora_cases as cases
import numpy as np
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.data import pipeline, raw_rows, streaming
from dsa_jax.data.batch import Batch
from dsa_jax.data.corpora import files as places, raw
from dsa_jax.data.corpus import changes
from dsa_jax.data.packing import PACKINGS
from dsa_jax.data.pipeline import first_batches, make_iterator
from dsa_jax.data.raw_rows import Place
from dsa_jax.data.sources import DataConfig

TEXTS = cases.documents(80)


@pytest.fixture
def small(monkeypatch):
  """Makes windows of some documents, and pieces of some windows."""
  monkeypatch.setattr(raw_rows, 'WINDOW', 600)
  monkeypatch.setattr(raw_rows, 'WINDOW_ROWS', 1)
  monkeypatch.setattr(raw, 'PIECE', 1500)
  monkeypatch.setattr(pipeline, 'n_workers', lambda streams: 0)


def write_lines(path, texts) -> dict:
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  return dict(format='jsonl', files=str(path))


def on_the_fly(tmp_path, fields, **others) -> DataConfig:
  return cases.config(tmp_path, fields, **{'tokenized': 'on_the_fly'} | others)


def take(iterator, n: int) -> list[Batch]:
  return [next(iterator) for _ in range(n)]


def same(left: list[Batch], right: list[Batch]) -> bool:
  pairs = zip(left, right, strict=True)
  return all(np.array_equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True))


def rows_of(batches: list[Batch]) -> collections.Counter:
  """Counts rows by all that they hold."""
  return collections.Counter(
      b''.join(array[i].tobytes() for array in batch) for batch in batches for i in range(len(batch.tokens))
  )


def documents_of(batches: list[Batch]) -> collections.Counter:
  """Counts documents none of which is cut."""
  counts = collections.Counter()
  for batch in batches:
    for tokens, start, end in zip(batch.tokens, batch.start, batch.end):
      for first in np.unique(start[end > start]):
        counts[bytes(tokens[(start == first) & (end > start)][1:].astype(np.uint8))] += 1
  return counts


@pytest.mark.parametrize('packing', PACKINGS)
def test_one_window_has_the_rows_of_tokenizing_ahead(tmp_path, packing):
  fields = write_lines(tmp_path / 'a.jsonl', TEXTS)
  others = dict(packing=packing, min_tokens=20, long_tokens=200, long_times=2, validation_share=0.3)
  ahead = cases.config(tmp_path, fields, **others)
  for split in 'train', 'validation':
    want = ahead.rows(64, split).sources[0]
    now = on_the_fly(tmp_path, fields, **others).rows(64, split)
    wanted = rows_of([Batch(*(array[None] for array in want[i])) for i in range(len(want))])
    assert rows_of(take(make_iterator(now, 1, seed=5), len(want))) == wanted
    assert rows_of(first_batches(now, 1, len(want), seed=5)) == wanted


@pytest.mark.parametrize('name', ['text', 'gzip', 'zstd', 'parquet', 'arrow'])
def test_an_epoch_reads_each_document_of_a_side_once(small, tmp_path, name):
  fields = cases.write(tmp_path, TEXTS)[name]
  sides = []
  for split in 'train', 'validation':
    data = on_the_fly(tmp_path, fields, packing='best_fit', validation_share=0.3)
    windows, of_epoch = data.rows(1200, split).raw[0].windows(order=3), collections.defaultdict(list)
    for window in windows:
      if window.place.epoch == 2:
        break
      of_epoch[window.place.epoch] += [window.rows[int(i)] for i in window.order]
    first, second = ([Batch(*(x[None] for x in row)) for row in rows] for rows in of_epoch.values())
    assert documents_of(first) == documents_of(second)
    assert not same(first[:2], second[:2]) or name in ('gzip', 'zstd')  # Few rows may come in any order.
    sides.append(documents_of(first))
  assert sides[0] + sides[1] == collections.Counter(text.encode() for text in TEXTS)
  assert not sides[0].keys() & sides[1].keys()
  stream = cases.config(tmp_path, fields, validation_share=0.3).rows(64, 'train').sources[0]
  assert sorted(len(text) + 1 for text in sides[0]) == sorted(stream.lengths)


def test_shares_and_a_resume_give_the_same_batches(small, tmp_path):
  rows = on_the_fly(tmp_path, write_lines(tmp_path / 'a.jsonl', TEXTS)).rows(32, 'train')
  whole, states, batches = make_iterator(rows, 12, seed=3), [], []
  while not states or states[-1]['epoch'] < 2:
    states.append(json.loads(json.dumps(whole.get_state())))
    batches.append(next(whole))
  assert any(0 < state['row'] for state in states) and len({(x['group'], x['window']) for x in states}) > 5
  for n in 1, 2, 4:
    for first in {0, 1, 7, len(states) // 2 + 1, len(states) - 3}:
      shares = [make_iterator(rows, 12, seed=3, share=(i, n)) for i in range(n)]
      for iterator in shares:
        take(iterator, 2)
        iterator.set_state(states[first])
      for want in batches[first : first + 3]:
        parts = [next(iterator) for iterator in shares]
        assert same([Batch(*map(np.concatenate, zip(*parts)))], [want])
  assert whole.get_state()['counts']['documents'] > 2 * 70


@pytest.mark.nightly
def test_any_number_of_processes_gives_the_same_batches(monkeypatch, tmp_path):
  monkeypatch.setattr(raw_rows, 'WINDOW', 600)
  monkeypatch.setattr(raw_rows, 'WINDOW_ROWS', 1)
  fields = write_lines(tmp_path / 'a.jsonl', TEXTS)
  rows = on_the_fly(tmp_path, fields).rows(32, 'train')
  batches = {}
  for n in 0, 1, 3:
    monkeypatch.setattr(pipeline, 'n_workers', lambda streams: n)
    iterator = make_iterator(rows, 8, seed=3)
    before, state = take(iterator, 20), json.loads(json.dumps(iterator.get_state()))
    batches[n] = [*before, *take(iterator, 60)]
    iterator.set_state(state)
    assert same(take(iterator, 60), batches[n][20:])
    iterator.close()
  assert same(batches[0], batches[1]) and same(batches[0], batches[3])


def test_an_error_of_another_process_is_the_same_error(monkeypatch, tmp_path):
  monkeypatch.setattr(raw_rows, 'WINDOW', 600)
  monkeypatch.setattr(raw_rows, 'WINDOW_ROWS', 1)
  monkeypatch.setattr(pipeline, 'n_workers', lambda streams: 1)
  fields = write_lines(tmp_path / 'a.jsonl', TEXTS)
  with open(fields['files'], 'a') as file:
    file.write('no JSON\n')
  rows = on_the_fly(tmp_path, fields, validation_share=0.0).rows(32, 'train')
  iterator = make_iterator(rows, 8, seed=3)
  with pytest.raises(ConfigError, match=r'a.jsonl, the line at byte \d+: it is no JSON.*Mend it'):
    take(iterator, 1000)
  iterator.close()


def test_damaged_documents_are_counted_and_named(small, tmp_path, caplog):
  fields = write_lines(tmp_path / 'a.jsonl', [*TEXTS, '', 'x', 'y'])
  with open(fields['files'], 'a') as file:
    file.write('no JSON\n' * 12)
  with pytest.raises(ConfigError, match=r'the line at byte \d+: it is no JSON.*damaged=.drop.'):
    take(make_iterator(on_the_fly(tmp_path, fields).rows(32, 'train'), 4, seed=0), 1000)
  others = dict(damaged='drop', min_tokens=3, validation_share=0.0)
  data = on_the_fly(tmp_path, fields, **others)
  iterator = make_iterator(data.rows(32, 'train'), 4, seed=0)
  with caplog.at_level(logging.WARNING):
    while (state := iterator.get_state())['epoch'] == 0:
      last, _ = state, next(iterator)
  assert last['counts'] == {'documents': 82, 'empty': 1, 'damaged': 12, 'length': 3}
  assert 'a.jsonl, the line at byte' in caplog.text and 'left out so far: 12, such as' in caplog.text
  about = data.about_documents(32, [last, last])['one']
  assert about['left_out'] == {'empty': 2, 'damaged': 24, 'length': 6} and about['is_sample']
  ahead = cases.config(tmp_path, fields, **others).about_documents(32)['one']
  assert ahead['left_out'] == {'empty': 1, 'damaged': 12, 'length': 3}


def test_memory_holds_a_window_and_a_document(small, tmp_path):
  long = 'z' * 5000
  fields = write_lines(tmp_path / 'a.jsonl', [*TEXTS[:40], long, *TEXTS[40:]])
  [rows] = on_the_fly(tmp_path, fields, validation_share=0.0, packing='best_fit').rows(64, 'train').raw
  windows = []
  for window in rows.windows(order=0):
    if window.place.epoch:
      break
    windows += [window] if window.rows else []
  sizes = [int(window.rows.stream.about['bytes'].sum()) for window in windows]
  assert max(sizes) < 5000 + 600 and sorted(sizes)[-2] < 600 + max(len(x.encode()) for x in TEXTS)
  assert len(rows.pieces) > 5 and len({window.place for window in windows}) == len(windows) > 10
  [again] = [next(rows.windows(0, window.place)) for window in windows[7:8]]
  assert again.place == windows[7].place and np.array_equal(again.order, windows[7].order)


def test_shares_of_a_mixture_of_all_kinds(small, tmp_path):
  sources = {}
  for letter, weight in (('a', 6), ('b', 3), ('c', 1)):
    sizes = np.random.default_rng(ord(letter)).integers(1, 50, size=300)
    fields = write_lines(tmp_path / f'{letter}.jsonl', [letter * n + str(i) for i, n in enumerate(sizes)])
    sources[letter] = fields | dict(weight=weight)
  out = tmp_path / 'tokens'
  cases.tokenizing.tokenize([raw.JsonLines(files=sources['b']['files'])], 'bytes', out, quiet=True, workers=1)
  sources['b'] = dict(format='tokens', files=str(out), weight=3)
  data = cases.mixture(tmp_path, sources, tokenized='on_the_fly')
  iterator = make_iterator(data.rows(32, 'train'), 10, seed=0)
  batches = take(iterator, 60)
  held_out = first_batches(data.rows(32, 'validation'), 4, 4, seed=0)
  for some, margin in (batches, 0.02), (batches[:5], 0.07), (held_out, 0.1):
    tokens = np.concatenate([batch.tokens.ravel() for batch in some])
    counts = np.array([np.sum(tokens == ord(letter)) for letter in 'abc'])
    np.testing.assert_allclose(counts / counts.sum(), [0.6, 0.3, 0.1], atol=margin)
  state, want = json.loads(json.dumps(iterator.get_state())), take(iterator, 5)
  shares = [make_iterator(data.rows(32, 'train'), 10, 0, share=(i, 2)) for i in range(2)]
  for share in shares:
    share.set_state(state)
  parts = zip(*(take(share, 5) for share in shares))
  assert same([Batch(*map(np.concatenate, zip(*both))) for both in parts], want)
  assert data.bytes_per_target(33, 16) == pytest.approx(1, rel=0.05)
  assert [about.get('is_sample', False) for about in data.about_documents(32, [state]).values()] == [True, False, True]


def test_validation_rows_are_fixed_and_different(small, tmp_path):
  fields = write_lines(tmp_path / 'a.jsonl', TEXTS)
  data = on_the_fly(tmp_path, fields, validation_share=0.3)
  assert data.bytes_per_target(32, 6) == pytest.approx(1, rel=0.05)  # The end of a document has no byte.
  some = first_batches(data.rows(32, 'validation'), 2, 3, seed=0)
  many = first_batches(data.rows(32, 'validation'), 4, 20, seed=0)
  again = first_batches(on_the_fly(tmp_path, fields, validation_share=0.3).rows(32, 'validation'), 4, 20, 0)
  assert same(many, again) and max(rows_of(many).values()) == 1
  assert rows_of(some) <= rows_of(first_batches(data.rows(32, 'validation'), 1, 40, seed=0))
  with pytest.raises(ConfigError, match=r'need 4000 different rows, but the source has \d+'):
    first_batches(data.rows(32, 'validation'), 40, 100, seed=0)
  own = fields | dict(validation_files=write_lines(tmp_path / 'b.jsonl', ['b' * 70] * 3)['files'])
  held_out = first_batches(on_the_fly(tmp_path, own).rows(32, 'validation'), 1, 2, seed=0)
  assert set(np.unique([batch.tokens for batch in held_out])) <= {0, ord('b'), 256}


@pytest.mark.parametrize(
    'texts, fields, split',
    [
        ([''], {}, 'train'),
        (['one'], dict(validation_share=0.0), 'validation'),
        (['one', 'two'], dict(min_tokens=9), 'train'),
        (['one', 'two'], dict(validation_share=1e-9), 'validation'),
    ],
)
def test_where_no_document_will_do(tmp_path, texts, fields, split):
  data = on_the_fly(tmp_path, write_lines(tmp_path / 'a.jsonl', texts), **fields)
  with pytest.raises(ConfigError, match=rf'a.jsonl has no document of two tokens or more for {split}'):
    data.rows(8, split)


def test_files_that_change_while_they_are_read_end_no_run_in_a_loop(small, tmp_path):
  fields = write_lines(tmp_path / 'a.jsonl', TEXTS)
  iterator = make_iterator(on_the_fly(tmp_path, fields).rows(32, 'train'), 4, seed=0)
  next(iterator)
  write_lines(tmp_path / 'a.jsonl', ['' for _ in TEXTS])
  with pytest.raises(ConfigError, match='no document of two tokens or more'):
    take(iterator, 1000)


def test_a_place_that_is_no_more_is_passed_over(small, tmp_path):
  rows = on_the_fly(tmp_path, write_lines(tmp_path / 'a.jsonl', TEXTS)).rows(32, 'train')
  iterator = make_iterator(rows, 4, seed=0)
  state = iterator.get_state() | Place(1, 0, 10**6)._asdict() | {'row': 5}
  iterator.set_state(state)
  next(iterator)
  assert (iterator.get_state()['group'], iterator.get_state()['window']) == (1, 0)


def test_a_description_tells_content_and_not_where_it_lies(tmp_path):
  fields = write_lines(tmp_path / 'a.jsonl', TEXTS)
  describe = lambda name: on_the_fly(tmp_path, fields | {'files': str(tmp_path / name)}).describe()
  before = describe('a.jsonl')
  os.utime(tmp_path / 'a.jsonl', (1, 1))
  shutil.move(tmp_path / 'a.jsonl', tmp_path / 'b.jsonl')
  assert describe('b.jsonl') == before and not (tmp_path / 'cache').exists()
  write_lines(tmp_path / 'b.jsonl', [*TEXTS[:-1], TEXTS[-1][::-1]])
  assert describe('b.jsonl') != before


def test_a_description_tells_what_has_changed_in_the_middle(tmp_path):
  """And still fits those of earlier versions, which knew the ends alone."""
  path, text = tmp_path / 'a.txt', ''.join(f'{i} words of a document\n' for i in range(20_000))
  describe = lambda: on_the_fly(tmp_path, dict(format='text', files=str(path))).describe()
  path.write_text(text)
  before = describe()
  assert describe() == before
  for a, b in (120_000, 320_000), (250_000, 250_010):
    path.write_text(text[:a] + text[a:b].swapcase() + text[b:])
    assert path.stat().st_size == len(text) and changes(before, describe(), 'source')
  of_ends = {name: known.split(', with blocks')[0] for name, known in before.items()}
  assert not changes(of_ends, describe(), 'source')
  path.write_text(text[::-1])
  assert changes(of_ends, describe(), 'source')


@pytest.mark.parametrize('size', [places.END, 2 * places.END, 2 * places.END + 1, 3 * places.END, 2**21 + 7])
def test_every_part_of_a_file_is_looked_at(tmp_path, size):
  """Up to about a megabyte every byte, and beyond that blocks from one end to the other."""
  path, content = tmp_path / 'a.txt', bytearray(size)
  path.write_bytes(content)
  before = places.ends_of(str(path)), places.middle_of(str(path))
  length = 1 if size < 2**20 else 2 * places.BLOCK
  for i in [*range(0, size - length, size // 50), size - length]:
    path.write_bytes(content[:i] + b'x' * length + content[i + length :])
    assert (places.ends_of(str(path)), places.middle_of(str(path))) != before, i


def test_the_field_is_checked(tmp_path):
  fields = write_lines(tmp_path / 'a.jsonl', TEXTS)
  with pytest.raises(ConfigError, match=r"data.tokenized='never' must be one of \('ahead', 'on_the_fly'\)"):
    on_the_fly(tmp_path, fields, tokenized='never')
  with pytest.raises(ConfigError, match='is for a mixture with a source of raw files'):
    DataConfig(tokenized='on_the_fly')
  with pytest.raises(ConfigError, match='is for a mixture with a source of raw files'):
    on_the_fly(tmp_path, dict(format='tokens', files='x'))


def test_processes_begin_for_large_corpora_alone(tmp_path, monkeypatch):
  rows = on_the_fly(tmp_path, write_lines(tmp_path / 'a.jsonl', TEXTS)).rows(32, 'train').raw
  monkeypatch.setattr(os, 'cpu_count', lambda: 6)
  assert streaming.n_workers(rows) == 0
  monkeypatch.setattr(raw_rows, 'WINDOW', 600)
  monkeypatch.setattr(raw_rows, 'WINDOW_ROWS', 1)
  [many] = on_the_fly(tmp_path, write_lines(tmp_path / 'a.jsonl', TEXTS)).rows(32, 'train').raw
  assert (streaming.n_workers([many]), streaming.n_workers([many] * 4)) == (6, 1)
