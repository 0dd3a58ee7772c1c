# SPDX-License-Identifier: Apache-2.0
"""GLM-5 and 5.2: DeepSeek-V3.2 with other sizes, without YaRN and without groups of experts.

GLM-4.5 to 4.7 came before them: DeepSeek's experts, and grouped-query attention that rotates half
of each head.
"""

import dataclasses

from dsa_jax.config import ModelConfig
from dsa_jax.families import deepseek, llama, qwen

GLM_5 = ModelConfig(
    vocab_size=154_880,
    dim=6144,
    n_layers=78,
    n_dense_layers=3,
    inter_dim=12_288,
    norm_eps=1e-5,
    n_routed_experts=256,
    n_shared_experts=1,
    n_activated_experts=8,
    n_expert_groups=1,
    n_limited_groups=1,
    moe_inter_dim=2048,
    route_scale=2.5,
    n_heads=64,
    q_lora_rank=2048,
    kv_lora_rank=512,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    v_head_dim=256,
    index_n_heads=32,
    index_head_dim=128,
    index_topk=2048,
    indexer_rope_interleave=True,
    rope_type='default',
    max_seq_len=202_752,
    original_seq_len=202_752,
    rope_theta=1e6,
)
# From layer 2 on, every fourth layer has an indexer; those between share what it selected.
GLM_52 = dataclasses.replace(
    GLM_5,
    indexer_types=tuple('full' if max(i - 2, 0) % 4 == 0 else 'shared' for i in range(78)),
    max_seq_len=1_048_576,
    original_seq_len=1_048_576,
    rope_theta=8e6,
)
GLM_45_AIR = llama.with_heads(
    128,
    rotated=64,
    vocab_size=151_552,
    dim=4096,
    n_layers=46,
    n_dense_layers=1,
    inter_dim=10_944,
    norm_eps=1e-5,
    n_routed_experts=128,
    n_shared_experts=1,
    n_activated_experts=8,
    n_expert_groups=1,
    n_limited_groups=1,
    moe_inter_dim=1408,
    route_scale=1.0,
    n_heads=96,
    n_kv_heads=8,
    qkv_bias=True,
    max_seq_len=131_072,
    rope_theta=1e6,
)

FAMILY = dataclasses.replace(
    deepseek.V32_FAMILY,
    architecture='GlmMoeDsaForCausalLM',
    sizes={'glm5': GLM_5, 'glm52': GLM_52},
    indexer_rope_interleave=True,
    lists_indexers=True,
    norms='BF16',
    repeats_embedding=False,
)

FAMILY_4 = dataclasses.replace(
    llama.LLAMA_FAMILY,
    architecture='Glm4MoeForCausalLM',
    sizes={'glm45_air': GLM_45_AIR},
    tensors=dataclasses.replace(
        deepseek.TENSORS,
        layer=llama.TENSORS.layer | qwen.BIASES | qwen.HEAD_NORMS,
        without_q_latent={},
        quantized=llama.TENSORS.quantized,
    ),
    fields=llama.LLAMA_FAMILY.fields | {
        key: deepseek.V3_FAMILY.fields[key]
        for key in (
            'n_routed_experts', 'n_shared_experts', 'num_experts_per_tok', 'n_group', 'topk_group',
            'moe_intermediate_size', 'routed_scaling_factor',
        )
    },
    optional={
        'attention_bias': ('qkv_bias', False),
        'use_qk_norm': ('qk_norm', False),
        'norm_topk_prob': ('norm_topk_prob', True),
    },
    fixed={'hidden_act': 'silu', 'tie_word_embeddings': False},
    neutral={'scoring_func': 'sigmoid', 'topk_method': 'noaux_tc'},
    layer_keys=deepseek.V32_FAMILY.layer_keys,
    rotary_share=0.5,
)  # fmt: skip
