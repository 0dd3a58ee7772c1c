# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and 2.5, whose attention has biases, Qwen3, whose heads are normed, and Qwen3's experts."""

import dataclasses

from dsa_jax.families import llama
from dsa_jax.families.deepseek import TENSORS as DEEPSEEK_TENSORS

QWEN25_0_5B = llama.with_heads(
    64,
    vocab_size=151_936,
    dim=896,
    n_layers=24,
    inter_dim=4864,
    norm_eps=1e-6,
    tie_embeddings=True,
    n_heads=14,
    n_kv_heads=2,
    qkv_bias=True,
    max_seq_len=32_768,
    rope_theta=1e6,
)
QWEN3_0_6B = llama.with_heads(
    128,
    vocab_size=151_936,
    dim=1024,
    n_layers=28,
    inter_dim=3072,
    norm_eps=1e-6,
    tie_embeddings=True,
    n_heads=16,
    n_kv_heads=8,
    qk_norm=True,
    max_seq_len=40_960,
    rope_theta=1e6,
)
QWEN3_8B = dataclasses.replace(
    QWEN3_0_6B, dim=4096, n_layers=36, n_dense_layers=36, inter_dim=12_288, tie_embeddings=False,
    n_heads=32,
)  # fmt: skip
QWEN3_30B_A3B = dataclasses.replace(
    QWEN3_0_6B,
    dim=2048,
    n_layers=48,
    n_dense_layers=0,
    inter_dim=6144,
    tie_embeddings=False,
    n_routed_experts=128,
    n_shared_experts=0,
    n_activated_experts=8,
    n_expert_groups=1,
    n_limited_groups=1,
    moe_inter_dim=768,
    route_scale=1.0,
    score_func='softmax',
    topk_method='greedy',
    n_heads=32,
    n_kv_heads=4,
)

BIASES = {
    'attn/bq': ('self_attn.q_proj.bias', '(h e) -> h e'),
    'attn/bk': ('self_attn.k_proj.bias', '(g e) -> g e'),
    'attn/bv': ('self_attn.v_proj.bias', '(g v) -> g v'),
}
HEAD_NORMS = {
    'attn/q_norm/scale': ('self_attn.q_norm.weight', 'e -> e'),
    'attn/k_norm/scale': ('self_attn.k_norm.weight', 'e -> e'),
}

QWEN2_FAMILY = dataclasses.replace(
    llama.LLAMA_FAMILY,
    architecture='Qwen2ForCausalLM',
    sizes={'qwen25_0_5b': QWEN25_0_5B},
    tensors=dataclasses.replace(llama.TENSORS, layer=llama.TENSORS.layer | BIASES),
    constants=llama.GQA | {'qkv_bias': True},
    fixed={'hidden_act': 'silu'},
    neutral={'use_mrope': False},
    layer_keys=('use_sliding_window', 'sliding_window', 'max_window_layers', 'layer_types'),
)
QWEN3_FAMILY = dataclasses.replace(
    QWEN2_FAMILY,
    architecture='Qwen3ForCausalLM',
    sizes={'qwen3_0_6b': QWEN3_0_6B, 'qwen3_8b': QWEN3_8B},
    tensors=dataclasses.replace(llama.TENSORS, layer=llama.TENSORS.layer | HEAD_NORMS),
    constants=llama.GQA | {'qk_norm': True},
    fixed=QWEN2_FAMILY.fixed | {'attention_bias': False},
    neutral={},
)
QWEN3_MOE_FAMILY = dataclasses.replace(
    QWEN3_FAMILY,
    architecture='Qwen3MoeForCausalLM',
    sizes={'qwen3_30b_a3b': QWEN3_30B_A3B},
    tensors=dataclasses.replace(
        QWEN3_FAMILY.tensors,
        moe={
            name: DEEPSEEK_TENSORS.moe[name] for name in ('ffn/gate', 'ffn/w1', 'ffn/w3', 'ffn/w2')
        },
    ),
    fields=QWEN3_FAMILY.fields | {
        'num_experts': 'n_routed_experts',
        'num_experts_per_tok': 'n_activated_experts',
        'moe_intermediate_size': 'moe_inter_dim',
    },
    optional=QWEN3_FAMILY.optional | {'norm_topk_prob': ('norm_topk_prob', False)},
    constants=QWEN3_FAMILY.constants | {
        'n_shared_experts': 0,
        'n_expert_groups': 1,
        'n_limited_groups': 1,
        'route_scale': 1.0,
        'score_func': 'softmax',
        'topk_method': 'greedy',
    },
    fixed=QWEN3_FAMILY.fixed | {'use_sliding_window': False},
    neutral={'use_qk_norm': True, 'qkv_bias': False, 'shared_expert_intermediate_size': 0},
    ignored=('sliding_window', 'max_window_layers'),
    layer_keys=('mlp_only_layers', 'decoder_sparse_step'),
)  # fmt: skip
