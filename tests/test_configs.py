# SPDX-License-Identifier: Apache-2.0
"""Every config builds; every tiny variant runs its whole recipe."""

import dataclasses
import importlib
import json
import pathlib

import laws
import pytest

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.families.axk2 import AXK2_LIGHT
from dsa_jax.families.deepseek import DEEPSEEK_V32
from dsa_jax.families.dots3 import DOTS3_NOTE
from dsa_jax.families.hy4 import HY4_PREVIEW
from dsa_jax.families.mistral4 import MISTRAL_LARGE_4
from dsa_jax.train import train
from dsa_jax.training.recipe import read_recipe

ROOT = pathlib.Path(__file__).parents[1]
# Configs with a released model.
RELEASED = {
    'deepseek_v32': DEEPSEEK_V32, 'axk2': AXK2_LIGHT, 'hy4': HY4_PREVIEW, 'dots3': DOTS3_NOTE,
    'mistral_large4': MISTRAL_LARGE_4,
}  # fmt: skip
NAMES = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem not in ('base', 'released'))


@pytest.mark.parametrize('name', [n for n in NAMES if n not in (*RELEASED, 'own_tokens')])
def test_full_variant_builds(name):
  recipe = read_recipe(importlib.import_module(f'configs.{name}').get_config())
  assert recipe.stages


@pytest.mark.nightly
@pytest.mark.parametrize('name', [n for n in NAMES if n != 'quickstart'])  # See test_train.py.
def test_tiny_variant_runs(name, tmp_path):
  config = importlib.import_module(f'configs.{name}').get_config('tiny')
  config.workdir = str(tmp_path)
  results = train(config)
  assert (tmp_path / 'report.json').exists()
  assert results['validation_bits']['sparse'] > 0


@pytest.mark.parametrize('name', NAMES)
def test_unknown_variant_is_refused(name):
  with pytest.raises(ValueError, match="'huge'.* or tiny"):
    importlib.import_module(f'configs.{name}').get_config('huge')


@pytest.mark.parametrize('name', RELEASED)
def test_a_released_model_does_not_learn_bytes(name, tmp_path):
  config = importlib.import_module(f'configs.{name}').get_config()
  assert ModelConfig(**config.model) == RELEASED[name]
  size = RELEASED[name].vocab_size
  of_bytes = f'vocab_size={size} is of another alphabet than the mixture'
  with pytest.raises(ConfigError, match=f'{of_bytes}.* There is no checkpoints/.*: convert the release to it'):
    read_recipe(config)
  for entry in config.stages.values():
    entry.init_from = str(tmp_path) if entry.init_from and entry.init_from not in config.stages else entry.init_from
  with pytest.raises(ConfigError, match=f'{of_bytes}.* {tmp_path} has no tokenizer: set config.data.tokenizer'):
    read_recipe(config)


def test_own_tokens_says_what_is_missing(tmp_path, monkeypatch):
  config = importlib.import_module('configs.own_tokens').get_config()
  assert set(config.data.sources) == {'web', 'code', 'books'}
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match="tokenizer='tokenizer.json' must be 'bytes', a tokenizer.json"):
    read_recipe(config)


def test_retrofit_takes_sizes_and_the_dense_loss_from_a_checkpoint(tmp_path):
  model = dataclasses.replace(laws.GQA, vocab_size=258, max_seq_len=4096, index_topk=2048)
  (tmp_path / 'config.json').write_text(json.dumps({'model': dataclasses.asdict(model)}))
  get_config = importlib.import_module('configs.retrofit').get_config
  recipe = read_recipe(get_config(f'{tmp_path},baseline'))
  assert recipe.model == dataclasses.replace(model, index_topk=256)
  chosen = dataclasses.replace(model, index_topk=512)
  (tmp_path / 'own').mkdir()
  (tmp_path / 'own' / 'config.json').write_text(json.dumps({'model': dataclasses.asdict(chosen)}))
  assert read_recipe(get_config(f'{tmp_path}/own')).model == chosen
  assert recipe.roles == {'dense_baseline': 'baseline', 'sparse': 'sparse'}
  assert recipe.teacher == tmp_path
  assert list(read_recipe(get_config(str(tmp_path))).stages) == ['warmup', 'sparse']
  with pytest.raises(ValueError, match="option 'both'"):
    get_config(f'{tmp_path},both')
