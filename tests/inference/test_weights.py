# SPDX-License-Identifier: Apache-2.0
"""Weights that stay narrow: what is loaded, and that products widen it to what it stands for."""

import dataclasses
import json

from flax import nnx
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.data.text import VOCAB_SIZE
from dsa_jax.families import SIZES
from dsa_jax.inference.load import load_checkpoint
from dsa_jax.inference.sampler import SampleConfig, Sampler
from dsa_jax.inference.weights import abstract_weights
from dsa_jax.kernels.block_scaled import BlockScaled
from dsa_jax.training.checkpoint import Checkpoints, Progress
from dsa_jax.training.optim import OptimConfig
from dsa_jax.training.state import new_state

CFG = dataclasses.replace(laws.CFG, vocab_size=VOCAB_SIZE, max_seq_len=64)
IDS = [list(range(40, 64)), list(range(70, 81))]


def saved(params, folder):
  state = new_state(params, ('backbone',), OptimConfig(), seed=0)
  with Checkpoints(folder / 'checkpoints' / 'sparse') as checkpoints:
    checkpoints.save(1, state, Progress({}, 0.0))
  (folder / 'config.json').write_text(json.dumps({'model': dataclasses.asdict(CFG)}))
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


@pytest.mark.parametrize('fmt', ['fp8', 'int8'])
@pytest.mark.parametrize('attention', ['sparse', 'dense'])
def test_codes_do_what_the_numbers_do_that_they_stand_for(checkpoint, fmt, attention):
  model = load_checkpoint(checkpoint, dtype=fmt)
  assert any(map(is_scaled, jax.tree.leaves(model, is_leaf=is_scaled)))
  ours, theirs = (
      Sampler(m, attention=attention, capacity=64) for m in (model, widened(model))
  )
  read = ours.read(IDS).logits, theirs.read(IDS).logits
  np.testing.assert_allclose(*read, rtol=1e-5, atol=1e-5)
  config = SampleConfig(max_new_tokens=12)
  assert ours.generate(IDS, config) == theirs.generate(IDS, config)
