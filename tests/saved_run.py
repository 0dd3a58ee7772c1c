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


def save_run(
    folder: pathlib.Path, cfg: ModelConfig, *, step: int = 1, weights: int = 0, **record
) -> pathlib.Path:
  """Saves a step of an entry, with weights of a seed, and a config.json with what else is given.

  Returns the entry.
  """
  state = new_state(laws.weights(cfg, weights), ('backbone',), OptimConfig(), seed=0)
  with Checkpoints(folder / 'checkpoints' / 'sparse') as checkpoints:
    checkpoints.save(step, state, Progress({}, 0.0))
  (folder / 'config.json').write_text(json.dumps({'model': dataclasses.asdict(cfg)} | record))
  return folder / 'checkpoints' / 'sparse'
