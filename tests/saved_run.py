# SPDX-License-Identifier: Apache-2.0
"""A run that has saved the weights of `laws`, without any training."""

import dataclasses
import json
import pathlib

import laws

from dsa_jax.config import ModelConfig
from dsa_jax.training.checkpoint import Checkpoints, Progress
from dsa_jax.training.optim import OptimConfig
from dsa_jax.training.state import new_state


def save_run(folder: pathlib.Path, cfg: ModelConfig, **record) -> pathlib.Path:
  """Saves step 1 of an entry, and a config.json with what else is given; returns the entry."""
  state = new_state(laws.weights(cfg), ('backbone',), OptimConfig(), seed=0)
  with Checkpoints(folder / 'checkpoints' / 'sparse') as checkpoints:
    checkpoints.save(1, state, Progress({}, 0.0))
  (folder / 'config.json').write_text(json.dumps({'model': dataclasses.asdict(cfg)} | record))
  return folder / 'checkpoints' / 'sparse'
