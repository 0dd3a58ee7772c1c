# SPDX-License-Identifier: Apache-2.0
"""Released checkpoints in and out; faults are in test_convert_faults.py, figures in parity."""

import dataclasses
import json
import math
import pathlib
import shutil

from flax import nnx
import jax
import ml_dtypes
import numpy as np
import pytest
import released

from configs import deepseek_v32
from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.convert import fp8
from dsa_jax.convert.config_json import read_config
from dsa_jax.convert.exporter import Checkpoint, _outs, export_checkpoint, open_checkpoint
from dsa_jax.convert.importer import import_checkpoint, open_source
from dsa_jax.convert.tensors import arrays_of
from dsa_jax.families import FAMILIES
from dsa_jax.families.deepseek import DEEPSEEK_V32
from dsa_jax.inference.load import load_checkpoint
from dsa_jax.train import train
from dsa_jax.training.checkpoint import Checkpoints, Progress, open_tree, restore_params
from dsa_jax.training.optim import OptimConfig
from dsa_jax.training.state import abstract_params, init_params, new_state

quiet = lambda nbytes: None


def import_folder(folder: pathlib.Path, target: pathlib.Path, **kwargs):
  mtp = kwargs.pop('mtp', True)
  return import_checkpoint(open_source(folder, mtp=mtp), target, advance=quiet, **kwargs)


def arrays(checkpoint: pathlib.Path) -> dict:
  return {path: store.read().result() for path, store in open_tree(checkpoint / '0/state').items()}


VARIANTS = {
    'v32_fp8': (released.V32, {}),
    'v32_bfloat16': (released.V32, {'fp8': False, 'norms': 'BF16'}),
    'v3_odd_scales': (released.V3, {'odd_scales': True, 'norms': 'BF16'}),
    'glm_shared': (released.GLM, {'norms': 'BF16'}),
    'glm_bfloat16': (released.GLM, {'fp8': False, 'norms': 'BF16'}),
    'axk2_fp8': (released.AXK2, {'norms': 'BF16'}),
    'dots3_fp8': (released.DOTS, {'norms': 'BF16'}),
}


@pytest.fixture(scope='module', params=VARIANTS)
def variant(request, tmp_path_factory):
  config, kwargs = VARIANTS[request.param]
  folder = tmp_path_factory.mktemp(request.param)
  released.write(folder / 'source', config, released.random_tensors(config, **kwargs))
  (folder / 'source' / 'tokenizer.json').write_text('{"version": "1.0"}')
  import_folder(folder / 'source', folder / 'ours')
  return folder, config


def test_round_trip(variant):
  """Out again, every tensor has its bytes, its dtype and its shape; in again, so have ours."""
  folder, config = variant
  source = open_checkpoint(folder / 'ours')
  export_checkpoint(source, folder / 'out', shard_bytes=200_000)
  assert released.read(folder / 'out') == released.read(folder / 'source')
  assert len(list((folder / 'out').glob('*.safetensors'))) > 1
  index = json.loads((folder / 'out' / 'model.safetensors.index.json').read_text())
  assert set(index['weight_map']) == set(released.read(folder / 'source'))
  assert (folder / 'out' / 'tokenizer.json').read_text() == '{"version": "1.0"}'
  written = json.loads((folder / 'out' / 'config.json').read_text())
  assert {key: written[key] for key in config if key in written} == {
      key: value for key, value in config.items() if key in written
  }
  assert read_config(written)[1] == read_config(config)[1]
  import_folder(folder / 'out', folder / 'again')
  ours, again = arrays(folder / 'ours'), arrays(folder / 'again')
  assert ours.keys() == again.keys()
  for path in ours:
    assert ours[path].dtype == again[path].dtype, path
    assert ours[path].tobytes() == again[path].tobytes(), path


def test_codes_may_stay_codes_on_disk(tmp_path):
  """They take half the room, load as the same codes and numbers, and go out as the same bytes."""
  config = released.V3 | {'num_hidden_layers': 2, 'num_nextn_predict_layers': 0}
  released.write(tmp_path / 'source', config, released.random_tensors(config, odd_scales=True, norms='BF16'))
  import_folder(tmp_path / 'source', tmp_path / 'codes', dtype='fp8')
  import_folder(tmp_path / 'source', tmp_path / 'wide', dtype='float32')
  codes, wide = arrays(tmp_path / 'codes'), arrays(tmp_path / 'wide')
  experts = 'params', 'moe_blocks', 'ffn', 'w1'
  assert codes[experts].dtype == 'float8_e4m3fn' and wide[experts].dtype == 'float32'
  assert codes['params', 'embed'].tobytes() == wide['params', 'embed'].tobytes()
  for dtype in 'fp8', 'float32':
    pair = [nnx.state(load_checkpoint(tmp_path / name, dtype=dtype)) for name in ('codes', 'wide')]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype('f4'), b.astype('f4')), *pair)
  export_checkpoint(open_checkpoint(tmp_path / 'codes'), tmp_path / 'out')
  assert released.read(tmp_path / 'out') == released.read(tmp_path / 'source')
  with pytest.raises(ConfigError, match='keeps .* in FP8, such as .*to train, convert the release again'):
    restore_params(tmp_path / 'codes', abstract_params(read_config(config)[1]))
  released.write(tmp_path / 'bf16', config, released.random_tensors(config, fp8=False))
  with pytest.raises(ConfigError, match='has no weights in FP8: dtype must be bfloat16 or float32'):
    import_folder(tmp_path / 'bf16', tmp_path / 'none', dtype='fp8')
  shutil.rmtree(tmp_path / 'codes' / '0' / 'scales')
  with pytest.raises(ConfigError, match='lacks the scales of .*: the copy is not whole'):
    open_checkpoint(tmp_path / 'codes')


def test_every_weight_is_in_its_place(variant):
  """Ours against theirs, element by element, dequantised in float64."""
  folder, config = variant
  theirs = {}
  for path in (folder / 'source').glob('*.safetensors'):
    for name, entry in released.safetensors.deserialize(path.read_bytes()):
      code = {'F8_E4M3': 'F8'}.get(entry['dtype'], entry['dtype'])
      x = np.frombuffer(bytes(entry['data']), released.CODES[code])
      theirs[name] = x.reshape(entry['shape']).astype(np.float64)
  for name in [name for name in theirs if name.endswith('_scale_inv')]:
    weight = theirs[name.removesuffix('_scale_inv')]
    for i, j in np.ndindex(weight.shape):
      weight[i, j] *= theirs[name][i // 128, j // 128]
  model = load_checkpoint(folder / 'ours')
  depth = config['num_hidden_layers']
  close = lambda a, b: np.testing.assert_allclose(np.asarray(a[...]), b, rtol=2**-8)
  close(model.head, theirs['lm_head.weight'].T)
  for i in range(depth):
    block, layer = model.block(i), f'model.layers.{i}.'
    attn = {k.removeprefix(layer + 'self_attn.'): v for k, v in theirs.items() if layer in k}
    own = released.sizes_of_layer(config, i)
    heads, nope, rope = (own[key] for key in ('num_attention_heads', 'qk_nope_head_dim', 'qk_rope_head_dim'))
    v = own['v_head_dim']
    gates = v * (config['model_type'] == 'axk2')
    q_b = attn['q_b_proj.weight'].reshape(heads, nope + rope + gates, -1)
    close(block.attn.wq_b, np.moveaxis(q_b, 2, 0))
    kv_b = attn['kv_b_proj.weight'].reshape(heads, nope + v, -1)
    close(block.attn.wkv_b, np.moveaxis(kv_b, 2, 0))
    close(block.attn.wkv_a, attn['kv_a_proj_with_mqa.weight'].T)
    close(block.attn.wo, attn['o_proj.weight'].T.reshape(heads, v, -1))
    if config['model_type'] == 'dots3_note':
      close(block.attn.wg, attn['g_proj.weight'].T)
      close(block.attn.k_rope_norm.scale, attn['k_rope_only_layernorm.weight'])
    if 'indexer.wq_b.weight' in attn:
      wq_b = attn['indexer.wq_b.weight'].reshape(config['index_n_heads'], -1, config['q_lora_rank'])
      close(block.attn.indexer.wq_b, np.moveaxis(wq_b, 2, 0))
      close(block.attn.indexer.k_norm.bias, attn['indexer.k_norm.bias'])
    elif 'index_n_heads' in config:
      assert block.attn.indexer is None
    for norm, name in (block.attn_norm, 'input'), (block.ffn_norm, 'post_attention'):
      if f'{layer}{name}_layernorm.norm.weight' in theirs:
        close(norm.scale, theirs[f'{layer}{name}_layernorm.norm.weight'])
        close(norm.w_down, theirs[f'{layer}{name}_layernorm.W_down.weight'].T)
        close(norm.w_up, theirs[f'{layer}{name}_layernorm.W_up.weight'].T)
    mlp = {k.removeprefix(layer + 'mlp.'): v for k, v in theirs.items() if layer in k}
    if i < config['first_k_dense_replace']:
      close(block.ffn.w2, mlp['down_proj.weight'].T)
    else:
      close(block.ffn.bias, mlp['gate.e_score_correction_bias'])
      for e in range(config['n_routed_experts']):
        close(block.ffn.w1[e], mlp[f'experts.{e}.gate_proj.weight'].T)
        close(block.ffn.w3[e], mlp[f'experts.{e}.up_proj.weight'].T)
  if not config.get('num_nextn_predict_layers'):
    assert model.mtp is None
    return
  close(model.mtp.eh_proj, theirs[f'model.layers.{depth}.eh_proj.weight'].T)
  close(model.mtp.norm.scale, theirs[f'model.layers.{depth}.shared_head.norm.weight'])


def test_an_fp8_export_of_a_wide_axk2_names_what_it_leaves_wide(tmp_path):
  tensors = released.random_tensors(released.AXK2, fp8=False, norms='BF16')
  config = {k: v for k, v in released.AXK2.items() if k != 'quantization_config'}
  released.write(tmp_path / 'source', config, tensors)
  import_folder(tmp_path / 'source', tmp_path / 'ours')
  export_checkpoint(open_checkpoint(tmp_path / 'ours'), tmp_path / 'out', quantized=True)
  written = json.loads((tmp_path / 'out' / 'config.json').read_text())['quantization_config']
  assert written['modules_to_not_convert'] == ['W_down', 'W_up']
  codes = {name: dtype for name, (dtype, *_) in released.read(tmp_path / 'out').items()}
  assert codes['model.layers.1.self_attn.q_b_proj.weight'] == 'F8_E4M3'
  assert codes['model.layers.1.input_layernorm.W_up.weight'] == 'BF16'


def layout_of(family: str, cfg: ModelConfig):
  source = Checkpoint(pathlib.Path(), family, cfg, True, {}, arrays_of(cfg, family), {}, {})
  return list(_outs(source, quantized=True))


def test_layout_of_deepseek_v32():
  """The released checkpoint's own totals: tensors, elements and bytes."""
  outs = layout_of('deepseek_v32', dataclasses.replace(DEEPSEEK_V32, n_mtp_layers=1))
  assert len(outs) == len({out.name for out in outs}) == 92_425
  assert sum(out.nbytes for out in outs) == 689_471_107_200
  assert sum(int(np.prod(out.shape)) for out in outs) == 685_396_921_376


@pytest.fixture(scope='module')
def v3(tmp_path_factory):
  folder = tmp_path_factory.mktemp('v3')
  released.write(folder / 'source', released.V3, released.random_tensors(released.V3))
  import_folder(folder / 'source', folder / 'ours')
  return folder


@pytest.mark.parametrize(
    'config, billions, full',
    [
        pytest.param(released.CONFIGS['glm5'], 753.9, 78, marks=pytest.mark.nightly),
        pytest.param(
            released.CONFIGS['glm5'] | {'num_nextn_predict_layers': 0}, 743.9, 78, marks=pytest.mark.nightly
        ),
        (released.CONFIGS['glm52'], 753.3, 21),
    ],
    ids=['5', '5_without_mtp', '5.2'],
)
def test_layout_of_glm(config, billions, full):
  """Published: 754B with the MTP layer, 744B without; 753.3B for 5.2, where 21 layers score."""
  family, cfg = read_config(config)
  weights = [out for out in layout_of(family, cfg) if not out.name.endswith('_scale_inv')]
  assert round(sum(math.prod(out.shape) for out in weights) / 1e9, 1) == billions
  assert len(cfg.full_layers) == full
  assert cfg.sm_scale == 256**-0.5
  assert not cfg.uses_yarn
  assert cfg.full_layers[:5] == ((0, 1, 2, 6, 10) if full == 21 else (0, 1, 2, 3, 4))


def test_fresh_indexers(v3, tmp_path):
  """DeepSeek-V3 has none: they are born as the model's own are, each layer's another."""
  model = load_checkpoint(v3 / 'ours')
  wk = np.asarray(model.moe_blocks.attn.indexer.wk[...])
  assert wk.shape == (2, 160, 128)
  np.testing.assert_allclose(wk.std(), 160**-0.5, rtol=0.05)
  assert not np.allclose(wk[0], wk[1])
  assert not np.allclose(wk[0], model.dense_blocks.attn.indexer.wk[0])
  assert (np.asarray(model.moe_blocks.attn.indexer.k_norm.scale[...]) == 1).all()
  import_folder(v3 / 'source', tmp_path / 'other', seed=1)
  other = arrays(tmp_path / 'other')['params', 'moe_blocks', 'attn', 'indexer', 'wk']
  assert not np.allclose(other, wk)


def test_v3_becomes_v32(v3, tmp_path):
  """As DeepSeek-V3 it goes out without them, as V3.2 with them."""
  export_checkpoint(open_checkpoint(v3 / 'ours', 'deepseek_v32'), tmp_path / 'out')
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['architectures'] == ['DeepseekV32ForCausalLM']
  assert read_config(config)[1] == load_checkpoint(v3 / 'ours').cfg
  import_folder(tmp_path / 'out', tmp_path / 'back')
  back, ours = arrays(tmp_path / 'back'), arrays(v3 / 'ours')
  assert back.keys() == ours.keys()
  path = 'params', 'moe_blocks', 'attn', 'indexer', 'wk'
  np.testing.assert_allclose(back[path].astype(np.float32), ours[path], rtol=2**-3, atol=1e-3)


def test_mtp_is_left_out_on_request(variant, tmp_path):
  folder, config = variant
  import_folder(folder / 'source', tmp_path / 'ours', mtp=False)
  assert load_checkpoint(tmp_path / 'ours').mtp is None
  kept = arrays(folder / 'ours')
  for path, x in arrays(tmp_path / 'ours').items():
    assert x.tobytes() == kept[path].tobytes()


def test_wide_import(variant, tmp_path):
  """In float32 dequantisation does not round; the FP8 bytes come back all the same."""
  folder, config = variant
  import_folder(folder / 'source', tmp_path / 'ours', dtype='float32')
  export_checkpoint(open_checkpoint(tmp_path / 'ours'), tmp_path / 'out')
  assert released.read(tmp_path / 'out') == released.read(folder / 'source')


def test_fresh_quantisation(tmp_path):
  """A checkpoint that was never FP8 is written in FP8: within half a step of E4M3."""
  tensors = released.random_tensors(released.V32, fp8=False)
  config = {k: v for k, v in released.V32.items() if k != 'quantization_config'}
  released.write(tmp_path / 'source', config, tensors)
  import_folder(tmp_path / 'source', tmp_path / 'ours')
  export_checkpoint(open_checkpoint(tmp_path / 'ours'), tmp_path / 'out', quantized=True)
  assert 'quantization_config' in json.loads((tmp_path / 'out' / 'config.json').read_text())
  expected = {
      name: dtype for name, (_, dtype) in released.layout(config, fp8=True, norms='F32').items()
  }
  dtypes = released.read(tmp_path / 'out')
  assert {name: dtype for name, (dtype, *_) in dtypes.items() if 'scale_inv' not in name} == {
      name: {'F8': 'F8_E4M3'}.get(dtype, dtype) for name, dtype in expected.items()
  }
  import_folder(tmp_path / 'out', tmp_path / 'back')
  before, after = arrays(tmp_path / 'ours'), arrays(tmp_path / 'back')
  for path, x in before.items():
    difference = np.abs(after[path].astype(np.float64) - x.astype(np.float64))
    assert (difference <= 2**-4 * np.abs(x.astype(np.float64)) + 1e-4).all(), path


@pytest.mark.parametrize('shape', [(128, 128), (5, 300), (129, 1)])
def test_scales(shape):
  """Powers of two, the smallest under which the block fits."""
  rng = np.random.default_rng(0)
  weight = rng.normal(size=shape).astype(np.float32)
  weight[0, 0] = 448.0  # Just fits a scale of 1.
  scale = fp8.block_scales(weight)
  assert scale.shape == fp8.scale_shape(shape)
  assert scale[0, 0] == 1
  for i, j in np.ndindex(scale.shape):
    largest = np.abs(weight[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]).max()
    assert largest <= 448 * scale[i, j] < 2 * largest
    assert np.frexp(scale[i, j])[0] == 0.5
  codes = fp8.quantize(weight, scale)
  assert codes.dtype == ml_dtypes.float8_e4m3fn
  again = fp8.quantize(fp8.dequantize(codes, scale, np.dtype(np.float32)), scale)
  assert codes.tobytes() == again.tobytes()
  assert (fp8.block_scales(np.zeros(shape, np.float32)) > 0).all()


def test_export_of_a_run(tmp_path):
  """A trained model becomes a released checkpoint, and comes back with the same weights."""
  _, cfg = read_config(released.GLM)
  state = new_state(init_params(cfg, seed=0), ('indexer',), OptimConfig(), seed=0)
  folder = tmp_path / 'run' / 'checkpoints' / 'warmup'
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(7, state, Progress({}, 0.0))
  record = {'model': dataclasses.asdict(cfg), 'stages': {}}
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(record))
  export_checkpoint(open_checkpoint(folder), tmp_path / 'out')
  import_folder(tmp_path / 'out', tmp_path / 'ours')
  back = load_checkpoint(tmp_path / 'ours')
  assert back.cfg == cfg
  pairs = zip(
      jax.tree.leaves_with_path(nnx.as_pure(state.params)), jax.tree.leaves(nnx.state(back))
  )
  for (path, x), y in pairs:
    np.testing.assert_allclose(y, x, rtol=2**-8, err_msg=jax.tree_util.keystr(path))


@pytest.mark.nightly
def test_a_dense_release_becomes_a_sparse_model(tmp_path):
  """configs/deepseek_v32.py from a DeepSeek-V3 folder: convert, warm up, go sparse, export."""
  config = deepseek_v32.get_config('tiny')
  model, family = config.model.to_dict(), FAMILIES['deepseek_v32']
  source = released.V3 | {key: model[field] for key, field in family.fields.items()}
  source |= {key: model[field] for key, (field, _) in family.optional.items()}
  yarn = {key: model[field] for key, field in family.ropes['yarn'].items()}
  source['rope_scaling'] = {'type': 'yarn', 'mscale_all_dim': yarn['mscale']} | yarn
  source |= {'first_k_dense_replace': 1, 'num_nextn_predict_layers': 1}
  released.write(tmp_path / 'v3', source, released.random_tensors(source))
  sizes = {name: model[name] for name in family.indexer_fields}
  opened = open_source(tmp_path / 'v3', indexer=sizes)
  import_checkpoint(opened, tmp_path / 'ours', advance=quiet)

  config.recipe = ('warmup', 'sparse')
  config.stages.warmup.init_from = str(tmp_path / 'ours')
  config.workdir = str(tmp_path / 'run')
  train(config)
  before = load_checkpoint(tmp_path / 'ours')
  warm = load_checkpoint(tmp_path / 'run' / 'checkpoints' / 'warmup')
  np.testing.assert_array_equal(warm.embed[...], before.embed[...])
  assert not np.allclose(warm.mtp.block.attn.indexer.wk[...], before.mtp.block.attn.indexer.wk[...])
  run = open_checkpoint(tmp_path / 'run' / 'checkpoints' / 'sparse')
  export_checkpoint(run, tmp_path / 'v32')
  written = json.loads((tmp_path / 'v32' / 'config.json').read_text())
  assert written['model_type'] == 'deepseek_v32'
  assert dataclasses.replace(read_config(written)[1], embed_init_std=0.02) == open_source(
      tmp_path / 'v32'
  ).model
