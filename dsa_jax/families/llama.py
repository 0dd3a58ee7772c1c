# SPDX-License-Identifier: Apache-2.0
"""Llama 2 to 3.x, which SmolLM2 is too, Mistral, and SmolLM3: grouped-query attention and MLPs."""

import dataclasses

from dsa_jax.config import ModelConfig
from dsa_jax.families.deepseek import YARN
from dsa_jax.families.family import INDEXER, Family, TensorNames

FRESH_INDEXER = {'index_n_heads': 16, 'index_head_dim': 64, 'index_rope_head_dim': 32}
# What all models with grouped-query attention have in common.
GQA = {'attention': 'gqa', 'q_lora_rank': 0, 'kv_lora_rank': 0, 'rope_interleave': False}

TENSORS = TensorNames(
    model={
        'embed': ('model.embed_tokens.weight', 'w d -> w d'),
        'norm/scale': ('model.norm.weight', 'd -> d'),
        'head': ('lm_head.weight', 'w d -> d w'),
    },
    layer={
        'attn_norm/scale': ('input_layernorm.weight', 'd -> d'),
        'attn/wq': ('self_attn.q_proj.weight', '(h e) d -> d h e'),
        'attn/wk': ('self_attn.k_proj.weight', '(g e) d -> d g e'),
        'attn/wv': ('self_attn.v_proj.weight', '(g v) d -> d g v'),
        'attn/wo': ('self_attn.o_proj.weight', 'd (h v) -> h v d'),
        **INDEXER,
        'ffn_norm/scale': ('post_attention_layernorm.weight', 'd -> d'),
    },
    mlp={
        'ffn/w1': ('mlp.gate_proj.weight', 'f d -> d f'),
        'ffn/w3': ('mlp.up_proj.weight', 'f d -> d f'),
        'ffn/w2': ('mlp.down_proj.weight', 'd f -> f d'),
    },
    quantized=(
        'q_proj', 'k_proj', 'v_proj', 'o_proj', 'wq_b', 'wk', 'gate_proj', 'up_proj', 'down_proj',
    ),
)  # fmt: skip

LLAMA_FAMILY = Family(
    architecture='LlamaForCausalLM',
    sizes={},
    tensors=TENSORS,
    fields={
        'vocab_size': 'vocab_size',
        'hidden_size': 'dim',
        'num_hidden_layers': 'n_layers',
        'intermediate_size': 'inter_dim',
        'rms_norm_eps': 'norm_eps',
        'num_attention_heads': 'n_heads',
        'max_position_embeddings': 'max_seq_len',
    },
    optional={'tie_word_embeddings': ('tie_embeddings', False)},
    constants=GQA,
    fixed={'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False},
    neutral={'is_llama_config': True, 'rope_interleaved': False},
    ropes={
        'default': {},
        'linear': {'factor': 'rope_factor'},
        'llama3': {
            'factor': 'rope_factor',
            'original_max_position_embeddings': 'original_seq_len',
            'low_freq_factor': 'low_freq_factor',
            'high_freq_factor': 'high_freq_factor',
        },
        'yarn': {key: field for key, field in YARN.items() if key != 'mscale'},
    },
    rope_theta=10_000.0,
    has_indexer=False,
    may_have_indexer=True,
    indexer_fields={
        'index_n_heads': 'index_n_heads',
        'index_head_dim': 'index_head_dim',
        'index_topk': 'index_topk',
    },
    fresh_indexer=FRESH_INDEXER,
    lists_indexers=True,
)
MISTRAL_FAMILY = dataclasses.replace(
    LLAMA_FAMILY,
    architecture='MistralForCausalLM',
    fixed={'hidden_act': 'silu', 'sliding_window': None},
    neutral={},
    explicit=('sliding_window',),
)
SMOLLM3_FAMILY = dataclasses.replace(
    LLAMA_FAMILY,
    architecture='SmolLM3ForCausalLM',
    optional={'tie_word_embeddings': ('tie_embeddings', True)},
    fixed=LLAMA_FAMILY.fixed | {'use_sliding_window': False},
    neutral={},
    ignored=('sliding_window', 'max_window_layers'),
    layer_keys=('no_rope_layers', 'no_rope_layer_interval'),
    nope_interval=4,
    rope_theta=2_000_000.0,
)
