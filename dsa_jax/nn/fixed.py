# SPDX-License-Identifier: Apache-2.0
"""The config of a module, which stays the one that it was made with."""

import dataclasses
from typing import Any

from flax import nnx

from dsa_jax.config import ConfigError, ModelConfig

FIXED = {'cfg', 'rule', 'selection', 'backend', *(field.name for field in dataclasses.fields(ModelConfig))}


class Configured(nnx.Module):
  """A module that reads its config while it runs.

  All modules of a model hold one config, or what `ModelConfig.of_layer` makes of it. They refuse
  another, which would reach one of them only, and attributes that are named like a field of it or like a
  choice of its callers, which nothing would read.
  """

  @property
  def cfg(self) -> ModelConfig:
    return self._cfg

  def __setattr__(self, name: str, value: Any):
    if name not in FIXED:
      super().__setattr__(name, value)
      return
    raise ConfigError(
        f'{name} of a model is fixed, because each of its layers holds the config; what selects is chosen where '
        'the model is called, as by Sampler.load(..., rule=...). Load the model with '
        'another budget: load_model(..., index_topk=8), load_checkpoint(..., index_topk=8) or '
        'Sampler.load(..., index_topk=8). Of a model in memory, '
        '`nnx.merge(model_graph(cfg), nnx.state(model))` is one with another config; model_graph is '
        'in dsa_jax.training.state.'
    )
