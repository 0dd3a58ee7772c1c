# SPDX-License-Identifier: Apache-2.0
"""The sizes and constants of a model, under DeepSeek's names."""

from collections.abc import Sequence
import dataclasses
import math
import os
import pathlib
import re


ATTENTION = 'mla', 'gqa'
ROPE_TYPES = 'default', 'linear', 'llama3', 'yarn'
TOPK_METHODS = 'noaux_tc', 'greedy', 'group_limited_greedy', 'best_two_of_groups'
OUTPUT_GATES = '', 'latents', 'hidden', 'heads'
# The sizes that layers with a window may have of their own, in fields that begin with `window_`.
WINDOW_SIZES = (
    'n_heads', 'q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim',
    'rope_theta',
)  # fmt: skip


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


def user_cache(name: str) -> pathlib.Path:
  """Returns a folder of this package in the user's cache folder, which `XDG_CACHE_HOME` may name.

  Raises:
    ConfigError: There is neither that nor a home folder, as for a user without an account.
  """
  try:
    root = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
  except RuntimeError as error:
    raise ConfigError(
        f'there is no home folder for {name}, which are kept: set HOME or XDG_CACHE_HOME.'
    ) from error
  return root / 'dsa_jax' / name


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A decoder with an indexer. The defaults are the released 671B model of DeepSeek-V3.2.

  The fields are those of DeepSeek's inference/config_671B_v3.2.json without its `dtype` and
  `scale_fmt`, two of GLM-5's indexer, the `rope_type` of config.json files, and what tells other
  families from DeepSeek's. GLM-5 is a DeepSeek-V3.2 without YaRN and without expert groups. Llama and
  Qwen have grouped-query attention.
  """

  vocab_size: int = 129_280
  dim: int = 7168
  n_layers: int = 61
  n_dense_layers: int = 3  # This many leading layers have an MLP in place of experts.
  mlp_layers: Sequence[int] = ()  # Layers behind them that have one, too, counted from 0.
  n_mtp_layers: int = 0  # 1 adds a layer that predicts the token after the next one.
  inter_dim: int = 18_432  # The width of the MLP in dense layers.
  norm_eps: float = 1e-6
  # The rank of the gates that norms before attention have, and norms before experts. 0: none has any.
  gated_norm_rank: int = 0
  n_streams: int = 0  # Residual streams, which layers weigh. 0: there is one, and nothing to weigh.
  streams_magnitude: float = 2.0  # The most that a stream takes of what a layer computes.
  streams_eps: float = 1e-6  # What is added to each weight of a stream.
  tie_embeddings: bool = False  # Whether the head is the embedding's transpose.
  # A head's products z become logits c · tanh(z / c), which stay within c. 0: they are the logits.
  logit_softcap: float = 0.0

  # Mixture of experts.
  n_routed_experts: int = 256
  n_shared_experts: int = 1
  n_activated_experts: int = 8
  n_expert_groups: int = 8
  n_limited_groups: int = 4  # A token may choose experts from this many groups.
  # Whether experts of the other groups score 0, and so come before any with a negative score.
  zero_dropped_groups: bool = False
  moe_inter_dim: int = 2048
  shared_inter_dim: int = 0  # The width of a shared expert. 0: `moe_inter_dim`.
  route_scale: float = 2.5
  score_func: str = 'sigmoid'  # What makes scores of router logits: 'sigmoid' or 'softmax'.
  # How experts are chosen. 'noaux_tc' adds a bias that balances their loads, and scores a group by
  # its two best experts, as 'best_two_of_groups' does without a bias. 'group_limited_greedy' scores a
  # group by its best one. 'greedy' has no groups.
  topk_method: str = 'noaux_tc'
  swiglu_limit: float = 0.0  # The largest magnitude within routed experts. 0: there is no limit.
  norm_topk_prob: bool = True  # Whether the weights of a token's experts are made to add up to one.

  # Attention: multi-head latent ('mla') or grouped-query ('gqa').
  attention: str = 'mla'
  n_heads: int = 128
  qk_nope_head_dim: int = 128  # Channels of a head that are not rotated.
  qk_rope_head_dim: int = 64  # Channels that are rotated: in MLA the last ones, in GQA the first ones.
  v_head_dim: int = 128
  rope_interleave: bool = True  # Whether rotation pairs neighbouring channels or those of two halves.
  nope_layers: Sequence[int] = ()  # The layers that rotate nothing, counted from 0.
  # Whether these layers have no rotary key: latents make all channels of their keys.
  nope_layers_expand: bool = False
  # Layers that select nothing, but attend to the latest `sliding_window` tokens, their own included.
  window_layers: Sequence[int] = ()
  sliding_window: int = 0  # 0 where no layer has a window.
  window_n_heads: int = 0  # The heads of a layer with a window. 0: as many as in other layers.
  window_q_lora_rank: int = 0  # The rank of its query latent. 0: that of other layers.
  window_kv_lora_rank: int = 0  # The rank of its other latent. 0: that of other layers.
  window_qk_nope_head_dim: int = 0  # Its channels that are not rotated. 0: as many as in other layers.
  window_qk_rope_head_dim: int = 0  # Its channels that are rotated. 0: as many as in other layers.
  window_v_head_dim: int = 0  # The width of its values. 0: that of other layers.
  window_rope_theta: float = 0.0  # The base of its rotary positions. 0: that of other layers.

  # Multi-head latent attention; 0 in GQA.
  q_lora_rank: int = 1536  # 0: queries come from the hidden state without a latent between.
  kv_lora_rank: int = 512
  # The layer whose latents and rotary keys each layer reads: itself or an earlier one. (): itself.
  kv_sources: Sequence[int] = ()
  latent_eps: float = 0.0  # The eps of the norms of latents. 0: `norm_eps`.
  latent_rescale: bool = False  # Whether normed latents are multiplied by sqrt(dim / rank).
  rope_key_norm: bool = False  # Whether rotary keys are normed before their rotation.
  # What makes a gate for each channel that a head has read. '': there are no gates. 'latents': the
  # projection of queries does, which then reads the normed and the raw query latent side by side.
  # 'hidden': a projection of the hidden state does. 'heads': it makes one gate for all channels of
  # a head.
  output_gate: str = ''
  # Whether a head's queries grow with the logarithm of their position, those of the indexer's, too.
  query_log_scale: bool = False
  attention_sinks: bool = False  # Whether each head has a logit of its own that no key stands behind.

  # Grouped-query attention.
  n_kv_heads: int = 0  # Key heads; 0 in MLA.
  qkv_bias: bool = False  # Whether queries, keys and values have biases.
  qk_norm: bool = False  # Whether each head's queries and keys are normed before their rotation.

  # Lightning indexer.
  index_n_heads: int = 64
  index_head_dim: int = 128
  index_topk: int = 2048
  # Selections of a query: 1 for all heads, or one for each key head, by index heads of its own.
  index_n_selections: int = 1
  index_rope_head_dim: int = 0  # Channels that the indexer rotates. 0: as many as `qk_rope_head_dim`.
  # Whether the indexer's rotary embedding pairs neighbouring channels, as GLM-5's does.
  indexer_rope_interleave: bool = False
  index_rope_last: bool = False  # Whether it rotates its last channels, in place of its first ones.
  # By how much the indexer's slow frequencies are divided, as YaRN does it, so that rows may be longer than
  # those of `index_original_seq_len` tokens that it learned from. 1: they are as they are.
  index_rope_factor: float = 1.0
  index_original_seq_len: int = 0  # 0: it is not known.
  index_norm_eps: float = 1e-6  # The eps of the norm of index keys. 0: `norm_eps`.
  # Whether the indexer norms what its queries are projected from, as it norms its keys.
  index_query_norm: bool = False
  # 'full' or 'shared' for each layer (IndexShare). A shared layer attends to what the last full one
  # before it selected. () means that every layer has an indexer of its own. Whatever it says of layers
  # with a window, they have none.
  indexer_types: Sequence[str] = ()

  # Rotary positions: 'default', 'linear', 'llama3' or 'yarn'. '' means YaRN's if max_seq_len exceeds
  # original_seq_len, and else the default ones.
  rope_type: str = ''
  max_seq_len: int = 163_840
  original_seq_len: int = 4096
  rope_theta: float = 10_000.0
  rope_factor: float = 40.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  low_freq_factor: float = 1.0  # Of 'llama3': turns within original_seq_len that still are slow.
  high_freq_factor: float = 4.0  # And from how many turns on a frequency is fast.
  mscale: float = 1.0  # How YaRN sharpens attention as its factor grows. 0: it does not.
  learned_frequencies: bool = False  # Whether all layers share a learned factor of each frequency.

  # The standard deviation of fresh embeddings. That of other weights follows from their fan-in.
  embed_init_std: float = 0.02
  dtype: str = 'bfloat16'  # The dtype of activations. Parameters and reductions are float32.

  def __post_init__(self):
    for name in ('indexer_types', 'nope_layers', 'mlp_layers', 'window_layers', 'kv_sources'):
      object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists.
    others = {f'window_{name}': name for name in WINDOW_SIZES} | {'shared_inter_dim': 'moe_inter_dim'}
    for name, other in others.items():
      if (size := getattr(self, name)) == getattr(self, other):  # To say it again says nothing.
        object.__setattr__(self, name, type(size)(0))
    for name in ('vocab_size', 'dim', 'n_layers', 'n_heads', 'v_head_dim', 'index_n_heads',
                 'index_head_dim', 'index_topk', 'max_seq_len', 'original_seq_len'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 1.')
    if not 0 <= self.n_dense_layers <= self.n_layers:
      raise ConfigError(f'{self.n_dense_layers=} must be within 0 and {self.n_layers=}.')
    self._check_mlp_layers()
    if self.dense_layers and self.inter_dim < 1:
      raise ConfigError(f'{self.inter_dim=} must be at least 1: layers {self.dense_layers} have an MLP.')
    if self.n_mtp_layers not in (0, 1):
      raise ConfigError(f'{self.n_mtp_layers=} must be 0 or 1.')
    if self.attention not in ATTENTION:
      raise ConfigError(f'{self.attention=} must be one of {ATTENTION}.')
    if self.rope_type not in ('', *ROPE_TYPES):
      raise ConfigError(f"{self.rope_type=} must be '' or one of {ROPE_TYPES}.")
    if self.dtype not in ('float32', 'bfloat16'):
      raise ConfigError(f"{self.dtype=} must be 'float32' or 'bfloat16'.")
    for name in ('nope_layers', 'window_layers'):
      if set(getattr(self, name)) - set(range(self.n_layers)):
        raise ConfigError(f'{name}={getattr(self, name)} must be within 0 and {self.n_layers - 1}.')
    if list(self.window_layers) != sorted(set(self.window_layers)):
      raise ConfigError(f'{self.window_layers=} must ascend.')
    if self.sliding_window < 0 or bool(self.sliding_window) != bool(self.window_layers):
      raise ConfigError(f'{self.sliding_window=} must be above 0 with window_layers, and 0 without.')
    self._check_positions_and_norms()
    self._check_heads()
    self._check_gates()
    self._check_window_sizes()
    self._check_nope_layers()
    self._check_kv_sources()
    if self.n_dense_layers < self.n_layers:
      self._check_experts()
    if types := self.indexer_types:
      first = [kind for i, kind in enumerate(types) if i not in self.window_layers][:1]
      if len(types) != self.n_layers or set(types) - {'full', 'shared'} or first == ['shared']:
        raise ConfigError(
            f"indexer_types={types} must be () or 'full' or 'shared' for each of the {self.n_layers} "
            "layers, the first of them 'full'."
        )

  def _check_mlp_layers(self):
    among = range(self.n_dense_layers + 1, self.n_layers)  # The layer before them has experts.
    ordered = sorted(set(self.mlp_layers))
    if list(self.mlp_layers) != ordered or not set(ordered) <= set(among):
      raise ConfigError(
          f'{self.mlp_layers=} must ascend, from {self.n_dense_layers + 1} to {self.n_layers - 1}: '
          f'{self.n_dense_layers=} counts the leading layers.'
      )

  def _check_positions_and_norms(self):
    if not 1 < self.rope_theta < math.inf:
      raise ConfigError(f'{self.rope_theta=} must be above 1, and finite.')
    if self.window_rope_theta and not 1 < self.window_rope_theta < math.inf:
      raise ConfigError(f'{self.window_rope_theta=} must be 0, or above 1 and finite.')
    if not 1 <= self.index_rope_factor < math.inf:
      raise ConfigError(f'{self.index_rope_factor=} must be at least 1, and finite.')
    if self.index_original_seq_len < (self.index_rope_factor > 1):
      raise ConfigError(
          f'{self.index_original_seq_len=} must be the length of the rows that the indexer learned from, as '
          'index_rope_factor goes by it. It may be 0 where that is 1.'
      )
    if not 0 <= self.norm_eps < math.inf:
      raise ConfigError(f'{self.norm_eps=} must be at least 0, and finite.')
    kind = self.rope_kind
    if kind != 'default' and not 1 <= self.rope_factor < math.inf:
      raise ConfigError(f'{self.rope_factor=} must be at least 1, and finite, with {kind!r} positions.')
    if (kind == 'yarn' or self.index_rope_factor > 1) and not 0 < self.beta_slow <= self.beta_fast < math.inf:
      raise ConfigError(f'{self.beta_slow=} must be above 0 and at most {self.beta_fast=}, which is finite.')
    if kind == 'yarn' and not math.isfinite(self.mscale):
      raise ConfigError(f'{self.mscale=} must be finite.')
    if kind == 'llama3' and not 0 <= self.low_freq_factor < self.high_freq_factor < math.inf:
      raise ConfigError(
          f'{self.low_freq_factor=} must be at least 0 and below {self.high_freq_factor=}, which is finite.'
      )

  def _check_heads(self):
    least = 0 if self.attention == 'mla' else 2
    if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim < least:
      raise ConfigError(f'{self.qk_rope_head_dim=} must be even and at least {least}.')
    if self.index_rope_head_dim % 2 or self.index_head_dim < self.index_rope_dim:
      raise ConfigError(
          f'{self.index_rope_dim=} must be even and at most {self.index_head_dim=}: set '
          'index_rope_head_dim.'
      )
    if self.index_n_selections not in (1, self.row_heads):
      raise ConfigError(f'{self.index_n_selections=} must be 1 or the {self.row_heads} key heads.')
    if self.index_n_heads % self.index_n_selections:
      raise ConfigError(f'{self.index_n_heads=} must be a multiple of {self.index_n_selections=}.')
    if self.attention == 'mla':
      wrong = [x for x in ('n_kv_heads', 'qkv_bias', 'qk_norm') if getattr(self, x)]
      if self.kv_lora_rank < 1 or self.qk_nope_head_dim < 1 or self.q_lora_rank < 0 or wrong:
        raise ConfigError(
            f'{self.kv_lora_rank=} and {self.qk_nope_head_dim=} must be at least 1, '
            f"{self.q_lora_rank=} at least 0, and {wrong or 'the fields of GQA'} unset, in MLA."
        )
      return
    if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
      raise ConfigError(f'{self.n_kv_heads=} must be at least 1 and divide {self.n_heads=}.')
    if self.q_lora_rank or self.kv_lora_rank or self.qk_nope_head_dim < 0:
      raise ConfigError(
          f'{self.q_lora_rank=} and {self.kv_lora_rank=} must be 0 in GQA, and '
          f'{self.qk_nope_head_dim=} at least 0.'
      )

  def _check_gates(self):
    if self.gated_norm_rank < 0:
      raise ConfigError(f'{self.gated_norm_rank=} must be at least 0.')
    if self.latent_eps < 0 or (self.latent_eps and self.attention != 'mla'):
      raise ConfigError(f'{self.latent_eps=} must be at least 0 in MLA, and 0 without latents.')
    if self.output_gate not in OUTPUT_GATES:
      raise ConfigError(f'{self.output_gate=} must be one of {OUTPUT_GATES}.')
    if self.output_gate == 'latents' and not self.q_lora_rank:
      raise ConfigError(f'{self.output_gate=} needs a query latent: {self.q_lora_rank=}.')
    if self.attention != 'mla' and (self.output_gate or self.attention_sinks):
      raise ConfigError(f'{self.output_gate=} and {self.attention_sinks=} must be unset in GQA.')
    of_mla = 'latent_rescale', 'rope_key_norm', 'query_log_scale', 'learned_frequencies'
    if self.attention != 'mla' and any(getattr(self, name) for name in of_mla):
      raise ConfigError(f'{of_mla} must be False in GQA.')
    if self.learned_frequencies and (self.n_mtp_layers or self.index_rope_dim != self.qk_rope_head_dim):
      raise ConfigError(
          f'{self.learned_frequencies=} must be False with an MTP layer, and where the indexer rotates '
          f'other widths than heads: {self.index_rope_dim=}, {self.qk_rope_head_dim=}.'
      )
    if self.n_streams < 0 or (self.n_streams and self.n_mtp_layers):
      raise ConfigError(f'{self.n_streams=} must be at least 0, and 0 with an MTP layer.')
    if min(self.swiglu_limit, self.index_norm_eps, self.logit_softcap) < 0:
      raise ConfigError(
          f'{self.swiglu_limit=}, {self.index_norm_eps=} and {self.logit_softcap=} must be at least 0.'
      )

  def _check_nope_layers(self):
    if self.nope_layers_expand and (self.attention != 'mla' or not self.nope_layers):
      raise ConfigError(f'{self.nope_layers_expand=} must be False without nope_layers in MLA.')
    if self.nope_layers_expand and self.has_window_sizes:
      raise ConfigError(f'{self.nope_layers_expand=} must be False where windows have other sizes.')
    if self.nope_layers_expand and set(self.nope_layers) & set(self.window_layers):
      raise ConfigError(
          f'{self.nope_layers_expand=} must be False where nope_layers={self.nope_layers} and '
          f'window_layers={self.window_layers} share a layer.'
      )
    if self.query_log_scale and self.nope_layers and not self.nope_layers_expand:
      raise ConfigError(f'{self.query_log_scale=} needs nope_layers_expand where layers do not rotate.')

  def _check_kv_sources(self):
    sources, layers = self.kv_sources, range(self.n_layers)
    if not sources:
      return
    kind = lambda i: (i in self.nope_layers, i in self.window_layers)
    fits = lambda i, source: source == i or kind(i) == kind(source) == (kind(i)[0], False)
    is_right = len(sources) == self.n_layers and all(
        0 <= source <= i and sources[source] == source and fits(i, source)
        for i, source in zip(layers, sources)
    )
    if not is_right or self.attention != 'mla' or self.n_mtp_layers:
      raise ConfigError(
          f'kv_sources={sources} must name, in MLA, for each of {self.n_layers} layers itself or an '
          'earlier layer that names itself, rotates as it does, and has no window, as it has none; '
          'and it must be () with an MTP layer.'
      )

  def _check_window_sizes(self):
    names = [f'window_{name}' for name in WINDOW_SIZES]
    given = {name: getattr(self, name) for name in names if getattr(self, name)}
    if any(size < 0 for size in given.values()):
      raise ConfigError(f'{given} must be at least 0.')
    if given and (self.attention != 'mla' or len(self.window_layers) in (0, self.n_layers)):
      raise ConfigError(
          f'{given} must be 0 unless some layers have a window, others have none, and attention is '
          f"'mla': {self.attention=} and {self.window_layers=}."
      )
    try:
      _ = self.of_windows  # It checks itself.
    except ConfigError as error:
      raise ConfigError(f'{given}, in layers with a window: {error}') from error

  def _check_experts(self):
    if self.moe_inter_dim < 1:
      raise ConfigError(f'{self.moe_inter_dim=} must be at least 1, because some layers have experts.')
    if self.score_func not in ('sigmoid', 'softmax'):
      raise ConfigError(f"{self.score_func=} must be 'sigmoid' or 'softmax'.")
    if self.topk_method not in TOPK_METHODS:
      raise ConfigError(f'{self.topk_method=} must be one of {TOPK_METHODS}.')
    if self.n_shared_experts < 0 or self.shared_inter_dim < 0:
      raise ConfigError(f'{self.n_shared_experts=} and {self.shared_inter_dim=} must be at least 0.')
    if not 0 < self.route_scale < math.inf:
      raise ConfigError(f'{self.route_scale=} must be above 0, and finite.')
    if self.n_expert_groups < 1:
      raise ConfigError(f'{self.n_expert_groups=} must be at least 1.')
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
  def dense_layers(self) -> tuple[int, ...]:
    """The layers that have an MLP in place of experts."""
    return (*range(self.n_dense_layers), *self.mlp_layers)

  @property
  def full_layers(self) -> tuple[int, ...]:
    """The layers with an indexer of their own."""
    return tuple(i for i in range(self.n_layers) if self.is_full(i))

  def is_full(self, layer: int) -> bool:
    """Returns whether a layer has its own indexer: no earlier layer's selection, and no window."""
    selects = layer not in self.window_layers
    return selects and (not self.indexer_types or self.indexer_types[layer] == 'full')

  @property
  def shares_indexers(self) -> bool:
    """Whether layers attend to what an earlier one selected."""
    return len(self.full_layers) + len(self.window_layers) < self.n_layers

  @property
  def has_window_sizes(self) -> bool:
    """Whether layers with a window have sizes of their own."""
    return any(getattr(self, f'window_{name}') for name in WINDOW_SIZES)

  @property
  def of_windows(self) -> 'ModelConfig':
    """The model whose layers all have the sizes of those with a window; else the same one.

    Layers that attend in two geometries differ in nothing but numbers. So a layer with a window is
    made of this config, and no code asks which of two sizes it should take.
    """
    if not self.has_window_sizes:
      return self
    given = {name: getattr(self, f'window_{name}') for name in WINDOW_SIZES}
    fields = {name: size for name, size in given.items() if size}
    fields |= {f'window_{name}': type(size)(0) for name, size in given.items()}
    return dataclasses.replace(self, **fields, index_rope_head_dim=self.index_rope_dim)

  @property
  def of_nope_layers(self) -> 'ModelConfig':
    """The model whose layers all are as those that rotate nothing, if these have no rotary key."""
    if not self.nope_layers_expand:
      return self
    return dataclasses.replace(
        self, qk_nope_head_dim=self.head_dim, qk_rope_head_dim=0, index_rope_head_dim=0,
        nope_layers=(), nope_layers_expand=False, kv_sources=(),
    )  # fmt: skip

  def reads_rows(self, layer: int) -> bool:
    """Returns whether a layer has no latents of its own."""
    return bool(self.kv_sources) and self.kv_sources[layer] != layer

  @property
  def n_readers(self) -> int:
    """The number of layers that read an earlier layer's latents."""
    return sum(map(self.reads_rows, range(self.n_layers)))

  def of_layer(self, layer: int) -> 'ModelConfig':
    """Returns the model whose layers all have the sizes of this one."""
    if layer in self.window_layers:
      return self.of_windows
    return self.of_nope_layers if layer in self.nope_layers else self

  @property
  def shared_experts_dim(self) -> int:
    """The width of all shared experts together."""
    return self.n_shared_experts * (self.shared_inter_dim or self.moe_inter_dim)

  @property
  def rope_kind(self) -> str:
    """The kind of rotary positions, which `rope_type` may leave open."""
    return self.rope_type or ('yarn' if self.max_seq_len > self.original_seq_len else 'default')

  @property
  def uses_yarn(self) -> bool:
    return self.rope_kind == 'yarn'

  @property
  def head_dim(self) -> int:
    """The width of a head's queries and keys."""
    return self.qk_nope_head_dim + self.qk_rope_head_dim

  @property
  def q_latent_dim(self) -> int:
    """The width of what the indexer's queries are projected from."""
    return self.q_lora_rank or self.dim

  @property
  def query_input_dim(self) -> int:
    """The width of what queries are projected from."""
    return 2 * self.q_lora_rank if self.output_gate == 'latents' else self.q_latent_dim

  @property
  def query_output_dim(self) -> int:
    """The channels of a head that the projection of queries makes: a query, and maybe gates."""
    return self.head_dim + (self.v_head_dim if self.output_gate == 'latents' else 0)

  @property
  def index_rope_dim(self) -> int:
    """The number of channels that the indexer rotates."""
    return self.index_rope_head_dim or self.qk_rope_head_dim

  @property
  def selection_shape(self) -> tuple[int, ...]:
    """The shape of what a query selects: [K], or [G, K] with a selection for each key head."""
    several = self.index_n_selections > 1
    return (self.index_n_selections, self.index_topk) if several else (self.index_topk,)

  @property
  def row_heads(self) -> int:
    """The key heads of a token's row, which is what sparse attention reads and a cache keeps."""
    return 1 if self.attention == 'mla' else self.n_kv_heads

  @property
  def row_value_dim(self) -> int:
    """The channels of the value, with which each key head's part of a row begins."""
    return self.kv_lora_rank if self.attention == 'mla' else self.v_head_dim

  @property
  def row_dim(self) -> int:
    """The width of each key head's part: in MLA a latent and the rotary key, in GQA value and key."""
    return self.row_value_dim + (self.qk_rope_head_dim if self.attention == 'mla' else self.head_dim)

  @property
  def sm_scale(self) -> float:
    """The softmax scale of the main attention, in both its forms, with YaRN's factor."""
    return self.yarn_factor * self.head_dim**-0.5

  @property
  def yarn_factor(self) -> float:
    """What YaRN multiplies the products of rotated channels by."""
    m = 0.1 * self.mscale * math.log(self.rope_factor) + 1 if self.uses_yarn else 1.0
    return m * m
