# SPDX-License-Identifier: Apache-2.0
"""Llama 2 to 3.x, which SmolLM2 is too, Mistral, and SmolLM3: grouped-query attention and MLPs."""

import dataclasses

from dsa_jax.config import ModelConfig
from dsa_jax.families import deepseek
from dsa_jax.families.family import INDEXER, Family, TensorNames

FRESH_INDEXER = {'index_n_heads': 16, 'index_head_dim': 64, 'index_rope_head_dim': 32}
# What all models with grouped-query attention have in common.
GQA = {'attention': 'gqa', 'q_lora_rank': 0, 'kv_lora_rank': 0, 'rope_interleave': False}


def with_heads(head_dim: int, *, rotated: int | None = None, **sizes) -> ModelConfig:
  """Returns a model with grouped-query attention, of which fresh indexers have the usual sizes.

  Args:
    head_dim: The width of queries, keys and values.
    rotated: So many channels of it are rotated. None: all.
    **sizes: Other fields of ModelConfig. What is not given of rotary positions says that there is
      no scaling, and of experts that there are none.
  """
  rotated = rotated or head_dim
  usual = {
      'n_dense_layers': sizes['n_layers'],
      'rope_type': 'default',
      'original_seq_len': sizes['max_seq_len'],
  }
  heads = {
      'qk_rope_head_dim': rotated, 'qk_nope_head_dim': head_dim - rotated, 'v_head_dim': head_dim,
  }  # fmt: skip
  return ModelConfig(**GQA | FRESH_INDEXER | usual | heads | sizes)


LLAMA3_8B = with_heads(
    128,
    vocab_size=128_256,
    dim=4096,
    n_layers=32,
    inter_dim=14_336,
    norm_eps=1e-5,
    n_heads=32,
    n_kv_heads=8,
    max_seq_len=8192,
    rope_theta=500_000.0,
)
LLAMA32_1B = with_heads(
    64,
    vocab_size=128_256,
    dim=2048,
    n_layers=16,
    inter_dim=8192,
    norm_eps=1e-5,
    tie_embeddings=True,
    n_heads=32,
    n_kv_heads=8,
    rope_type='llama3',
    max_seq_len=131_072,
    original_seq_len=8192,
    rope_theta=500_000.0,
    rope_factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
SMOLLM2_135M = with_heads(
    64,
    vocab_size=49_152,
    dim=576,
    n_layers=30,
    inter_dim=1536,
    norm_eps=1e-5,
    tie_embeddings=True,
    n_heads=9,
    n_kv_heads=3,
    max_seq_len=8192,
    rope_theta=100_000.0,
)
SMOLLM2_360M = dataclasses.replace(
    SMOLLM2_135M, dim=960, n_layers=32, n_dense_layers=32, inter_dim=2560, n_heads=15, n_kv_heads=5
)
SMOLLM2_1_7B = dataclasses.replace(
    SMOLLM2_135M, dim=2048, n_layers=24, n_dense_layers=24, inter_dim=8192, n_heads=32,
    n_kv_heads=32, rope_theta=130_000.0,
)  # fmt: skip
SMOLLM3_3B = with_heads(
    128,
    vocab_size=128_256,
    dim=2048,
    n_layers=36,
    inter_dim=11_008,
    norm_eps=1e-6,
    tie_embeddings=True,
    n_heads=16,
    n_kv_heads=4,
    nope_layers=range(3, 36, 4),
    max_seq_len=65_536,
    rope_theta=5e6,
)
MISTRAL_7B_V03 = dataclasses.replace(
    LLAMA3_8B, vocab_size=32_768, max_seq_len=32_768, original_seq_len=32_768, rope_theta=1e6
)

TENSORS = TensorNames(
    model=deepseek.TENSORS.model,
    layer={
        'attn_norm/scale': ('input_layernorm.weight', 'd -> d'),
        'attn/wq': ('self_attn.q_proj.weight', '(h e) d -> d h e'),
        'attn/wk': ('self_attn.k_proj.weight', '(g e) d -> d g e'),
        'attn/wv': ('self_attn.v_proj.weight', '(g v) d -> d g v'),
        'attn/wo': ('self_attn.o_proj.weight', 'd (h v) -> h v d'),
        **INDEXER,
        'ffn_norm/scale': ('post_attention_layernorm.weight', 'd -> d'),
    },
    mlp=deepseek.TENSORS.mlp,
    quantized=(
        'q_proj', 'k_proj', 'v_proj', 'o_proj', 'wq_b', 'wk', 'gate_proj', 'up_proj', 'down_proj',
    ),
)  # fmt: skip

LLAMA_FAMILY = Family(
    architecture='LlamaForCausalLM',
    sizes={
        'llama3_8b': LLAMA3_8B,
        'llama32_1b': LLAMA32_1B,
        'smollm2_135m': SMOLLM2_135M,
        'smollm2_360m': SMOLLM2_360M,
        'smollm2_1_7b': SMOLLM2_1_7B,
    },
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
        'yarn': {key: field for key, field in deepseek.YARN.items() if key != 'mscale'},
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
    sizes={'mistral_7b_v03': MISTRAL_7B_V03},
    fixed={'hidden_act': 'silu'},
    neutral={},
    explicit=('sliding_window',),
    layer_keys=('sliding_window',),
)
SMOLLM3_FAMILY = dataclasses.replace(
    LLAMA_FAMILY,
    architecture='SmolLM3ForCausalLM',
    sizes={'smollm3_3b': SMOLLM3_3B},
    optional={'tie_word_embeddings': ('tie_embeddings', True)},
    fixed=LLAMA_FAMILY.fixed | {'use_sliding_window': False},
    neutral={},
    ignored=('sliding_window', 'max_window_layers'),
    layer_keys=('no_rope_layers', 'no_rope_layer_interval'),
    nope_interval=4,
    rope_theta=2_000_000.0,
)
