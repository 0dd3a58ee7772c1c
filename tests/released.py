# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints in the released layout, written from its description alone.

Nothing here is shared with the package. Names, shapes and dtypes: DeepSeek-V3.2's checkpoint
(163 shards, revision a7e62ac0) and the headers of GLM-5.2-FP8.
"""

import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors

CODES = {'F32': np.float32, 'BF16': ml_dtypes.bfloat16, 'F8': ml_dtypes.float8_e4m3fn}

V32 = {
    'model_type': 'deepseek_v32', 'vocab_size': 48, 'hidden_size': 160, 'num_hidden_layers': 3,
    'first_k_dense_replace': 1, 'num_nextn_predict_layers': 1, 'intermediate_size': 144,
    'rms_norm_eps': 1e-6, 'n_routed_experts': 4, 'n_shared_experts': 1, 'num_experts_per_tok': 2,
    'n_group': 2, 'topk_group': 1, 'moe_intermediate_size': 24, 'routed_scaling_factor': 2.5,
    'num_attention_heads': 4, 'q_lora_rank': 40, 'kv_lora_rank': 136, 'qk_nope_head_dim': 16,
    'qk_rope_head_dim': 8, 'v_head_dim': 12, 'max_position_embeddings': 512, 'rope_theta': 10000,
    'rope_scaling': {
        'type': 'yarn', 'factor': 40, 'original_max_position_embeddings': 64, 'beta_fast': 32,
        'beta_slow': 1, 'mscale': 1.0, 'mscale_all_dim': 1.0,
    },
    'index_n_heads': 4, 'index_head_dim': 16, 'index_topk': 8, 'torch_dtype': 'bfloat16',
    'architectures': ['DeepseekV32ForCausalLM'], 'scoring_func': 'sigmoid', 'hidden_act': 'silu',
    'quantization_config': {'quant_method': 'fp8', 'weight_block_size': [128, 128]},
}  # fmt: skip
V3 = {k: v for k, v in V32.items() if not k.startswith('index_')} | {
    'model_type': 'deepseek_v3', 'architectures': ['DeepseekV3ForCausalLM'],
}  # fmt: skip
GLM = {k: v for k, v in V32.items() if k != 'rope_scaling'} | {
    'model_type': 'glm_moe_dsa', 'num_hidden_layers': 6, 'first_k_dense_replace': 2, 'n_group': 1,
    'topk_group': 1, 'rms_norm_eps': 1e-5, 'indexer_rope_interleave': True, 'v_head_dim': 20,
    'index_topk_freq': 2, 'index_skip_topk_offset': 2, 'architectures': ['GlmMoeDsaForCausalLM'],
}  # Full layers: 0, 1, 3, 5.  # fmt: skip
AXK2 = {k: v for k, v in V32.items() if k != 'rope_scaling'} | {
    'model_type': 'axk2', 'num_nextn_predict_layers': 0, 'gated_norm_rank': 4,
    'architectures': ['AXK2ForCausalLM'],
    'quantization_config': {
        **V32['quantization_config'], 'modules_to_not_convert': ['W_down', 'W_up'],
    },
}  # fmt: skip
DOTS = {
    key: value for key, value in V32.items()
    if key not in ('rope_scaling', 'n_group', 'topk_group', 'num_nextn_predict_layers')
} | {
    'model_type': 'dots3_note', 'architectures': ['Dots3NoteForCausalLM'], 'rope_theta': 8e7,
    'num_hidden_layers': 4, 'moe_shared_expert_intermediate_size': 20, 'sliding_window_size': 9,
    'layer_types': ['full_attention'] * 2 + ['sliding_attention'] * 2,
    'swa_num_attention_heads': 2, 'swa_q_lora_rank': 36, 'swa_kv_lora_rank': 132,
    'swa_qk_nope_head_dim': 10, 'swa_qk_rope_head_dim': 6, 'swa_v_head_dim': 14,
    'swa_rope_theta': 5e4, 'vision_config': {'adapter_out_dim': 160},
    'audio_config': {'adapter_out_dim': 160},
}  # fmt: skip

# The text stands in a section. Layer 3 reads the latents of layer 1, and shares the selection of layer 2.
MISTRAL = {
    'model_type': 'mistral_large4', 'architectures': ['MistralLarge4ForConditionalGeneration'],
    'torch_dtype': 'bfloat16', 'image_token_index': 10, 'vision_config': {'hidden_size': 16},
    'quantization_config': V32['quantization_config'],
    'text_config': {
        key: value for key, value in V32.items()
        if key.endswith(('_size', '_heads', '_head_dim', '_rank', '_layers', '_experts', '_factor', '_topk'))
        and key not in ('q_lora_rank', 'num_nextn_predict_layers')
    } | {
        'model_type': 'mistral_large4_text', 'num_hidden_layers': 4, 'num_experts_per_tok': 2,
        'first_k_dense_replace': 1, 'rms_norm_eps': 1e-5, 'n_group': 2, 'topk_group': 1,
        'max_position_embeddings': 512, 'no_rope_layers': [1, 0, 1, 0],
        'kv_source_layers': [0, 1, 2, 1], 'indexer_types': ['full', 'full', 'full', 'shared'],
        'final_logit_softcapping': 5.0, 'rope_parameters': {
            'rope_type': 'yarn', 'rope_theta': 10000.0, 'factor': 8.0, 'attention_factor': 1.0,
            'original_max_position_embeddings': 64,
        },
    },
}  # fmt: skip


def sizes_of_layer(c: dict, i: int) -> dict:
  """Returns a config.json in which the sizes of layer i stand under the usual keys."""
  types = c.get('layer_types')
  if not types or i >= len(types) or types[i] != 'sliding_attention':
    return c
  return c | {key.removeprefix('swa_'): value for key, value in c.items() if key.startswith('swa_')}


# The sizes of the released models, as their own config.json files have them.
CONFIGS = {
    'v32': {
        'model_type': 'deepseek_v32', 'vocab_size': 129280, 'hidden_size': 7168, 'n_group': 8,
        'intermediate_size': 18432, 'moe_intermediate_size': 2048, 'num_hidden_layers': 61,
        'num_attention_heads': 128, 'n_shared_experts': 1, 'n_routed_experts': 256, 'topk_group': 4,
        'routed_scaling_factor': 2.5, 'kv_lora_rank': 512, 'q_lora_rank': 1536,
        'qk_rope_head_dim': 64, 'v_head_dim': 128, 'qk_nope_head_dim': 128,
        'num_experts_per_tok': 8, 'rms_norm_eps': 1e-6, 'max_position_embeddings': 163840,
        'index_topk': 2048, 'index_head_dim': 128, 'index_n_heads': 64, 'first_k_dense_replace': 3,
        'num_nextn_predict_layers': 1, 'rope_theta': 10000, 'torch_dtype': 'bfloat16',
        'rope_scaling': {
            'type': 'yarn', 'factor': 40, 'original_max_position_embeddings': 4096,
            'beta_fast': 32, 'beta_slow': 1, 'mscale': 1.0, 'mscale_all_dim': 1.0,
        },
    },
    'glm5': {
        'model_type': 'glm_moe_dsa', 'vocab_size': 154880, 'hidden_size': 6144, 'n_group': 1,
        'intermediate_size': 12288, 'moe_intermediate_size': 2048, 'num_hidden_layers': 78,
        'num_attention_heads': 64, 'n_shared_experts': 1, 'n_routed_experts': 256, 'topk_group': 1,
        'routed_scaling_factor': 2.5, 'kv_lora_rank': 512, 'q_lora_rank': 2048,
        'qk_rope_head_dim': 64, 'v_head_dim': 256, 'qk_nope_head_dim': 192,
        'num_experts_per_tok': 8, 'rms_norm_eps': 1e-5, 'max_position_embeddings': 202752,
        'index_topk': 2048, 'index_head_dim': 128, 'index_n_heads': 32, 'first_k_dense_replace': 3,
        'num_nextn_predict_layers': 1,
        'rope_parameters': {'rope_theta': 1e6, 'rope_type': 'default'},
    },
}  # fmt: skip
CONFIGS['v3'] = {
    key: value for key, value in CONFIGS['v32'].items() if not key.startswith('index_')
} | {'model_type': 'deepseek_v3'}
CONFIGS['glm52'] = CONFIGS['glm5'] | {
    'max_position_embeddings': 1048576, 'index_topk_freq': 4, 'index_skip_topk_offset': 3,
    'rope_parameters': {'rope_theta': 8e6, 'rope_type': 'default'},
}  # fmt: skip
CONFIGS['v2_lite'] = {
    'model_type': 'deepseek_v2', 'vocab_size': 102400, 'hidden_size': 2048, 'n_group': 1,
    'intermediate_size': 10944, 'moe_intermediate_size': 1408, 'num_hidden_layers': 27,
    'num_attention_heads': 16, 'num_key_value_heads': 16, 'n_shared_experts': 2,
    'n_routed_experts': 64, 'topk_group': 1, 'topk_method': 'greedy', 'scoring_func': 'softmax',
    'routed_scaling_factor': 1.0, 'kv_lora_rank': 512, 'q_lora_rank': None, 'qk_rope_head_dim': 64,
    'v_head_dim': 128, 'qk_nope_head_dim': 128, 'num_experts_per_tok': 6, 'norm_topk_prob': False,
    'rms_norm_eps': 1e-6, 'max_position_embeddings': 163840, 'first_k_dense_replace': 1,
    'rope_theta': 10000, 'torch_dtype': 'bfloat16', 'moe_layer_freq': 1, 'tie_word_embeddings': False,
    'rope_scaling': {
        'type': 'yarn', 'factor': 40, 'original_max_position_embeddings': 4096, 'beta_fast': 32,
        'beta_slow': 1, 'mscale': 0.707, 'mscale_all_dim': 0.707,
    },
}  # fmt: skip
CONFIGS['moonlight'] = {k: v for k, v in CONFIGS['v2_lite'].items() if k != 'rope_scaling'} | {
    'model_type': 'deepseek_v3', 'vocab_size': 163840, 'intermediate_size': 11264,
    'rms_norm_eps': 1e-5, 'routed_scaling_factor': 2.446, 'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc', 'norm_topk_prob': True, 'rope_theta': 50000.0,
    'max_position_embeddings': 8192, 'num_nextn_predict_layers': 0,
}  # fmt: skip
CONFIGS['llama3_8b'] = {
    'model_type': 'llama', 'vocab_size': 128256, 'hidden_size': 4096, 'intermediate_size': 14336,
    'num_hidden_layers': 32, 'num_attention_heads': 32, 'num_key_value_heads': 8,
    'max_position_embeddings': 8192, 'rms_norm_eps': 1e-5, 'rope_theta': 500000.0,
    'rope_scaling': None, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
}  # fmt: skip
CONFIGS['llama32_1b'] = CONFIGS['llama3_8b'] | {
    'hidden_size': 2048, 'intermediate_size': 8192, 'num_hidden_layers': 16, 'head_dim': 64,
    'max_position_embeddings': 131072, 'tie_word_embeddings': True,
    'rope_scaling': {
        'factor': 32.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0,
        'original_max_position_embeddings': 8192, 'rope_type': 'llama3',
    },
}  # fmt: skip
CONFIGS['smollm2_135m'] = CONFIGS['llama3_8b'] | {
    'vocab_size': 49152, 'hidden_size': 576, 'intermediate_size': 1536, 'num_hidden_layers': 30,
    'num_attention_heads': 9, 'num_key_value_heads': 3, 'rope_theta': 100000,
    'tie_word_embeddings': True, 'is_llama_config': True, 'rope_interleaved': False,
}  # fmt: skip
CONFIGS['smollm2_360m'] = CONFIGS['smollm2_135m'] | {
    'hidden_size': 960, 'intermediate_size': 2560, 'num_hidden_layers': 32,
    'num_attention_heads': 15, 'num_key_value_heads': 5,
}  # fmt: skip
CONFIGS['smollm2_1_7b'] = CONFIGS['smollm2_135m'] | {
    'hidden_size': 2048, 'intermediate_size': 8192, 'num_hidden_layers': 24,
    'num_attention_heads': 32, 'num_key_value_heads': 32, 'rope_theta': 130000,
}  # fmt: skip
CONFIGS['mistral_7b_v03'] = CONFIGS['llama3_8b'] | {
    'model_type': 'mistral', 'vocab_size': 32768, 'max_position_embeddings': 32768,
    'rope_theta': 1e6, 'sliding_window': None,
}  # fmt: skip
CONFIGS['smollm3_3b'] = CONFIGS['llama3_8b'] | {
    'model_type': 'smollm3', 'hidden_size': 2048, 'intermediate_size': 11008,
    'num_hidden_layers': 36, 'num_attention_heads': 16, 'num_key_value_heads': 4,
    'max_position_embeddings': 65536, 'rms_norm_eps': 1e-6, 'rope_theta': 5e6,
    'tie_word_embeddings': True, 'no_rope_layers': [1, 1, 1, 0] * 9, 'no_rope_layer_interval': 4,
    'use_sliding_window': False, 'sliding_window': None, 'max_window_layers': 28,
}  # fmt: skip
CONFIGS['qwen25_0_5b'] = {
    'model_type': 'qwen2', 'vocab_size': 151936, 'hidden_size': 896, 'intermediate_size': 4864,
    'num_hidden_layers': 24, 'num_attention_heads': 14, 'num_key_value_heads': 2,
    'max_position_embeddings': 32768, 'rms_norm_eps': 1e-6, 'rope_theta': 1e6,
    'tie_word_embeddings': True, 'use_mrope': False, 'use_sliding_window': False,
    'sliding_window': 32768, 'max_window_layers': 24, 'torch_dtype': 'bfloat16',
}  # fmt: skip
CONFIGS['qwen3_0_6b'] = {
    'model_type': 'qwen3', 'vocab_size': 151936, 'hidden_size': 1024, 'intermediate_size': 3072,
    'num_hidden_layers': 28, 'num_attention_heads': 16, 'num_key_value_heads': 8, 'head_dim': 128,
    'max_position_embeddings': 40960, 'rms_norm_eps': 1e-6, 'rope_theta': 1000000,
    'rope_scaling': None, 'tie_word_embeddings': True, 'attention_bias': False,
    'use_sliding_window': False, 'sliding_window': None, 'max_window_layers': 28,
    'torch_dtype': 'bfloat16',
}  # fmt: skip
CONFIGS['qwen3_8b'] = CONFIGS['qwen3_0_6b'] | {
    'hidden_size': 4096, 'intermediate_size': 12288, 'num_hidden_layers': 36,
    'num_attention_heads': 32, 'tie_word_embeddings': False,
}  # fmt: skip
CONFIGS['qwen3_30b_a3b'] = CONFIGS['qwen3_8b'] | {
    'model_type': 'qwen3_moe', 'hidden_size': 2048, 'intermediate_size': 6144,
    'num_hidden_layers': 48, 'num_key_value_heads': 4, 'num_experts': 128, 'num_experts_per_tok': 8,
    'moe_intermediate_size': 768, 'norm_topk_prob': True, 'decoder_sparse_step': 1,
    'mlp_only_layers': [], 'output_router_logits': False, 'router_aux_loss_coef': 0.001,
}  # fmt: skip
CONFIGS['glm45_air'] = {
    'model_type': 'glm4_moe', 'vocab_size': 151552, 'hidden_size': 4096, 'intermediate_size': 10944,
    'num_hidden_layers': 46, 'num_attention_heads': 96, 'num_key_value_heads': 8, 'head_dim': 128,
    'max_position_embeddings': 131072, 'rms_norm_eps': 1e-5, 'rope_theta': 1000000,
    'rope_scaling': None, 'partial_rotary_factor': 0.5, 'attention_bias': True,
    'use_qk_norm': False, 'moe_intermediate_size': 1408, 'n_routed_experts': 128,
    'n_shared_experts': 1, 'num_experts_per_tok': 8, 'n_group': 1, 'topk_group': 1,
    'norm_topk_prob': True, 'routed_scaling_factor': 1.0, 'first_k_dense_replace': 1,
    'num_nextn_predict_layers': 1, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
}  # fmt: skip
# The defaults of AXK2Config in `transformers` 5.24.
CONFIGS['axk2_light'] = {
    'model_type': 'axk2', 'vocab_size': 163840, 'hidden_size': 2048, 'intermediate_size': 5120,
    'moe_intermediate_size': 512, 'num_hidden_layers': 48, 'num_attention_heads': 32,
    'n_shared_experts': 1, 'n_routed_experts': 128, 'routed_scaling_factor': 2.5,
    'kv_lora_rank': 128, 'q_lora_rank': 384, 'qk_rope_head_dim': 32, 'v_head_dim': 64,
    'qk_nope_head_dim': 64, 'n_group': None, 'topk_group': None, 'num_experts_per_tok': 8,
    'norm_topk_prob': True, 'max_position_embeddings': 131072, 'rms_norm_eps': 1e-6,
    'rope_parameters': None, 'mlp_layer_types': None, 'index_topk': 2048, 'index_head_dim': 128,
    'index_n_heads': 16, 'gated_norm_rank': 16,
}  # fmt: skip
# The defaults of HYV4VLTextConfig in `transformers` 5.24, by the keys of HYV4Config.
CONFIGS['hy4_preview'] = {
    'model_type': 'hy_v4', 'vocab_size': 120832, 'hidden_size': 6144, 'intermediate_size': 18432,
    'moe_intermediate_size': 2048, 'num_hidden_layers': 78, 'num_attention_heads': 64,
    'n_shared_experts': 1, 'n_routed_experts': 256, 'routed_scaling_factor': 2.827,
    'kv_lora_rank': 512, 'q_lora_rank': 2048, 'qk_rope_head_dim': 64, 'v_head_dim': 256,
    'qk_nope_head_dim': 192, 'n_group': 1, 'topk_group': 1, 'num_experts_per_tok': 8,
    'norm_topk_prob': True, 'max_position_embeddings': 262144, 'rms_norm_eps': 1e-5,
    'index_topk': 2048, 'index_head_dim': 128, 'index_n_heads': 32, 'hc_mult': 4,
    'hc_magnitude': 2.0, 'hc_eps': 1e-6, 'learnable_sink_init': 0.0, 'swiglu_limit': 10.0,
}  # fmt: skip
CONFIGS['hy4'] = CONFIGS['hy4_preview'] | {'model_type': 'hy_v4_vl_text'}

# The defaults of Dots3NoteTextConfig in `transformers` 5.24, by the keys of the release; its window.
CONFIGS['dots3_note'] = {
    'model_type': 'dots3_note', 'vocab_size': 152064, 'hidden_size': 5120, 'intermediate_size': 13824,
    'moe_intermediate_size': 1536, 'num_hidden_layers': 46, 'num_attention_heads': 128,
    'n_shared_experts': 1, 'n_routed_experts': 256, 'routed_scaling_factor': 1.0,
    'kv_lora_rank': 512, 'q_lora_rank': 1024, 'qk_rope_head_dim': 64, 'v_head_dim': 128,
    'qk_nope_head_dim': 128, 'num_experts_per_tok': 8, 'norm_topk_prob': True,
    'max_position_embeddings': 524288, 'rms_norm_eps': 1e-5, 'rope_theta': 8e7, 'rope_scaling': None,
    'index_topk': 2048, 'index_head_dim': 128, 'index_n_heads': 64, 'first_k_dense_replace': 1,
    'sliding_window_size': 513, 'swa_num_attention_heads': 64, 'swa_q_lora_rank': 1024,
    'swa_kv_lora_rank': 1024, 'swa_qk_nope_head_dim': 192, 'swa_qk_rope_head_dim': 64,
    'swa_v_head_dim': 128, 'swa_rope_theta': 5e4,
}  # fmt: skip

# The defaults of MistralLarge4TextConfig in `transformers` 5.24, with what is said of the release: nine
# layers without positions read the latents of another.
CONFIGS['mistral_large4'] = {
    'model_type': 'mistral_large4_text', 'vocab_size': 204800, 'hidden_size': 6144,
    'intermediate_size': 24576, 'moe_intermediate_size': 6144, 'num_hidden_layers': 72,
    'num_attention_heads': 64, 'n_shared_experts': 1, 'n_routed_experts': 128,
    'routed_scaling_factor': 1.0, 'kv_lora_rank': 512, 'qk_rope_head_dim': 64, 'v_head_dim': 128,
    'qk_nope_head_dim': 64, 'n_group': 1, 'topk_group': 1, 'num_experts_per_tok': 4,
    'max_position_embeddings': 1048576, 'rms_norm_eps': 1e-5, 'index_topk': 2048,
    'index_head_dim': 128, 'index_n_heads': 32, 'first_k_dense_replace': 1,
    'final_logit_softcapping': 30.0, 'no_rope_layers': [1, 1, 1, 0] * 18,
    'kv_source_layers': [35 if i in range(39, 72, 4) else i for i in range(72)],
    'rope_parameters': {
        'rope_type': 'yarn', 'rope_theta': 10000.0, 'factor': 2048.0,
        'original_max_position_embeddings': 512, 'beta_fast': 32.0, 'beta_slow': 1.0,
        'attention_factor': 1.0,
    },
}  # fmt: skip

# The number of weights that the models' public pages say, without MTP layers.
PARAMETERS = {
    'v2_lite': 15_706_484_224,
    'llama3_8b': 8_030_261_248,
    'llama32_1b': 1_235_814_400,
    'smollm2_135m': 134_515_008,
    'smollm2_360m': 361_821_120,
    'smollm2_1_7b': 1_711_376_384,
    'mistral_7b_v03': 7_248_023_552,
    'smollm3_3b': 3_075_098_624,
    'qwen25_0_5b': 494_032_768,
    'qwen3_0_6b': 596_049_920,
    'qwen3_8b': 8_190_735_360,
    'qwen3_30b_a3b': 30_532_122_624,
    'glm45_air': 106_852_245_504 + 45 * 128,  # The biases of routers were not counted.
}


def layout(c: dict, *, fp8: bool = True, norms: str = 'F32') -> dict[str, tuple[tuple, str]]:
  """Returns shape and dtype of every tensor but the scales."""
  d, wide, depth = c['hidden_size'], 'F8' if fp8 else 'BF16', c['num_hidden_layers']
  tensors = {
      'model.embed_tokens.weight': ((c['vocab_size'], d), 'BF16'),
      'lm_head.weight': ((c['vocab_size'], d), 'BF16'),
      'model.norm.weight': ((d,), norms),
  }
  gates = c['model_type'] == 'axk2'
  for i in range(depth + c.get('num_nextn_predict_layers', 0)):
    layer, attn, own = f'model.layers.{i}.', f'model.layers.{i}.self_attn.', sizes_of_layer(c, i)
    heads, q, kv = own['num_attention_heads'], own['q_lora_rank'], own['kv_lora_rank']
    nope, rope, v = own['qk_nope_head_dim'], own['qk_rope_head_dim'], own['v_head_dim']
    tensors |= {
        attn + 'q_a_proj.weight': ((q, d), wide),
        attn + 'q_a_layernorm.weight': ((q,), norms),
        attn + 'q_b_proj.weight': ((heads * (nope + rope + gates * v), (1 + gates) * q), wide),
        attn + 'kv_a_proj_with_mqa.weight': ((kv + rope, d), wide),
        attn + 'kv_a_layernorm.weight': ((kv,), norms),
        attn + 'kv_b_proj.weight': ((heads * (nope + v), kv), wide),
        attn + 'o_proj.weight': ((d, heads * v), wide),
    }
    freq, offset = c.get('index_topk_freq', 1), c.get('index_skip_topk_offset', 0)
    owns_indexer = i == depth or max(i - offset + 1, 0) % freq == 0
    owns_indexer &= own is c  # Layers of other sizes have windows.
    if c['model_type'] == 'dots3_note':
      tensors[attn + 'g_proj.weight'] = (heads, d), wide
      tensors[attn + 'k_rope_only_layernorm.weight'] = (rope,), norms
    if 'index_n_heads' in c and owns_indexer:
      n, width = c['index_n_heads'], c['index_head_dim']
      tensors |= {
          attn + 'indexer.wq_b.weight': ((n * width, q), wide),
          attn + 'indexer.wk.weight': ((width, d), wide),
          attn + 'indexer.k_norm.weight': ((width,), norms),
          attn + 'indexer.k_norm.bias': ((width,), norms),
          attn + 'indexer.weights_proj.weight': ((n, d), 'BF16'),
      }
    types = dict(enumerate(c.get('mlp_layer_types', ())))
    is_dense = i < c['first_k_dense_replace'] or types.get(i) == 'dense'
    before_mlp = 'post_attention_layernorm', gates and not is_dense
    for norm, is_gated in (('input_layernorm', gates), before_mlp):
      tensors[layer + norm + ('.norm.weight' if is_gated else '.weight')] = (d,), norms
      if is_gated:
        tensors[f'{layer}{norm}.W_down.weight'] = (c['gated_norm_rank'], d), 'BF16'
        tensors[f'{layer}{norm}.W_up.weight'] = (d, c['gated_norm_rank']), 'BF16'
    if is_dense:
      tensors |= _swiglu(layer + 'mlp.', d, c['intermediate_size'], wide)
    else:
      f = c['moe_intermediate_size']
      shared = c['n_shared_experts'] * c.get('moe_shared_expert_intermediate_size', f)
      tensors[layer + 'mlp.gate.weight'] = (c['n_routed_experts'], d), 'BF16'
      tensors[layer + 'mlp.gate.e_score_correction_bias'] = (c['n_routed_experts'],), 'F32'
      for e in range(c['n_routed_experts']):
        tensors |= _swiglu(layer + f'mlp.experts.{e}.', d, f, wide)
      tensors |= _swiglu(layer + 'mlp.shared_experts.', d, shared, wide)
    if i == depth:
      tensors |= {
          layer + 'enorm.weight': ((d,), norms),
          layer + 'hnorm.weight': ((d,), norms),
          layer + 'eh_proj.weight': ((d, 2 * d), 'BF16'),
          layer + 'shared_head.norm.weight': ((d,), norms),
      }
      if c['model_type'] != 'glm_moe_dsa':
        for name in ('embed_tokens.weight', 'shared_head.head.weight'):
          tensors[layer + name] = (c['vocab_size'], d), 'BF16'
  return tensors


def mistral_layout(whole: dict, *, fp8: bool = True) -> dict[str, tuple[tuple, str]]:
  """The same of Mistral Large 4, which has names of its own."""
  c, wide = whole['text_config'], 'F8' if fp8 else 'BF16'
  d, heads, kv = c['hidden_size'], c['num_attention_heads'], c['kv_lora_rank']
  nope, rope, v = c['qk_nope_head_dim'], c['qk_rope_head_dim'], c['v_head_dim']
  n, width = c['index_n_heads'], c['index_head_dim']
  tensors = {
      'tok_embeddings.weight': ((c['vocab_size'], d), 'BF16'),
      'output.weight': ((c['vocab_size'], d), 'BF16'),
      'norm.weight': ((d,), 'BF16'),
      'lerope.alpha': ((rope // 2,), 'F32'),
  }
  for i in range(c['num_hidden_layers']):
    layer, attn, rotates = f'layers.{i}.', f'layers.{i}.attention.', c['no_rope_layers'][i]
    tensors |= {
        layer + 'attention_norm.weight': ((d,), 'BF16'),
        layer + 'ffn_norm.weight': ((d,), 'BF16'),
        attn + 'wq.weight': ((heads * (nope + rope), d), wide),
        attn + 'wkv_b.weight': ((heads * (nope + (0 if rotates else rope) + v), kv), wide),
        attn + 'wo.weight': ((d, heads * v), wide),
        attn + 'ssmax_scaling.s': ((heads,), 'BF16'),
        attn + 'ssmax_scaling.b': ((heads,), 'BF16'),
    }
    if c['kv_source_layers'][i] == i:
      tensors[attn + 'wkv_a_with_mqa.weight'] = (kv + (rope if rotates else 0), d), wide
      tensors[attn + 'kv_a_norm.weight'] = (kv,), 'BF16'
    if c['indexer_types'][i] == 'full':
      tensors |= {
          attn + 'indexer.q_input_norm.weight': ((d,), 'BF16'),
          attn + 'indexer.q_input_norm.bias': ((d,), 'BF16'),
          attn + 'indexer.wq_b.weight': ((n * width, d), wide),
          attn + 'indexer.ssmax_scaling.s': ((n,), 'BF16'),
          attn + 'indexer.ssmax_scaling.b': ((n,), 'BF16'),
          attn + 'indexer.wk.weight': ((width, d), wide),
          attn + 'indexer.k_norm.weight': ((width,), 'BF16'),
          attn + 'indexer.k_norm.bias': ((width,), 'BF16'),
          attn + 'indexer.weights_proj.weight': ((n, d), 'BF16'),
      }
    mlps = {'feed_forward.': c['intermediate_size']}
    if i >= c['first_k_dense_replace']:
      f = c['moe_intermediate_size']
      tensors[layer + 'gate.weight'] = (c['n_routed_experts'], d), 'BF16'
      mlps = {f'experts.{e}.': f for e in range(c['n_routed_experts'])}
      mlps['shared_experts.'] = f * c['n_shared_experts']
    for mlp, f in mlps.items():
      tensors |= {
          layer + mlp + 'w1.weight': ((f, d), wide),
          layer + mlp + 'w3.weight': ((f, d), wide),
          layer + mlp + 'w2.weight': ((d, f), wide),
      }
  return tensors


def _swiglu(prefix: str, d: int, f: int, dtype: str) -> dict:
  return {
      prefix + 'gate_proj.weight': ((f, d), dtype),
      prefix + 'up_proj.weight': ((f, d), dtype),
      prefix + 'down_proj.weight': ((d, f), dtype),
  }


def random_tensors(c: dict, *, odd_scales: bool = False, **kwargs) -> dict[str, np.ndarray]:
  """Returns a whole checkpoint; FP8 codes are of all kinds but NaN, zeros of both signs included.

  Args:
    c: A config.json.
    odd_scales: Scales that are no powers of two, as DeepSeek-V3's are not.
    **kwargs: See `layout`.
  """
  rng, tensors = np.random.default_rng(0), {}
  shapes = mistral_layout if c['model_type'] == 'mistral_large4' else layout
  for name, (shape, code) in shapes(c, **kwargs).items():
    if code == 'F8':
      codes = rng.integers(0, 127, size=shape) + 128 * rng.integers(2, size=shape)
      tensors[name] = codes.astype(np.uint8).view(CODES['F8'])
      blocks = [-(-n // 128) for n in shape]
      scale = rng.uniform(0.5, 1, blocks) if odd_scales else 2.0 ** rng.integers(-12, -9, blocks)
      tensors[name + '_scale_inv'] = (scale * (1e-3 if odd_scales else 1)).astype(np.float32)
    else:
      tensors[name] = rng.normal(size=shape).astype(CODES[code])
  extra = f"model.layers.{c.get('num_hidden_layers')}."
  if extra + 'embed_tokens.weight' in tensors:
    tensors[extra + 'embed_tokens.weight'] = tensors['model.embed_tokens.weight']
    tensors[extra + 'shared_head.head.weight'] = tensors['lm_head.weight']
  return tensors


def write(folder: pathlib.Path, c: dict, tensors: dict[str, np.ndarray], *, shards: int = 3):
  """Writes config.json, the shards and their index."""
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(c))
  names = sorted(tensors)
  weight_map = {}
  for i in range(shards):
    file = f'model-{i + 1:05}-of-{shards:05}.safetensors'
    mine = names[i::shards]
    weight_map |= {name: file for name in mine}
    write_shard(folder / file, {name: tensors[name] for name in mine})
  index = {'metadata': {'total_size': sum(x.nbytes for x in tensors.values())}}
  index['weight_map'] = weight_map
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))


def write_shard(path: pathlib.Path, tensors: dict[str, np.ndarray]):
  tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  specs = {
      name: safetensors.TensorSpec(
          dtype=x.dtype.name, shape=x.shape, data_ptr=x.ctypes.data, data_len=x.nbytes
      )
      for name, x in tensors.items()
  }
  safetensors.serialize_file(specs, path, {'format': 'pt'})


def read(folder: pathlib.Path) -> dict[str, tuple[str, tuple, bytes]]:
  """Returns dtype, shape and bytes of every tensor of a folder."""
  tensors = {}
  for path in sorted(folder.glob('*.safetensors')):
    for name, entry in safetensors.deserialize(path.read_bytes()):
      tensors[name] = entry['dtype'], tuple(entry['shape']), bytes(entry['data'])
  return tensors
