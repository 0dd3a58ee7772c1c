# SPDX-License-Identifier: Apache-2.0
"""Folders of tokens: whole or absent, the same after a kill, and refused where they are not whole."""

import errno
import fcntl
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import corpora_cases as cases
import numpy as np
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.data.corpora import raw, tokenizing, tokens
from dsa_jax.data.sources import DataConfig

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path, monkeypatch):
  monkeypatch.setattr(raw, 'PIECE', 2000)
  monkeypatch.setattr(tokens, 'RECORD', 50)
  lines = [json.dumps({'text': text}) + '\n' for text in cases.documents(100)]
  (tmp_path / 'a.jsonl').write_text(''.join(lines))
  return raw.JsonLines(files=str(tmp_path / 'a.jsonl'))


def tokenize(source, out, **others):
  tokenizing.tokenize([source], 'bytes', out, quiet=True, **({'workers': 1} | others))


def content(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def size(folder):
  """Returns the bytes of a folder in which others write, 0 where it is not there."""
  try:
    return sum(path.stat().st_size for path in folder.iterdir())
  except FileNotFoundError:  # Files are renamed, the folder, too.
    return 0


def test_reads_back_any_part_of_the_stream(source, tmp_path):
  tokenize(source, tmp_path / 'out')
  folder = tokens.TokenFolder(tmp_path / 'out')
  want = np.concatenate([cases.ids_of(text) for text in cases.documents(100)])
  np.testing.assert_array_equal(folder.read(0, len(want)), want)
  rng = np.random.default_rng(0)
  for first in rng.integers(0, len(want), size=50).tolist():
    n = int(rng.integers(0, min(700, len(want) - first)))
    np.testing.assert_array_equal(folder.read(first, n), want[first : first + n])
  assert len(json.loads((tmp_path / 'out/manifest.json').read_text())['parts']) > 5
  assert int(folder.about['tokens'].sum()) == len(want)


def test_goes_on_where_it_was_stopped(source, tmp_path, monkeypatch):
  tokenize(source, tmp_path / 'whole')
  done = 0
  real = tokenizing._tokenize_piece

  def stop_after_three(*args):
    nonlocal done
    if done == 3:
      raise KeyboardInterrupt
    done += 1
    return real(*args)

  monkeypatch.setattr(tokenizing, '_tokenize_piece', stop_after_three)
  with pytest.raises(KeyboardInterrupt):
    tokenize(source, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
  part = tmp_path / 'out.partial/part-00004.array_record'  # A part that has no record is made anew.
  part.write_bytes(b'half')
  monkeypatch.setattr(tokenizing, '_tokenize_piece', real)
  tokenize(source, tmp_path / 'out')
  assert content(tmp_path / 'out') == content(tmp_path / 'whole')
  assert not list(tmp_path.glob('out.*'))


def test_another_job_does_not_go_on_there(source, tmp_path):
  tokenize(source, tmp_path / 'out')
  (tmp_path / 'out.partial').mkdir()
  (tmp_path / 'out.partial/plan.json').write_text('{"damaged": "stop"}')
  shutil.rmtree(tmp_path / 'out')
  record = tmp_path / 'out.partial/part-00000.json'
  record.touch()
  with pytest.raises(ConfigError, match='or with another tokenizer: what differs is version, sources'):
    tokenize(source, tmp_path / 'out')
  record.unlink()  # Nothing is lost where nothing was done.
  tokenize(source, tmp_path / 'out')


def test_damaged_documents_may_be_dropped_after_they_stopped_a_job(source, tmp_path):
  with open(source.files, 'a') as file:
    file.write('3\n')
  with pytest.raises(ConfigError, match='it holds a int, not an object. Mend it, or leave'):
    tokenize(source, tmp_path / 'out')
  assert any((tmp_path / 'out.partial').glob('part-*.json'))
  tokenize(source, tmp_path / 'out', damaged='drop')
  tokenize(source, tmp_path / 'anew', damaged='drop')
  assert content(tmp_path / 'out') == content(tmp_path / 'anew')


def test_files_that_change_while_they_are_read_are_named(source, tmp_path, monkeypatch):
  real = tokenizing._tokenize_piece

  def write_meanwhile(*args):
    with open(source.files, 'a') as file:
      file.write('{"text": "more"}\n')
    return real(*args)

  monkeypatch.setattr(tokenizing, '_tokenize_piece', write_meanwhile)
  with pytest.raises(ConfigError, match=f'{source.files} changed while it was tokenized'):
    tokenize(source, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_corpus_of_more_parts_than_open_files(source, tmp_path, monkeypatch):
  monkeypatch.setattr(raw, 'PIECE', 300)
  tokenize(source, tmp_path / 'out')
  folder = tokens.TokenFolder(tmp_path / 'out')
  few = functools.lru_cache(4)(tokens._reader.__wrapped__)
  monkeypatch.setattr(tokens, '_reader', few)
  want = np.concatenate([cases.ids_of(text) for text in cases.documents(100)])
  np.testing.assert_array_equal(folder.read(0, len(want)), want)
  assert few.cache_info().currsize == 4 and few.cache_info().misses > 30


def test_a_part_that_cannot_be_written_whole_is_not_there(tmp_path):
  """A limit on the size of files stands for a full disk."""
  script = (
      'import pathlib, resource, sys\n'
      'import numpy as np\n'
      'from dsa_jax.data.corpora import tokens\n'
      'resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n'
      'documents = [np.arange(10_000, dtype=np.uint32)] * 100\n'
      'try:\n'
      "  tokens.write_part(pathlib.Path(sys.argv[1]) / 'part', documents, 'uint16')\n"
      'except OSError as error:\n'
      '  print(error)\n'
  )
  command = [sys.executable, '-c', script, str(tmp_path)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert 'part could not be written: write() failed: File too large' in done.stdout, done.stderr
  assert not list(tmp_path.iterdir())


def test_two_jobs_into_one_folder(source, tmp_path, monkeypatch):
  """The one that waited finds the folder there."""
  real = tokenizing._claim

  def claim_late(partial, plan):
    monkeypatch.setattr(tokenizing, '_claim', real)
    thread.start()
    time.sleep(0.3)
    real(partial, plan)

  def other():
    with pytest.raises(ConfigError, match='out exists; choose another folder'):
      tokenize(source, tmp_path / 'out')
    ended.append(True)

  ended, thread = [], threading.Thread(target=other)
  monkeypatch.setattr(tokenizing, '_claim', claim_late)
  tokenize(source, tmp_path / 'out')
  thread.join()
  assert ended and tokens.TokenFolder(tmp_path / 'out').vocab_size == 258
  assert not list(tmp_path.glob('out.*'))


def test_a_script_without_a_guard_may_start_processes(source, tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(
      'import pathlib\n'
      'from dsa_jax.data.corpora import raw, tokenizing\n'
      'raw.PIECE = 2000\n'
      f'source = raw.JsonLines(files={source.files!r})\n'
      f"tokenizing.cached(source, 'bytes', pathlib.Path({str(tmp_path / 'cache')!r}), 'stop')\n"
      "print('once')\n"
  )
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  done = subprocess.run(
      [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=60
  )
  assert done.stdout.count('once') == 1 and done.stdout.count('100 documents') == 1, done.stderr


def test_a_cache_that_cannot_be_written_is_named(source, tmp_path):
  (tmp_path / 'file').touch()
  flat = dict(format='flat', files=str(tmp_path / 'x.npy'), separator=0)
  np.save(tmp_path / 'x.npy', np.array([1, 2, 0]))
  for fields in dict(format='jsonl', files=source.files), flat:
    config = DataConfig(source='mixture', sources={'x': fields}, cache=str(tmp_path / 'file/cache'))
    with pytest.raises(ConfigError, match='could not be kept in .*/file/cache.* by data.cache'):
      config.rows(8, 'train')


def test_a_disk_without_locks_is_said_and_used(source, tmp_path, monkeypatch, caplog):
  def refuse(handle, kind):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, 'flock', refuse)
  tokenize(source, tmp_path / 'out')
  assert tokens.read_manifest(tmp_path / 'out')['documents'] == 100
  assert 'No locks available: let no other process' in caplog.text


def test_a_cache_that_is_whole_need_not_be_written(source, tmp_path, monkeypatch):
  config = lambda: cases.config(tmp_path, dict(format='jsonl', files=source.files)).rows(16, 'train')
  config()
  monkeypatch.setattr(tokenizing, 'locked', lambda path: pytest.fail('a lock is a file'))
  config()


def test_what_is_there_is_not_written_over(source, tmp_path):
  (tmp_path / 'out').mkdir()
  with pytest.raises(ConfigError, match='out exists; choose another folder'):
    tokenize(source, tmp_path / 'out')


def test_left_out_documents_are_counted_and_named(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n{"text": ""}\n3\n{"text": "b"}\n4\n')
  source = raw.JsonLines(files=str(tmp_path / 'a.jsonl'))
  tokenize(source, tmp_path / 'out', damaged='drop')
  manifest = tokens.read_manifest(tmp_path / 'out')
  assert [manifest[name] for name in ('documents', 'empty', 'damaged')] == [2, 1, 2]
  assert 'the line at byte 27: it holds a int' in manifest['examples_of_damaged'][0]
  (tmp_path / 'b.jsonl').write_text('{"text": ""}\n')
  with pytest.raises(ConfigError, match='there is no document: 1 are empty'):
    tokenize(raw.JsonLines(files=str(tmp_path / 'b.jsonl')), tmp_path / 'none')


def test_a_folder_that_is_not_whole_is_refused(source, tmp_path):
  tokenize(source, tmp_path / 'out')
  part = tmp_path / 'out/part-00003.array_record'
  whole = part.read_bytes()
  part.write_bytes(whole[:-7])
  with pytest.raises(ConfigError, match=f'part-00003.array_record has {len(whole) - 7} bytes and must'):
    tokens.TokenFolder(tmp_path / 'out')
  part.write_bytes(b'\xff' * len(whole))
  with pytest.raises(ConfigError, match='part-00003.array_record is damaged: '):
    stream = tokens.TokenFolder(tmp_path / 'out')
    stream.read(0, int(stream.about['tokens'].sum()))
  part.write_bytes(whole)
  manifest = tmp_path / 'out/manifest.json'
  text = manifest.read_text()
  manifest.write_text(text.replace('"dtype"', '"type"'))
  with pytest.raises(ConfigError, match="manifest.json is damaged: KeyError 'dtype'"):
    tokens.TokenFolder(tmp_path / 'out')
  manifest.write_text(text)
  documents = tmp_path / 'out/documents.npy'
  np.save(documents, np.load(documents)[::-1][:-1])
  with pytest.raises(ConfigError, match='they do not belong together'):
    tokens.TokenFolder(tmp_path / 'out')
  part.unlink()
  with pytest.raises(ConfigError, match='part-00003.array_record has None bytes'):
    tokens.TokenFolder(tmp_path / 'out')
  manifest.write_text(text.replace('"version": 1', '"version": 2'))
  with pytest.raises(ConfigError, match='is of version 2; this is 1'):
    tokens.TokenFolder(tmp_path / 'out')
  manifest.write_text(text[:50])
  with pytest.raises(ConfigError, match='is no folder of tokens'):
    tokens.TokenFolder(tmp_path / 'out')


def test_raw_files_are_tokenized_once(source, tmp_path, monkeypatch):
  config = lambda: cases.config(tmp_path, dict(format='jsonl', files=source.files))
  config().rows(16, 'train')
  monkeypatch.setattr(tokenizing, 'tokenize', lambda *args, **kwargs: pytest.fail('again'))
  config().rows(16, 'train')
  with open(source.files, 'a') as file:
    file.write('{"text": "more"}\n')
  with pytest.raises(pytest.fail.Exception, match='again'):
    config().rows(16, 'train')


@pytest.mark.nightly
def test_kills_at_any_moment_lose_and_double_nothing(tmp_path):
  lines = [json.dumps({'text': text}) + '\n' for text in cases.documents(20_000)]
  for i in range(8):
    (tmp_path / f'{i}.jsonl').write_text(''.join(lines[i::8]))
  command = [sys.executable, '-m', 'dsa_jax.tokenize', f'--files={tmp_path}/*.jsonl', '--tokenizer=bytes']

  def start(out):
    return subprocess.Popen([*command, str(out)], cwd=ROOT, start_new_session=True)

  assert start(tmp_path / 'whole').wait() == 0
  rng, out, kills = np.random.default_rng(0), tmp_path / 'out', 0
  partial = out.with_name('out.partial')
  while not out.exists():
    process = start(out)
    written, goal = size(partial), rng.integers(1, 2_000_000)
    while process.poll() is None and size(partial) < written + goal:
      time.sleep(0.002)
    if process.poll() is None:
      subprocess.run(['pkill', '-KILL', '-g', str(process.pid)], check=True)
      assert process.wait() == -signal.SIGKILL
      kills += 1
      time.sleep(0.5)
  assert kills and content(out) == content(tmp_path / 'whole')
