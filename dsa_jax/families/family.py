# SPDX-License-Identifier: Apache-2.0
"""The description of a model family, as data."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from dsa_jax.config import ModelConfig

# The path of a weight in our tree -> its name in a checkpoint, and the equation that turns the axes
# it has there into ours.
Names = Mapping[str, tuple[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorNames:
  """Where each weight of the model lies in the family's checkpoints."""

  model: Names  # Weights outside the layers.
  layer: Names  # Weights of every layer, under `model.layers.N.`; those of the indexer among them.
  mlp: Names  # Weights of a layer that has an MLP.
  moe: Names  # Weights of a layer that has experts; {} in a name is the number of an expert.
  mtp: Names  # Weights of the MTP layer beside those that it has as a layer.
  # Tensors of the MTP layer that repeat tensors of the model, which our MTP layer shares.
  mtp_copies: Mapping[str, str]
  # The last part of the names of those matrices that are FP8 in a quantised checkpoint.
  quantized: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """What tells the checkpoints of one `model_type` from those of another."""

  architecture: str  # The class in the `transformers` package.
  sizes: Mapping[str, ModelConfig]  # The released models, by short names; without an MTP layer.
  tensors: TensorNames

  # The keys of config.json, each with the field of ModelConfig that has the same value.
  fields: Mapping[str, str]
  indexer_fields: Mapping[str, str]  # The keys that only a family with an indexer has.
  yarn_fields: Mapping[str, str]  # The keys of `rope_scaling`.
  # Keys whose values the model is built for; a config.json with another value is of another model.
  fixed: Mapping[str, Any]

  has_indexer: bool = True  # Without one, an import makes fresh indexers.
  # Whether the indexer rotates pairs of neighbouring channels, where config.json does not say.
  indexer_rope_interleave: bool = False
  lists_indexers: bool = False  # Whether config.json lists the layers that have an indexer.
  norms: str = 'BF16'  # The dtype of norm weights, where an import does not say.
  repeats_embedding: bool = True  # Whether `mtp_copies` are written, where an import does not say.
