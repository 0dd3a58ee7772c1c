# SPDX-License-Identifier: Apache-2.0
"""One command, several runs: each in its folder, checked before the first one trains."""

import pytest

from configs import quickstart
from dsa_jax import train
from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.nn.attention.types import Mode
from dsa_jax.training.optim import OptimConfig
from dsa_jax.training.recipe import read_recipe
from dsa_jax.training.state import model_graph
from dsa_jax.training.step import make_train_step
from dsa_jax.training.sweep import sweep_configs


def config_of(folder, *sweep):
  config = quickstart.get_config('tiny')
  config.workdir, config.sweep = str(folder), sweep
  return config


def test_each_run_has_a_folder_and_its_fields(tmp_path):
  config = config_of(tmp_path, {'seed': 1}, {'seed': 2, 'model.index_topk': 4})
  one, two = sweep_configs(config)
  assert (one.seed, one.model.index_topk, one.workdir) == (1, 8, f'{tmp_path}/seed=1')
  assert (two.seed, two.model.index_topk, two.workdir) == (2, 4, f'{tmp_path}/seed=2,index_topk=4')
  assert config.seed == 0 and config.model.index_topk == 8
  assert read_recipe(two).seed == 2


def test_one_field_of_two_stages_is_named_with_its_stage(tmp_path):
  stages = 'stages.baseline', 'stages.sparse'
  runs = sweep_configs(config_of(tmp_path, *({f'{stage}.steps': 20} for stage in stages)))
  assert [run.workdir for run in runs] == [f'{tmp_path}/{stage}.steps=20' for stage in stages]


def test_seeds_that_change_nothing_are_no_sweep(tmp_path):
  """Each would be the same run, to the last bit, and `compare` would find no deviation."""
  config = config_of(tmp_path, {'seed': 1}, {'seed': 2})
  for name in config.recipe:
    config.stages[name].init_from = config.stages[name].init_from or 'checkpoints/mine'
  with pytest.raises(ConfigError, match=r"sweep: {'seed': 2} must differ in more than its seed.*data_seed"):
    sweep_configs(config)
  config.sweep = {'seed': 1}, {'seed': 1, 'stages.sparse.data_seed': 5}
  assert len(sweep_configs(config)) == 2
  config.selection, config.sweep = 'random', ({'seed': 1}, {'seed': 2})
  assert len(sweep_configs(config)) == 2


def test_without_a_sweep_there_is_one_run(tmp_path):
  config = config_of(tmp_path)
  assert sweep_configs(config) == [config]


@pytest.mark.parametrize(
    'sweep', [({'sed': 1},), ({'model.index_tpk': 1},), ({'seed': 'one'},), ({},), ({'seed': 1}, {'seed': 1})]
)
def test_a_sweep_that_cannot_be(tmp_path, sweep):
  with pytest.raises(ConfigError, match='^sweep: '):
    sweep_configs(config_of(tmp_path, *sweep))


def test_all_are_checked_before_one_trains(tmp_path, monkeypatch):
  trained = []
  monkeypatch.setattr(train, 'train', trained.append)
  with pytest.raises(ConfigError, match='index_topk'):
    train.train_all(config_of(tmp_path, {'seed': 1}, {'model.index_topk': 64}))
  with pytest.raises(ConfigError, match='neither an earlier entry of the recipe nor a folder'):
    train.train_all(config_of(tmp_path, {'seed': 1}, {'stages.sparse.init_from': 'warmpu'}))
  assert not trained and not list(tmp_path.iterdir())


def test_they_are_trained_and_compared(tmp_path, monkeypatch):
  trained, compared = [], []
  monkeypatch.setattr(train, 'train', lambda config: trained.append(config.seed))
  monkeypatch.setattr(train, 'read_run', lambda folder: folder.name[:6])
  monkeypatch.setattr(train, 'group_runs', list)
  monkeypatch.setattr(train, 'print_table', compared.append)
  first = str(tmp_path / 'seed=3' / 'checkpoints' / 'sparse')  # It will be there.
  train.train_all(config_of(tmp_path, {'seed': 3}, {'seed': 4, 'stages.dense.init_from': first}))
  assert trained == [3, 4] and compared == [['seed=3', 'seed=4']]
  mixture = {'data.source': 'mixture', 'data.sources': {'a': {'format': 'text', 'files': '*'}}}
  ids = mixture | {'model.vocab_size': 1000, 'stages.dense.init_from': first}  # Of a tokenizer to come.
  train.train_all(config_of(tmp_path, {'seed': 3}, {'seed': 4} | ids))
  monkeypatch.setattr(train, 'kept_results', lambda recipe: {'title': 'done'})
  monkeypatch.setattr(train, 'open_run', None)  # Runs that have ended are not opened.
  train.train_all(config_of(tmp_path, {'seed': 3}, {'seed': 4}))
  assert compared == [['seed=3', 'seed=4']] * 3


def test_runs_share_their_programs():
  cfg = ModelConfig(**quickstart.get_config('tiny').model)
  mode = Mode(attention='dense', backend='xla')
  steps = [make_train_step(model_graph(cfg), ('backbone',), mode, OptimConfig()) for _ in range(2)]
  assert steps[0] is steps[1]


def test_the_example_is_a_sweep():
  assert [one.seed for one in sweep_configs(quickstart.get_config('sweep'))] == [0, 1, 2]
