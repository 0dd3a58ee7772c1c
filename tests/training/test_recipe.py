# SPDX-License-Identifier: Apache-2.0
"""What a recipe's report compares, whatever its entries are called, and what it refuses."""

import pytest

from configs import base, quickstart
from dsa_jax.config import ConfigError
from dsa_jax.reporting.results import scored_entries
from dsa_jax.training.recipe import read_recipe
from dsa_jax.training.run import open_run
from dsa_jax.training.stages import StageConfig

SIZE = {'steps': 1, 'batch_size': 2, 'seq_len': 64}


def recipe_of(windows=(), **entries):
  """Returns the recipe of entries that are given as (stage, init_from)."""
  config = base.get_config()
  config.workdir = 'runs/none'
  config.model.update(vocab_size=258, index_topk=8)
  if windows:
    config.model.update(window_layers=windows, sliding_window=8)
  config.report.update(seq_len=64)
  config.recipe = tuple(entries)
  for name, (stage, init_from) in entries.items():
    rates = {'backbone_lr': 1e-3, 'indexer_lr': 1e-3}
    config.stages[name] = base.stage(stage=stage, init_from=init_from, **rates, **SIZE)
  return read_recipe(config)


def test_roles_follow_from_what_starts_where():
  recipe = recipe_of(
      short=('dense', ''), long=('dense', 'short'), fair=('dense', 'long'), kl=('warmup', 'long'),
      k8=('sparse', 'kl'), random=('sparse', 'kl'), k9=('sparse', 'kl'),
  )
  assert recipe.roles == {'dense_before': 'long', 'dense_baseline': 'fair', 'sparse': 'k9'}
  others = {'k8': 'k8', 'random (entry)': 'random'}  # A rule of the report is called random.
  assert scored_entries(recipe) == recipe.roles | others


def test_roles_of_recipes_that_lack_some():
  assert recipe_of(a=('dense', '')).roles == {'dense_before': 'a'}
  assert recipe_of(a=('dense', ''), b=('dense', 'a')).roles == {'dense_before': 'b'}
  assert recipe_of(w=('warmup', 'runs/a'), s=('sparse', 'w')).roles == {'sparse': 's'}
  recipe = recipe_of(a=('dense', ''), w=('warmup', 'a'))
  assert recipe.roles == {'dense_before': 'a', 'sparse': 'w'} == scored_entries(recipe)
  recipe = recipe_of(w=('warmup', 'runs/a'))
  assert recipe.roles == {'sparse': 'w'} and str(recipe.teacher) == 'runs/a'


@pytest.mark.parametrize('name', ['a,b', 'a/b', '-a', 'a b'])
def test_a_name_that_is_no_folder_is_refused(name):
  with pytest.raises(ConfigError, match='the name .* must be of letters'):
    recipe_of(**{name: ('dense', '')})


def test_layers_that_all_have_windows_train_no_indexer():
  all_layers = tuple(range(base.get_config().model.n_layers))
  recipe_of(all_layers, a=('dense', ''))
  recipe_of(all_layers[1:], a=('dense', ''), w=('warmup', 'a'))
  with pytest.raises(ConfigError, match='stages.w: all layers have a window, model.sliding_window=8'):
    recipe_of(all_layers, a=('dense', ''), w=('warmup', 'a'))


def test_a_stage_trains_some_of_its_parts():
  fields = dict(steps=1, batch_size=1, seq_len=64)
  entry = StageConfig(stage='sparse', trains=['indexer'], indexer_lr=1e-3, **fields)
  assert entry.trains == ('indexer',) and entry.rates().keys() == {'indexer'}
  assert StageConfig(stage='warmup', indexer_lr=1e-3, **fields).trains == ('indexer',)
  for stage, trains in ('dense', ('indexer',)), ('sparse', ('experts',)), ('sparse', ('indexer',) * 2):
    with pytest.raises(ConfigError, match=f'of a {stage} stage must be of'):
      StageConfig(stage=stage, trains=trains, backbone_lr=1e-3, indexer_lr=1e-3, **fields)


@pytest.mark.parametrize(
    'field, value', [('tokenizer', 'somewhere'), ('packing', 'full'), ('min_tokens', 4), ('n_keys', 9), ('cache', 'x')]
)
def test_a_field_of_another_source_is_named_before_a_run_begins(tmp_path, field, value, caplog):
  config = quickstart.get_config('tiny')
  config.workdir = str(tmp_path / 'run')
  config.data[field] = value
  recipe = read_recipe(config)
  says = rf"data.{field}={value!r} would change nothing: data.source='text' does not read it"
  with pytest.raises(ConfigError, match=says):
    open_run(recipe)
  recipe.workdir.mkdir()
  (recipe.workdir / 'config.json').write_text('{}')  # A run that has begun with it is not lost.
  open_run(recipe)
  assert says in caplog.text
