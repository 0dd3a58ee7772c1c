# SPDX-License-Identifier: Apache-2.0
"""Tensors that hold several weights, tensors with other names, and tensors that no model has."""

import json
import pathlib
import re

import numpy as np
import pytest
import released

from dsa_jax.config import ConfigError
from dsa_jax.convert.exporter import export_checkpoint, open_checkpoint
from dsa_jax.convert.importer import import_checkpoint, open_source
from dsa_jax.inference.load import load_checkpoint

HY4 = pathlib.Path(__file__).parents[1] / 'parity' / 'hy_v4'


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
  codes = {'F32': np.float32}
  return {
      name: np.frombuffer(data, codes[dtype]).reshape(shape)
      for name, (dtype, shape, data) in released.read(folder).items()
  }


@pytest.fixture(scope='module')
def ours(tmp_path_factory) -> pathlib.Path:
  target = tmp_path_factory.mktemp('hy4') / 'ours'
  import_checkpoint(open_source(HY4), target, advance=lambda nbytes: None)
  return target


def test_both_halves_are_in_their_places(ours):
  joined = tensors_of(HY4)['model.layers.2.mlp.experts.gate_up_proj']
  ffn = load_checkpoint(ours).block(2).ffn
  width = joined.shape[1] // 2
  np.testing.assert_array_equal(ffn.w1[...], joined[:, :width].swapaxes(1, 2))
  np.testing.assert_array_equal(ffn.w3[...], joined[:, width:].swapaxes(1, 2))


def test_an_export_has_the_names_of_the_release_and_the_same_bytes(ours, tmp_path):
  read = []
  export_checkpoint(open_checkpoint(ours), tmp_path / 'out', advance=read.append)
  usual = lambda name: name.replace('mlp.linear_gate', 'mlp.gate_proj').replace(
      'shared_experts.linear_gate', 'shared_experts.gate_proj'
  )
  theirs = {usual(name): x for name, x in released.read(HY4).items()}
  assert theirs != released.read(HY4)
  assert released.read(tmp_path / 'out') == theirs
  assert sum(read) == sum(len(data) for _, _, data in theirs.values())
  before, after = (json.loads((folder / 'config.json').read_text()) for folder in (HY4, tmp_path / 'out'))
  assert before.items() <= after.items()
  open_source(tmp_path / 'out')  # The usual names are read, too.


def copied(folder: pathlib.Path, more: dict[str, np.ndarray]) -> pathlib.Path:
  config = json.loads((HY4 / 'config.json').read_text())
  released.write(folder, config, tensors_of(HY4) | more)
  return folder


def test_two_names_of_one_tensor(tmp_path):
  twice = {'model.layers.0.mlp.gate_proj.weight': np.zeros((48, 32), np.float32)}
  with pytest.raises(ConfigError, match='linear_gate.weight is .*gate_proj.weight by another name'):
    open_source(copied(tmp_path / 'twice', twice))


def test_tensors_of_mtp_layers_are_passed_over(tmp_path):
  extra = {'model.mtp_layers.0.eh_proj.weight': np.zeros((2, 2), np.float32)}
  source = open_source(copied(tmp_path / 'mtp', extra))
  assert not source.model.n_mtp_layers and not any('mtp' in name for name in source.places)


def test_parts_for_pictures_and_sound_are_passed_over(tmp_path):
  folder = HY4.parent / 'dots3_note'
  extra = [
      'vision_encoder.norm.weight', 'audio_encoder.dots_encoder.x.bias', 'model.mtp.norm.weight',
      'model.layers.46.input_layernorm.weight',
  ]  # fmt: skip
  tensors = tensors_of(folder) | dict.fromkeys(extra, np.zeros(2, np.float32))
  released.write(tmp_path / 'all', json.loads((folder / 'config.json').read_text()), tensors)
  assert not set(extra) & open_source(tmp_path / 'all').places.keys()


def test_hy4_reads_both_orders_of_two_names_and_writes_what_transformers_reads(tmp_path):
  folder = HY4.parent / 'hy_v4_vl'
  config, tensors = json.loads((folder / 'config.json').read_text()), tensors_of(folder)
  assert any('.hc_head.hc_pre.' in name for name in tensors)
  others = {name.replace('.hc_head.hc_pre.', '.hc_pre.hc_head.'): x for name, x in tensors.items()}
  released.write(tmp_path / 'other', config, others)
  import_checkpoint(open_source(tmp_path / 'other'), tmp_path / 'ours', advance=lambda nbytes: None)
  export_checkpoint(open_checkpoint(tmp_path / 'ours'), tmp_path / 'out')
  usual = lambda name: re.sub(r'(mlp|shared_experts)\.linear_gate', r'\1.gate_proj', name)
  text = {usual(name): x for name, x in released.read(folder).items() if not name.startswith('vit.')}
  assert released.read(tmp_path / 'out') == text
  written = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert all(written[key] == config[key] for key in config if key != 'text_config')
  of_text = {key: x for key, x in config['text_config'].items() if key not in config} | {'model_type': 'hy_v4_vl_text'}
  assert all(written['text_config'][key] == x for key, x in of_text.items())


def test_a_joined_tensor_of_another_width(tmp_path):
  name = 'model.layers.1.mlp.experts.gate_up_proj'
  half = {name: tensors_of(HY4)[name][:, :16]}
  with pytest.raises(ConfigError, match=r'has shape .4, 16, 32.; config.json asks for .4, 32, 32.'):
    open_source(copied(tmp_path / 'half', half))
