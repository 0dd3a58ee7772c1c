# SPDX-License-Identifier: Apache-2.0
"""An export gives back what was imported: dtypes, what config.json says of them, files and ids."""

import dataclasses
import json
import pathlib
import shutil

from flax import nnx
import numpy as np
import pytest
import released
from tokenizer_families import byte_level

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.convert import quantization
from dsa_jax.convert.config_json import read_config
from dsa_jax.convert.exporter import _ids_of_data, export_bytes, export_checkpoint, open_checkpoint
from dsa_jax.convert.importer import import_checkpoint, open_source
from dsa_jax.data.text import BOS, VOCAB_SIZE
from dsa_jax.inference.load import StoredModel, load_checkpoint
from dsa_jax.nn.mlp import MLP
from dsa_jax.training.checkpoint import Checkpoints, Progress
from dsa_jax.training.optim import OptimConfig
from dsa_jax.training.origin import keep_origin
from dsa_jax.training.state import init_params, new_state

quiet = lambda nbytes: None
MTP, DEPTH = 'model.layers.3', range(3)
WK = [f'model.layers.{i}.self_attn.indexer.wk' for i in (*DEPTH, 3)]
ATTENTION = [f'model.layers.{i}.self_attn' for i in DEPTH]

# Parts of an FP8 checkpoint that came in bfloat16, and the lists that say so in released files.
PARTS = {
    'mtp': (lambda name: name.startswith(MTP + '.'), [MTP]),
    'wk': (lambda name: 'indexer.wk.' in name, WK),
    'attention': (lambda name: 'self_attn' in name and not name.startswith(MTP), ATTENTION),
    'shared experts': (lambda name: 'shared_experts' in name, ['shared_experts']),
    'all but experts': (lambda name: '.experts.' not in name, ['self_attn', 'shared_experts', 're:model.layers.0']),
}  # fmt: skip


def widen(tensors: dict, is_wide) -> dict:
  """Turns some FP8 matrices into bfloat16 ones."""
  out = {}
  for name, x in tensors.items():
    if name.endswith('_scale_inv'):
      if not is_wide(name):
        out[name] = x
    elif is_wide(name) and x.dtype == released.CODES['F8']:
      out[name] = np.random.default_rng(0).normal(size=x.shape).astype(released.CODES['BF16'])
    else:
      out[name] = x
  return out


def convert(folder: pathlib.Path, config: dict, tensors: dict, **files: str):
  released.write(folder / 'source', config, tensors)
  for name, content in files.items():
    (folder / 'source' / name.replace('__', '.')).write_text(content)
  import_checkpoint(open_source(folder / 'source'), folder / 'ours', advance=quiet)
  return open_checkpoint(folder / 'ours')


def export(source, target: pathlib.Path, quantized: bool | None = None) -> tuple[dict, dict]:
  """Returns the tensors and config.json of an export."""
  export_checkpoint(source, target, quantized=quantized)
  return released.read(target), json.loads((target / 'config.json').read_text())


def agrees(tensors: dict, config: dict) -> bool:
  """Whether a loader that obeys the list finds the dtypes that it expects."""
  section = config.get('quantization_config') or {}
  entries = section.get('modules_to_not_convert') or []
  usual = {n for n, (_, code) in released.layout(released.V32).items() if code == 'F8'}
  for name in usual:
    listed = any(quantization._speaks_of(e, name.removesuffix('.weight')) for e in entries)
    if (tensors[name][0] == 'F8_E4M3') != (bool(section) and not listed):
      return False
  return True


@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('listed', [True, False], ids=['listed', 'unlisted'])
def test_recorded_dtypes_win(tmp_path, part, listed):
  """A plain export gives back the same bytes, and a list that fits them."""
  is_wide, names = PARTS[part]
  config = dict(released.V32)
  if listed:
    config['quantization_config'] = config['quantization_config'] | {'modules_to_not_convert': names}
  tensors = widen(released.random_tensors(config), is_wide)
  source = convert(tmp_path, config, tensors)
  got, written = export(source, tmp_path / 'plain')
  assert got == released.read(tmp_path / 'source')
  assert agrees(got, written)
  if listed:
    assert written['quantization_config'] == config['quantization_config']
  got, written = export(source, tmp_path / 'fp8', True)
  assert agrees(got, written)
  assert 'modules_to_not_convert' not in written['quantization_config']
  got, written = export(source, tmp_path / 'wide', False)
  assert agrees(got, written)
  assert 'quantization_config' not in written
  assert not any(dtype == 'F8_E4M3' for dtype, *_ in got.values())
  assert export_bytes(source) == sum(len(data) for *_, data in released.read(tmp_path / 'plain').values())


def test_a_checkpoint_without_fp8_says_nothing_of_it(tmp_path):
  tensors = released.random_tensors(released.V32, fp8=False)
  got, written = export(convert(tmp_path, released.V32, tensors), tmp_path / 'out')
  assert got == released.read(tmp_path / 'source')
  assert 'quantization_config' not in written


@pytest.mark.parametrize(
    'before, quantized, wide, after',
    [
        (['lm_head', 'm.1'], ['m.2.a'], ['m.1.a'], ['lm_head', 'm.1']),
        (['m.1'], ['m.1.a', 'm.10.a'], ['m.1.b'], ['m.1.b']),
        (['m.1*'], ['m.2.a'], ['m.1.b'], ['m.1*']),
        (['re:m.[12]'], ['m.2.a'], ['m.1.b'], ['m.1.b']),
        (None, ['m.1.experts.0.a'], ['m.2.experts.0.a', 'm.2.experts.1.a'], ['m.2.experts']),
        (None, ['m.1.experts.0.a'], ['m.1.experts.1.a'], ['m.1.experts.1.a']),
        ([], ['m.1.a'], [], []),
        (['m.1'], ['m.1.a'], [], None),
    ],
)
@pytest.mark.parametrize('key', quantization.LISTS)
def test_lists_of_what_is_not_quantised(key, before, quantized, wide, after):
  base = {'quant_method': 'fp8'} | ({} if before is None else {key: before})
  section = quantization.describe(base, quantized, wide)
  lists = {k: v for k, v in section.items() if k in quantization.LISTS}
  assert list(lists.values()) == ([] if after is None else [after])


FILES = {
    'tokenizer__json': '{"version": "1.0"}',
    'tokenizer_config__json': '{"add_bos_token": true}',
    'special_tokens_map__json': '{}',
    'generation_config__json': '{"eos_token_id": [1, 3]}',
    'chat_template__jinja': '{{ messages }}',
}


def train(ours: pathlib.Path, run: pathlib.Path, *, stage: str = 'sparse') -> pathlib.Path:
  """Makes the run of one step that began with a converted checkpoint."""
  record = json.loads((ours / 'config.json').read_text())
  model = load_checkpoint(ours)
  params = nnx.state(model)
  params['embed'] = params['embed'].replace(params['embed'][...] + 1)
  state = new_state(params, ('indexer',), OptimConfig(), seed=0)
  folder = run / 'checkpoints' / 'mine'
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(7, state, Progress({}, 0.0))
  config = {'model': record['model'], 'stages': {'mine': {'stage': stage}}, 'data': {'source': 'text'}}
  (run / 'config.json').write_text(json.dumps(config))
  keep_origin(run, [ours])
  return folder


@pytest.mark.parametrize('fp8', [True, False])
def test_a_run_gives_back_what_it_began_with(tmp_path, fp8):
  config = released.V32 | {'bos_token_id': 5, 'eos_token_id': [6, 7], 'pad_token_id': 8}
  tensors = released.random_tensors(config, fp8=fp8)
  convert(tmp_path, config, tensors, **FILES)
  folder = train(tmp_path / 'ours', tmp_path / 'run')
  got, written = export(open_checkpoint(folder), tmp_path / 'out')
  before = released.read(tmp_path / 'source')
  assert {name: x[:2] for name, x in got.items()} == {name: x[:2] for name, x in before.items()}
  assert got['model.embed_tokens.weight'] != before['model.embed_tokens.weight']
  for name, content in FILES.items():
    assert (tmp_path / 'out' / name.replace('__', '.')).read_text() == content
  ids = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'torch_dtype', 'rope_scaling')
  assert {key: written[key] for key in ids} == {key: config[key] for key in ids}
  assert ('quantization_config' in written) == fp8
  export_checkpoint(open_checkpoint(folder), tmp_path / 'wide', quantized=False)
  open_source(tmp_path / 'wide')
  if not fp8:
    shutil.rmtree(tmp_path / 'run' / 'origin')
    export_checkpoint(open_checkpoint(folder), tmp_path / 'bare')
    assert not (tmp_path / 'bare' / 'tokenizer.json').exists()


def test_ids_are_those_of_the_tokenizer_that_a_run_has_kept(tmp_path):
  run = tmp_path / 'checkpoints' / 'mine'
  (tmp_path / 'origin').mkdir(parents=True)
  data = {'source': 'mixture', 'tokenizer': '', 'sources': {'a': {'format': 'text'}}}
  ids = lambda data: tuple(_ids_of_data(StoredModel(run, None, {'data': data}), 400).values())
  assert ids(data) == (BOS, BOS)
  for lost in {'sources': {'a': {'format': 'flat'}}}, {'tokenizer': '/lost'}, {'source': 'recall'}:
    assert ids(data | lost) == (None, None)
  byte_level(['<s>', '<|end|>']).save(str(tmp_path / 'origin' / 'tokenizer.json'))
  assert ids(data) == (None, None)
  settings = {'bos_token': '<s>', 'eos_token': '<|end|>'}
  (tmp_path / 'origin' / 'tokenizer_config.json').write_text(json.dumps(settings))
  assert ids(data) == (0, 1)
  (tmp_path / 'origin' / 'generation_config.json').write_text('{"eos_token_id": [1, 3]}')
  assert ids(data) == (0, [1, 3])


def test_loading_an_import_says_nothing(tmp_path, caplog):
  config = released.V32 | {'num_nextn_predict_layers': 0}
  convert(tmp_path, config, released.random_tensors(config, fp8=False))
  caplog.clear()
  load_checkpoint(tmp_path / 'ours')
  assert not [record for record in caplog.records if record.levelname != 'INFO']


def test_one_section_says_what_is_quantized(tmp_path):
  """Some files call it by another name."""
  config = dict(released.V32)
  config['compression_config'] = config.pop('quantization_config')
  source = convert(tmp_path, config, released.random_tensors(released.V32))
  for name, quantized in ('plain', None), ('wide', False):
    written = export(source, tmp_path / name, quantized)[1]
    assert 'compression_config' not in written
    assert ('quantization_config' in written) == (quantized is None)


@pytest.mark.parametrize('stage, family', [('sparse', 'deepseek_v32'), ('dense', 'deepseek_v3')])
def test_trained_indexers_are_exported_whatever_the_origin(tmp_path, stage, family):
  """DeepSeek-V3 has none; what has been trained in their place must not be lost."""
  convert(tmp_path, released.V3, released.random_tensors(released.V3, fp8=False))
  folder = train(tmp_path / 'ours', tmp_path / 'run', stage=stage)
  source = open_checkpoint(folder)
  assert source.family == family
  assert open_checkpoint(folder, 'deepseek_v3').family == 'deepseek_v3'


@pytest.mark.parametrize(
    'vocab_size, data, ids',
    [
        (VOCAB_SIZE, {'source': 'text'}, (256, 256)),
        pytest.param(VOCAB_SIZE, {}, (256, 256), marks=pytest.mark.nightly),
        (300, {'source': 'recall'}, (None, None)),
        pytest.param(48, {'source': 'text'}, (None, None), marks=pytest.mark.nightly),
    ],
)
def test_a_run_without_an_origin_has_the_ids_of_its_data(tmp_path, vocab_size, data, ids):
  cfg = dataclasses.replace(read_config(released.V32)[1], vocab_size=vocab_size, n_mtp_layers=0)
  folder = tmp_path / 'run' / 'checkpoints' / 'mine'
  with Checkpoints(folder) as checkpoints:
    state = new_state(init_params(cfg, seed=0), ('indexer',), OptimConfig(), seed=0)
    checkpoints.save(7, state, Progress({}, 0.0))
  record = {'model': dataclasses.asdict(cfg), 'stages': {}, 'data': data}
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(record))
  _, written = export(open_checkpoint(folder), tmp_path / 'out')
  assert (written['bos_token_id'], written['eos_token_id']) == ids  # Loaders would choose for absent ones.
  assert read_config(written)[1] == cfg
  assert cfg == ModelConfig(**record['model'])


def test_a_pattern_that_only_the_source_spells_out_is_kept(tmp_path):
  """DeepSeek-V3.2 has no list of indexers, but a config.json that gives their frequency is kept."""
  config = released.V32 | {'index_topk_freq': 2, 'index_skip_topk_offset': 1}
  tensors = released.random_tensors(config)
  got, written = export(convert(tmp_path, config, tensors), tmp_path / 'out')
  assert got == released.read(tmp_path / 'source')
  assert read_config(written)[1].indexer_types == ('full', 'shared', 'full')


def test_layers_of_unlike_kinds_in_any_order(tmp_path):
  """Each layer's tensors reach the layer of its number, and come out as they were."""
  types = ['sparse', 'dense', 'sparse', 'sparse', 'dense']
  config = released.V32 | {
      'num_hidden_layers': 5, 'mlp_layer_types': types, 'first_k_dense_replace': 0,
  }  # fmt: skip
  source = convert(tmp_path, config, released.random_tensors(config))
  assert source.model.mlp_layers == (1, 4)
  tensors, written = export(source, tmp_path / 'out')
  assert tensors == released.read(tmp_path / 'source')
  assert written['mlp_layer_types'] == types
  model = load_checkpoint(tmp_path / 'ours')
  for i, kind in enumerate(types):
    name = f'model.layers.{i}.self_attn.kv_a_layernorm.weight'
    want = np.frombuffer(tensors[name][2], np.float32)
    np.testing.assert_array_equal(model.block(i).attn.kv_norm.scale[...], want)
    assert isinstance(model.block(i).ffn, MLP) == (kind == 'dense')
  with pytest.raises(ConfigError, match="family='deepseek_v3' cannot hold this model .mlp_layers"):
    open_checkpoint(tmp_path / 'ours', 'deepseek_v3')
