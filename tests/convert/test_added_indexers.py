# SPDX-License-Identifier: Apache-2.0
"""Families without indexers: fresh ones at import, trained ones in exports, and heads that are tied."""

import dataclasses
import json
import pathlib
import shutil

from flax import nnx
import numpy as np
import pytest
import released

from dsa_jax.config import ConfigError
from dsa_jax.convert.config_json import read_config
from dsa_jax.convert.exporter import export_checkpoint, open_checkpoint
from dsa_jax.convert.importer import import_checkpoint, open_source
from dsa_jax.families import SIZES
from dsa_jax.inference.load import load_checkpoint
from dsa_jax.training.checkpoint import Checkpoints, Progress
from dsa_jax.training.optim import OptimConfig
from dsa_jax.training.origin import keep_origin
from dsa_jax.training.state import init_params, new_state

PARITY = pathlib.Path(__file__).parents[1] / 'parity'
FRESH = {'index_n_heads': 3, 'index_head_dim': 8, 'index_rope_head_dim': 4, 'index_topk': 16}
INDEXER = 'model.layers.{}.self_attn.indexer.'
quiet = lambda nbytes: None


def convert(source: pathlib.Path, target: pathlib.Path, **sizes: int):
  import_checkpoint(open_source(source, indexer=sizes), target, advance=quiet)
  return load_checkpoint(target)


def run_from(ours: pathlib.Path, run: pathlib.Path, stage: str) -> pathlib.Path:
  """Makes the run of one step that began with a converted checkpoint."""
  params = nnx.state(load_checkpoint(ours))
  folder = run / 'checkpoints' / 'mine'
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, new_state(params, ('indexer',), OptimConfig(), seed=0), Progress({}, 0.0))
  model = json.loads((ours / 'config.json').read_text())['model']
  (run / 'config.json').write_text(json.dumps({'model': model, 'stages': {'mine': {'stage': stage, 'seq_len': 48}}}))
  keep_origin(run, [ours])
  return folder


def test_fresh_indexers_have_the_usual_sizes_or_those_that_are_asked_for():
  source = open_source(PARITY / 'qwen3')
  sizes = 'index_n_heads', 'index_head_dim', 'index_rope_head_dim', 'index_topk'
  assert [getattr(source.model, name) for name in sizes] == [16, 64, 32, 2048]
  assert dataclasses.replace(source.model, **FRESH) == open_source(PARITY / 'qwen3', indexer=FRESH).model
  with pytest.raises(ConfigError, match='index_rope_dim=32 must be even and at most'):
    open_source(PARITY / 'qwen3', indexer={'index_head_dim': 16})
  with pytest.raises(ConfigError, match='checkpoint has indexers'):
    open_source(PARITY / 'deepseek_v32', indexer=FRESH)


@pytest.mark.parametrize('said, dtype', [({}, 'float32'), ({'torch_dtype': None}, 'float32'), ({'dtype': 'bfloat16'}, 'bfloat16')])
def test_the_dtype_is_that_of_the_weights_where_none_is_named(said, dtype, tmp_path):
  shutil.copytree(PARITY / 'qwen3', tmp_path / 'source')
  path = tmp_path / 'source' / 'config.json'
  config = json.loads(path.read_text())
  del config['torch_dtype']
  path.write_text(json.dumps(config | said))
  assert open_source(tmp_path / 'source').model.dtype == dtype


@pytest.mark.parametrize(
    'case, family',
    [
        ('llama_tied', 'llama'),
        ('qwen3_windows', 'qwen3'),  # Its layer 0 alone selects.
        ('qwen3_moe_plain', 'qwen3_moe'),
        ('qwen3_moe_mixed', 'qwen3_moe'),
        ('glm4_moe', 'glm4_moe'),
        ('deepseek_v2', 'deepseek_v2'),
        ('moonlight', 'deepseek_v32'),
    ],
)
def test_trained_indexers_go_out_and_come_back(case, family, tmp_path):
  """They go out under DeepSeek's names, and config.json says their sizes."""
  convert(PARITY / case, tmp_path / 'ours', **FRESH)
  folder = run_from(tmp_path / 'ours', tmp_path / 'run', 'sparse')
  export_checkpoint(open_checkpoint(folder), tmp_path / 'out')
  before, after = released.read(PARITY / case), released.read(tmp_path / 'out')
  assert {name: after[name] for name in before} == before
  full = open_source(PARITY / case).model.full_layers
  tensors = 'wq_b.weight', 'wk.weight', 'k_norm.weight', 'k_norm.bias', 'weights_proj.weight'
  added = {INDEXER.format(i) + name for i in full for name in tensors}
  assert after.keys() - before.keys() == added
  written = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert {name: written[name] for name in FRESH} == FRESH
  assert written['model_type'] == family
  model, back = load_checkpoint(folder), convert(tmp_path / 'out', tmp_path / 'back')
  length = 0 if family == 'deepseek_v32' else 48  # Of the rows that they learned from.
  assert back.cfg == dataclasses.replace(model.cfg, index_original_seq_len=length)
  if length:
    assert load_checkpoint(tmp_path / 'back', index_rope_factor=2.0).cfg.index_original_seq_len == 48
  assert model.cfg.dtype == 'float32'  # So nothing is rounded.
  for i in full:
    for a, b in zip(*(jax_leaves(m.block(i).attn.indexer) for m in (model, back))):
      np.testing.assert_array_equal(b, a)
  with pytest.raises(ConfigError, match='checkpoint has indexers'):
    open_source(tmp_path / 'out', indexer=FRESH)
  export_checkpoint(open_checkpoint(tmp_path / 'back'), tmp_path / 'again')
  assert released.read(tmp_path / 'again') == after


def jax_leaves(module: nnx.Module) -> list:
  return [x[...] for _, x in nnx.to_flat_state(nnx.state(module))]


def test_indexers_that_share_are_written_too(tmp_path):
  """A model made here, with IndexShare, becomes one of the first family that can say all of it."""
  size = dataclasses.replace(
      SIZES['smollm2_135m'], n_layers=3, n_dense_layers=3, dim=24, inter_dim=16, n_heads=4,
      n_kv_heads=2, v_head_dim=8, qk_rope_head_dim=8, vocab_size=40, max_seq_len=64,
      original_seq_len=64, indexer_types=('full', 'shared', 'full'), **FRESH,
  )  # fmt: skip
  folder = tmp_path / 'run' / 'checkpoints' / 'mine'
  with Checkpoints(folder) as checkpoints:
    state = new_state(init_params(size, seed=0), ('indexer',), OptimConfig(), seed=0)
    checkpoints.save(1, state, Progress({}, 0.0))
  stages = {'mine': {'stage': 'sparse'}}
  record = {'model': dataclasses.asdict(size), 'stages': stages, 'data': {'source': 'recall'}}
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(record))
  source = open_checkpoint(folder)
  assert source.family == 'llama'
  export_checkpoint(source, tmp_path / 'out')
  assert not any(INDEXER.format(1) in name for name in released.read(tmp_path / 'out'))
  assert open_source(tmp_path / 'out').model == size
  with pytest.raises(ConfigError, match="kv_lora_rank=0.* export as 'llama' or 'mistral'"):
    open_checkpoint(folder, 'deepseek_v32')
  with pytest.raises(ConfigError, match=r'cannot hold this model \(qk_norm\)'):
    open_checkpoint(folder, 'qwen3')


def test_indexers_that_were_not_trained_stay_here(tmp_path):
  convert(PARITY / 'qwen3', tmp_path / 'ours', **FRESH)
  folder = run_from(tmp_path / 'ours', tmp_path / 'run', 'dense')
  export_checkpoint(open_checkpoint(folder), tmp_path / 'out')
  assert released.read(tmp_path / 'out') == released.read(PARITY / 'qwen3')


def with_head(folder: pathlib.Path, factor: float) -> pathlib.Path:
  """Writes a tied checkpoint that has a head all the same: the embedding times a factor."""
  shutil.copytree(PARITY / 'llama_tied', folder)
  tensors = {}
  for name, entry in released.safetensors.deserialize((folder / 'model.safetensors').read_bytes()):
    tensors[name] = np.frombuffer(bytes(entry['data']), np.float32).reshape(entry['shape'])
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'] * np.float32(factor)
  released.write_shard(folder / 'model.safetensors', tensors)
  return folder


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
  source = with_head(tmp_path / 'same', 1)
  assert convert(source, tmp_path / 'ours', **FRESH).head is None
  export_checkpoint(open_checkpoint(tmp_path / 'ours'), tmp_path / 'out')
  assert released.read(tmp_path / 'out') == released.read(source)
  with pytest.raises(ConfigError, match='lm_head.weight must be a copy of model.embed_tokens.weight'):
    open_source(with_head(tmp_path / 'other', 2))


def test_an_untied_head_must_be_there(tmp_path):
  shutil.copytree(PARITY / 'llama_tied', tmp_path / 'source')
  path = tmp_path / 'source' / 'config.json'
  config = json.loads(path.read_text()) | {'tie_word_embeddings': False}
  path.write_text(json.dumps(config))
  with pytest.raises(ConfigError, match='lm_head.weight is missing'):
    open_source(tmp_path / 'source')
  assert read_config(config)[1].tie_embeddings is False


@pytest.mark.parametrize('case', ['qwen2', 'qwen3_moe'])
def test_matrices_may_be_exported_in_fp8(case, tmp_path):
  """All of them but the embedding, the head and the router; biases and norms stay as they are."""
  convert(PARITY / case, tmp_path / 'ours', **FRESH)
  export_checkpoint(open_checkpoint(tmp_path / 'ours'), tmp_path / 'out', quantized=True)
  after = released.read(tmp_path / 'out')
  wide = {name for name, (dtype, shape, _) in after.items() if dtype != 'F8_E4M3' and len(shape) > 1}
  wide = {name for name in wide if not name.endswith('_scale_inv')}
  assert all(name.split('.')[-2] in ('embed_tokens', 'lm_head', 'gate') for name in wide)
  assert not any('bias' in name and dtype == 'F8_E4M3' for name, (dtype, *_) in after.items())
  back = convert(tmp_path / 'out', tmp_path / 'back', **FRESH)
  wq, again = (model.block(0).attn.wq[...] for model in (load_checkpoint(tmp_path / 'ours'), back))
  np.testing.assert_allclose(again, wq, rtol=2**-3, atol=1e-3)
