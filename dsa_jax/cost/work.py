# SPDX-License-Identifier: Apache-2.0
"""Counts the FLOPs and bytes of one token, part by part; a multiply-add is two FLOPs."""

from collections.abc import Collection
import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import numpy as np

from dsa_jax.config import ModelConfig


BYTES = {'fp8': 1, 'bf16': 2}  # Of a number of each format.


class Work(NamedTuple):
  """What one part of the model does for one token, in all layers."""

  part: str
  flops: float
  bytes: float  # Bytes read or written; several tokens share what they read together.
  unit: Literal['fp8', 'bf16']
  kind: Literal['weights', 'context', 'gather']  # The efficiency that applies.


def attention_flops(cfg: ModelConfig, context: int, *, sparse: bool) -> float:
  """Returns forward FLOPs per token of all layers' attention, averaged over a causal context.

  Dense attention takes every head's scores and values in MHA form, over (context + 1) / 2 visible
  keys. Sparse attention takes the indexer over the same keys, and the rows of at most `index_topk`.
  In both, layers with a window take MHA form within it. The projections, which both share, are left
  out.
  """
  visible, n_windows = (context + 1) / 2, len(cfg.window_layers)
  windows = n_windows * mha_flops(cfg.of_windows) * _mean_up_to(cfg.sliding_window, context)
  if not sparse:
    return windows + (cfg.n_layers - n_windows) * mha_flops(cfg) * visible
  selected = _mean_up_to(cfg.index_topk, context)
  indexer = index_flops(cfg) * visible
  return windows + len(cfg.full_layers) * indexer + selected * all_row_flops(cfg)


def _mean_up_to(most: int, context: int) -> float:
  """Returns the mean number of keys of a query that takes at most so many of those that it sees."""
  most = min(most, context)
  return most - most * (most - 1) / (2 * context)  # The first tokens see fewer.


def training_flops(
    cfg: ModelConfig,
    trains: Collection[str],
    n_visible: np.ndarray,
    *,
    sparse: bool,
    form: Literal['mha', 'mqa'] = 'mqa',
) -> float:
  """Returns the FLOPs of a training step on these queries, as model FLOPs are counted.

  A product whose two factors have gradients costs three times its forward pass, and one whose weights
  alone have one costs twice. Nothing that is computed again counts: neither a layer in the backward
  pass, nor the attention that the divergence compares with. As in `token_work`, norms, the embedding
  and communication are left out.

  Args:
    cfg: The model.
    trains: The parts that learn, keys of `training.stages.PARTS`.
    n_visible: The number of keys that each query sees, of any shape.
    sparse: Whether attention is to selected keys.
    form: The form of sparse attention: that of rows, or 'mha' where other keys are masked.
  """
  backbone, indexer = 'backbone' in trains, 'indexer' in trains
  limits = np.inf, cfg.index_topk, cfg.sliding_window
  seen, chosen, near = (np.sum(np.minimum(n_visible, most), dtype=float) for most in limits)
  weights = sum(work.flops for work in _weight_works(cfg, 1, 1, True))
  if cfg.n_mtp_layers:  # One layer more, its projection, and the head once more.
    n_dense = cfg.n_dense_layers + (cfg.n_dense_layers == cfg.n_layers)
    longer = dataclasses.replace(
        cfg, n_layers=cfg.n_layers + 1, n_dense_layers=n_dense, indexer_types=()
    )
    last = sum(work.flops for work in _weight_works(longer, 1, 1, True)) - weights
    weights += last + 2 * cfg.dim * (2 * cfg.dim + cfg.vocab_size)
  n_windows, n_indexers = len(cfg.window_layers), len(cfg.full_layers) + cfg.n_mtp_layers
  heads = (cfg.n_layers + cfg.n_mtp_layers - n_windows) * mha_flops(cfg)
  rows = heads if form == 'mha' else all_row_flops(cfg) + cfg.n_mtp_layers * row_flops(cfg)
  pairs = rows * chosen if sparse else heads * seen
  pairs += n_windows * mha_flops(cfg.of_windows) * near
  flops = (3 if backbone else 1) * (np.size(n_visible) * weights + pairs)
  products = 2 * np.size(n_visible) * _index_weights(cfg)
  if indexer:  # A warm-up differentiates all scores, the sparse stage those of selected keys.
    scores = seen + 3 * chosen if sparse else 3 * seen
    flops += n_indexers * (2 * products + index_flops(cfg) * scores)
  elif sparse:
    flops += n_indexers * (products + index_flops(cfg) * seen)
  return float(flops)


def mha_flops(cfg: ModelConfig) -> int:
  """Returns FLOPs per query, key and layer of attention with expanded keys and values."""
  return 2 * cfg.n_heads * (cfg.head_dim + cfg.v_head_dim)


def row_flops(cfg: ModelConfig) -> int:
  """Returns FLOPs per query, key and layer of attention on stored rows: in MLA, absorbed queries."""
  if cfg.attention == 'gqa':
    return mha_flops(cfg)
  return 2 * cfg.n_heads * (cfg.row_dim + cfg.row_value_dim)


@functools.cache
def all_row_flops(cfg: ModelConfig) -> int:
  """Returns the same of all layers that select. Rows without a rotary key are narrower."""
  selecting = {*range(cfg.n_layers)} - {*cfg.window_layers}
  return sum(row_flops(cfg.of_layer(i)) for i in selecting)


def index_flops(cfg: ModelConfig) -> int:
  """Returns FLOPs per query, key and layer of the index scores."""
  return 2 * cfg.index_n_heads * cfg.index_head_dim


def row_bytes(cfg: ModelConfig, cache: str) -> int:
  """Returns the bytes per token and layer of a stored row.

  In MLA the cache 'fp8' is FlashMLA's: the latent is FP8 with a float32 scale per 128 channels, and
  the rotary key is bfloat16. In GQA all is FP8, with a scale for either half of a key head's part.
  """
  if cache == 'bf16':
    return 2 * cfg.row_heads * cfg.row_dim
  if cfg.attention == 'gqa':
    return cfg.row_heads * (cfg.row_dim + cfg.row_dim % 2 + 2 * 4)
  return cfg.kv_lora_rank + 4 * math.ceil(cfg.kv_lora_rank / 128) + 2 * cfg.qk_rope_head_dim


def index_key_bytes(cfg: ModelConfig, cache: str) -> int:
  """Returns the bytes of an index key: FP8 with one float32 scale, or bfloat16."""
  return 2 * cfg.index_head_dim if cache == 'bf16' else cfg.index_head_dim + 4


def cache_bytes(cfg: ModelConfig, cache: str, *, sparse: bool = True) -> int:
  """Returns the bytes per cached token, in all layers that keep something of their own."""
  keys = len(cfg.full_layers) * index_key_bytes(cfg, cache) if sparse else 0
  own = [i for i in range(cfg.n_layers) if not cfg.reads_rows(i)]
  sizes = lambda i: cfg.of_windows if i in cfg.window_layers else cfg
  return sum(row_bytes(sizes(i), cache) for i in own) + keys


def token_work(
    cfg: ModelConfig,
    context: int,
    *,
    sparse: bool,
    form: Literal['mha', 'mqa'],
    window_form: Literal['mha', 'mqa'] | None = None,
    cache: str = 'fp8',
    readers: int = 1,
    pass_tokens: int = 1,
    chips: int = 1,
    logits: bool = True,
    scores: Literal['weights', 'context'] = 'context',
    weights: Literal['fp8', 'bf16'] = 'fp8',
) -> list[Work]:
  """Returns the work of one token, part by part.

  Attention, router and head are bfloat16 in any case. MTP, norms, embedding and communication are left out.

  Args:
    cfg: The model.
    context: The number of tokens that this one sees, itself included.
    sparse: Whether an indexer selects among them.
    form: The form of attention. Sparse attention in MHA form computes every visible pair under a
      mask.
    window_form: That of layers with a window, which do the same whatever the others do. None: the same.
    cache: The format of stored keys.
    readers: The number of a sequence's query tokens that read its cache together.
    pass_tokens: The tokens per chip in one forward pass, which read the weights together.
    chips: The number of chips that share the routed experts; each has all other weights.
    logits: Whether this token's logits are wanted. Of a prompt, only the last token's are.
    scores: The efficiency that applies to index scores.
    weights: The format of the weights and of what is multiplied with them; V3.2's is FP8.
  """
  works = _weight_works(cfg, pass_tokens, chips, logits, weights)
  if sparse:
    works += _index_works(cfg, context, cache, readers, pass_tokens, scores, weights)
  entry, near_flops = row_bytes(cfg, cache), mha_flops if (window_form or form) == 'mha' else row_flops
  n_windows, window = len(cfg.window_layers), cfg.sliding_window
  selecting = cfg.n_layers - n_windows
  rows = n_windows * min(context, window + readers - 1) * row_bytes(cfg.of_windows, cache) / readers
  near = n_windows * min(context, window)
  works.append(Work('windows', near * near_flops(cfg.of_windows), rows, 'bf16', 'context'))
  if sparse and form == 'mqa':  # Each query gathers its own keys.
    seen = selecting * min(context, cfg.index_topk)
    kind = 'gather' if cache == 'fp8' else 'context'
    flops = min(context, cfg.index_topk) * all_row_flops(cfg)
    works.append(Work('attention', flops, seen * entry, 'bf16', kind))
  else:
    pairs = selecting * mha_flops(cfg) if form == 'mha' else all_row_flops(cfg)
    rows = selecting * context * entry / readers
    works.append(Work('attention', context * pairs, rows, 'bf16', 'context'))
  return [work for work in works if work.flops or work.bytes]


def _weight_works(
    cfg: ModelConfig, pass_tokens: int, chips: int, logits: bool, weights: str = 'fp8'
) -> list[Work]:
  """Returns the products with weights, except those of the indexer."""
  dense = len(cfg.dense_layers)
  moe = cfg.n_layers - dense
  experts = max(cfg.n_routed_experts, 1)
  expert = 3 * cfg.dim * cfg.moe_inter_dim
  # A large batch uses every expert of a layer, a small one only some.
  used = experts * (1 - (1 - cfg.n_activated_experts / experts) ** (pass_tokens * chips))
  routed = 2 * moe * cfg.n_activated_experts * expert
  gates = 2 * cfg.dim * cfg.gated_norm_rank  # Of one norm.
  # Two halves of each layer read and write, and the head reads.
  streams = (4 * cfg.n_layers + 1) * cfg.n_streams**2 * cfg.dim
  n_windows, n_nope = len(cfg.window_layers), len({*cfg.nope_layers} - {*cfg.window_layers})
  attention = (cfg.n_layers - n_windows - n_nope) * _attention_weights(cfg)
  attention += n_windows * _attention_weights(cfg.of_windows)
  attention += n_nope * _attention_weights(cfg.of_nope_layers)
  readers = [cfg.of_layer(i) for i in range(cfg.n_layers) if cfg.reads_rows(i)]
  attention -= sum(cfg.dim * sizes.row_dim for sizes in readers)  # They make no rows.
  used_bytes = moe * used * expert * BYTES[weights]
  return [
      _product('projections', attention, pass_tokens, weights),
      _product('gated norms', (cfg.n_layers + moe) * gates, pass_tokens, 'bf16'),
      _product('streams', streams, pass_tokens, 'bf16'),
      _product('dense MLPs', dense * 3 * cfg.dim * cfg.inter_dim, pass_tokens, weights),
      _product('router', moe * cfg.dim * experts, pass_tokens, 'bf16'),
      _product('shared experts', moe * 3 * cfg.dim * cfg.shared_experts_dim, pass_tokens, weights),
      Work('routed experts', routed, used_bytes / chips / pass_tokens, weights, 'weights'),
      _product('head', cfg.dim * cfg.vocab_size if logits else 0, pass_tokens, 'bf16'),
  ]


def _attention_weights(cfg: ModelConfig) -> int:
  """Returns the number of weights of one attention layer, besides its indexer."""
  outputs = cfg.n_heads * cfg.v_head_dim * cfg.dim
  queries = cfg.dim * cfg.q_lora_rank + cfg.query_input_dim * cfg.n_heads * cfg.query_output_dim
  gates = {'hidden': outputs, 'heads': cfg.dim * cfg.n_heads}
  queries += gates.get(cfg.output_gate, 0)
  rows = cfg.dim * cfg.row_heads * cfg.row_dim
  if cfg.attention == 'gqa':
    return queries + rows + outputs
  expansion = cfg.kv_lora_rank * cfg.n_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)
  return queries + rows + expansion + outputs


def _index_works(
    cfg: ModelConfig, context: int, cache: str, readers: int, pass_tokens: int, scores: str, weights: str
) -> list[Work]:
  """Returns the indexer's products with weights, its scores, and the selection."""
  full = len(cfg.full_layers)
  keys = full * context * index_key_bytes(cfg, cache) / readers
  return [
      _product('index projections', full * _index_weights(cfg), pass_tokens, weights),
      Work('index scores', full * context * index_flops(cfg), keys, cache, scores),
      # Each score is written and read once, in float32; key heads that select have scores of their own.
      Work('selection', 0, full * cfg.index_n_selections * context * 8, 'bf16', 'context'),
  ]


def _index_weights(cfg: ModelConfig) -> int:
  """Returns the number of weights of one indexer."""
  queries = cfg.q_latent_dim * cfg.index_n_heads * cfg.index_head_dim
  return queries + cfg.dim * (cfg.index_head_dim + cfg.index_n_heads)


def _product(part: str, size: int, pass_tokens: int, unit: str) -> Work:
  """Returns the product of one token with weights of this size, which all tokens read together."""
  return Work(part, 2 * size, size * BYTES[unit] / pass_tokens, unit, 'weights')
