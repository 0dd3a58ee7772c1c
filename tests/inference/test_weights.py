# SPDX-License-Identifier: Apache-2.0
"""Weights that stay narrow: what is loaded, and that products widen it to what it stands for."""

import dataclasses
import json
import math
import operator
import re

import einops
from flax import nnx
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
import released

from dsa_jax.config import ConfigError
from dsa_jax.convert.importer import import_checkpoint, open_source
from dsa_jax.data.text import VOCAB_SIZE
from dsa_jax.families import SIZES
from dsa_jax.inference.batch_file import AnswerFile, read_prompts
from dsa_jax.inference.load import load_checkpoint
from dsa_jax.inference.released import scales_of_blocks
from dsa_jax.inference.sampler import SampleConfig, Sampler
from dsa_jax.inference.weights import abstract_weights
from dsa_jax.kernels.block_scaled import BlockScaled, block_sizes
from dsa_jax.training.checkpoint import Checkpoints, Progress
from dsa_jax.training.optim import OptimConfig
from dsa_jax.training.state import new_state

CFG = dataclasses.replace(laws.CFG, vocab_size=VOCAB_SIZE, max_seq_len=64)
GQA = dataclasses.replace(laws.GQA, vocab_size=VOCAB_SIZE, max_seq_len=64)
IDS = [list(range(40, 64)), list(range(70, 81))]


def saved(params, folder, cfg=CFG):
  state = new_state(params, ('backbone',), OptimConfig(), seed=0)
  with Checkpoints(folder / 'checkpoints' / 'sparse') as checkpoints:
    checkpoints.save(1, state, Progress({}, 0.0))
  (folder / 'config.json').write_text(json.dumps({'model': dataclasses.asdict(cfg)}))
  return folder / 'checkpoints' / 'sparse'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  return saved(laws.weights(CFG), tmp_path_factory.mktemp('run'))


def is_scaled(x):
  return isinstance(x, BlockScaled)


def widened(model):
  """Returns the same model with arrays in the place of codes."""
  wide = lambda x: x.astype(jnp.float32) if is_scaled(x) else x
  return jax.tree.map(wide, model, is_leaf=is_scaled)


@pytest.fixture(scope='module', params=[(CFG, 'fp8'), (GQA, 'int8')], ids=['mla-fp8', 'gqa-int8'])
def pair(request, tmp_path_factory):
  """Samplers with codes, and with the numbers that these stand for."""
  cfg, fmt = request.param
  folder = saved(laws.weights(cfg), tmp_path_factory.mktemp('run'), cfg)
  model = load_checkpoint(folder, dtype=fmt)
  return Sampler(model, capacity=64), Sampler(widened(model), capacity=64)


def test_codes_do_what_the_numbers_do_that_they_stand_for(pair):
  read = (sampler.read(IDS).logits for sampler in pair)
  np.testing.assert_allclose(*read, rtol=1e-5, atol=1e-5)


@pytest.mark.nightly
def test_codes_write_what_the_numbers_do(pair):
  ours, theirs = (sampler.generate(IDS, SampleConfig(max_new_tokens=12)) for sampler in pair)
  assert ours == theirs


def test_what_was_fp8_before_is_what_it_was(checkpoint, tmp_path):
  wide = widened(load_checkpoint(checkpoint, dtype='fp8'))
  again = load_checkpoint(saved(nnx.state(wide), tmp_path), dtype='fp8')
  jax.tree.map(np.testing.assert_array_equal, nnx.state(widened(again)), nnx.state(wide))


def test_what_products_do_not_widen_keeps_its_dtype(checkpoint):
  narrow, wide = load_checkpoint(checkpoint, dtype='int8'), load_checkpoint(checkpoint)
  block, kept = narrow.block(1), wide.block(1)
  for path in 'attn.wo', 'attn.indexer.wq_b', 'ffn.w2', 'ffn.shared.w1':
    got, want = (operator.attrgetter(path)(x)[...] for x in (block, kept))
    assert got.codes.dtype == 'int8' and got.scale.dtype == 'float32'
    most = jnp.abs(want).max() / 127  # Half of a step, and the smaller blocks' steps are no larger.
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.51 * most)
  for path in 'ffn.gate', 'attn.indexer.weights_proj', 'attn.kv_norm.scale':
    got, want = (operator.attrgetter(path)(x)[...] for x in (block, kept))
    np.testing.assert_array_equal(got, want)


def test_v32_takes_little_more_than_its_released_checkpoint():
  weights = jax.tree.leaves(abstract_weights(SIZES['v32'], 'fp8'))
  assert sum(math.prod(x.shape) * x.dtype.itemsize for x in weights) < 1.05 * 689e9


def test_unknown_formats_are_refused(checkpoint):
  with pytest.raises(ConfigError, match=r"one of the formats .*'int8'.*; got 'fp4'"):
    load_checkpoint(checkpoint, dtype='fp4')


def test_answers_of_another_format_are_refused(checkpoint, tmp_path):
  wide, narrow = (Sampler.load(checkpoint, weights=fmt) for fmt in ('float32', 'int8'))
  assert wide.formats == ('float32', 'float32') and narrow.formats == ('float32', 'float32', 'int8')
  (tmp_path / 'prompts').write_text('{"prompt": "one"}')
  given = read_prompts(tmp_path / 'prompts', None), SampleConfig(max_new_tokens=1), 1
  list(AnswerFile(tmp_path / 'answers', wide, *given).answer(slots=1))
  with pytest.raises(ConfigError, match='another checkpoint or settings'):
    AnswerFile(tmp_path / 'answers', narrow, *given)


@pytest.mark.parametrize(
    'equation, sizes',
    [('f d -> d f', dict(f=300, d=256)), ('(h e) q -> q h e', dict(h=5, e=192, q=384)),
     ('d (h v) -> h v d', dict(d=64, h=3, v=96))],
)  # fmt: skip
def test_scales_of_blocks_are_those_of_their_numbers(equation, sizes):
  theirs, ours = equation.split(' -> ')
  matrix = tuple(
      math.prod(sizes[name] for name in axis.strip('()').split())
      for axis in re.findall(r'\([^)]*\)|\w+', theirs)
  )
  scale = np.random.default_rng(0).normal(size=[-(-n // 128) for n in matrix])
  of_numbers = np.repeat(np.repeat(scale, 128, 0), 128, 1)[: matrix[0], : matrix[1]]
  wanted = einops.rearrange(of_numbers, equation, **sizes)
  axes = ('heads', None, None) if ours.startswith('h') else (None,) * wanted.ndim
  blocks = block_sizes(wanted.shape, axes)
  got = scales_of_blocks(scale, equation, wanted.shape, blocks)
  for axis, size in enumerate(blocks):
    got = np.repeat(got, size, axis)
  np.testing.assert_array_equal(got, wanted)


def test_released_codes_are_kept_whatever_their_scales(tmp_path):
  tensors = released.random_tensors(released.V3, odd_scales=True, norms='BF16')
  released.write(tmp_path / 'source', released.V3, tensors)
  source = open_source(tmp_path / 'source')
  import_checkpoint(source, tmp_path / 'ours', dtype='float32', advance=lambda _: None)
  narrow, wide = (load_checkpoint(tmp_path / 'ours', dtype=fmt) for fmt in ('fp8', 'float32'))
  assert narrow.block(0).attn.indexer.wk[...].dtype == 'float32'  # It is fresh, and was never FP8.
  is_close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
  jax.tree.map(is_close, nnx.state(widened(narrow)), nnx.state(wide))
