# SPDX-License-Identifier: Apache-2.0
"""A whole tiny recipe: what it leaves behind, and that no kill changes a number."""

import dataclasses
import errno
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import quickstart
from dsa_jax import train
from dsa_jax.config import ConfigError
from dsa_jax.inference.load import load_model
from dsa_jax.reporting.meter import OF_THE_MACHINE, Meter
from dsa_jax.reporting.metrics import MetricsWriter, read_metrics
from dsa_jax.training.checkpoint import Checkpoints, saved_stage, saved_steps
from dsa_jax.training.recipe import read_recipe
from dsa_jax.training.run import Run
from dsa_jax.training.workdir import check_workdir, write_config

ROOT = pathlib.Path(__file__).parents[1]
COMMAND = [sys.executable, '-m', 'dsa_jax.train', '--config=configs/quickstart.py:tiny']


def tiny(folder, **changes):
  c = quickstart.get_config('tiny')
  c.workdir = str(folder)
  with c.unlocked():
    c.update_from_flattened_dict(changes)
  return c


def start(workdir, *flags):
  return subprocess.Popen(
      [*COMMAND, f'--config.workdir={workdir}', *flags],
      cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )


def run(workdir, *flags):
  """Runs the command in a process of its own, to its end."""
  process = start(workdir, *flags)
  output, _ = process.communicate()
  return process.returncode, output


def kill_at(workdir, n_rows, delay):
  """Starts the command and kills it `delay` seconds after it has written so many metrics."""
  process, csv = start(workdir), workdir / 'metrics.csv'
  while process.poll() is None and (not csv.exists() or csv.read_bytes().count(b'\n') < n_rows):
    time.sleep(0.01)
  time.sleep(delay)
  process.kill()  # SIGKILL.
  process.communicate()
  assert process.returncode == -signal.SIGKILL, 'the run ended before it could be killed'


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('undisturbed')
  code, output = run(workdir)
  assert code == 0, output
  return workdir, output


def arrays(workdir, entry, step):
  with ocp.PyTreeCheckpointer() as checkpointer:
    tree = checkpointer.restore(workdir / 'checkpoints' / entry / str(step) / 'state')
  return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(tree)}


def same_numbers(a: pathlib.Path, b: pathlib.Path):
  rows = lambda x: [r for r in read_metrics(x / 'metrics.csv') if r.name not in OF_THE_MACHINE]
  assert rows(a) == rows(b)
  for entry in ('dense', 'baseline', 'warmup', 'sparse'):
    ours, theirs = arrays(a, entry, 8), arrays(b, entry, 8)
    assert ours.keys() == theirs.keys()
    for name in ours:
      np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f'{entry} {name}')
  reports = [json.loads((x / 'report.json').read_text()) for x in (a, b)]
  for name in ('validation_bits', 'captured_mass_by_rule', 'bits_by_position'):
    assert reports[0][name] == reports[1][name]


def test_leaves_a_whole_report(undisturbed):
  workdir, output = undisturbed
  report = json.loads((workdir / 'report.json').read_text())
  names = {'dense_before', 'dense_baseline', 'sparse', 'window_sinks', 'random', 'oracle'}
  assert report['validation_bits'].keys() == names
  assert all(0 < bits < 9 for bits in report['validation_bits'].values())
  assert len(report['captured_mass']) == report['n_layers']
  assert report['index_topk'] == 8 and report['context'] == 64 and report['seconds'] > 0
  for name in ('report.md', 'overview.png', 'training.png', 'selection.png'):
    assert (workdir / name).stat().st_size > 1000
  assert 'fair baseline' in output and 'report.md' in output
  assert list((workdir / 'tensorboard' / 'sparse').iterdir())
  for name, entry in json.loads((workdir / 'config.json').read_text())['stages'].items():
    assert saved_stage(workdir / 'checkpoints' / name) == entry['stage']


def test_logs_what_a_researcher_wants(undisturbed):
  rows = read_metrics(undisturbed[0] / 'metrics.csv')
  names = {(row.stage, row.name) for row in rows}
  for stage in ('dense', 'baseline', 'warmup', 'sparse'):
    assert {(stage, 'validation_loss'), (stage, 'tokens_per_second')} <= names
    assert ((stage, 'backbone_lr') in names) == (stage != 'warmup')
    assert ((stage, 'indexer_lr') in names) == (stage in ('warmup', 'sparse'))
  by_row = {row[:3]: row.value for row in rows}
  rates = quickstart.get_config('tiny').stages.dense.backbone_lr * np.array([1, 0.5 * 1.1])
  np.testing.assert_allclose([by_row['dense', i, 'backbone_lr'] for i in (1, 5)], rates, rtol=1e-6)
  assert by_row['dense', 8, 'validation_loss'] < by_row['dense', 4, 'validation_loss'] < 8
  for stage in ('warmup', 'sparse'):
    for name in ('index_kl', 'captured_mass', 'topk_recall', 'neighbour_overlap', 'selected_distance'):
      assert {(stage, f'{name}/layer_{i}') for i in range(2)} <= names
    assert (stage, 'layer_overlap/layer_0') in names
  warmup = [r.value for r in rows if r.stage == 'warmup' and r.name.startswith('index_kl')]
  assert np.mean(warmup[-4:]) < np.mean(warmup[:4])


def test_layers_with_a_window_have_no_divergence_and_no_indexer(tmp_path):
  config = {'model.n_layers': 3, 'model.window_layers': (1,), 'model.sliding_window': 8}
  recipe = read_recipe(tiny(tmp_path, **config))
  metrics = {'lm_loss': jnp.float32(2.5), 'index_kl': jnp.array([0.25, 0.0, 0.75])}
  metrics['layer_grad_norm_indexer'] = jnp.array([1.5, 2.5])
  meter = Meter(64, 0, lambda batch: 0.0, 1)
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints, MetricsWriter(tmp_path) as writer:
    text = train.record(1, metrics, 'warmup', checkpoints, writer, recipe, meter)
    metrics['layer_grad_norm_indexer'] *= jnp.array([1, jnp.nan])
    with pytest.raises(train.NotFiniteError, match='first in layer 2, in the backward pass'):
      train.record(2, metrics, 'warmup', checkpoints, writer, recipe, meter)
  assert text == 'loss 2.500  KL 0.500'
  values = {row.name: row.value for row in read_metrics(tmp_path / 'metrics.csv')}
  numbers = {'index_kl': [0.25, 0.75], 'layer_grad_norm_indexer': [1.5, 2.5]}
  for name, (first, last) in numbers.items():
    own = {key: value for key, value in values.items() if key.startswith(name)}
    assert own == {f'{name}/layer_0': first, f'{name}/layer_2': last}


@pytest.mark.nightly
def test_sigkill_at_random_moments_changes_nothing(undisturbed, tmp_path):
  moments = random.Random(0)
  total = (undisturbed[0] / 'metrics.csv').read_text().count('\n')
  for n_rows in [0, *sorted(moments.sample(range(1, total - 20), 3))]:
    kill_at(tmp_path, n_rows, delay=moments.uniform(0, 0.3))
  code, output = run(tmp_path)
  assert code == 0, output
  same_numbers(undisturbed[0], tmp_path)


@pytest.mark.nightly
def test_a_failure_between_any_two_steps_changes_nothing(undisturbed, tmp_path, monkeypatch):
  """Stops right after each save was asked for, and half-way between saves, in one process."""
  record, seen = train.record, []

  def fail_once(step, metrics, name, *rest):
    if (name, step) in (('dense', 6), ('warmup', 4), ('sparse', 5)) and (name, step) not in seen:
      seen.append((name, step))
      raise KeyboardInterrupt
    return record(step, metrics, name, *rest)

  monkeypatch.setattr(train, 'record', fail_once)
  for _ in range(3):
    with pytest.raises(KeyboardInterrupt):
      train.train(tiny(tmp_path))
  train.train(tiny(tmp_path))
  assert len(seen) == 3
  same_numbers(undisturbed[0], tmp_path)


def test_running_again_changes_nothing_and_prints_the_report(undisturbed, monkeypatch, capsys):
  """It is evaluated again only if there is something else to report."""
  workdir, output = undisturbed
  before, report = ((workdir / name).read_text() for name in ('metrics.csv', 'report.json'))
  runs = []

  def evaluate(run, began):
    runs.append(run)
    return json.loads(report) | {'report': dataclasses.asdict(run.recipe.report)}

  monkeypatch.setattr(train, 'evaluate_recipe', evaluate)
  monkeypatch.setattr(train, 'all_programs', lambda run: {})
  assert train.train(tiny(workdir)) == json.loads(report)
  table = capsys.readouterr().out
  assert not runs and 'fair baseline' in table and table in output
  assert (workdir / 'report.json').read_text() == report
  again = train.train(tiny(workdir, **{'report.batches': 1}))
  assert len(runs) == 1 and again['report']['batches'] == 1
  (workdir / 'report.json').unlink()
  train.train(tiny(workdir))
  assert len(runs) == 2
  later = time.time() + 1  # Clocks of file systems tick every few milliseconds.
  os.utime(workdir / 'checkpoints' / 'sparse' / '8', (later, later))  # As if it had just been trained.
  train.train(tiny(workdir))
  assert len(runs) == 3
  assert (workdir / 'metrics.csv').read_text() == before


def test_another_config_is_refused(undisturbed):
  with pytest.raises(ValueError, match=r'(?s)belongs to another config.*seed: 0 there, 7 here'):
    train.train(tiny(undisturbed[0], seed=7))


def test_misspelt_field_names_the_right_one(tmp_path):
  code, output = run(tmp_path / 'new', '--config.model.index_top=4')
  assert code != 0 and 'index_topk' in output
  assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'stages.sparse.seq_len': 8}, r"must exceed .*index_topk=8"),
        ({'stages.sparse.steps': 0}, r'stages\.sparse: steps=0 must be at least 1'),
        ({'stages.sparse.stage': 'spares'}, r"must be one of .*'sparse'"),
        ({'stages.warmup.indexer_lr': 0.0}, r'indexer_lr must be above 0'),
        ({'stages.warmup.init_from': 'sparse'}, r'must come before it'),
        ({'stages.warmup.init_from': ''}, r'init_from must say'),
        ({'stages.dense.micro_batches': 3}, r'batch_size=2 must be a multiple'),
        ({'stages.dense.seq_len': 4096}, r'exceeds .*max_seq_len=256'),
        ({'stages.dense.attention': 'sparse'}, r'of a dense stage'),
        ({'model.vocab_size': 100}, r'vocab_size=100 is too small'),
        ({'model.n_heads': 0}, r'n_heads=0 must be at least 1'),
        ({'model.n_limited_groups': 5}, r'n_limited_groups=5'),
        ({'data.files': 'no/such/*.txt'}, r'no/such/\*\.txt.* matches no file'),
        ({'data.source': 'texts'}, r"must be one of .'text', 'recall', 'mixture'"),
        ({'selection': 'best'}, r"selection='best' must be one of"),
        ({'remat': 'all'}, r"remat='all' must be one of .'none', 'layer', 'selection', 'products'"),
        ({'recipe': ('dense', 'dence')}, r"names \['dence'\]"),
        ({'workdir': ''}, r'workdir must name a folder'),
        ({'model.index_tpk': 8}, r"did you mean 'index_topk'"),
        ({'report.rules': ('nonsense',)}, r"report: rules=\('nonsense',\) names \['nonsense'\]; the rules are"),
        ({'report.rules': ('random', 'random')}, r'name each of its rules once'),
        ({'report.rules': ()}, r'at least one'),
        ({'report.rules': ('random',)}, r"must hold recipe.selection='indexer'"),
        ({'report.seq_len': 4096}, r'report.seq_len=4096 exceeds .*max_seq_len=256'),
        ({'report.seq_len': 8}, r'report.seq_len=8 must exceed .*index_topk=8'),
        ({'report.batches': 0}, r'report: batches=0 must be at least 1'),
        ({'report.batches': 10**7}, r'config.report, of held-out data, in rows of 64 .* rows.* Give more data, or'),
        ({'report.sparse': 'spars'}, r"report.sparse='spars' must be one of the stages"),
        ({'report.dense_before': 'warmup'}, r"'warmup' is a warmup stage; it must be a dense one"),
        ({'stages.sparse.init_from': 'warmpu'}, r"init_from='warmpu' is neither .* Did you mean the entry 'warmup'"),
        ({'stages.warmup.init_may_differ': ('theta',)}, r"init_may_differ names \['theta'\]"),
        ({'model.vocab_size': 1024}, r'vocab_size=1024 is of another alphabet than the text data, which has 258'),
        ({'workdir': 'gs://bucket/run'}, r"workdir='gs://bucket/run' must be a local path"),
        ({'stages.warmup.init_from': 's3://bucket/run'}, r"init_from='s3://bucket/run' must be a local path"),
        ({'stages.dense.schedule': 'linear'}, r"schedule='linear' must be one of .*'wsd'.*MODULE:FUNCTION"),
        ({'optim.decays': 'none'}, r"optim: decays='none' must be one of"),
        ({'seed': -1}, r'seed=-1 must be within 0 and 4294967295'),
        ({'seed': 2**32}, r'seed=4294967296 must be within'),
        ({'resume': 'oldest'}, r"resume='oldest' must be one of \('latest', 'last_good'\)"),
        ({'backend': 'cuda'}, r"backend='cuda' must be one of .*'reference', 'xla', 'tpu', 'gpu'"),
        ({'backend': 'tpu'}, r"backend='tpu': its kernels run on a TPU, and jax finds a cpu here"),
        ({'backend': 'gpu'}, r"backend='gpu': its kernels run on a Hopper GPU"),
        ({'optim.b1': 1.0}, r'optim: b1=1.0 must be at least 0 and below 1'),
        ({'stages.dense.backbone_lr': float('nan')}, r'backbone_lr must be above 0'),
    ],
)
def test_bad_configs_say_what_to_do_and_write_nothing(tmp_path, changes, message):
  workdir = tmp_path / 'new'
  with pytest.raises(ConfigError, match=message):
    train.train(tiny(workdir, **changes))
  assert not workdir.exists()


def test_unwritable_workdir(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='cannot be written'):
    train.train(tiny(tmp_path / 'file' / 'run'))


def test_missing_init_from(tmp_path):
  config = tiny(tmp_path, recipe=('warmup',), **{'stages.warmup.init_from': str(tmp_path / 'none')})
  with pytest.raises(ConfigError, match='is neither an earlier entry of the recipe nor a folder'):
    train.train(config)


def test_one_stage_starts_from_another_run(undisturbed, tmp_path, monkeypatch):
  for name in 'report_programs', 'evaluate_recipe':  # Its report is not looked at.
    monkeypatch.setattr(train, name, lambda *_: {})
  monkeypatch.setattr(train, 'write_report', lambda *_: None)
  source = undisturbed[0] / 'checkpoints' / 'dense'
  changes = {'stages.warmup.init_from': str(source), 'recipe': ('warmup',)}
  train.train(tiny(tmp_path, **changes))
  ours, theirs = arrays(tmp_path, 'warmup', 8), arrays(undisturbed[0], 'warmup', 8)
  for name in ours:
    np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_another_model_is_refused(undisturbed, tmp_path):
  source = undisturbed[0] / 'checkpoints' / 'dense'
  changes = {'stages.warmup.init_from': str(source), 'recipe': ('warmup',), 'model.index_n_heads': 3}
  with pytest.raises(ValueError, match=r"(?s)holds another model.*indexer.*\(.*4.*\) there"):
    train.train(tiny(tmp_path, **changes))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  changes = {'recipe': ('dense',), 'stages.dense.backbone_lr': 1e30, 'optim.clip_norm': 1e30}
  with pytest.raises(FloatingPointError, match=r'(?s)at step \d+ of stage dense.*layer \d.*checkpoint'):
    train.train(tiny(tmp_path, **changes))
  saved = [p.name for p in (tmp_path / 'checkpoints' / 'dense').iterdir() if p.name.isdigit()]
  for step in saved:
    assert all(np.isfinite(x).all() for x in arrays(tmp_path, 'dense', step).values())


def test_a_batch_that_cannot_be_read_loses_no_step_that_is_to_be_saved(tmp_path, monkeypatch):
  """The device gets batches one step ahead, so the next one is read before a step has ended."""
  place, placed = train.place_batch, []

  def place_three(rows, *args):
    if len(placed) == 2:
      raise ConfigError('a damaged document')
    placed.append(rows)
    return place(rows, *args)

  monkeypatch.setattr(train, 'place_batch', place_three)
  changes = {'recipe': ('dense',), 'save_every': 2, 'stages.dense.steps': 3}
  with pytest.raises(ConfigError, match='a damaged document'):
    train.train(tiny(tmp_path, **changes))
  assert saved_steps(tmp_path / 'checkpoints' / 'dense') == [2]


def test_config_is_kept_whole(tmp_path):
  config = tiny(tmp_path)
  for _ in range(2):
    check_workdir(config, tmp_path)
    write_config(config, tmp_path)
  assert json.loads((tmp_path / 'config.json').read_text())['model']['index_topk'] == 8
  assert sorted(p.name for p in tmp_path.iterdir()) == ['config.json', 'data.json']


def config_of(workdir):
  """Returns the config that made the old run, with whatever fields there are today."""
  kept = json.loads((workdir / 'config.json').read_text())
  config = quickstart.get_config('tiny')
  with config.unlocked():
    for name, value in kept.items():
      if isinstance(value, dict):
        for inner, of_inner in value.items():
          if isinstance(of_inner, dict):
            config[name][inner].update(of_inner)
          else:
            config[name][inner] = of_inner
      else:
        config[name] = value
  config.workdir = str(workdir)
  return config


def test_a_run_of_an_earlier_version_resumes_to_its_numbers(old_run):
  """Its config.json lacks every field that was added since."""
  csv = old_run / 'metrics.csv'
  by_row = lambda: {row[:3]: row.value for row in read_metrics(csv)}
  before = by_row()
  assert ('warmup', 4, 'index_kl/layer_1') in before
  lines = csv.read_text().splitlines(keepends=True)
  csv.write_text(''.join(line for line in lines if not line.startswith(('warmup,3', 'warmup,4'))))
  kept = json.loads((old_run / 'config.json').read_text())
  for name in ('embed_init_std', 'indexer_types'):  # As if these were new.
    del kept['model'][name]
  kept['model'] |= {'embed_init_std': 1.0}
  (old_run / 'config.json').write_text(json.dumps(kept))
  train.train(config_of(old_run))
  after = by_row()
  assert before.keys() <= after.keys()
  for row, value in before.items():
    np.testing.assert_allclose(after[row], value, rtol=1e-4, err_msg=str(row))


def test_a_model_of_an_earlier_version_is_loaded(old_run):
  model, recipe = load_model(old_run, 'dense')
  assert model.cfg.dim == 16 and recipe.roles == {'dense_before': 'dense'}
  assert np.isfinite(np.asarray(model.embed[...])).all()


def test_another_report_is_no_other_run(undisturbed, tmp_path):
  config = tiny(tmp_path)
  write_config(config, tmp_path)
  changes = {'report.batches': 1, 'log_every': 2, 'save_every': 1}
  check_workdir(tiny(tmp_path, **changes), tmp_path)
  with pytest.raises(ConfigError, match='optim.b1: 0.9 there, 0.8 here'):
    check_workdir(tiny(tmp_path, **changes | {'optim.b1': 0.8}), tmp_path)


@pytest.mark.parametrize('text, message', [('{', 'is no JSON'), ('[]', 'must hold a JSON object')])
def test_a_broken_config_is_named(tmp_path, text, message):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ConfigError, match=message):
    check_workdir(tiny(tmp_path), tmp_path)


@pytest.mark.nightly
def test_entries_have_any_names(tmp_path):
  """They are trained, scored, drawn and reported under them; several may end a recipe."""
  config = tiny(tmp_path, log_every=1)
  names = {'dense': 'base-1', 'baseline': 'more.dense', 'warmup': 'random', 'sparse': 'sparse_k8'}
  with config.unlocked():
    stages = {names[name]: entry for name, entry in config.stages.items()}
    for entry in stages.values():
      entry.update(steps=2, init_from=names.get(entry.init_from, ''))
    stages['sparse'] = stages['sparse_k8'].copy_and_resolve_references()
    config.stages = ConfigDict()
    for name, entry in stages.items():
      config.stages[name.replace('.', '_')] = entry
    config.recipe = ('base-1', 'more_dense', 'random', 'sparse', 'sparse_k8')
  results = train.train(config)
  roles = {'dense_before': 'base-1', 'dense_baseline': 'more_dense', 'sparse': 'sparse_k8'}
  assert results['roles'] == roles
  scored = results['validation_bits']
  assert {'dense_before', 'dense_baseline', 'sparse', 'sparse (entry)', 'oracle'} <= scored.keys()
  assert scored['sparse (entry)'] == scored['sparse']  # The same stage, twice.
  text = (tmp_path / 'report.md').read_text()
  for words in ('dense (base-1)', 'sparse, indexer (sparse_k8)', '| random | 256 |', 'sparse_k8 starts'):
    assert words in text, words
  for name in ('overview.png', 'training.png', 'selection.png'):
    assert (tmp_path / name).stat().st_size > 1000


def test_a_programming_error_keeps_its_traceback(tmp_path, monkeypatch, capsys):
  """Only what a user can mend is one line."""

  def fail(config):
    raise ValueError('operands could not be broadcast together')

  monkeypatch.setattr(train, 'CONFIG', SimpleNamespace(value=tiny(tmp_path)), raising=False)
  monkeypatch.setattr(train, 'join_job', lambda: None)
  monkeypatch.setattr(train, 'train', fail)
  with pytest.raises(ValueError, match='broadcast'):
    train.main(['train'])
  monkeypatch.setattr(os, '_exit', mock.Mock(side_effect=SystemExit))
  kinds = {errno.ENOSPC: SystemExit, errno.ENOENT: FileNotFoundError, errno.EIO: SystemExit}
  for number, kind in kinds.items():
    monkeypatch.setattr(train, 'train', mock.Mock(side_effect=OSError(number, 'full', 'metrics.csv')))
    with pytest.raises(kind):
      train.main(['train'])
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith('error: metrics.csv could not be written: full. Make room')
  assert lines[1].startswith('error: metrics.csv: full. Start the same command again')
  monkeypatch.setattr(train, 'train', lambda config: check_workdir(config, tmp_path))
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(SystemExit, match='^error: .*config.json is no JSON'):
    train.main(['train'])


@pytest.mark.parametrize('topk, want', [(8, 'sparse'), (32, 'masked')])
def test_auto_is_one_of_the_two_modes_and_says_which(tmp_path, caplog, topk, want):
  """The two give the same numbers: law_masked_is_sparse."""
  caplog.set_level('INFO')
  changes = {'model.index_topk': topk, 'stages.sparse.attention': 'auto'}
  recipe = read_recipe(tiny(tmp_path, **changes))
  mode_of = lambda recipe: Run(recipe, None, 'xla', None, None).mode('sparse')
  mode = mode_of(recipe)
  assert f'stage sparse at 64 tokens: {want} attention' in caplog.text
  named = read_recipe(tiny(tmp_path, **changes | {'stages.sparse.attention': want}))
  assert mode == mode_of(named)
