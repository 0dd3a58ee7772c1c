# SPDX-License-Identifier: Apache-2.0
"""Schedules of the learning rate, and the weights that decay."""

from flax import nnx
import jax
import laws
import numpy as np
import optax
import pytest

from configs import quickstart
from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.training.optim import OptimConfig, ScheduleConfig, learning_rates, make_optimizer
from dsa_jax.training.stages import StageConfig
from dsa_jax.training.state import abstract_params, split_parts

pytestmark = pytest.mark.usefixtures('eager')

CFG = ModelConfig(**quickstart.get_config('tiny').model)


def rates(kind, *, warmup_steps=0, steps=10, end_share=0.1, decay_share=0.5, peak=2.0):
  shape = {'warmup_steps': warmup_steps, 'steps': steps, 'end_share': end_share}
  return learning_rates(ScheduleConfig(kind=kind, decay_share=decay_share, **shape), peak)


@pytest.mark.parametrize('warmup_steps', [0, 3])
def test_cosine_is_that_of_optax(warmup_steps):
  want = optax.cosine_decay_schedule(2.0, 10, 0.1)
  if warmup_steps:
    want = optax.warmup_cosine_decay_schedule(0.0, 2.0, 3, 10, 0.2)
  np.testing.assert_array_equal(rates('cosine', warmup_steps=warmup_steps), jax.jit(want)(np.arange(10)))


def test_constant_and_wsd():
  np.testing.assert_allclose(rates('constant'), 2.0)
  np.testing.assert_allclose(rates('constant', warmup_steps=4)[:6], [0, 0.5, 1, 1.5, 2, 2])
  wsd = rates('wsd', warmup_steps=2, end_share=0.5)
  np.testing.assert_allclose(wsd, [0, 1, 2, 2, 2, 2, 1.8, 1.6, 1.4, 1.2], rtol=1e-6)
  np.testing.assert_allclose(rates('wsd', decay_share=0.0), 2.0)
  short = rates('wsd', warmup_steps=6)  # The fall of half the steps begins behind the warm-up.
  np.testing.assert_allclose(short[5:], [2 * 5 / 6, 2, 1.55, 1.1, 0.65], rtol=1e-6)


def hyperbola(step, steps, peak):
  return peak / (1 + step)


def test_a_function_of_ones_own():
  np.testing.assert_allclose(rates('test_optim:hyperbola')[:3], [2, 1, 2 / 3], rtol=1e-6)
  for kind in 'linear', 'test_optim:nothing', 'no_module:f':
    with pytest.raises(ConfigError, match=f"schedule='{kind}' must be one of"):
      rates(kind)
  with pytest.raises(ConfigError, match='must give rates of 0 or more'):
    rates('test_optim:hyperbola', peak=-1.0)


def test_a_stage_has_one():
  entry = dict(stage='dense', steps=4, batch_size=1, seq_len=8, backbone_lr=1.0)
  np.testing.assert_allclose(StageConfig(**entry, schedule='constant').rates()['backbone'], 1.0)
  with pytest.raises(ConfigError, match='decay_share=2.0 must be within 0 and 1'):
    StageConfig(**entry, decay_share=2.0)


@pytest.mark.parametrize('cfg', [CFG, laws.GQA], ids=['mla', 'gqa'])
@pytest.mark.parametrize('decays', ['all', 'matrices'])
def test_what_decays(decays, cfg):
  """Without gradients, decay alone moves a weight."""
  parts, _ = split_parts(abstract_params(cfg), ('backbone',))
  parts = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), parts['backbone'])
  optimizer = make_optimizer(OptimConfig(weight_decay=0.1, decays=decays))
  zeros = jax.tree.map(np.zeros_like, parts)
  updates, _ = jax.jit(lambda zeros, parts: optimizer.update(zeros, optimizer.init(parts), parts))(zeros, parts)
  moved = {
      '/'.join(map(str, path)): bool((x[...] != 0).any())
      for path, x in nnx.to_flat_state(updates)
  }
  still = {name for name, moves in moved.items() if not moves}
  norms = {name for name in moved if name.endswith(('scale', 'bq', 'bk', 'bv')) or name == 'embed'}
  assert still == (norms if decays == 'matrices' else set()) and len(norms) > 5


def test_unknown_decay():
  with pytest.raises(ConfigError, match="decays='some' must be one of"):
    OptimConfig(decays='some')
