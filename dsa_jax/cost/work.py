# SPDX-License-Identifier: Apache-2.0
"""The floating-point operations and bytes of one token, part by part. Two per multiply-add."""

import math
from typing import Literal, NamedTuple

from dsa_jax.config import ModelConfig


class Work(NamedTuple):
  """What one part of the model does for one token, in all layers."""

  part: str
  flops: float
  bytes: float  # Read or written; of what several tokens read together, this one's share.
  unit: Literal['fp8', 'bf16']
  kind: Literal['weights', 'context', 'gather']  # Which efficiency applies.


def attention_flops(cfg: ModelConfig, context: int, *, sparse: bool) -> float:
  """Returns forward FLOPs per token of all layers' attention, averaged over a causal context.

  Dense: every head's scores and values in MHA form, over (context + 1) / 2 visible keys. Sparse:
  the indexer over the same keys, and the absorbed MQA form over at most `index_topk`. Projections,
  which both share, are left out.
  """
  visible = (context + 1) / 2
  if not sparse:
    return cfg.n_layers * mha_flops(cfg) * visible
  k = min(cfg.index_topk, context)
  selected = k - k * (k - 1) / (2 * context)  # The first k tokens see fewer.
  indexer = index_flops(cfg) * visible
  return len(cfg.full_layers) * indexer + cfg.n_layers * mqa_flops(cfg) * selected


def mha_flops(cfg: ModelConfig) -> int:
  """Attention per query, key and layer where keys and values of each head are made up first."""
  return 2 * cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim)


def mqa_flops(cfg: ModelConfig) -> int:
  """Attention per query, key and layer on the latents themselves (absorbed)."""
  return 2 * cfg.n_heads * (2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim)


def index_flops(cfg: ModelConfig) -> int:
  """Index scores per query, key and layer."""
  return 2 * cfg.index_n_heads * cfg.index_head_dim


def latent_bytes(cfg: ModelConfig, cache: str) -> int:
  """Bytes per token and layer of latent and rotary key.

  'fp8' as FlashMLA has it: the latent in FP8 with a float32 scale per 128 channels, the rotary key
  in bfloat16.
  """
  if cache == 'bf16':
    return 2 * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)
  return cfg.kv_lora_rank + 4 * math.ceil(cfg.kv_lora_rank / 128) + 2 * cfg.qk_rope_head_dim


def index_key_bytes(cfg: ModelConfig, cache: str) -> int:
  """Bytes per token and full layer of the index key: in FP8 with one float32 scale, or bfloat16."""
  return 2 * cfg.index_head_dim if cache == 'bf16' else cfg.index_head_dim + 4


def cache_bytes(cfg: ModelConfig, cache: str, *, sparse: bool = True) -> int:
  """Bytes per cached token, all layers."""
  keys = len(cfg.full_layers) * index_key_bytes(cfg, cache) if sparse else 0
  return cfg.n_layers * latent_bytes(cfg, cache) + keys


def token_work(
    cfg: ModelConfig,
    context: int,
    *,
    sparse: bool,
    form: Literal['mha', 'mqa'],
    cache: str = 'fp8',
    readers: int = 1,
    pass_tokens: int = 1,
    chips: int = 1,
    logits: bool = True,
    scores: Literal['weights', 'context'] = 'context',
) -> list[Work]:
  """Returns the work of one token, part by part.

  Products with weights have FP8 inputs, as in the released model; attention, router and head are
  bfloat16. MTP, norms, embedding and communication are left out.

  Args:
    cfg: The model.
    context: Tokens that this one sees, itself included.
    sparse: Whether an indexer selects among them.
    form: Of attention. Sparse in MHA form masks: it computes every visible pair.
    cache: How keys are stored.
    readers: Query tokens of a sequence that read its cache together.
    pass_tokens: Tokens per chip in one forward pass, which read the weights together.
    chips: Over which routed experts are spread; all other weights are on each.
    logits: Whether this token's logits are wanted; of a prompt only the last one's are.
    scores: Which efficiency applies to index scores.
  """
  moe, dense = cfg.n_layers - cfg.n_dense_layers, cfg.n_dense_layers
  experts = cfg.n_routed_experts
  expert = 3 * cfg.dim * cfg.moe_inter_dim
  mla = (
      cfg.dim * (cfg.q_lora_rank + cfg.kv_lora_rank + cfg.qk_rope_head_dim)
      + cfg.q_lora_rank * cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
      + cfg.kv_lora_rank * cfg.n_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)
      + cfg.n_heads * cfg.v_head_dim * cfg.dim
  )
  index = cfg.q_lora_rank * cfg.index_n_heads * cfg.index_head_dim + cfg.dim * (
      cfg.index_head_dim + cfg.index_n_heads
  )

  def weights(part: str, size: int, unit='fp8'):
    width = 1 if unit == 'fp8' else 2
    return Work(part, 2 * size, size * width / pass_tokens, unit, 'weights')

  # A large batch wakes every expert of a layer, a small one only some.
  awake = experts * (1 - (1 - cfg.n_activated_experts / experts) ** (pass_tokens * chips))
  routed = 2 * moe * cfg.n_activated_experts * expert
  works = [
      weights('projections', cfg.n_layers * mla),
      weights('dense MLPs', dense * 3 * cfg.dim * cfg.inter_dim),
      weights('router', moe * cfg.dim * experts, 'bf16'),
      weights('shared experts', moe * cfg.n_shared_experts * expert),
      Work('routed experts', routed, moe * awake * expert / chips / pass_tokens, 'fp8', 'weights'),
      weights('head', cfg.dim * cfg.vocab_size if logits else 0, 'bf16'),
  ]
  if sparse:
    full = len(cfg.full_layers)
    keys = full * context * index_key_bytes(cfg, cache) / readers
    works += [
        weights('index projections', full * index),
        Work('index scores', full * context * index_flops(cfg), keys, cache, scores),
        # Each score is written and read once, in float32.
        Work('selection', 0, full * context * 8, 'bf16', 'context'),
    ]
  entry = latent_bytes(cfg, cache)
  if sparse and form == 'mqa':  # Each query gathers its own keys.
    seen = cfg.n_layers * min(context, cfg.index_topk)
    kind = 'gather' if cache == 'fp8' else 'context'
    works.append(Work('attention', seen * mqa_flops(cfg), seen * entry, 'bf16', kind))
  else:
    pairs = mha_flops(cfg) if form == 'mha' else mqa_flops(cfg)
    seen = cfg.n_layers * context
    works.append(Work('attention', seen * pairs, seen * entry / readers, 'bf16', 'context'))
  return [work for work in works if work.flops or work.bytes]
