# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2, V3, which Kimi K2 and Moonlight are too, and V3.2, which has indexers."""

import dataclasses

from dsa_jax.config import ModelConfig
from dsa_jax.families.family import INDEXER, Family, TensorNames

DEEPSEEK_V32 = ModelConfig(rope_type='yarn')  # The defaults are this model's sizes.
DEEPSEEK_V3 = DEEPSEEK_V32  # With the indexers that V3.2 added to it.
DEEPSEEK_V2_LITE = ModelConfig(
    vocab_size=102_400,
    dim=2048,
    n_layers=27,
    n_dense_layers=1,
    inter_dim=10_944,
    norm_eps=1e-6,
    n_routed_experts=64,
    n_shared_experts=2,
    n_activated_experts=6,
    n_expert_groups=1,
    n_limited_groups=1,
    moe_inter_dim=1408,
    route_scale=1.0,
    score_func='softmax',
    topk_method='greedy',
    norm_topk_prob=False,
    n_heads=16,
    q_lora_rank=0,
    rope_type='yarn',
    mscale=0.707,
)
MOONLIGHT_16B_A3B = dataclasses.replace(
    DEEPSEEK_V2_LITE,
    vocab_size=163_840,
    inter_dim=11_264,
    norm_eps=1e-5,
    route_scale=2.446,
    score_func='sigmoid',
    topk_method='noaux_tc',
    norm_topk_prob=True,
    rope_type='default',
    max_seq_len=8192,
    original_seq_len=8192,
    rope_theta=50_000.0,
    mscale=1.0,
)

TENSORS = TensorNames(
    model={
        'embed': ('model.embed_tokens.weight', 'w d -> w d'),
        'norm/scale': ('model.norm.weight', 'd -> d'),
        'head': ('lm_head.weight', 'w d -> d w'),
    },
    layer={
        'attn_norm/scale': ('input_layernorm.weight', 'd -> d'),
        'attn/wq_a': ('self_attn.q_a_proj.weight', 'q d -> d q'),
        'attn/q_norm/scale': ('self_attn.q_a_layernorm.weight', 'q -> q'),
        'attn/wq_b': ('self_attn.q_b_proj.weight', '(h e) q -> q h e'),
        'attn/wkv_a': ('self_attn.kv_a_proj_with_mqa.weight', 'e d -> d e'),
        'attn/kv_norm/scale': ('self_attn.kv_a_layernorm.weight', 'c -> c'),
        'attn/wkv_b': ('self_attn.kv_b_proj.weight', '(h e) c -> c h e'),
        'attn/wo': ('self_attn.o_proj.weight', 'd (h v) -> h v d'),
        **INDEXER,
        'ffn_norm/scale': ('post_attention_layernorm.weight', 'd -> d'),
    },
    without_q_latent={'attn/wq_b': ('self_attn.q_proj.weight', '(h e) d -> d h e')},
    mlp={
        'ffn/w1': ('mlp.gate_proj.weight', 'f d -> d f'),
        'ffn/w3': ('mlp.up_proj.weight', 'f d -> d f'),
        'ffn/w2': ('mlp.down_proj.weight', 'd f -> f d'),
    },
    moe={
        'ffn/gate': ('mlp.gate.weight', 'x d -> d x'),
        'ffn/bias': ('mlp.gate.e_score_correction_bias', 'x -> x'),
        'ffn/w1': ('mlp.experts.{}.gate_proj.weight', 'f d -> d f'),
        'ffn/w3': ('mlp.experts.{}.up_proj.weight', 'f d -> d f'),
        'ffn/w2': ('mlp.experts.{}.down_proj.weight', 'd f -> f d'),
        'ffn/shared/w1': ('mlp.shared_experts.gate_proj.weight', 'f d -> d f'),
        'ffn/shared/w3': ('mlp.shared_experts.up_proj.weight', 'f d -> d f'),
        'ffn/shared/w2': ('mlp.shared_experts.down_proj.weight', 'd f -> f d'),
    },
    mtp={
        'enorm/scale': ('enorm.weight', 'd -> d'),
        'hnorm/scale': ('hnorm.weight', 'd -> d'),
        'eh_proj': ('eh_proj.weight', 'd e -> e d'),
        'norm/scale': ('shared_head.norm.weight', 'd -> d'),
    },
    mtp_copies={
        'embed_tokens.weight': 'model.embed_tokens.weight',
        'shared_head.head.weight': 'lm_head.weight',
    },
    quantized=(
        'q_a_proj', 'q_b_proj', 'q_proj', 'kv_a_proj_with_mqa', 'kv_b_proj', 'o_proj', 'wq_b', 'wk',
        'gate_proj', 'up_proj', 'down_proj',
    ),
)  # fmt: skip

YARN = {
    'factor': 'rope_factor',
    'original_max_position_embeddings': 'original_seq_len',
    'beta_fast': 'beta_fast',
    'beta_slow': 'beta_slow',
    'mscale': 'mscale',
}

V32_FAMILY = Family(
    architecture='DeepseekV32ForCausalLM',
    sizes={'v32': DEEPSEEK_V32},
    tensors=TENSORS,
    fields={
        'vocab_size': 'vocab_size',
        'hidden_size': 'dim',
        'num_hidden_layers': 'n_layers',
        'intermediate_size': 'inter_dim',
        'rms_norm_eps': 'norm_eps',
        'n_routed_experts': 'n_routed_experts',
        'n_shared_experts': 'n_shared_experts',
        'num_experts_per_tok': 'n_activated_experts',
        'n_group': 'n_expert_groups',
        'topk_group': 'n_limited_groups',
        'moe_intermediate_size': 'moe_inter_dim',
        'routed_scaling_factor': 'route_scale',
        'num_attention_heads': 'n_heads',
        'kv_lora_rank': 'kv_lora_rank',
        'qk_nope_head_dim': 'qk_nope_head_dim',
        'qk_rope_head_dim': 'qk_rope_head_dim',
        'v_head_dim': 'v_head_dim',
        'max_position_embeddings': 'max_seq_len',
    },
    optional={'q_lora_rank': ('q_lora_rank', 0)},
    fixed={
        'hidden_act': 'silu',
        'attention_bias': False,
        'tie_word_embeddings': False,
        'norm_topk_prob': True,
        'scoring_func': 'sigmoid',
        'topk_method': 'noaux_tc',
        'moe_layer_freq': 1,
        'mlp_bias': False,
    },
    neutral={'rope_interleave': True, 'qkv_bias': False, 'use_qk_norm': False, 'use_mla': True},
    layer_keys=('first_k_dense_replace', 'mlp_layer_types', 'num_nextn_predict_layers'),
    lists_mlp_layers=True,
    ropes={'yarn': YARN, 'default': {}},
    indexer_fields={
        'index_n_heads': 'index_n_heads',
        'index_head_dim': 'index_head_dim',
        'index_topk': 'index_topk',
    },
    norms='F32',
)
V3_FAMILY = dataclasses.replace(
    V32_FAMILY,
    architecture='DeepseekV3ForCausalLM',
    sizes={'v3': DEEPSEEK_V3, 'moonlight': MOONLIGHT_16B_A3B},
    fixed={key: value for key, value in V32_FAMILY.fixed.items() if key != 'moe_layer_freq'},
    layer_keys=(*V32_FAMILY.layer_keys, 'moe_layer_freq'),
    lists_mlp_layers=False,
    has_indexer=False,
    norms='BF16',
)
KIMI_FAMILY = dataclasses.replace(V3_FAMILY, sizes={})  # Kimi K2 is a DeepSeek-V3 of other sizes.
V2_FAMILY = dataclasses.replace(
    V3_FAMILY,
    architecture='DeepseekV2ForCausalLM',
    sizes={'v2_lite': DEEPSEEK_V2_LITE},
    tensors=dataclasses.replace(TENSORS, mtp={}, mtp_copies={}),
    fields={key: field for key, field in V3_FAMILY.fields.items() if 'group' not in key},
    optional=V3_FAMILY.optional | {
        'n_group': ('n_expert_groups', 1),
        'topk_group': ('n_limited_groups', 1),
        'topk_method': ('topk_method', 'greedy'),
    },
    constants={'score_func': 'softmax', 'norm_topk_prob': False},
    fixed={key: value for key, value in V3_FAMILY.fixed.items() if key != 'topk_method'} | {
        'scoring_func': 'softmax',
        'norm_topk_prob': False,
    },
    layer_keys=('first_k_dense_replace', 'moe_layer_freq'),
    may_have_indexer=True,
    lists_indexers=True,
)  # fmt: skip
