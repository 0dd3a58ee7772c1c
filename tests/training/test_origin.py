# SPDX-License-Identifier: Apache-2.0
"""A recipe starts from another run's weights only if they mean there what they mean here."""

import dataclasses
import json
import shutil

from ml_collections import ConfigDict
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from configs import base
from dsa_jax import train
from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.data.text import BOS
from dsa_jax.data.tokenizer import Bytes
from dsa_jax.data.tokenizer_files import find_tokenizer, open_tokenizer
from dsa_jax.training.checkpoint import saved_steps
from dsa_jax.training.origin import (
    check_origins, differing_fields, find_starts, keep_origin, keep_starts, keep_tokenizer,
)  # fmt: skip
from dsa_jax.training.recipe import read_recipe
from dsa_jax.training.state import abstract_params
from dsa_jax.training.stored_arrays import Checksums, write_checksums


def recipe_from(*args, **changes):
  return read_recipe(config_from(*args, **changes))


def config_from(old_run, folder, init_from, **changes):
  """Returns the config of one warm-up, with the model of the old run but for the changes."""
  config, old = base.get_config(), json.loads((old_run / 'config.json').read_text())
  for name in ('data', 'model'):
    config[name].update(old[name])
  config.workdir, config.recipe = str(folder), ('warmup',)
  config.stages.warmup = ConfigDict(old['stages']['warmup'] | {'init_from': str(init_from)})
  config.report.update(seq_len=64)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


def check(recipe):
  check_origins(recipe, abstract_params(recipe.model))


def test_the_same_model_is_accepted_with_other_limits(old_run, tmp_path):
  source = old_run / 'checkpoints' / 'dense'
  free = {'model.max_seq_len': 128, 'model.index_topk': 4, 'model.embed_init_std': 2.0}
  for changes in {}, free, {'model.dtype': 'bfloat16'}:
    check(recipe_from(old_run, tmp_path / 'new', source, **changes))


@pytest.mark.parametrize(
    'name, value',
    [
        ('rope_theta', 1e6),
        ('norm_eps', 1e-2),
        ('route_scale', 2.0),
        ('n_activated_experts', 1),
        ('n_limited_groups', 1),
        ('indexer_rope_interleave', True),
    ],
)
def test_another_function_is_refused_unless_it_is_named(old_run, tmp_path, name, value):
  source, changes = old_run / 'checkpoints' / 'dense', {f'model.{name}': value}
  with pytest.raises(ConfigError, match=rf'(?s)computes something else.*{name}: \S+ there, {value} here'):
    check(recipe_from(old_run, tmp_path / 'new', source, **changes))
  changes['stages.warmup.init_may_differ'] = (name,)
  check(recipe_from(old_run, tmp_path / 'new', source, **changes))


def test_all_entries_start_from_the_step_that_was_there_as_the_run_began(old_run, tmp_path):
  source, new = old_run / 'checkpoints' / 'dense', tmp_path / 'new'
  [step] = [path for path in source.iterdir() if path.name.isdigit()]
  recipe, like = recipe_from(old_run, new, source), abstract_params(recipe_from(old_run, new, source).model)
  starts = find_starts(recipe)
  assert [(folder, start.step) for folder, start in starts.items()] == [(source, step.resolve())]
  later = source / str(int(step.name) + 1)
  shutil.copytree(step, later)  # The other run goes on.
  keep_starts(new, starts)
  assert find_starts(recipe) == starts
  goes_on = recipe_from(old_run, new, source, on_changed_data='go_on')
  assert find_starts(goes_on)[source].step == later.resolve()
  [start] = starts.values()
  start.params(like)
  with pytest.raises(ConfigError, match='is gone or has other weights than when the run began'):
    start._replace(weights='others').params(like)
  shutil.rmtree(step)
  for ask in (lambda: start.params(like), lambda: find_starts(recipe)):  # Before a step is trained, too.
    with pytest.raises(ConfigError, match=f'{step.name}, which this run starts from, is gone'):
      ask()


def two_entries_from(old_run, project, **changes):
  """Returns the recipe of a run in a project, whose two entries start from the project's other run."""
  config = config_from(old_run, project / 'new', project / 'old' / 'checkpoints' / 'dense')
  with config.unlocked():
    config.stages.again = config.stages.warmup.copy_and_resolve_references()
    config.recipe = ('warmup', 'again')
    config.update_from_flattened_dict(changes)
  return read_recipe(config)


@pytest.fixture(params=[True, False], ids=['now', 'as earlier versions wrote it'])
def project(old_run, tmp_path, request):
  """A run of which one of two entries has begun from a step of another, which has gone on to the next."""
  project = tmp_path / 'project'
  shutil.copytree(old_run, project / 'old')
  [step] = saved_steps(entry := project / 'old' / 'checkpoints' / 'dense')
  shutil.copytree(entry / str(step), entry / str(step + 1))
  for number in step, step + 1:
    sums = dict.fromkeys(Checksums._fields, (number,))  # Of other weights in each.
    write_checksums(entry / str(number), {'state': {'params.embed': Checksums(**sums)}})
  (entry / str(step + 1)).rename(tmp_path / 'later')
  recipe = two_entries_from(old_run, project)
  keep_starts(recipe.workdir, starts := find_starts(recipe))
  if not request.param:
    known = {str(folder.resolve()): [str(start.step), start.weights] for folder, start in starts.items()}
    (recipe.workdir / 'starts.json').write_text(json.dumps(known))
  [start] = starts.values()
  (recipe.checkpoint_folder('warmup') / '4').mkdir(parents=True)
  (tmp_path / 'later').rename(entry / str(step + 1))
  return project, start


@pytest.mark.parametrize('move', [shutil.move, shutil.copytree])
def test_a_project_that_is_elsewhere_keeps_the_steps_it_started_from(old_run, project, tmp_path, move):
  project, start = project
  move(project, tmp_path / 'elsewhere')
  recipe, before = two_entries_from(old_run, tmp_path / 'elsewhere'), tmp_path / 'project'
  elsewhere = tmp_path / 'elsewhere' / start.step.relative_to(before)
  for _ in range(2):  # As it was kept, and as it is kept now.
    assert list(find_starts(recipe).values()) == [start._replace(step=elsewhere)]
    keep_starts(recipe.workdir, find_starts(recipe))


def test_a_run_goes_on_from_where_it_started(old_run, project, tmp_path):
  project, start = project
  assert list(find_starts(two_entries_from(old_run, project)).values()) == [start]
  moved = tmp_path / 'deeper' / 'elsewhere'  # The run alone; where it started from is as it was.
  shutil.copytree(project / 'new', moved)
  shutil.rmtree(moved / 'checkpoints')
  assert list(find_starts(two_entries_from(old_run, project, workdir=str(moved))).values()) == [start]


def test_a_step_that_nothing_tells_is_not_guessed(old_run, project):
  project, start = project
  recipe, [source] = two_entries_from(old_run, project), {start.step.parent}
  later = source / str(int(start.step.name) + 1)
  for known in {}, {'gone': ['8', 'other weights']}, {'gone': ['8', None]}:
    (recipe.workdir / 'starts.json').write_text(json.dumps(known))
    with pytest.raises(ConfigError, match=r"from which step of .*dense the entries \['warmup'\] have begun"):
      find_starts(recipe)
  goes_on = two_entries_from(old_run, project, on_changed_data='go_on')
  assert [x.step for x in find_starts(goes_on).values()] == [later]
  (recipe.checkpoint_folder('again') / '4').mkdir(parents=True)
  dense = {'stage': 'dense', 'trains': ('backbone',), 'backbone_lr': 0.1}
  changes = {f'stages.{name}.{field}': x for name in recipe.stages for field, x in dense.items()}
  assert find_starts(two_entries_from(old_run, project, **changes)) == {}  # Not even the report needs it.
  shutil.rmtree(recipe.workdir / 'checkpoints')  # Now nothing has begun from another step.
  assert [x.step for x in find_starts(recipe).values()] == [later]


def test_all_runs_of_a_sweep_start_from_the_step_that_was_there_as_it_began(old_run, tmp_path, monkeypatch):
  source, steps = old_run / 'checkpoints' / 'dense', []
  [step] = [path for path in source.iterdir() if path.name.isdigit()]

  def train_one(config):
    [start] = find_starts(read_recipe(config)).values()
    steps.append(start.step.name)
    shutil.copytree(step, source / str(int(step.name) + len(steps)))  # The other run goes on.

  monkeypatch.setattr(train, 'train', train_one)
  for name in 'read_run', 'group_runs', 'print_table':
    monkeypatch.setattr(train, name, lambda _: None)
  config = config_from(old_run, tmp_path / 'new', source)
  config.sweep = tuple({'stages.warmup.data_seed': seed} for seed in (3, 4, 5))
  train.train_all(config)
  assert steps == [step.name] * 3


def test_a_checkpoint_knows_its_model_however_it_is_named(old_run, tmp_path):
  entry, links = old_run / 'checkpoints' / 'dense', tmp_path / 'run' / 'checkpoints'
  [step] = [path for path in entry.iterdir() if path.name.isdigit()]
  links.mkdir(parents=True)
  (links / 'dense').symlink_to(entry)
  shutil.copy(old_run / 'config.json', tmp_path / 'run')
  for source in step, links / 'dense', links / 'dense' / step.name:
    check(recipe_from(old_run, tmp_path / 'new', source))
    with pytest.raises(ConfigError, match='rope_theta: 10000.0 there'):
      check(recipe_from(old_run, tmp_path / 'new', source, **{'model.rope_theta': 1e6}))
  shutil.copytree(entry, tmp_path / 'alone')
  with pytest.raises(ConfigError, match='does not say which model it is of'):
    check(recipe_from(old_run, tmp_path / 'new', tmp_path / 'alone'))


def test_another_tokenizer_is_said(old_run, tmp_path, caplog):
  run = tmp_path / 'run'
  shutil.copytree(old_run, run)
  for folder, words in (run / 'origin', {'a': 0, 'b': 1}), (tmp_path / 'other', {'b': 0, 'a': 1}):
    folder.mkdir()
    Tokenizer(models.WordLevel(words, 'a')).save(str(folder / 'tokenizer.json'))
  changes = {'data.source': 'mixture', 'data.sources': {'a': {'format': 'text', 'files': 'x'}}}
  for name, warns in ('run/origin', False), ('other', True):
    changes['data.tokenizer'] = str(tmp_path / name)
    check(recipe_from(old_run, tmp_path / 'new', run / 'checkpoints' / 'dense', **changes))
    assert bool(caplog.records) == warns
  assert 'other\' is another: ids may mean other words there' in caplog.text


def test_the_order_of_unlike_layers_counts():
  """Weights have the same shapes whichever layers have an MLP."""
  model = ModelConfig(n_layers=5, n_dense_layers=0, mlp_layers=(1, 3))
  other = dataclasses.replace(model, mlp_layers=[2, 3])
  assert differing_fields(model, model) == []
  assert differing_fields(model, other) == ['mlp_layers']


def test_yarn_counts_where_a_model_has_it(old_run, tmp_path):
  source = old_run / 'checkpoints' / 'dense'
  check(recipe_from(old_run, tmp_path / 'new', source, **{'model.rope_factor': 4.0}))
  changes = {'model.original_seq_len': 32}  # From here on, 256 positions are YaRN's.
  with pytest.raises(ConfigError, match='rope_type: default there, yarn here'):
    check(recipe_from(old_run, tmp_path / 'new', source, **changes))


def test_other_shapes_are_refused(old_run, tmp_path):
  source = old_run / 'checkpoints' / 'dense'
  with pytest.raises(ConfigError, match=r'(?s)holds another model.*wq_b'):
    check(recipe_from(old_run, tmp_path / 'new', source, **{'model.index_n_heads': 3}))


def test_a_folder_that_is_something_else_says_what_to_do(old_run, tmp_path):
  with pytest.raises(ConfigError, match=r"is a run. Choose .*ENTRY one of \['dense', 'warmup'\]"):
    check(recipe_from(old_run, tmp_path / 'new', old_run))
  released = tmp_path / 'released'
  released.mkdir()
  (released / 'model.safetensors').write_bytes(b'')
  with pytest.raises(ConfigError, match='Convert it first: python -m dsa_jax.convert'):
    check(recipe_from(old_run, tmp_path / 'new', released))
  with pytest.raises(ConfigError, match="neither .* nor a folder. Did you mean the entry 'warmup'"):
    check(recipe_from(old_run, tmp_path / 'new', 'warmpu'))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ConfigError, match='holds no checkpoint'):
    check(recipe_from(old_run, tmp_path / 'new', tmp_path / 'empty'))


def test_an_entry_that_has_begun_needs_its_origin_no_more(old_run, tmp_path):
  new = tmp_path / 'new'
  shutil.copytree(old_run / 'checkpoints' / 'warmup', new / 'checkpoints' / 'warmup')
  check(recipe_from(old_run, new, tmp_path / 'gone'))


def test_what_an_import_has_kept_goes_along(tmp_path):
  """From a converted checkpoint to a run, and from there to the next run; whole, and once."""
  ours = tmp_path / 'ours'
  ours.mkdir()
  record = {'model': {}, 'source': {'family': 'deepseek_v32', 'files': ['tokenizer.json', 'gone.json']}}
  (ours / 'config.json').write_text(json.dumps(record))
  (ours / 'tokenizer.json').write_text('{}')
  runs = [tmp_path / name for name in ('first', 'second')]
  for run in runs:
    (run / 'checkpoints' / 'warmup').mkdir(parents=True)
  keep_origin(runs[0], [ours])
  keep_origin(runs[1], [runs[0] / 'checkpoints' / 'warmup'])
  for run in runs:
    assert {p.name for p in (run / 'origin').iterdir()} == {'config.json', 'tokenizer.json'}
    assert json.loads((run / 'origin' / 'config.json').read_text()) == record
  (ours / 'tokenizer.json').write_text('changed')
  keep_origin(runs[0], [ours])
  assert (runs[0] / 'origin' / 'tokenizer.json').read_text() == '{}'


def imported_and_own(folder):
  """An import with a tokenizer, and the same tokenizer with a mark of turns and another end."""
  for name, marks in ('import', ['</s>']), ('own', ['</s>', '<u>']):
    (folder / name).mkdir()
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate('ab<u>/s?')}, '?'))
    tokenizer.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
    tokenizer.add_special_tokens(marks)
    tokenizer.save(str(folder / name / 'tokenizer.json'))
  (folder / 'own' / 'tokenizer_config.json').write_text('{"eos_token": "<u>"}')
  (folder / 'import' / 'merges.txt').write_text('of the import')
  config = {'text_config': {'eos_token_id': 8, 'vocab_size': 16}, 'pad_token_id': 1}
  files = ['tokenizer.json', 'merges.txt']
  record = {'model': {}, 'source': {'family': 'llama', 'config': config, 'files': files}}
  (folder / 'import' / 'config.json').write_text(json.dumps(record))
  return folder / 'import', folder / 'own'


def test_a_run_keeps_the_tokenizer_that_it_was_trained_with(tmp_path):
  """Whatever its import had; samplers, exports and the next run read what is kept."""
  ours, own = imported_and_own(tmp_path)
  runs = [tmp_path / name for name in ('first', 'second')]
  for run in runs:
    (run / 'checkpoints' / 'warmup').mkdir(parents=True)
  keep_origin(runs[0], [ours])
  keep_tokenizer(runs[0], str(ours))
  assert (runs[0] / 'origin' / 'config.json').read_text() == (ours / 'config.json').read_text()
  keep_tokenizer(runs[0], str(own))
  keep_origin(runs[1], [runs[0] / 'checkpoints' / 'warmup'])
  for run in runs:
    kept = find_tokenizer(run / 'origin')
    assert kept.encode_prompt('<u>a') == [9, 0] and kept.stop == (9,)
    assert kept.digest == open_tokenizer(str(own)).digest
    assert not (run / 'origin' / 'merges.txt').exists()
    source = json.loads((run / 'origin' / 'config.json').read_text())['source']
    assert source['family'] == 'llama' and source['config']['pad_token_id'] == 1
    assert source['config']['text_config'] == {'eos_token_id': 9, 'vocab_size': 16}
  assert sorted(path.name for path in runs[0].iterdir()) == ['checkpoints', 'origin']


def test_a_run_on_bytes_keeps_no_tokenizer_of_its_import(tmp_path):
  ours, _ = imported_and_own(tmp_path)
  run = tmp_path / 'run'
  run.mkdir()
  keep_tokenizer(run, 'bytes')
  assert not (run / 'origin').exists()
  keep_origin(run, [ours])
  keep_tokenizer(run, '')
  assert (run / 'origin' / 'tokenizer.json').exists()
  keep_tokenizer(run, 'bytes')
  assert isinstance(find_tokenizer(run / 'origin'), Bytes)
  assert json.loads((run / 'origin' / 'config.json').read_text())['source']['config']['eos_token_id'] == BOS


def test_a_kill_while_a_tokenizer_is_replaced_loses_nothing(tmp_path):
  ours, own = imported_and_own(tmp_path)
  run = tmp_path / 'run'
  run.mkdir()
  keep_origin(run, [ours])
  (run / 'origin').rename(run / 'origin.before')
  keep_origin(run, [])
  keep_tokenizer(run, str(own))
  assert find_tokenizer(run / 'origin').stop == (9,)


def test_a_tokenizer_that_has_changed_takes_the_place_of_what_was_kept(tmp_path):
  ours, own = imported_and_own(tmp_path)
  run = tmp_path / 'run'
  run.mkdir()
  keep_tokenizer(run, str(ours))
  shutil.copyfile(own / 'tokenizer.json', ours / 'tokenizer.json')
  keep_tokenizer(run, str(ours))
  assert find_tokenizer(run / 'origin').digest == open_tokenizer(str(ours)).digest
