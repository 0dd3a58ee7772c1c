# SPDX-License-Identifier: Apache-2.0
"""FLOPs against the survey's table at DeepSeek-V3.2's sizes."""

import pytest

from dsa_jax.config import ModelConfig
from dsa_jax.cost import attention_flops

# Context: dense MHA, indexer plus sparse absorbed, MFLOP per token and layer.
TABLE = {4096: (168, 33.6 + 428), 32_768: (1342, 268 + 553), 131_072: (5369, 1074 + 566)}


@pytest.mark.parametrize('context', TABLE)
def test_matches_the_published_arithmetic(context):
  cfg = ModelConfig()
  for sparse, expected in zip((False, True), TABLE[context]):
    per_layer = attention_flops(cfg, context, sparse=sparse) / cfg.n_layers / 1e6
    assert per_layer == pytest.approx(expected, rel=2e-3)


def test_counts_every_key_below_the_budget():
  cfg = ModelConfig(n_layers=1, n_dense_layers=1)
  indexer = 2 * cfg.index_n_heads * cfg.index_head_dim
  absorbed = 2 * cfg.n_heads * (2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim)
  visible = sum(range(1, 101)) / 100
  assert attention_flops(cfg, 100, sparse=True) == pytest.approx((indexer + absorbed) * visible)
