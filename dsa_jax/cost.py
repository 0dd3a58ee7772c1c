# SPDX-License-Identifier: Apache-2.0
"""What attention costs, in floating-point operations per token, by arithmetic."""

from dsa_jax.config import ModelConfig


def attention_flops(cfg: ModelConfig, context: int, *, sparse: bool) -> float:
  """Returns forward FLOPs per token of all layers' attention, averaged over a causal context.

  Dense: every head's scores and values in MHA form, over (context + 1) / 2 visible keys. Sparse:
  the indexer over the same keys, and the absorbed MQA form over at most `index_topk`. Two per
  multiply-add; projections, which both share, are left out.
  """
  visible = (context + 1) / 2
  qk = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
  if not sparse:
    return cfg.n_layers * 2 * cfg.n_heads * (qk + cfg.v_head_dim) * visible
  k = min(cfg.index_topk, context)
  selected = k - k * (k - 1) / (2 * context)  # The first k tokens see fewer.
  absorbed = 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim
  indexer = 2 * cfg.index_n_heads * cfg.index_head_dim * visible
  attention = 2 * cfg.n_heads * absorbed * selected
  return len(cfg.full_layers) * indexer + cfg.n_layers * attention
