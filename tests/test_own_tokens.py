# SPDX-License-Identifier: Apache-2.0
"""A recipe on tokens of one's own, from the text to the report and to sampling."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from tokenizer_families import byte_level

from configs import quickstart
from dsa_jax import train as train_module
from dsa_jax.config import ConfigError
from dsa_jax.data import pipeline, raw_rows
from dsa_jax.data.corpora import tokenizing
from dsa_jax.data.corpora.raw import JsonLines
from dsa_jax.data.corpora.tokens import read_manifest
from dsa_jax.data.tokenizer import Pretrained
from dsa_jax.data.tokenizer_files import open_tokenizer
from dsa_jax.inference.sampler import Sampler
from dsa_jax.reporting.metrics import read_metrics
from dsa_jax.train import train
from dsa_jax.training.origin import keep_tokenizer
from dsa_jax.training.recipe import read_recipe

ROOT = pathlib.Path(__file__).parents[1]


def write_corpus(folder):
  texts = [path.read_text() for path in sorted((ROOT / 'configs').glob('*.py'))]
  pieces = [text[i : i + 400] for text in texts for i in range(0, len(text) - 40, 400)]  # None is short.
  lines = ''.join(json.dumps({'text': piece}) + '\n' for piece in [*pieces, '', 'x', 'y', 'z'])
  lines += '3\n'
  (folder / 'a.jsonl').write_text(lines)
  tokenizer = byte_level(['<s>', '<|end|>'])
  (folder / 'mine').mkdir()
  tokenizer.save(str(folder / 'mine/tokenizer.json'))
  settings = {'add_bos_token': True, 'bos_token': '<s>', 'eos_token': '<|end|>'}
  (folder / 'mine/tokenizer_config.json').write_text(json.dumps(settings))


def config_of(folder):
  c = quickstart.get_config('tiny')
  c.workdir, c.recipe = str(folder / 'run'), ('dense', 'warmup')
  c.model.vocab_size = 384
  c.data.source, c.data.tokenizer, c.data.cache = 'mixture', str(folder / 'mine'), str(folder / 'cache')
  c.data.validation_share, c.data.damaged, c.data.min_tokens = 0.2, 'drop', 4
  c.data.sources.own = dict(format='jsonl', files=str(folder / 'a.jsonl'))
  c.report.update(batches=1)
  for entry in c.stages.values():
    entry.update(steps=2, seq_len=63)  # One device takes any length.
  return c


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp('own')
  write_corpus(folder)
  return folder, train(config_of(folder))


def test_the_report_has_bits_per_byte_and_documents(trained):
  folder, results = trained
  assert results['unit'] == 'token' and 1 < results['bytes_per_target'] < 4
  about = results['documents']['own']
  assert about['documents'] > 20 and sum(about['lengths']) == about['documents'] and about['cut'] > 0
  assert sum(about['context']) == pytest.approx(1)
  text = (folder / 'run/report.md').read_text()
  assert about['left_out'] == {'empty': 1, 'damaged': 1, 'length': 3}
  row = ['own', *(f'{about[x]:,}' for x in ('documents', 'tokens', 'rows', 'cut')), f'{about["filled"]:.1%}']
  assert f'| {" | ".join([*row, "1", "1", "3"])} |' in text
  for words in ('nats per token', 'bits per byte', '## Documents', 'own, queries'):
    assert words in text


def test_the_run_keeps_its_tokenizer(trained):
  folder, _ = trained
  sampler = Sampler.load(folder / 'run/checkpoints/dense')
  assert isinstance(sampler.tokenizer, Pretrained)
  assert sampler.tokenizer.encode('def') == open_tokenizer(str(folder / 'mine')).encode('def')
  assert isinstance(open_tokenizer(str(folder / 'run/checkpoints/dense')), Pretrained)


def test_a_run_keeps_the_ids_that_end_its_texts(trained, tmp_path):
  """A release may name them in its config.json alone, and a converted checkpoint holds that."""
  folder, _ = trained
  for name, record in ('release', {'eos_token_id': [1, 5]}), ('converted', {'source': {'config': {'eos_token_id': [1, 5]}}}):
    release, workdir = tmp_path / name, tmp_path / f'run of {name}'
    release.mkdir()
    workdir.mkdir()
    shutil.copyfile(folder / 'mine/tokenizer.json', release / 'tokenizer.json')
    (release / 'config.json').write_text(json.dumps(record))
    keep_tokenizer(workdir, str(release))
    kept, given = open_tokenizer(str(workdir)), open_tokenizer(str(release))
    assert kept.stop == given.stop == (1, 5) and kept.digest == given.digest


def test_a_recipe_reads_text_by_the_tokenizer_of_its_origin(trained, tmp_path):
  folder, _ = trained
  c = config_of(folder)
  c.workdir, c.recipe, c.data.tokenizer = str(tmp_path / 'next'), ('warmup',), ''
  c.stages.warmup.init_from = str(folder / 'run/checkpoints/dense')
  recipe = read_recipe(c)
  assert recipe.data.tokenizer == str((folder / 'run/origin').resolve())
  c.model.vocab_size = 256
  with pytest.raises(ConfigError, match='vocab_size=256 is too small for the mixture data: it needs 320'):
    read_recipe(c)


def test_tokens_must_be_in_the_ids_of_the_origin(trained, tmp_path):
  folder, _ = trained
  (tmp_path / 'b.jsonl').write_text('{"text": "some text"}\n')
  tokenizing.tokenize([JsonLines(files=str(tmp_path / 'b.jsonl'))], 'bytes', tmp_path / 'out', quiet=True)
  c = config_of(folder)
  c.workdir, c.recipe, c.data.tokenizer = str(tmp_path / 'next'), ('warmup',), ''
  c.stages.warmup.init_from = str(folder / 'run/checkpoints/dense')
  c.data.sources.own = dict(format='tokens', files=str(tmp_path / 'out'))
  with pytest.raises(ConfigError, match='was made with another tokenizer than .*origin'):
    read_recipe(c)


def test_a_resume_on_another_corpus_is_refused(trained):
  folder, _ = trained
  c = config_of(folder)
  c.stages.warmup.steps = 3
  text = (folder / 'a.jsonl').read_text()
  (folder / 'a.jsonl').write_text(text + '{"text": "more"}\n')
  try:
    with pytest.raises(ConfigError, match='the data has changed .*different .own'):
      train(c)
  finally:
    (folder / 'a.jsonl').write_text(text)


@pytest.mark.nightly
def test_tokenizing_on_the_fly_survives_a_failure_between_steps(tmp_path, monkeypatch):
  """Its windows are small, so that the run goes through several, and through more than an epoch."""
  write_corpus(tmp_path)
  lines = (tmp_path / 'a.jsonl').read_text().splitlines(keepends=True)
  (tmp_path / 'a.jsonl').write_text(''.join(lines[-24:]))
  monkeypatch.setattr(raw_rows, 'WINDOW', 1000)
  monkeypatch.setattr(raw_rows, 'WINDOW_ROWS', 1)
  monkeypatch.setattr(pipeline, 'n_workers', lambda streams: 0)
  c = config_of(tmp_path)
  c.recipe, c.data.tokenized, c.save_every, c.log_every = ('dense',), 'on_the_fly', 5, 1
  c.stages.dense.update(steps=60)
  c.report.rules, c.data.validation_share = ('indexer',), 0.5
  real, count = train_module.record, itertools.count(1)

  def fail_once(*args):
    if next(count) == 38:
      raise KeyboardInterrupt
    return real(*args)

  monkeypatch.setattr(train_module, 'record', fail_once)
  with pytest.raises(KeyboardInterrupt):
    train(c)
  about = train(c)['documents']['own']
  assert about['is_sample'] and about['left_out']['damaged'] > 1 and not (tmp_path / 'cache').exists()
  assert 'Of own, which is tokenized while it is read' in (tmp_path / 'run/report.md').read_text()
  c.workdir = str(tmp_path / 'undisturbed')
  train(c)
  rows = lambda run: read_metrics(tmp_path / run / 'metrics.csv')
  losses = lambda run: [row.value for row in rows(run) if row.name == 'lm_loss']
  assert losses('run') == losses('undisturbed') and len(losses('run')) == 60


def test_the_command_writes_a_folder_that_trains(trained, tmp_path):
  folder, _ = trained
  command = [sys.executable, '-m', 'dsa_jax.tokenize', f'--files={folder}/a.jsonl', f'--tokenizer={folder}/mine']
  run = lambda *args: subprocess.run([*command, *args], cwd=ROOT, capture_output=True, text=True)
  done = run('--damaged=drop', str(tmp_path / 'out'))
  assert done.returncode == 0 and 'left out: 1 empty, 1 damaged.' in done.stdout, done.stderr
  raw, tokens = config_of(folder), config_of(folder)
  tokens.data.sources.own = dict(format='tokens', files=str(tmp_path / 'out'))
  assert read_recipe(raw).data.describe() == read_recipe(tokens).data.describe()
  again = run(str(tmp_path / 'out'))
  assert again.returncode == 1 and 'out exists; choose another folder' in again.stderr
  assert 'Traceback' not in again.stderr and again.stderr.count('\n') == 1


CONFIG = """
from configs import base, quickstart

def get_config():
  c = quickstart.get_config('tiny')
  c.data = base.get_config().data
  c.data.source, c.data.cache = 'mixture', '{folder}/cache'
  c.data.sources.one = dict(format='jsonl', files='{folder}/one.json', validation_files='{folder}/one.txt.json')
  c.data.sources.two = dict(format='jsonl', files='{folder}/two.json')
  return c
"""


def test_the_command_goes_on_in_a_mixture(tmp_path):
  (tmp_path / 'mine.py').write_text(CONFIG.format(folder=tmp_path))
  for name, text in ('one', '{"text": "a"}'), ('one.txt', '{"text": "bb"}'), ('two', 'no JSON'):
    (tmp_path / f'{name}.json').write_text(text)
  out = str(tmp_path / 'out')
  command = [sys.executable, '-m', 'dsa_jax.tokenize', f'--config={tmp_path}/mine.py']
  run = lambda *args: subprocess.run([*command, *args], cwd=ROOT, capture_output=True, text=True)
  stopped = run(out)
  assert stopped.returncode == 1 and 'two.json, the line at byte 0: it is no JSON' in stopped.stderr
  assert {path.name for path in (tmp_path / 'out').iterdir()} == {'one'}
  (tmp_path / 'two.json').write_text('{"text": "ccc"}')
  done = run(out)
  assert 'out/one is there already, of the same files' in done.stdout, done.stderr
  counts = {p.name: read_manifest(p)['tokens'] for p in (tmp_path / 'out').iterdir()}
  assert counts == {'one': 2, 'one.validation': 3, 'two': 4}


@pytest.mark.parametrize(
    'args, message',
    [
        (['--workers=0', 'out'], 'flag --workers=0: 0 is not a positive integer'),
        (['gs://bucket/out'], "the folder to write='gs://bucket/out' must be a local path"),
    ],
)
def test_arguments_of_the_command(tmp_path, args, message):
  (tmp_path / 'a.json').write_text('{"text": "a"}')
  command = [sys.executable, '-m', 'dsa_jax.tokenize', '--files=a.json', '--tokenizer=bytes', *args]
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
  assert done.returncode == 1 and message in done.stderr
  assert [path.name for path in tmp_path.iterdir()] == ['a.json']


def test_a_format_is_known_by_endings(tmp_path):
  for name in ('a.json', 'b.jsonl.gz', 'c.parquet', 'd.txt', 'e.arrow', 'f/state.json'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('x')
  script = (
      'import sys\n'
      'from dsa_jax.tokenize import guess_format\n'
      'for names in sys.argv[1:]:\n'
      '  try: print(type(guess_format(names.split(","), None, "text")).__name__)\n'
      '  except ValueError as error: print(error)\n'
  )
  names = ['a.json', 'a.json,b.jsonl.gz', 'c.parquet', 'd.txt', 'e.arrow', 'f', 'a.json,d.txt']
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-c', script, *names]
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
  *kinds, mixed = done.stdout.splitlines()
  assert kinds == ['JsonLines', 'JsonLines', 'Parquet', 'Text', 'Arrow', 'Arrow'], done.stderr
  assert mixed == "the files end in ['.json', '.txt']: give one kind, or --format."
