# SPDX-License-Identifier: Apache-2.0
"""The config of a module, which stays the one that it was made with."""

from flax import nnx

from dsa_jax.config import ConfigError, ModelConfig


class Configured(nnx.Module):
  """A module that reads its config while it runs.

  All modules of a model hold one config, or what `ModelConfig.of_layer` makes of it. They refuse
  another, which would reach one of them only.
  """

  @property
  def cfg(self) -> ModelConfig:
    return self._cfg

  @cfg.setter
  def cfg(self, _: ModelConfig):
    raise ConfigError(
        'the config of a model is fixed, because each of its layers holds it. Load the model with '
        'another budget: load_model(..., index_topk=8), load_checkpoint(..., index_topk=8) or '
        'Sampler.load(..., index_topk=8). Of a model in memory, '
        '`nnx.merge(model_graph(cfg), nnx.state(model))` is one with another config; model_graph is '
        'in dsa_jax.training.state.'
    )
