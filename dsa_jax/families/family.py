# SPDX-License-Identifier: Apache-2.0
"""The description of a model family, as data."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from dsa_jax.config import ModelConfig

# The path of a weight in our tree -> its name in a checkpoint, and the equation that turns the axes
# it has there into ours.
Names = Mapping[str, tuple[str, str]]

# The names of an indexer's tensors, in whichever family it is.
INDEXER: Names = {
    'attn/indexer/wq_b': ('self_attn.indexer.wq_b.weight', '(i j) q -> q i j'),
    'attn/indexer/wk': ('self_attn.indexer.wk.weight', 'j d -> d j'),
    'attn/indexer/k_norm/scale': ('self_attn.indexer.k_norm.weight', 'j -> j'),
    'attn/indexer/k_norm/bias': ('self_attn.indexer.k_norm.bias', 'j -> j'),
    'attn/indexer/weights_proj': ('self_attn.indexer.weights_proj.weight', 'i d -> d i'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorNames:
  """Where each weight of the model lies in the family's checkpoints.

  A name may stand for a weight that only some models of the family have, such as a bias. Weights of
  one layer with one name lie behind each other in that tensor, along its last axis but one.
  """

  model: Names  # Weights outside the layers.
  layer: Names  # Weights of every layer, under `model.layers.N.`; those of the indexer among them.
  layers: str = 'model.layers.'  # What stands before the number of a layer.
  # Weights whose names are others in a model that has no query latent.
  without_q_latent: Names = dataclasses.field(default_factory=dict)
  mlp: Names  # Weights of a layer that has an MLP.
  # Weights of a layer that has experts; {} in a name is the number of an expert.
  moe: Names = dataclasses.field(default_factory=dict)
  # Weights of the MTP layer beside those that it has as a layer.
  mtp: Names = dataclasses.field(default_factory=dict)
  # Tensors of the MTP layer that repeat tensors of the model, which our MTP layer shares.
  mtp_copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # Other names of modules that a checkpoint may have, each with the usual one.
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  unread: tuple[str, ...] = ()  # How the names of tensors begin that no model here has.
  # The last part of the names of those matrices that are FP8 in a quantised checkpoint.
  quantized: tuple[str, ...]
  # The last part of the names of matrices that a quantised checkpoint lists as not quantised.
  never_quantized: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """What tells the checkpoints of one `model_type` from those of another."""

  architecture: str  # The class in the `transformers` package.
  other_names: tuple[str, ...] = ()  # Other values of `model_type` that a config.json may have.
  sizes: Mapping[str, ModelConfig]  # The released models, by short names; without an MTP layer.
  tensors: TensorNames
  in_memory: TensorNames | None = None  # The names in files of `transformers` that keep its own.

  # Keys that `transformers` saves, each with the key that the release has in its place.
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # Sections of parts that are left out. Loaders check that they fit the width of the model.
  towers: tuple[str, ...] = ()
  tower_width: str = ''  # The key of these sections that has the width of the model.
  # The model_type of the section `text_config`, in which an export has the keys of the text. '': it has
  # no section.
  text_type: str = ''
  beside_text: tuple[str, ...] = ()  # Keys of parts that are left out, which stand beside that section.
  # The keys of config.json, each with the field of ModelConfig that has the same value.
  fields: Mapping[str, str]
  # Keys that may be absent or null, each with its field and the value that this means.
  optional: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)
  # Those of them of which loaders want either all or none. They are null where that says the same.
  null_together: tuple[str, ...] = ()
  # The fields that have one value in all models of the family.
  constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # Keys whose values the model is built for; a config.json with another value is of another model.
  fixed: Mapping[str, Any]
  # More keys of this kind, which an export does not write.
  neutral: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  ignored: tuple[str, ...] = ()  # Keys that change nothing while the fixed ones are as they are.
  # Keys that must be there, even as null, because loaders take another value for an absent one.
  explicit: tuple[str, ...] = ()
  # Keys that say which layers are of which kind, or are extra ones; see `convert.layers_json`.
  layer_keys: tuple[str, ...] = ()
  leading_mlp_layers: int = 0  # Leading layers that have an MLP, where config.json says of none.
  # Whether loaders read from mlp_layer_types which layers have an MLP, in any order.
  lists_mlp_layers: bool = False
  usual_window: int = 0  # The window, where config.json is silent. 0: there is none.
  # Where config.json is silent, every so many layers has no window, from layer 1 on, and layer 0 has
  # none. 0: all layers have one.
  windows_between: int = 0
  # The keys of sizes that layers with a window have of their own, without the prefix that tells them
  # from those of other layers; each with its field and what it means that it is absent.
  window_fields: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)
  window_prefix: str = ''
  # Where config.json is silent, the last of every so many layers rotates nothing. 0: all rotate.
  nope_interval: int = 0

  # The kinds of rotary positions, each with the keys of its section and their fields.
  ropes: Mapping[str, Mapping[str, str]]
  # The section of rotary positions, where config.json has none. {}: they are the default ones.
  usual_rope: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  rope_ignored: tuple[str, ...] = ()  # Keys of that section that say nothing of a text.
  rope_theta: float | None = None  # The base, where config.json is silent. None: it must say.
  # The share of a head that is rotated, where config.json is silent. None: it cannot be chosen.
  rotary_share: float | None = None

  has_indexer: bool = True  # Without one, an import makes fresh indexers.
  # Whether a checkpoint of a family without indexers may have some that this package has trained.
  # Its config.json then has the keys of `indexer_fields`.
  may_have_indexer: bool = False
  indexer_fields: Mapping[str, str]  # The keys that only a model with an indexer has.
  fresh_indexer: Mapping[str, int] = dataclasses.field(default_factory=dict)  # Sizes of fresh ones.
  # Whether the indexer rotates pairs of neighbouring channels, where config.json does not say.
  indexer_rope_interleave: bool = False
  # Whether loaders disagree about what the indexer rotates, so that config.json has to say it.
  disputes_rotation: bool = False
  # Where config.json is silent, every so many layers have an indexer, from layer 1 on, and layer 0 has.
  index_topk_freq: int = 1
  lists_indexers: bool = False  # Whether config.json lists the layers that have an indexer.

  norms: str = 'BF16'  # The dtype of norm weights, where an import does not say.
  repeats_embedding: bool = True  # Whether copies are written, where an import does not say.
