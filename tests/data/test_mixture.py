# SPDX-License-Identifier: Apache-2.0
"""A mixture of sources: its shares, its fields, and the same batches however it is read."""

import json
import pathlib
import subprocess
import sys

import corpora_cases as cases
import numpy as np
import pytest
from tokenizer_families import FAMILIES

from dsa_jax.config import ConfigError
from dsa_jax.data.corpora import tokenizing
from dsa_jax.data.corpora.raw import Text
from dsa_jax.data.corpus import changes
from dsa_jax.data.packing import PACKINGS
from dsa_jax.data.pipeline import first_batches, first_rows, make_iterator
from dsa_jax.data.sources import DataConfig

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def sources(tmp_path):
  """Three sources, each of a letter."""
  fields = {}
  for letter, weight in (('a', 6), ('b', 3), ('c', 1)):
    sizes = np.random.default_rng(ord(letter)).integers(1, 50, size=400)
    texts = [letter * n + str(i) for i, n in enumerate(sizes)]
    lines = ''.join(json.dumps({'text': text}) + '\n' for text in texts)
    (tmp_path / f'{letter}.jsonl').write_text(lines)
    fields[letter] = dict(format='jsonl', files=str(tmp_path / f'{letter}.jsonl'), weight=weight)
  return fields


def letters(batches):
  tokens = np.concatenate([batch.tokens.ravel() for batch in batches])
  counts = np.array([np.sum(tokens == ord(letter)) for letter in 'abc'])
  return counts / counts.sum()


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


def test_tokens_come_in_the_shares_of_weights(sources, tmp_path):
  data = cases.mixture(tmp_path, sources)
  batches = take(make_iterator(data.rows(32, 'train'), 10, seed=0), 60)
  np.testing.assert_allclose(letters(batches), [0.6, 0.3, 0.1], atol=0.02)
  np.testing.assert_allclose(letters(batches[:5]), [0.6, 0.3, 0.1], atol=0.07)
  held_out = first_batches(data.rows(32, 'validation'), 4, 4, seed=0)
  assert np.all(letters(held_out) > 0)


def test_documents_in_another_order_are_another_corpus(sources, tmp_path):
  """Sums over documents would not tell; an earlier version described them so."""
  before, path = cases.mixture(tmp_path, sources).describe(), pathlib.Path(sources['a']['files'])
  first, second, *others = path.read_text().splitlines(keepends=True)
  path.write_text(''.join([second, first, *others]))
  now = cases.mixture(tmp_path, sources).describe()
  assert changes(before, now, 'source') == '1 source is different (a)'
  earlier = {name: text.split(', in the order')[0] for name, text in before.items()}
  assert earlier != before and changes(earlier, before) == ''


def test_shares_of_hosts_make_up_the_batch_and_resume_anywhere(sources, tmp_path):
  rows = cases.mixture(tmp_path, sources).rows(32, 'train')
  whole = make_iterator(rows, 12, seed=3)
  shares = [make_iterator(rows, 12, seed=3, share=(i, 4)) for i in range(4)]
  for _ in range(30):
    parts = [next(share).tokens for share in shares]
    np.testing.assert_array_equal(np.concatenate(parts), next(whole).tokens)
  state = json.loads(json.dumps(whole.get_state()))
  want = next(whole)
  for n in 1, 2, 3:  # Other numbers of hosts go on with the same batch.
    again = [make_iterator(rows, 12, seed=3, share=(i, n)) for i in range(n)]
    for iterator in again:
      iterator.set_state(state)
    np.testing.assert_array_equal(np.concatenate([next(x).tokens for x in again]), want.tokens)


def test_files_of_their_own_for_validation(sources, tmp_path):
  one = sources['a'] | {'validation_files': sources['b']['files']}
  data = cases.mixture(tmp_path, {'x': one})
  assert letters(first_batches(data.rows(32, 'validation'), 4, 4, seed=0))[1] == 1
  assert letters(take(make_iterator(data.rows(32, 'train'), 4, seed=0), 40))[0] == 1


def test_validation_files_that_are_trained_on_are_named(sources, tmp_path, caplog):
  a, b, c = (sources[letter]['files'] for letter in 'abc')
  data = cases.mixture(tmp_path, {'x': sources['a'] | {'validation_files': c}, 'y': sources['b']})
  data.describe()
  assert not caplog.records
  data = cases.mixture(
      tmp_path, {'x': sources['a'] | {'files': [a, b], 'validation_files': [c, b]}, 'y': sources['c']}
  )
  data.describe()
  [record] = caplog.records
  assert f'{b} is of x (validation) and of the files of x: training reads what' in record.message


def test_a_source_that_is_used_up_is_named(sources, tmp_path):
  rows = cases.mixture(tmp_path, sources).rows(32, 'validation')
  with pytest.raises(ConfigError, match=r'rows of the mixture are needed, and its sources have \d+'):
    first_batches(rows, len(rows) // 2, 2, seed=0)


def test_bytes_of_text_for_each_target(sources, tmp_path):
  data = cases.mixture(tmp_path, sources)
  assert data.unit == 'byte' and data.bytes_per_target(32, 4) == pytest.approx(1)
  tokens = dict(format='flat', files='x.bin', separator=0)
  assert cases.mixture(tmp_path, {'x': tokens}).unit == 'token'


def test_bytes_for_each_target_where_rows_are_filled_unlike(sources, tmp_path):
  """Weights are shares of rows; a row of one source has many targets, a row of another has few."""
  for letter, n in ('a', 15), ('b', 19):  # Rows of 33 tokens hold two documents of `a`, one of `b`.
    lines = ''.join(json.dumps({'text': f'{i:0{n}}'}) + '\n' for i in range(400))
    pathlib.Path(sources[letter]['files']).write_text(lines)
  both = {letter: sources[letter] | {'weight': 0.5} for letter in 'ab'}
  data = cases.mixture(tmp_path, both, packing='best_fit')
  batches = first_batches(data.rows(33, 'validation'), 2, 6, seed=0)
  stream = data._open('a')
  stream.about = stream.about.copy()
  stream.about['bytes'] *= 5  # As if its tokens were of five bytes each.
  n_targets = np.concatenate([batch.weights.sum(axis=1) for batch in batches])
  many = n_targets > n_targets.mean()  # Those rows are of `a`.
  want = (5 * n_targets[many].sum() + n_targets[~many].sum()) / n_targets.sum()
  assert many.sum() == len(many) / 2 and want > 3.2
  assert data.bytes_per_target(33, 12) == pytest.approx(want, rel=0.06)  # And the share of the end.


@pytest.mark.parametrize('packing', PACKINGS)
def test_bytes_for_each_target_are_those_of_the_rows_that_are_scored(packing, tmp_path):
  """Documents of all lengths have from one to nine bytes for each token, and some are cut."""
  rng = np.random.default_rng(0)
  texts = ['x' * int(n) for n in rng.integers(2, 90, size=40)]
  (tmp_path / 'x.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  fields = {'format': 'jsonl', 'files': str(tmp_path / 'x.jsonl'), 'validation_files': str(tmp_path / 'x.jsonl')}
  data = cases.mixture(tmp_path, {'x': fields}, packing=packing)
  rows = data.rows(32, 'validation')
  [source] = rows.sources
  about = data._open('x (validation)').about
  factors = 1 + np.arange(len(about)) % 9
  data._open('x (validation)').about = about = about.copy()
  about['bytes'] = factors * (about['tokens'] - 1)  # Each target has so many bytes.
  for n in 1, 7:
    n_bytes = n_targets = 0
    for held, i in first_rows(rows, n, seed=0):
      assert held is source
      pieces, firsts = held.layout.pieces(i), np.cumsum(about['tokens']) - about['tokens']
      for at, size in zip(pieces.at, pieces.n):
        document = np.flatnonzero(firsts <= at)[-1]
        targets = min(size, firsts[document] + about['tokens'][document] - 1 - at)
        n_bytes, n_targets = n_bytes + factors[document] * targets, n_targets + targets
    got = data.bytes_per_target(32, n)
    assert got == pytest.approx(float(n_bytes) / float(n_targets)) and got != pytest.approx(factors.mean(), rel=1e-3)
    scored = first_batches(rows, 1, n, seed=0)
    assert sum(batch.weights.sum() for batch in scored) == n_targets
  [(held, i)] = first_rows(rows, 1, seed=0)
  own = np.searchsorted(np.cumsum(about['tokens']), held.layout.pieces(i).at, side='right')
  about['bytes'][np.setdiff1d(np.arange(len(about)), own)] = 0
  assert [data.bytes_per_target(32, n) is None for n in (1, 7)] == [False, True]  # Only those of the rows count.


def test_a_part_of_a_document_has_the_bytes_of_its_own_text(tmp_path):
  (tmp_path / 'x.jsonl').write_text(json.dumps({'text': 'a' * 40 + 'z' * 30}) + '\n')
  fields = {'format': 'jsonl', 'files': str(tmp_path / 'x.jsonl'), 'validation_files': str(tmp_path / 'x.jsonl')}
  [rows] = cases.mixture(tmp_path, {'x': fields}).rows(32, 'validation').sources
  decode = lambda ids: ''.join('é' if i == ord('z') else 'e' for i in ids)  # As if a z stood for two bytes.
  known = [rows.text_of([i], decode) for i in range(3)]
  assert [n for _, n in known] == [32, 32, 6]  # Targets. The first 40 of 70 are of one byte, of 100.
  np.testing.assert_allclose([n_bytes for n_bytes, _ in known], [70 * x / 100 for x in (32, 8 + 48, 12)])
  np.testing.assert_allclose([rows.text_of([i])[0] for i in range(3)], [32, 32, 6])
  # As tokenizers of bytes do with what begins or ends within a character: one mark for each byte.
  cut = lambda ids: '\ufffd' * len(ids) if len(ids) < 70 else 'x' * len(ids)
  np.testing.assert_allclose([rows.text_of([i], cut)[0] for i in range(3)], [32, 32, 6])


@pytest.mark.parametrize('family', ['qwen', 'llama_2'])
def test_bytes_are_shared_out_by_the_tokenizer(family, tmp_path):
  """Words come first, of several bytes for each token, and then letters that it lacks, of one."""
  FAMILIES[family][0]().save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'x.jsonl').write_text(json.dumps({'text': 'the tree of the house ' * 20 + '\u1000\u1005' * 60}) + '\n')
  fields = {'format': 'jsonl', 'files': str(tmp_path / 'x.jsonl'), 'validation_files': str(tmp_path / 'x.jsonl')}
  data = cases.mixture(tmp_path, {'x': fields}, tokenizer=str(tmp_path))
  [rows] = data.rows(48, 'validation').sources
  of_rows = [rows.text_of([i], data._tokenizer.decode) for i in range(len(rows))]
  known = [n_bytes / n for n_bytes, n in of_rows if n]
  assert known[0] > 1.05 * known[-1]
  np.testing.assert_allclose(sum(n_bytes for n_bytes, _ in of_rows), rows.stream.about['bytes'].sum(), rtol=0.02)
  [(_, first)] = first_rows(data.rows(48, 'validation'), 1, seed=0)
  assert data.bytes_per_target(48, 1) == pytest.approx(of_rows[first][0] / of_rows[first][1])


def test_a_folder_of_another_tokenizer_is_refused(tmp_path):
  texts = cases.documents(20)
  fields = cases.write(tmp_path, texts)['tokens']
  other = cases.mixture(tmp_path, {'x': fields}, tokenizer='bytes')
  assert other.vocab_size == 258
  FAMILIES['qwen'][0]().save(str(tmp_path / 'tokenizer.json'))
  wrong = cases.mixture(tmp_path, {'x': fields}, tokenizer=str(tmp_path))
  with pytest.raises(ConfigError, match=r'data.sources.x: .* another tokenizer than .*set data.special_tokens as'):
    wrong.rows(32, 'train')
  (tmp_path / 'a.txt').write_text('text')
  of_text = dict(format='text', files=str(tmp_path / 'a.txt'))
  tokenizing.tokenize([Text(files=of_text['files'])], str(tmp_path), tmp_path / 'other', quiet=True)
  of_tokens = dict(format='tokens', files=str(tmp_path / 'other'))
  for sources in {'a': fields, 'b': of_tokens}, {'a': of_text, 'b': of_tokens}:
    with pytest.raises(ConfigError, match='data.sources.b: .* was made with another tokenizer than'):
      cases.mixture(tmp_path, sources).rows(8, 'train')
  both = fields | {'files': [fields['files'], of_tokens['files']]}
  with pytest.raises(ConfigError, match='were made with different tokenizers'):
    cases.mixture(tmp_path, {'a': both}).rows(8, 'train')


def test_data_that_changes_is_described_otherwise(sources, tmp_path):
  describe = lambda: cases.mixture(tmp_path, sources).describe()
  before = describe()
  assert before == describe() and set(before) == {'a', 'b', 'c'}
  with open(tmp_path / 'b.jsonl', 'a') as file:
    file.write('{"text": "more"}\n')
  after = describe()
  assert [name for name in before if before[name] != after[name]] == ['b']


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'format': 'csv'}, r"data.sources.one: format='csv' must be one of"),
        ({'format': 'jsonl', 'files': 'x', 'column': 'a'}, r"has no field 'column'; those of jsonl are"),
        ({'format': 'jsonl', 'files': 'x', 'weight': 0}, 'weight=0 must be a number above 0'),
        ({'format': 'jsonl', 'files': 'x', 'weight': True}, 'weight=True must be a number above 0'),
        ({'format': 'flat', 'files': 'x'}, "data.sources.one: .*'separator'"),
        ({'files': 'x'}, 'format=None must be one of'),
        ({'format': 'text', 'files': []}, r'files=\[\] must be a string, or a list'),
    ],
)
def test_fields_of_a_source(tmp_path, fields, message):
  with pytest.raises(ConfigError, match=message):
    cases.config(tmp_path, fields)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'source': 'mixture'}, "a 'mixture' needs at least one"),
        ({'sources': {'x': {'format': 'text', 'files': ''}}}, 'the others have none'),
        ({'source': 'mixture', 'sources': {'a/b': {}}}, "the name 'a/b' must be of letters"),
        ({'damaged': 'ignore'}, "data.damaged='ignore' must be one of"),
        ({'special_tokens': 'drop'}, "data.special_tokens='drop' must be one of"),
        ({'special_tokens': 'ids'}, "data.special_tokens='ids' would change nothing"),
        ({'source': 'web'}, "data.source='web' must be one of"),
    ],
)
def test_fields_of_data(fields, message):
  with pytest.raises(ConfigError, match=message):
    DataConfig(**fields)


def test_values_of_other_types():
  """They reach a config from a command line. Tests check annotations, users' processes do not."""
  cases = {
      "{'format': 'jsonl', 'files': 3}": 'one: files=3 must be a string, or a list',
      "{'format': 'jsonl', 'files': [3]}": 'files=[3] must be a string, or a list',
      "{'format': 'jsonl', 'files': 'x', 'field': 3}": 'field=3 must be the name of a field',
      "{'format': 'flat', 'files': 'x', 'separator': '0'}": "separator='0' must be an id",
      "'x'": "data.sources.one='x' must be fields, such as",
  }
  script = 'from dsa_jax.data.sources import read_member\n' + ''.join(
      f'try: read_member("one", {fields})\nexcept ValueError as error: print(error)\n' for fields in cases
  )
  run = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
  lines = run.stdout.splitlines()
  assert len(lines) == len(cases), run.stderr
  for line, message in zip(lines, cases.values(), strict=True):
    assert message in line
