# SPDX-License-Identifier: Apache-2.0
"""The sizes and constants of a model, under DeepSeek's names."""

from collections.abc import Sequence
import dataclasses
import math
import os
import pathlib
import re


class ConfigError(ValueError):
  """An input that its user can mend; its message names the value and says what would be right.

  The commands print it as one line. Every other error keeps its traceback.
  """


def local_path(name: str | os.PathLike, what: str) -> pathlib.Path:
  """Returns a path with `~` expanded.

  Raises:
    ConfigError: It is an address, such as gs://bucket/folder, which would become a local folder.
  """
  text = os.fspath(name)
  if re.match(r'\w{2,}:/', text):  # pathlib makes gs:/ of gs://.
    raise ConfigError(
        f'{what}={text!r} must be a local path: mount the bucket (gcsfuse, mountpoint-s3), or copy it.'
    )
  return pathlib.Path(text).expanduser()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A model of DeepSeek-V3.2's kind. The defaults are the released 671B model.

  The fields are those of DeepSeek's inference/config_671B_v3.2.json without its `dtype` and
  `scale_fmt`, two of GLM-5's indexer, and the `rope_type` of config.json files. GLM-5 is such a
  model without YaRN and without expert groups.
  """

  vocab_size: int = 129_280
  dim: int = 7168
  n_layers: int = 61
  n_dense_layers: int = 3  # This many leading layers have an MLP in place of experts.
  n_mtp_layers: int = 0  # 1 adds a layer that predicts the token after the next one.
  inter_dim: int = 18_432  # The width of the MLP in dense layers.
  norm_eps: float = 1e-6

  # Mixture of experts.
  n_routed_experts: int = 256
  n_shared_experts: int = 1
  n_activated_experts: int = 8
  n_expert_groups: int = 8
  n_limited_groups: int = 4  # A token may choose experts from this many groups.
  moe_inter_dim: int = 2048
  route_scale: float = 2.5
  score_func: str = 'sigmoid'

  # Multi-head latent attention.
  n_heads: int = 128
  q_lora_rank: int = 1536
  kv_lora_rank: int = 512
  qk_nope_head_dim: int = 128
  qk_rope_head_dim: int = 64
  v_head_dim: int = 128

  # Lightning indexer.
  index_n_heads: int = 64
  index_head_dim: int = 128
  index_topk: int = 2048
  # Whether the indexer's rotary embedding pairs neighbouring channels, as GLM-5's does.
  indexer_rope_interleave: bool = False
  # 'full' or 'shared' for each layer (IndexShare). A shared layer attends to what the last full one
  # before it selected. () means that every layer has an indexer of its own.
  indexer_types: Sequence[str] = ()

  # 'yarn' or 'default' rotary positions. '' means YaRN's if max_seq_len exceeds original_seq_len.
  rope_type: str = ''
  max_seq_len: int = 163_840
  original_seq_len: int = 4096
  rope_theta: float = 10_000.0
  rope_factor: float = 40.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0

  # The standard deviation of fresh embeddings. That of other weights follows from their fan-in.
  embed_init_std: float = 0.02
  dtype: str = 'bfloat16'  # The dtype of activations. Parameters and reductions are float32.

  def __post_init__(self):
    object.__setattr__(self, 'indexer_types', tuple(self.indexer_types))  # JSON has lists.
    for name in ('vocab_size', 'dim', 'n_layers', 'n_heads', 'q_lora_rank', 'kv_lora_rank',
                 'qk_nope_head_dim', 'v_head_dim', 'index_n_heads', 'index_head_dim',
                 'index_topk', 'max_seq_len', 'original_seq_len'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 1.')
    if not 0 <= self.n_dense_layers <= self.n_layers:
      raise ConfigError(f'{self.n_dense_layers=} must be within 0 and {self.n_layers=}.')
    if self.n_mtp_layers not in (0, 1):
      raise ConfigError(f'{self.n_mtp_layers=} must be 0 or 1.')
    if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim < 2:
      raise ConfigError(f'{self.qk_rope_head_dim=} must be even and at least 2.')
    if self.index_head_dim < self.qk_rope_head_dim:
      raise ConfigError(f'{self.index_head_dim=} must hold {self.qk_rope_head_dim=} channels.')
    if self.score_func != 'sigmoid':
      raise ConfigError(f"{self.score_func=} must be 'sigmoid'.")
    if self.rope_type not in ('', 'yarn', 'default'):
      raise ConfigError(f"{self.rope_type=} must be 'yarn', 'default' or ''.")
    if self.dtype not in ('float32', 'bfloat16'):
      raise ConfigError(f"{self.dtype=} must be 'float32' or 'bfloat16'.")
    if self.n_dense_layers < self.n_layers:
      self._check_experts()
    if types := self.indexer_types:
      if len(types) != self.n_layers or set(types) - {'full', 'shared'} or types[0] != 'full':
        raise ConfigError(
            f"indexer_types={types} must be () or 'full' or 'shared' for each of the {self.n_layers} "
            "layers, the first of them 'full'."
        )

  def _check_experts(self):
    if self.n_routed_experts % self.n_expert_groups:
      raise ConfigError(f'{self.n_routed_experts=} must be a multiple of {self.n_expert_groups=}.')
    if not 1 <= self.n_limited_groups <= self.n_expert_groups:
      raise ConfigError(f'{self.n_limited_groups=} must be within 1 and {self.n_expert_groups=}.')
    reachable = self.n_routed_experts // self.n_expert_groups * self.n_limited_groups
    if not 1 <= self.n_activated_experts <= reachable:
      raise ConfigError(
          f'{self.n_activated_experts=} must be within 1 and the {reachable} experts of '
          f'{self.n_limited_groups=} groups.'
      )

  @property
  def full_layers(self) -> tuple[int, ...]:
    """The layers with an indexer of their own."""
    return tuple(i for i in range(self.n_layers) if self.is_full(i))

  def is_full(self, layer: int) -> bool:
    """Returns whether a layer has its own indexer instead of the selection of an earlier layer."""
    return not self.indexer_types or self.indexer_types[layer] == 'full'

  @property
  def shares_indexers(self) -> bool:
    return len(self.full_layers) < self.n_layers

  @property
  def uses_yarn(self) -> bool:
    if self.rope_type:
      return self.rope_type == 'yarn'
    return self.max_seq_len > self.original_seq_len

  @property
  def sm_scale(self) -> float:
    """The softmax scale of the main attention, in both its forms, with YaRN's factor."""
    m = 0.1 * self.mscale * math.log(self.rope_factor) + 1 if self.uses_yarn else 1.0
    return m * m * (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
