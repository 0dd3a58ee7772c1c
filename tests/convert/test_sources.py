# SPDX-License-Identifier: Apache-2.0
"""Folders as they lie on real disks: what is skipped, and what is said in few words."""

import json
import os
import pathlib

from flax import nnx
import jax
import ml_dtypes
import numpy as np
import pytest
import released

from dsa_jax.config import ConfigError
from dsa_jax.convert.building import KEPT_FILES, building
from dsa_jax.convert.exporter import export_checkpoint, open_checkpoint
from dsa_jax.convert.importer import import_checkpoint, open_source
from dsa_jax.inference.load import load_checkpoint

quiet = lambda nbytes: None
INDEX = 'model.safetensors.index.json'
POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4302350824\n'


def write(folder: pathlib.Path, config=released.V32, change=lambda tensors: None, **kwargs):
  tensors = released.random_tensors(config, **kwargs)
  change(tensors)
  released.write(folder, config, tensors)
  return tensors


def refused(folder: pathlib.Path, **kwargs) -> list[str]:
  with pytest.raises(ConfigError) as error:
    open_source(folder, **kwargs)
  return str(error.value).splitlines()


# Links.


@pytest.mark.parametrize('end', ['disk/end', 'disk/new/end'])
def test_a_link_to_nothing_is_built_at_its_end(tmp_path, end):
  (tmp_path / 'disk').mkdir()
  target = tmp_path / 'link'
  target.symlink_to(tmp_path / end)
  with building(target, needs=0) as partial:
    assert partial.parent == (tmp_path / end).parent
    (partial / 'a').write_text('a')
  assert target.is_symlink() and (tmp_path / end / 'a').read_text() == 'a'
  assert sorted(p.name for p in tmp_path.iterdir()) == ['disk', 'link']


def test_a_relative_link_and_a_link_to_a_link(tmp_path):
  (tmp_path / 'first').symlink_to('second')
  (tmp_path / 'second').symlink_to('end')
  with building(tmp_path / 'first', needs=0) as partial:
    (partial / 'a').write_text('a')
  assert (tmp_path / 'end' / 'a').read_text() == 'a'


def test_a_link_in_a_circle_is_refused_before_any_work(tmp_path):
  (tmp_path / 'a').symlink_to('b')
  (tmp_path / 'b').symlink_to('a')
  with pytest.raises(ConfigError, match='a is a link that leads back to itself'):
    with building(tmp_path / 'a', needs=0):
      raise AssertionError('work')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b']


def test_a_link_to_something_exists(tmp_path):
  (tmp_path / 'end').mkdir()
  (tmp_path / 'link').symlink_to('end')
  with pytest.raises(ConfigError, match='link exists; choose another target'):
    with building(tmp_path / 'link', needs=0):
      pass


def test_a_failed_build_at_a_links_end_leaves_the_link_alone(tmp_path):
  (tmp_path / 'link').symlink_to('end')
  with pytest.raises(KeyError):
    with building(tmp_path / 'link', needs=0):
      raise KeyError
  assert [p.name for p in tmp_path.iterdir()] == ['link']


# Files that are not what they seem.


@pytest.mark.parametrize(
    'name', ['config.json', INDEX, 'model-00002-of-00003.safetensors', 'tokenizer.json']
)
def test_git_lfs_pointers_are_named_as_such(tmp_path, name):
  write(tmp_path / 'source')
  (tmp_path / 'source' / name).write_text(POINTER)
  lines = refused(tmp_path / 'source')
  assert f'{name} is a git-lfs pointer, not the file itself: run `git lfs pull`' in lines[-1]
  assert len(lines) <= 2


def test_every_shard_may_be_a_pointer(tmp_path):
  write(tmp_path / 'source')
  for path in (tmp_path / 'source').glob('*.safetensors'):
    path.write_text(POINTER)
  assert len(refused(tmp_path / 'source')) == 4


@pytest.mark.parametrize('stale', ['missing shards', 'whole shards', 'junk'])
def test_a_file_that_was_saved_again_beats_the_index(tmp_path, stale, caplog):
  tensors = write(tmp_path / 'source')
  folder = tmp_path / 'source'
  tensors['model.norm.weight'] = tensors['model.norm.weight'] + 1
  released.write_shard(folder / 'model.safetensors', tensors)
  if stale == 'missing shards':
    for path in folder.glob('model-*.safetensors'):
      path.unlink()
  elif stale == 'junk':
    (folder / INDEX).write_text('{')
  opened = open_source(folder)
  assert {place.path.name for place in opened.places.values()} == {'model.safetensors'}
  assert 'model.safetensors is read' in caplog.text
  (folder / 'model.safetensors').write_bytes(b'')
  assert f'{INDEX} is there as well: delete it, or delete model.safetensors.' in refused(folder)[-1]


def test_an_index_that_names_the_single_file_is_used(tmp_path):
  tensors = released.random_tensors(released.V32)
  released.write(tmp_path / 'source', released.V32, tensors, shards=1)
  folder = tmp_path / 'source'
  (folder / 'model-00001-of-00001.safetensors').rename(folder / 'model.safetensors')
  index = {'weight_map': dict.fromkeys(tensors, 'model.safetensors')}
  (folder / INDEX).write_text(json.dumps(index))
  open_source(folder)
  (folder / INDEX).write_text(json.dumps({'weight_map': index['weight_map'] | {'x': 'model.safetensors'}}))
  assert f'x is not in model.safetensors, where {INDEX} lists it' in refused(folder)[-1]


# Tensors that no loader reads.


@pytest.mark.parametrize('config', [released.V32, released.GLM, released.V3], ids=['v32', 'glm', 'v3'])
def test_inverse_frequencies_are_skipped(tmp_path, config):
  def change(tensors):
    for i in range(config['num_hidden_layers'] + 1):
      tensors[f'model.layers.{i}.self_attn.rotary_emb.inv_freq'] = np.ones(4, np.float32)
    tensors['model.rotary_emb.inv_freq'] = np.ones(4, np.float32)

  write(tmp_path / 'source', config, change)
  write(tmp_path / 'plain', config)
  opened, plain = open_source(tmp_path / 'source'), open_source(tmp_path / 'plain')
  assert opened.places.keys() == plain.places.keys()
  assert opened.nbytes == plain.nbytes


@pytest.mark.parametrize('fp8', [True, False])
def test_indexers_of_shared_layers_are_skipped(tmp_path, fp8):
  full = released.GLM | {'index_topk_freq': 1}
  released.write(tmp_path / 'source', released.GLM, released.random_tensors(full, fp8=fp8, norms='BF16'))
  opened = open_source(tmp_path / 'source')
  names = {name for name in opened.places if '.indexer.' in name}
  assert {int(name.split('.')[2]) for name in names} == {0, 1, 3, 5, 6}
  import_checkpoint(opened, tmp_path / 'ours', advance=quiet)
  export_checkpoint(open_checkpoint(tmp_path / 'ours'), tmp_path / 'out')
  assert released.read(tmp_path / 'out').keys() == opened.places.keys()


def test_indexers_of_a_dense_model_are_not(tmp_path):
  """A config.json without indexers beside their weights is of another model."""
  tensors = released.random_tensors(released.V32)
  released.write(tmp_path / 'source', released.V3, tensors)
  assert 'indexer' in refused(tmp_path / 'source')[1]


# Much that is wrong, in few words.


def test_long_lists_are_cut(tmp_path):
  def change(tensors):
    for name in [name for name in tensors if '.mlp.' in name]:
      tensors[f'language_model.{name}'] = tensors.pop(name)

  tensors = write(tmp_path / 'source', change=change)
  lines, n = refused(tmp_path / 'source'), sum('language_model' in name for name in tensors)
  assert sum('is missing' in line for line in lines) == 10
  assert sum('is in no place' in line for line in lines) == 10
  assert lines.count(f'  ... and {n - 10} more like these.') == 1
  assert sum('more like these' in line for line in lines) == 2


@pytest.mark.parametrize('layers', [0, None])
def test_an_mtp_layer_that_the_config_does_not_count(tmp_path, layers):
  write(tmp_path / 'source')
  path = tmp_path / 'source' / 'config.json'
  path.write_text(json.dumps(released.V32 | {'num_nextn_predict_layers': layers}))
  lines = refused(tmp_path / 'source')
  assert len(lines) == 2
  assert 'set it to 1, or leave the layer out with --nomtp' in lines[1]
  assert open_source(tmp_path / 'source', mtp=False).model.n_mtp_layers == 0


def test_an_mtp_layer_with_holes(tmp_path):
  def change(tensors):
    del tensors['model.layers.3.eh_proj.weight'], tensors['model.layers.3.enorm.weight']

  write(tmp_path / 'source', change=change)
  assert 'Nothing is missing outside the MTP layer, which --nomtp leaves out' in refused(tmp_path / 'source')[-1]
  open_source(tmp_path / 'source', mtp=False)


def with_scales(dtype):
  def change(tensors):
    for name in tensors:
      if name.endswith('_scale_inv'):
        tensors[name] = tensors[name].astype(dtype)

  return change


def test_scales_in_bfloat16_go_in_and_out(tmp_path):
  """As in Qwen's releases in FP8. They are powers of two here, so the weights are the same."""
  for name, dtype in ('narrow', ml_dtypes.bfloat16), ('wide', np.float32):
    write(tmp_path / name, change=with_scales(dtype))
    import_checkpoint(open_source(tmp_path / name), tmp_path / f'{name}_ours', advance=quiet)
    export_checkpoint(open_checkpoint(tmp_path / f'{name}_ours'), tmp_path / f'{name}_out')
    assert released.read(tmp_path / f'{name}_out') == released.read(tmp_path / name)
  narrow, wide = (load_checkpoint(tmp_path / f'{name}_ours') for name in ('narrow', 'wide'))
  jax.tree.map(np.testing.assert_array_equal, nnx.state(narrow), nnx.state(wide))


def test_scales_of_other_dtypes_are_told_once(tmp_path):
  tensors = write(tmp_path / 'source', change=with_scales(ml_dtypes.float8_e8m0fnu))
  n = sum(name.endswith('_scale_inv') for name in tensors)
  lines = refused(tmp_path / 'source')
  assert len(lines) == 2
  assert f'{n} scales, such as model' in lines[1] and 'they must be F32' in lines[1]


@pytest.mark.parametrize('method', ['awq', 'gptq', 'compressed-tensors', 'bitsandbytes', None])
def test_another_quantisation_is_refused_first(tmp_path, method):
  def change(tensors):
    for name in [name for name in tensors if 'proj.weight' in name]:
      tensors[name.replace('weight', 'qweight')] = tensors.pop(name)

  write(tmp_path / 'source', change=change)
  config = released.V32 | {'quantization_config': {'quant_method': method, 'bits': 4}}
  (tmp_path / 'source' / 'config.json').write_text(json.dumps(config))
  lines = refused(tmp_path / 'source')
  assert len(lines) == 1 and f'quant_method={method!r} must be' in lines[0]


# Numbers that are out of range.


@pytest.mark.parametrize('seed', [-1, 2**32, 2**63, 2**64])
def test_seeds_out_of_range(tmp_path, seed):
  write(tmp_path / 'source', released.V3)
  with pytest.raises(ConfigError, match=f'seed={seed} must'):
    import_checkpoint(open_source(tmp_path / 'source'), tmp_path / 'ours', seed=seed, advance=quiet)
  assert os.listdir(tmp_path) == ['source']


@pytest.mark.parametrize('size', [0, -1, 2**31, 2**63])
@pytest.mark.parametrize('name', ['index_n_heads', 'index_head_dim', 'index_topk'])
def test_sizes_of_fresh_indexers_out_of_range(tmp_path, name, size):
  write(tmp_path / 'source', released.V3)
  [line] = refused(tmp_path / 'source', indexer={name: size})
  assert f'{name}={size} must be positive' in line


def test_all_files_of_a_tokenizer_are_kept(tmp_path):
  write(tmp_path / 'source')
  content = {name: json.dumps({'name': name}) for name in KEPT_FILES}
  for name, text in content.items():
    (tmp_path / 'source' / name).write_text(text)
  import_checkpoint(open_source(tmp_path / 'source'), tmp_path / 'ours', advance=quiet)
  export_checkpoint(open_checkpoint(tmp_path / 'ours'), tmp_path / 'out')
  for folder in ('ours', 'out'):
    assert {name: (tmp_path / folder / name).read_text() for name in KEPT_FILES} == content


@pytest.mark.parametrize('family, code, is_kept', [('', 'model_x', True), ('', 'model_y', False), ('deepseek_v32', 'model_x', False)])
def test_classes_of_code_are_named_where_the_code_is_and_fits(family, code, is_kept, tmp_path):
  write(tmp_path / 'source', released.V3 | {'auto_map': {'AutoModel': 'model_x.Model'}})
  (tmp_path / 'source' / f'{code}.py').write_text('raise RuntimeError')  # Nothing runs it.
  import_checkpoint(open_source(tmp_path / 'source'), tmp_path / 'ours', advance=quiet)
  export_checkpoint(open_checkpoint(tmp_path / 'ours', family), tmp_path / 'out')
  assert ('auto_map' in json.loads((tmp_path / 'out' / 'config.json').read_text())) == is_kept
  assert (tmp_path / 'out' / f'{code}.py').read_text() == 'raise RuntimeError'
