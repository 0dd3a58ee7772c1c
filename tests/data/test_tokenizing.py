# SPDX-License-Identifier: Apache-2.0
"""Folders of tokens: whole or absent, the same after a kill, and refused where they are not whole."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import corpora_cases as cases
import numpy as np
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.data.corpora import raw, tokenizing, tokens

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
  assert not (tmp_path / 'out.partial').exists()


def test_another_job_does_not_go_on_there(source, tmp_path):
  tokenize(source, tmp_path / 'out')
  (tmp_path / 'out.partial').mkdir()
  (tmp_path / 'out.partial/plan.json').write_text('{"other": 1}')
  shutil.rmtree(tmp_path / 'out')
  with pytest.raises(ConfigError, match='was begun with other files, or with another tokenizer'):
    tokenize(source, tmp_path / 'out')


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
  part.unlink()
  with pytest.raises(ConfigError, match='part-00003.array_record has None bytes'):
    tokens.TokenFolder(tmp_path / 'out')
  manifest = tmp_path / 'out/manifest.json'
  text = manifest.read_text()
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
  while not out.exists():
    process = start(out)
    try:
      process.wait(timeout=float(rng.uniform(2, 4 + kills)))
    except subprocess.TimeoutExpired:
      subprocess.run(['pkill', '-KILL', '-g', str(process.pid)], check=True)
      assert process.wait() == -signal.SIGKILL
      kills += 1
      time.sleep(0.5)
  assert kills and content(out) == content(tmp_path / 'whole')
