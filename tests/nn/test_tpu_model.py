# SPDX-License-Identifier: Apache-2.0
"""A model trains alike with the kernels of TPUs and GPUs, interpreted, and the portable ones."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from dsa_jax.config import ModelConfig
from dsa_jax.data.batch import Batch
from dsa_jax.nn.attention.types import Mode
from dsa_jax.training.optim import OptimConfig
from dsa_jax.training.stages import STAGES
from dsa_jax.training.state import init_params, model_graph, new_state
from dsa_jax.training.step import make_train_step


@pytest.mark.nightly
def test_the_sparse_stage_steps_alike():
  cfg = ModelConfig(**quickstart.get_config('tiny').model)
  graph, trains, optim = model_graph(cfg), STAGES['sparse'].trains, OptimConfig()
  tokens = jax.random.randint(jax.random.key(1), (1, 24), 0, cfg.vocab_size)
  position = jnp.arange(24, dtype=jnp.int32)[None]
  start = jnp.where(position < 9, 0, 9)  # Two documents.
  weights = jnp.ones((1, 24), jnp.float32)
  batch = Batch(
      tokens=tokens, targets=jnp.roll(tokens, -1, 1), weights=weights, start=start, end=position + 1
  )
  results = {}
  for backend in ('xla', 'tpu', 'gpu'):
    mode = Mode(backend=backend, attention='sparse', index_loss=True)
    state = new_state(init_params(cfg, seed=0), trains, optim, seed=0)
    with cases.interpreted(backend):
      step = make_train_step(graph, trains, mode, optim)
      results[backend] = jax.block_until_ready(step(state, batch, {part: 1e-3 for part in trains}))
  metrics = results['xla'][1]
  for backend in ('tpu', 'gpu'):
    assert_alike(results[backend][1], metrics)


def assert_alike(other, metrics):
  for name in ('lm_loss', 'index_kl', 'grad_norm_backbone', 'grad_norm_indexer'):
    assert metrics[name].sum() > 0
    np.testing.assert_allclose(other[name], metrics[name], rtol=2e-5, err_msg=name)
  for name in metrics:  # By layer, of both parts of the model.
    if name.startswith('layer_grad_norm'):
      close = functools.partial(np.testing.assert_allclose, rtol=2e-4, err_msg=name)
      jax.tree.map(close, other[name], metrics[name])
