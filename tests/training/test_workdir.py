# SPDX-License-Identifier: Apache-2.0
"""What may change between two starts of a run, and what may not."""

import json

import pytest

from configs import quickstart
from dsa_jax.config import ConfigError
from dsa_jax.data.corpus import changes, describe_files
from dsa_jax.data.sources import DataConfig
from dsa_jax.training.recipe import read_recipe
from dsa_jax.training.workdir import check_data, check_workdir, write_config


def config_of(folder, **changed):
  config = quickstart.get_config('tiny')
  config.workdir = str(folder)
  with config.unlocked():
    config.update_from_flattened_dict(changed)
  return config


def begun(folder, *entries):
  write_config(config_of(folder), folder)
  for entry in entries:
    (folder / 'checkpoints' / entry / '4').mkdir(parents=True)
  return folder


@pytest.mark.parametrize(
    'changed',
    [
        {'log_every': 3, 'save_every': 1, 'measure_every': 2, 'measure_rows': 2},
        {'report.batches': 1, 'report.seq_len': 32},
        {'stages.sparse.steps': 99, 'stages.sparse.backbone_lr': 1.0, 'stages.sparse.init_from': 'dense'},
        {'stages.baseline.steps': 20},  # It has begun, and nothing that has descends from it.
        {'recipe': ('dense', 'baseline', 'warmup')},
        {'mesh.fsdp': 2, 'compilation_cache': 'off', 'resume': 'last_good'},
        {'remat': 'selection', 'backend': 'xla'},  # Such as for want of memory.
        {'stages.dense.micro_batches': 2, 'stages.warmup.micro_batches': 4},
        {'model.rope_type': ''},  # As configs had it before; with 256 positions it is the same.
    ],
)
def test_these_may_change(tmp_path, changed):
  check_workdir(config_of(tmp_path, **changed), begun(tmp_path, 'dense', 'baseline', 'warmup'))


@pytest.mark.parametrize(
    'changed, message',
    [
        ({'seed': 1}, 'seed: 0 there, 1 here'),
        ({'model.dim': 64}, 'model.dim: 32 there, 64 here'),
        ({'stages.warmup.indexer_lr': 1.0}, 'stages.warmup.indexer_lr: 0.01 there, 1.0 here'),
        ({'stages.baseline.steps': 4}, 'stages.baseline.steps: 8 there, 4 here'),
        ({'stages.dense.steps': 20}, 'stages.dense.steps: 8 there, 20 here'),  # Others go on from it.
        ({'recipe': ('baseline', 'warmup')}, r"\['dense', 'baseline', 'warmup'\] have begun"),
        ({'recipe': ('dense', 'warmup', 'baseline')}, 'have begun'),
    ],
)
def test_these_may_not(tmp_path, changed, message):
  with pytest.raises(ConfigError, match=f'(?s)belongs to another config.*{message}'):
    check_workdir(config_of(tmp_path, **changed), begun(tmp_path, 'dense', 'baseline', 'warmup'))


@pytest.mark.parametrize('rule', ['indexer', 'random'])
def test_how_a_sparse_entry_is_computed_may_change(tmp_path, rule):
  """Except in what is drawn for each micro-batch."""
  write_config(config_of(tmp_path, selection=rule), tmp_path)
  for entry in 'dense', 'baseline', 'warmup', 'sparse':
    (tmp_path / 'checkpoints' / entry / '4').mkdir(parents=True)
  may = {'selection': rule, 'stages.sparse.attention': 'masked', 'stages.dense.micro_batches': 2}
  check_workdir(config_of(tmp_path, **may), tmp_path)
  config = config_of(tmp_path, **may | {'stages.sparse.micro_batches': 2})
  if rule == 'random':
    with pytest.raises(ConfigError, match='stages.sparse.micro_batches: 1 there, 2 here'):
      check_workdir(config, tmp_path)
  else:
    check_workdir(config, tmp_path)


def test_more_positions_do_not_change_the_rotation(tmp_path):
  longer = read_recipe(config_of(tmp_path, **{'model.max_seq_len': 8192})).model
  assert longer.rope_kind == read_recipe(config_of(tmp_path)).model.rope_kind == 'default'


def test_a_path_may_be_spelled_in_another_way(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  paths = lambda prefix: {'data.files': f'{prefix}texts/*.txt', 'stages.dense.init_from': f'{prefix}ours'}
  write_config(config_of(tmp_path, **paths('')), tmp_path)
  (tmp_path / 'checkpoints' / 'dense' / '4').mkdir(parents=True)
  for prefix in './', 'texts/../', f'{tmp_path}/':
    check_workdir(config_of(tmp_path, **paths(prefix)), tmp_path)
  with pytest.raises(ConfigError, match='data.files: texts/'):
    check_workdir(config_of(tmp_path, **paths('other/')), tmp_path)


def test_a_folder_in_which_checkpoints_cannot_be_read(tmp_path):
  for name in 'lr[1]', 'a\\b':
    folder = tmp_path / name
    with pytest.raises(ConfigError, match=r'must have no . in its path'):
      check_workdir(config_of(folder), folder)


def test_a_run_of_which_nothing_is_saved_may_change_its_entries(tmp_path):
  changed = {'stages.dense.steps': 1, 'stages.dense.backbone_lr': 1.0, 'recipe': ('dense',)}
  check_workdir(config_of(tmp_path, **changed), begun(tmp_path))


@pytest.mark.parametrize('has_config', [True, False])
def test_a_checkpoint_beyond_the_steps_is_named(tmp_path, has_config):
  """Such as a copy of an earlier one, which would else end the entry."""
  begun(tmp_path, 'dense')
  if not has_config:
    (tmp_path / 'config.json').unlink()
  dense = tmp_path / 'checkpoints' / 'dense'
  (dense / '8').mkdir()  # The last step.
  (dense / '10').touch()
  check_workdir(config_of(tmp_path), tmp_path)
  (dense / '9').mkdir()
  with pytest.raises(ConfigError, match=r'dense/9 is beyond stages.dense.steps=8, .* Move it out'):
    check_workdir(config_of(tmp_path), tmp_path)
  check_workdir(config_of(tmp_path, **{'stages.dense.steps': 9}), tmp_path)


def test_a_changed_corpus_is_named(tmp_path):
  folder, run = tmp_path / 'texts', tmp_path / 'run'
  folder.mkdir()
  for name in 'abcde':
    (folder / f'{name}.txt').write_text(name)
  describe = lambda: describe_files(sorted(folder.glob('*.txt')))
  before = describe()
  write_config(config_of(run), run, before)
  check_data(describe(), run, 'stop')
  (folder / 'a.txt').unlink()
  (folder / 'b.txt').write_text('B')
  (folder / 'f.txt').write_text('f')
  assert changes(before, describe()) == (
      '1 file is gone (a.txt); 1 file is new (f.txt); 1 file is different (b.txt)'
  )
  with pytest.raises(ConfigError, match=r'1 file is gone \(a.txt\).*on_changed_data=go_on'):
    check_data(describe(), run, 'stop')
  check_data(describe(), run, 'go_on')
  write_config(config_of(run), run, describe())
  check_data(describe(), run, 'stop')
  write_config(config_of(run, **{'data.source': 'mixture'}), run, {'a': 'by one tokenizer'})
  with pytest.raises(ConfigError, match=r'1 source is different \(a\).*the files and the tokenizer'):
    check_data({'a': 'by another'}, run, 'stop')


def test_a_corpus_that_moves_as_a_whole_is_the_same(tmp_path):
  for root in 'here', 'there':
    (tmp_path / root / 'inner').mkdir(parents=True)
    (tmp_path / root / 'inner' / 'a.txt').write_text('a')
    (tmp_path / root / 'b.txt').write_text('b')
  describe = lambda root: describe_files(sorted((tmp_path / root).rglob('*.txt')))
  assert describe('here') == describe('there') != {}


def corpus_of(pattern):
  """What describes the text files of a glob, and which of them are for validation."""
  return DataConfig(files=str(pattern), validation_share=0.5).describe()


def write_texts(folder, names='abcdefgh'):
  folder.mkdir(parents=True)
  for name in names:
    (folder / f'{name}.txt').write_text(name)
  return folder / '*.txt'


def test_a_corpus_may_lie_elsewhere_if_it_is_the_same(tmp_path):
  run, here = tmp_path / 'run', write_texts(tmp_path / 'texts')
  write_config(config_of(run, **{'data.files': str(here)}), run, corpus_of(here))
  there, other = write_texts(tmp_path / 'new/texts'), write_texts(tmp_path / 'new/others')
  moved = check_workdir(config_of(run, **{'data.files': str(there)}), run)
  [row] = moved
  assert row.startswith(f'data.files: {here} there')
  check_data(corpus_of(there), run, 'stop', moved)
  sides = lambda pattern: [text.partition(', for ')[2] for text in corpus_of(pattern).values()]
  assert sides(here) == sides(there) != sides(other) and {*sides(here)} == {'training', 'validation'}
  (tmp_path / 'new/texts/a.txt').write_text('other')
  for pattern in there, other:  # A side goes by the name of the folder, too.
    for on_changed in 'stop', 'go_on':  # That is for a corpus in its own place.
      with pytest.raises(ConfigError, match=r'(?s)belongs to another config.*for validation, is not what'):
        check_data(corpus_of(pattern), run, on_changed, moved)


def test_a_folder_of_another_name_has_another_split(tmp_path):
  """Where the config names it by a relative path, which does not change with it."""
  run, here = tmp_path / 'run', write_texts(tmp_path / 'texts')
  write_config(config_of(run), run, corpus_of(here))
  (tmp_path / 'texts').rename(tmp_path / 'others')
  with pytest.raises(ConfigError, match='the data has changed .* files are different'):
    check_data(corpus_of(tmp_path / 'others/*.txt'), run, 'stop')
  earlier = {name: text.partition(', for ')[0] for name, text in corpus_of(tmp_path / 'others/*.txt').items()}
  write_config(config_of(run), run, earlier)  # An earlier version did not say which were for validation.
  check_data(corpus_of(tmp_path / 'others/*.txt'), run, 'stop')


def test_the_files_of_sources_may_lie_elsewhere_too(tmp_path):
  changes = {'data.source': 'mixture', 'data.sources': {'a': {'format': 'text', 'files': 'x/*.txt'}}}
  write_config(config_of(tmp_path, **changes), tmp_path, {'a': '2 documents'})
  changes['data.sources'] = {'a': {'format': 'text', 'files': ['y/a.txt', 'z/b.txt']}}
  moved = check_workdir(config_of(tmp_path, **changes), tmp_path)
  assert moved == ["data.sources.a.files: x/*.txt there, ['y/a.txt', 'z/b.txt'] here"]
  check_data({'a': '2 documents'}, tmp_path, 'stop', moved)
  with pytest.raises(ConfigError, match='belongs to another config'):
    check_data({'a': '2 documents, in the order 1'}, tmp_path, 'stop', moved)
  changes['data.sources']['a']['format'] = 'jsonl'
  with pytest.raises(ConfigError, match='data.sources.a.format: text there, jsonl here'):
    check_workdir(config_of(tmp_path, **changes), tmp_path)


def test_a_run_of_an_earlier_version_has_no_description(tmp_path):
  write_config(config_of(tmp_path), tmp_path)
  (tmp_path / 'data.json').unlink()
  check_data({'a.txt': '1 bytes, 0'}, tmp_path, 'stop')
  assert json.loads((tmp_path / 'config.json').read_text())['seed'] == 0
