# SPDX-License-Identifier: Apache-2.0
"""Mistral Large 4's names and keys, those of its release and those of transformers, in and out."""

import json
import pathlib
import re

import numpy as np
import pytest
import released

from dsa_jax.convert.config_json import read_config, write_config
from dsa_jax.convert.exporter import export_checkpoint, open_checkpoint
from dsa_jax.convert.importer import import_checkpoint, open_source
from dsa_jax.inference.load import load_checkpoint

CASE = pathlib.Path(__file__).parents[1] / 'parity' / 'mistral_large4'
PICTURES = 'vision_encoder.', 'pre_mm_projector_norm.', 'patch_merger.', 'vision_language_adapter.'


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  """A release in FP8, with tensors of the parts that are left out, and ours."""
  folder = tmp_path_factory.mktemp('mistral')
  extra = (*(prefix + 'x.weight' for prefix in PICTURES), 'mtp_dspark.0.wq.weight')
  tensors = released.random_tensors(released.MISTRAL)
  released.write(folder / 'source', released.MISTRAL, tensors | dict.fromkeys(extra, np.zeros(2, np.float32)))
  import_checkpoint(open_source(folder / 'source'), folder / 'ours', advance=lambda nbytes: None)
  return folder


def test_round_trip(folder):
  """Out again, every tensor of the text has its bytes, and config.json says what it said."""
  export_checkpoint(open_checkpoint(folder / 'ours'), folder / 'out', shard_bytes=200_000)
  names = released.mistral_layout(released.MISTRAL)
  is_of_text = lambda name: name.removesuffix('_scale_inv') in names
  theirs = {name: x for name, x in released.read(folder / 'source').items() if is_of_text(name)}
  assert released.read(folder / 'out') == theirs and any(name.endswith('_scale_inv') for name in theirs)
  files = json.loads((folder / 'out' / 'model.safetensors.index.json').read_text())['weight_map']
  in_order = [files[name] for name in ('norm.weight', *(f'layers.{i}.ffn_norm.weight' for i in range(4)))]
  assert in_order == sorted(in_order) and len(set(in_order)) > 1
  written = json.loads((folder / 'out' / 'config.json').read_text())
  assert {key: written[key] for key in released.MISTRAL if key != 'text_config'} == {
      key: value for key, value in released.MISTRAL.items() if key != 'text_config'
  }
  assert released.MISTRAL['text_config'].items() <= written['text_config'].items()
  assert not {'quantization_config', 'vision_config', 'architectures'} & written['text_config'].keys()


def test_every_weight_is_in_its_place(folder):
  theirs = {}
  for name, (dtype, shape, data) in released.read(folder / 'source').items():
    code = {'F8_E4M3': 'F8'}.get(dtype, dtype)
    theirs[name] = np.frombuffer(data, released.CODES[code]).reshape(shape).astype(np.float64)
  for name in [name for name in theirs if name.endswith('_scale_inv')]:
    scale = theirs[name].repeat(128, axis=0).repeat(128, axis=1)
    weight = theirs[name.removesuffix('_scale_inv')]
    weight *= scale[: weight.shape[0], : weight.shape[1]]
  model, c = load_checkpoint(folder / 'ours'), released.MISTRAL['text_config']
  close = lambda a, b: np.testing.assert_allclose(np.asarray(a[...]), b, rtol=2**-8)
  close(model.rope_factors, theirs['lerope.alpha'])
  close(model.head, theirs['output.weight'].T)
  for i in range(4):
    block, layer = model.block(i), f'layers.{i}.'
    attn = {k.removeprefix(layer + 'attention.'): v for k, v in theirs.items() if k.startswith(layer)}
    split = lambda x: x.reshape(c['num_attention_heads'], -1, x.shape[1])
    of_heads = lambda name: np.moveaxis(split(attn[name]), 2, 0)
    close(block.attn.wq_b, of_heads('wq.weight'))
    close(block.attn.wkv_b, of_heads('wkv_b.weight'))
    close(block.attn.q_scale.scale, attn['ssmax_scaling.s'])
    close(block.attn.q_scale.bias, attn['ssmax_scaling.b'])
    assert (block.attn.wkv_a is None) == (i == 3) == ('wkv_a_with_mqa.weight' not in attn)
    if i < 3:
      close(block.attn.wkv_a, attn['wkv_a_with_mqa.weight'].T)
      close(block.attn.indexer.q_norm.bias, attn['indexer.q_input_norm.bias'])
      close(block.attn.indexer.q_scale.scale, attn['indexer.ssmax_scaling.s'])
      close(block.attn.indexer.weights_proj, attn['indexer.weights_proj.weight'].T)
    if i:
      close(block.ffn.gate, theirs[layer + 'gate.weight'].T)
      close(block.ffn.w3[1], theirs[layer + 'experts.1.w3.weight'].T)
      close(block.ffn.shared.w2, theirs[layer + 'shared_experts.w2.weight'].T)
    else:
      close(block.ffn.w1, theirs[layer + 'feed_forward.w1.weight'].T)


def test_what_transformers_saves_is_read():
  """Its config.json has more keys, and a text alone may be all that there is."""
  ours, saved = (json.loads((CASE / name).read_text()) for name in ('config.json', 'saved_config.json'))
  assert read_config(saved) == read_config(ours) == read_config(saved['text_config'] | {'dtype': 'float32'})
  name, model = read_config(saved)
  for base in ({}, ours, saved, saved['text_config']):
    written = write_config(name, model, base)
    assert written['text_config']['model_type'] == 'mistral_large4_text'
    assert read_config(written) == (name, model)


IN_MEMORY = {
    r'^tok_embeddings': 'model.language_model.embed_tokens', r'^norm': 'model.language_model.norm',
    r'^output': 'lm_head', r'^lerope': 'model.language_model.rotary_emb',
    r'^layers': 'model.language_model.layers', r'^vision_encoder': 'model.vision_tower',
    r'^(pre_mm|patch_m|vision_l)': r'model.multi_modal_projector.\1',
    r'\.attention\.': '.self_attn.', r'\.attention_norm': '.input_layernorm',
    r'\.ffn_norm': '.post_attention_layernorm', r'\.wq\.': '.q_proj.', r'\.wo\.': '.o_proj.',
    r'\.wkv_a_with_mqa': '.kv_a_proj_with_mqa', r'\.kv_a_norm': '.kv_a_layernorm',
    r'\.wkv_b': '.kv_b_proj', r'ssmax_scaling\.s': 'softmax_scaling.scale',
    r'ssmax_scaling\.b': 'softmax_scaling.bias', r'\.feed_forward': '.mlp', r'\.gate\.': '.mlp.gate.',
    r'\.shared_experts': '.mlp.shared_experts', r'\.w1\.': '.gate_proj.', r'\.w2\.': '.down_proj.',
    r'\.w3\.': '.up_proj.',
}  # fmt: skip


def with_names_in_memory(tensors: dict[str, np.ndarray], n_experts: int) -> dict[str, np.ndarray]:
  """Renames tensors as the classes of transformers do, which have all experts of a layer in one."""
  renamed = {}
  for name, x in tensors.items():
    if '.experts.' not in name:
      for pattern, other in IN_MEMORY.items():
        name = re.sub(pattern, other, name)
      renamed[name] = x
  for layer in {name.split('.experts.')[0] for name in tensors if '.experts.' in name}:
    all_of = lambda w: np.stack([tensors[f'{layer}.experts.{e}.{w}.weight'] for e in range(n_experts)])
    prefix = f'model.language_model.{layer}.mlp.experts.'
    renamed[prefix + 'gate_up_proj'] = np.concatenate([all_of('w1'), all_of('w3')], axis=1)
    renamed[prefix + 'down_proj'] = all_of('w2')
  return renamed


def test_names_of_classes_are_read_and_those_of_the_release_written(tmp_path):
  codes = {'F32': np.float32}
  theirs = released.read(CASE)
  tensors = {name: np.frombuffer(x, codes[code]).reshape(shape) for name, (code, shape, x) in theirs.items()}
  config = json.loads((CASE / 'config.json').read_text())
  others = with_names_in_memory(tensors, config['text_config']['n_routed_experts'])
  assert not others.keys() & theirs.keys() - {n for n in theirs if n.startswith(PICTURES)}
  released.write(tmp_path / 'saved', config, others)
  import_checkpoint(open_source(tmp_path / 'saved'), tmp_path / 'ours', advance=lambda nbytes: None)
  export_checkpoint(open_checkpoint(tmp_path / 'ours'), tmp_path / 'out')
  assert released.read(tmp_path / 'out') == {n: x for n, x in theirs.items() if not n.startswith(PICTURES)}
