# SPDX-License-Identifier: Apache-2.0
"""Families are data, and the only place where the sizes of released models stand."""

import ast
import dataclasses
import math
import pathlib
import sys

import pytest
import released

from configs import deepseek_v32
from dsa_jax.compile import cases
from dsa_jax.config import ModelConfig
from dsa_jax.convert.config_json import read_config, write_config
from dsa_jax.convert.tensors import arrays_of, copies_of, weight_shapes
from dsa_jax.families import FAMILIES, SIZES
from dsa_jax.families.deepseek import DEEPSEEK_V32

ROOT = pathlib.Path(__file__).parents[2]
HOMES = {ROOT / 'dsa_jax' / 'config.py', *(ROOT / 'dsa_jax' / 'families').glob('*.py')}


def test_every_size_has_a_released_config():
  assert SIZES.keys() == released.CONFIGS.keys()


@pytest.mark.parametrize('name', SIZES)
def test_sizes_are_those_of_the_released_config(name):
  family, model = read_config(released.CONFIGS[name])
  assert name in FAMILIES[family].sizes
  assert model.n_mtp_layers == released.CONFIGS[name].get('num_nextn_predict_layers', 0)
  assert dataclasses.replace(model, n_mtp_layers=0) == SIZES[name]
  assert model.uses_yarn == SIZES[name].uses_yarn


@pytest.mark.parametrize('name', SIZES)
def test_a_written_config_reads_as_the_same_model(name):
  family, model = read_config(released.CONFIGS[name])
  assert read_config(write_config(family, model, {})) == (family, model)


@pytest.mark.parametrize('name', released.PARAMETERS)
def test_sizes_have_the_published_number_of_weights(name):
  family, _ = read_config(released.CONFIGS[name])
  arrays = arrays_of(SIZES[name], family, has_indexer=False)
  assert sum(math.prod(array.shape) for array in arrays.values()) == released.PARAMETERS[name]


def test_hy4_preview_has_the_published_size():
  """780 billion weights, of which 10 are of the MTP layers that we leave out; both are rounded."""
  arrays = arrays_of(SIZES['hy4_preview'], 'hy_v4')
  assert round(sum(math.prod(array.shape) for array in arrays.values()) / 1e10) == 77


def test_axk2_light_has_as_many_weights_as_in_transformers():
  """Parameters of AXK2ForCausalLM(AXK2Config()) in 5.24, and the routers' biases, its buffers."""
  arrays = arrays_of(SIZES['axk2_light'], 'axk2')
  assert sum(math.prod(array.shape) for array in arrays.values()) == 20_314_494_976 + 47 * 128


def test_dots3_note_has_the_published_size():
  """Parameters of Dots3NoteForCausalLM(Dots3NoteTextConfig()) in 5.24, and the routers' biases.

  The model's card says 280 billion, of which 16 are used for a token.
  """
  arrays = arrays_of(SIZES['dots3_note'], 'dots3_note')
  assert sum(math.prod(array.shape) for array in arrays.values()) == 279_551_718_016 + 45 * 256


def test_mistral_large4_has_the_published_size():
  """Parameters of the text in MistralLarge4ForConditionalGeneration in 5.24, with the release's sources.

  Its name says 1T, of which 52B are used for a token, the embedding left out.
  """
  large = SIZES['mistral_large4']
  count = lambda cfg: sum(math.prod(a.shape) for a in arrays_of(cfg, 'mistral_large4').values())
  weights, spared = count(large), count(dataclasses.replace(large, kv_sources=())) - count(large)
  assert weights == 1_050_089_886_752
  assert spared == 9 * (large.dim * large.kv_lora_rank + large.kv_lora_rank)
  unused = 71 * 124 * 3 * large.dim * large.moe_inter_dim + large.vocab_size * large.dim
  assert round((weights - unused) / 1e9) == 52


@pytest.mark.parametrize('family', FAMILIES)
def test_every_weight_has_a_name(family):
  """Without indexers, those of an indexer are left out and no others."""
  small = few_layers(a_model_of(family))
  for has_indexer in (True, False):
    arrays = arrays_of(small, family, has_indexer=has_indexer)
    unnamed = weight_shapes(small).keys() - arrays.keys()
    assert all('indexer' in path for path in unnamed)
    assert bool(unnamed) != has_indexer


@pytest.mark.parametrize('family', FAMILIES)
def test_names_are_of_weights_and_fields_that_there_are(family):
  """Every name is of one tensor, and every key of config.json is of a field of ModelConfig."""
  traits = FAMILIES[family]
  fields = {field.name for field in dataclasses.fields(ModelConfig)}
  named = {*traits.fields.values(), *traits.indexer_fields.values(), *traits.constants}
  named |= {field for field, _ in traits.optional.values()} | {*traits.fresh_indexer}
  assert named.union(*(keys.values() for keys in traits.ropes.values())) <= fields
  small = few_layers(a_model_of(family))
  tensors = [t for array in arrays_of(small, family).values() for t in array.tensors]
  names = [tensor.name for tensor in tensors if not tensor.part]
  assert {tensor.name for tensor in tensors} == {*names}
  assert len(names) == len(set(names))
  assert any(array.quantizable for array in arrays_of(small, family).values())
  for copy, original in copies_of(small, family).items():
    assert copy not in names and original in names
  assert any('.indexer.' in name for name in names) == traits.has_indexer


def test_a_new_family_is_one_more_entry(monkeypatch):
  """A family that names its attention otherwise, in its config.json and in its tensors."""
  v32 = FAMILIES['deepseek_v32']
  renamed = {ours: (name.replace('self_attn', 'attention'), equation)
             for ours, (name, equation) in v32.tensors.layer.items()}  # fmt: skip
  fields = {key.replace('num_attention_heads', 'n_head'): ours for key, ours in v32.fields.items()}
  tensors = dataclasses.replace(v32.tensors, layer=renamed)
  toy = dataclasses.replace(v32, architecture='Toy', tensors=tensors, fields=fields)
  monkeypatch.setitem(FAMILIES, 'toy', toy)
  small = few_layers(DEEPSEEK_V32)
  config = write_config('toy', small, {})
  assert (config['architectures'], config['n_head']) == (['Toy'], small.n_heads)
  assert read_config(config) == ('toy', small)
  names = {t.name for array in arrays_of(small, 'toy').values() for t in array.tensors}
  assert 'model.layers.1.attention.indexer.wk.weight' in names
  assert not any('self_attn' in name for name in names)


def a_model_of(family: str) -> ModelConfig:
  return next(iter(FAMILIES[family].sizes.values()), DEEPSEEK_V32)


def few_layers(model: ModelConfig) -> ModelConfig:
  """Returns a model with two layers, of which one has experts where the model has some."""
  leading = min(model.n_dense_layers, 1) if model.n_dense_layers < model.n_layers else 2
  is_mtp = model.attention == 'mla' and model.topk_method == 'noaux_tc' and leading < 2
  is_mtp = is_mtp and not model.output_gate
  nope = (1,) if model.nope_layers_expand else tuple(i for i in model.nope_layers if i < 2)
  windows = (1,) if model.window_layers else ()
  return dataclasses.replace(
      model, n_layers=2, n_dense_layers=leading, n_mtp_layers=int(is_mtp), n_routed_experts=16,
      nope_layers=nope, window_layers=windows, indexer_types=(), kv_sources=(),
  )  # fmt: skip


def test_families_import_nothing_but_sizes():
  for path in (ROOT / 'dsa_jax' / 'families').glob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom) and node.module.startswith('dsa_jax'):
        assert node.module.startswith(('dsa_jax.families', 'dsa_jax.config')), path


def test_whoever_needs_a_size_takes_it_from_here():
  sys.path.insert(0, str(ROOT / 'experiments' / 'pod_plan'))
  import plan

  assert DEEPSEEK_V32 == ModelConfig(rope_type='yarn')
  assert plan.MODELS == {name: SIZES[name] for name in cases.HEADS}
  for name, heads in cases.HEADS.items():
    assert heads == (SIZES[name].n_heads, SIZES[name].index_n_heads)
  assert ModelConfig(**deepseek_v32.get_config().model) == DEEPSEEK_V32


def test_no_other_file_has_the_sizes_of_a_released_model():
  """Judged by large numbers that are no small multiple of a power of two."""
  odd_part = lambda n: n // (n & -n)
  telling = {
      number
      for size in SIZES.values()
      for number in (size.vocab_size, size.dim, size.inter_dim, size.max_seq_len)
      if number > 4096 and odd_part(number) > 5
  }
  for folder in ('dsa_jax', 'configs', 'experiments'):
    for path in (ROOT / folder).rglob('*.py'):
      if path not in HOMES:
        assert not telling & numbers(path), path


def numbers(path: pathlib.Path) -> set[float]:
  tree = ast.walk(ast.parse(path.read_text()))
  values = [node.value for node in tree if isinstance(node, ast.Constant)]
  return {value for value in values if type(value) in (int, float)}
