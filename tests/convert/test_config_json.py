# SPDX-License-Identifier: Apache-2.0
"""Every key of a config.json is read, is known to change nothing, or is refused by its name."""

import json
import pathlib

import numpy as np
import pytest
import released

from dsa_jax.config import ConfigError
from dsa_jax.convert.config_json import has_indexer, read_config, write_config
from dsa_jax.nn.rope import rope_frequencies

ROOT = pathlib.Path(__file__).parents[1]

# What stands in released files beside the keys of `released.CONFIGS`.
BESIDE = {
    'architectures': ['X'], 'auto_map': {'AutoConfig': 'configuration_deepseek.DeepseekV3Config'},
    'attention_bias': False, 'attention_dropout': 0.0, 'aux_loss_alpha': 0.001, 'bos_token_id': 0,
    'eos_token_id': [1, 2], 'pad_token_id': None, 'ep_size': 1, 'hidden_act': 'silu',
    'initializer_range': 0.02, 'moe_layer_freq': 1, 'norm_topk_prob': True, 'pretraining_tp': 1,
    'scoring_func': 'sigmoid', 'seq_aux': True, 'tie_word_embeddings': False,
    'topk_method': 'noaux_tc', 'torch_dtype': 'bfloat16', 'transformers_version': '4.44.2',
    'use_cache': True, 'rope_interleave': True, '_name_or_path': 'x', 'mlp_bias': False,
    'quantization_config': {
        'activation_scheme': 'dynamic', 'fmt': 'e4m3', 'quant_method': 'fp8', 'scale_fmt': 'ue8m0',
        'weight_block_size': [128, 128],
    },
}  # fmt: skip
LONGER = {'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32768}
YARN = released.V32['rope_scaling']
SIZES = {'head_dim': 8, 'qk_head_dim': 24, 'num_key_value_heads': 4}


def read(**changes):
  return read_config(released.V32 | changes)[1]


@pytest.mark.parametrize('name', ['v32', 'v3', 'glm5', 'glm52'])
def test_released_files_are_read(name):
  config = released.CONFIGS[name]
  heads = {
      'num_key_value_heads': config['num_attention_heads'],
      'head_dim': config['qk_rope_head_dim'],
      'qk_head_dim': config['qk_nope_head_dim'] + config['qk_rope_head_dim'],
  }
  more = {'index_share_for_mtp_iteration': True, 'index_topk_pattern': None} if 'glm' in name else {}
  assert read_config(config | BESIDE | heads | more) == read_config(config)


def test_what_transformers_saves_of_dots3_note_is_read():
  """Sections for kinds of layers, of the text alone or beside the other parts."""
  folder = ROOT / 'parity' / 'dots3_note'
  ours, saved = (json.loads((folder / name).read_text()) for name in ('config.json', 'saved_config.json'))
  assert {'per_layer_config', 'rope_parameters'} <= saved.keys() - ours.keys()
  assert read_config(saved) == read_config(ours)
  whole = {'model_type': 'dots3_note', 'rope_parameters': None, 'vision_config': {}, 'audio_config': {}}
  whole['text_config'] = saved
  assert read_config(whole) == read_config(ours)
  written = write_config('dots3_note', read_config(saved)[1], saved)
  assert read_config(written) == read_config(ours) and has_indexer(saved)
  assert not {'per_layer_config', 'rope_parameters', 'sliding_window'} & written.keys()


@pytest.mark.parametrize('name', released.CONFIGS)
def test_keys_that_change_nothing(name):
  config = released.CONFIGS[name]
  read = family_of(config)
  beside = {
      'architectures': ['X'], 'attention_dropout': 0.0, 'bos_token_id': 0, 'eos_token_id': [1, 2],
      'pad_token_id': None, 'hidden_act': 'silu', 'initializer_range': 0.02, 'pretraining_tp': 1,
      'transformers_version': '4.44.2', 'use_cache': True, '_name_or_path': 'x',
      'layer_types': ['full_attention'] * config['num_hidden_layers'],
  }  # fmt: skip
  for i in read()[1].window_layers:
    beside['layer_types'][i] = 'sliding_attention'
  assert read(**beside) == read()


def family_of(config: dict):
  return lambda **changes: read_config({**config, **changes})


GQA = {
    name: family_of(released.CONFIGS[name])
    for name in ('llama3_8b', 'llama32_1b', 'mistral_7b_v03', 'smollm3_3b', 'qwen25_0_5b',
                 'qwen3_8b', 'qwen3_30b_a3b', 'glm45_air', 'v2_lite', 'moonlight',
                 'axk2_light', 'hy4_preview', 'hy4', 'dots3_note', 'mistral_large4')
}  # fmt: skip
MISTRAL_ROPE = released.CONFIGS['mistral_large4']['rope_parameters']
DOTS_LAYERS = {'layer_types': ['indexed_attention'] * 2 + ['sliding_attention'] * 44}
LLAMA3 = released.CONFIGS['llama32_1b']['rope_scaling']
WINDOWS = {'use_sliding_window': True}
NO_WINDOWS = {'window_layers': (), 'sliding_window': 0}
INDEXED = {'index_n_heads': 4, 'index_head_dim': 32, 'index_topk': 64}


@pytest.mark.parametrize(
    'name, changes, message',
    [
        ('llama3_8b', {'attention_bias': True}, 'attention_bias=True must be False'),
        ('llama3_8b', {'mlp_bias': True}, 'mlp_bias=True must be False'),
        ('llama3_8b', {'sliding_window': 4096}, 'sliding_window=4096 is unknown'),
        ('llama3_8b', {'rope_interleaved': True}, 'rope_interleaved=True must be False'),
        ('llama3_8b', {'rope_interleave': True}, 'rope_interleave=True is unknown'),
        ('llama3_8b', {'qk_norm': True}, 'qk_norm=True is unknown'),
        ('llama3_8b', {'num_experts': 8}, 'num_experts=8 is unknown'),
        ('llama3_8b', {'num_nextn_predict_layers': 1}, 'num_nextn_predict_layers=1 is unknown'),
        ('llama3_8b', {'num_key_value_heads': 5}, 'n_kv_heads=5 must be at least 1 and divide'),
        ('llama3_8b', {'head_dim': 127}, 'qk_rope_head_dim=127 must be even'),
        ('llama3_8b', {'head_dim': '128'}, "head_dim='128' must be a number"),
        ('llama3_8b', {'tie_word_embeddings': 'no'}, "tie_word_embeddings='no' must be true or false"),
        ('llama3_8b', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5 must be 1'),
        ('llama3_8b', {'rope_scaling': {'type': 'dynamic', 'factor': 2}}, "type='dynamic' must be"),
        ('llama3_8b', {'rope_scaling': {'type': 'linear'}}, 'factor=None must be a number'),
        ('llama3_8b', {'rope_scaling': {'type': 'linear', 'factor': 0.5}}, 'must be at least 1'),
        ('llama3_8b', {'rope_scaling': {**YARN}}, "mscale=1.0 is unknown for 'yarn' positions"),
        ('llama3_8b', {'rope_scaling': LONGER | {'attn_factor': 0.8782488562869419}},
         'say attention_factor=1.13863, as transformers takes it, or attention_factor=1, which vLLM'),
        ('llama3_8b', {'rope_scaling': LONGER | {'attn_factor': 'x'}}, "attn_factor='x' must be a number"),
        ('llama3_8b', {'rope_scaling': LONGER | {'attention_factor': 0}}, 'attention_factor=0 must be a number above 0'),
        ('llama3_8b', {'rope_scaling': LONGER | {'factor': 1, 'attention_factor': 2}}, 'attention_factor=2 must be 1 where factor is 1'),
        ('llama32_1b', {'rope_scaling': LLAMA3 | {'beta_fast': 32}}, 'beta_fast=32 is unknown'),
        ('llama32_1b', {'rope_scaling': LLAMA3 | {'low_freq_factor': 4.0}}, 'low_freq_factor=4.0 must be'),
        ('llama32_1b', {'rope_scaling': LLAMA3 | {'attention_factor': 2.0}}, 'attention_factor=2.0'),
        ('llama32_1b', {'rope_scaling': LLAMA3 | {'attn_factor': 0.9}}, 'must be 1: `transformers` passes it over'),
        ('mistral_7b_v03', {'sliding_window': 0}, 'sliding_window=0 must be a count of tokens, or null'),
        ('mistral_7b_v03', {'sliding_window': '4096'}, "sliding_window='4096' must be a count"),
        ('mistral_7b_v03', {'use_sliding_window': True}, 'use_sliding_window=True must be False'),
        ('smollm3_3b', {'no_rope_layers': [1, 0]}, 'no_rope_layers=.* must be 1 for each of 36 layers'),
        ('smollm3_3b', {'no_rope_layer_interval': 0}, 'no_rope_layer_interval=0 must be a count'),
        ('smollm3_3b', WINDOWS, 'use_sliding_window=True must be False'),
        ('qwen3_30b_a3b', WINDOWS, 'use_sliding_window=True must be False'),
        ('qwen25_0_5b', {'use_sliding_window': 'yes'}, "use_sliding_window='yes' must be true or false"),
        ('qwen25_0_5b', WINDOWS | {'sliding_window': 0.5}, 'sliding_window=0.5 must be a count'),
        ('qwen25_0_5b', WINDOWS | {'max_window_layers': None}, 'max_window_layers=None must be a count'),
        ('qwen25_0_5b', WINDOWS | {'layer_types': ['sliding_attention']}, 'layer_types=.* for each of 24'),
        ('qwen25_0_5b', WINDOWS | {'layer_types': ['chunked_attention'] * 24}, 'layer_types=.* must be one'),
        ('qwen25_0_5b', {'layer_types': ['indexed_attention'] * 24}, "must be one of .'full_attention',"),
        ('qwen25_0_5b', {'use_mrope': True}, 'use_mrope=True must be False'),
        ('qwen3_8b', {'attention_bias': True}, 'attention_bias=True must be False'),
        ('qwen3_8b', {'layer_types': ['sliding_attention'] * 36}, 'layer_types='),
        ('qwen3_30b_a3b', {'decoder_sparse_step': 0}, 'decoder_sparse_step=0 must be a count'),
        ('qwen3_30b_a3b', {'decoder_sparse_step': True}, 'decoder_sparse_step=True must be a count'),
        ('qwen3_30b_a3b', {'mlp_only_layers': [48]}, r'mlp_only_layers=\[48\] must be numbers of layers'),
        ('qwen3_30b_a3b', {'mlp_only_layers': [True]}, 'must be numbers of layers'),
        ('qwen3_30b_a3b', {'mlp_only_layers': 1}, 'mlp_only_layers=1 must be numbers of layers'),
        ('qwen3_30b_a3b', {'mlp_layer_types': ['dense'] * 48}, 'mlp_layer_types=.* is unknown'),
        ('glm45_air', {'mlp_layer_types': ['dense', *['sparse'] * 44, 'dense']}, "must be 1 'dense', then"),
        ('glm45_air', {'moe_layer_freq': 2}, 'moe_layer_freq=2 is unknown'),
        ('v2_lite', {'moe_layer_freq': 0}, 'moe_layer_freq=0 must be a count'),
        ('v2_lite', {'moe_layer_freq': [0, *[1] * 26]}, r'moe_layer_freq=\[0, 1.* must be a count'),
        ('v2_lite', {'mlp_layer_types': ['dense'] * 27}, 'mlp_layer_types=.* is unknown'),
        ('qwen3_30b_a3b', {'num_local_experts': 64}, 'num_local_experts=64 must be 128'),
        ('qwen3_30b_a3b', {'norm_topk_prob': 1}, 'norm_topk_prob=1 must be true or false'),
        ('qwen3_30b_a3b', {'shared_expert_intermediate_size': 8}, 'shared_expert_intermediate_size=8 must be 0'),
        ('qwen3_30b_a3b', {'use_qk_norm': False}, 'use_qk_norm=False must be True'),
        ('glm45_air', {'partial_rotary_factor': 0}, 'partial_rotary_factor=0 must be above 0'),
        ('glm45_air', {'scoring_func': 'softmax'}, "scoring_func='softmax' must be 'sigmoid'"),
        ('v2_lite', {'norm_topk_prob': True}, 'norm_topk_prob=True must be False'),
        ('v2_lite', {'topk_method': 'best'}, "topk_method='best' must be one of"),
        ('v2_lite', {'topk_method': 'group_limited_greedy', 'n_group': 3}, 'must be a multiple of'),
        ('moonlight', {'topk_method': 'greedy'}, "topk_method='greedy' must be 'noaux_tc'"),
        ('qwen3_8b', {'index_topk': 64}, 'index_n_heads is missing'),
        ('axk2_light', {'n_group': 4}, 'n_group and topk_group must be null together, or neither'),
        ('axk2_light', {'q_lora_rank': None}, 'q_lora_rank=None must be a number'),
        ('hy4_preview', {'swiglu_limit': 0}, 'swiglu_limit=0 must be positive'),
        ('dots3_note', {'use_dsa': False}, 'use_dsa=False must be True'),
        ('dots3_note', {'attention_gate_type': 'elementwise'}, "attention_gate_type='elementwise' must be 'headwise'"),
        ('dots3_note', {'swa_head_dim': 192}, 'swa_head_dim=192 must be 256'),
        ('dots3_note', {'swa_kv_lora_rank': 0}, 'swa_kv_lora_rank=0 must be positive'),
        ('dots3_note', {'sliding_window': 512}, 'sliding_window=512 contradicts sliding_window_size=513'),
        ('dots3_note', {'swa_qk_rope_head_dim': 63}, 'window_qk_rope_head_dim.: 63.*must be even'),
        ('dots3_note', DOTS_LAYERS | {'per_layer_config': {'2': {'v_head_dim': 64}}}, 'must give all layers with a window the same'),
        ('dots3_note', {'per_layer_config': {'1': {'v_head_dim': 64}}}, 'must give all layers with a window the same'),
        ('dots3_note', DOTS_LAYERS | {'per_layer_config': {'1': {}}}, 'must give all layers with a window the same'),
        ('dots3_note', DOTS_LAYERS | {'per_layer_config': {str(i): {'rank': 2} for i in range(2, 46)}}, 'must give all layers'),
        ('dots3_note', {'rope_parameters': {'indexed_attention': {'rope_theta': 5.0, 'rope_type': 'yarn'}}},
         "rope_parameters: 'indexed_attention'"),
        ('dots3_note', {'text_config': {'rms_norm_eps': 0.5}}, 'rms_norm_eps=.* contradicts rms_norm_eps=0.5 of text_config'),
        ('dots3_note', {'text_config': [1]}, 'text_config=.1. must be a section'),
        ('dots3_note', {'rope_parameters': {'full_attention': {'rope_theta': 5.0, 'partial_rotary_factor': 'a'}}},
         "'full_attention': .* must be of layers that select"),
        ('dots3_note', {'rope_parameters': {'sliding_attention': {'rope_theta': 5.0, 'partial_rotary_factor': 0.5}}},
         "rope_parameters: 'sliding_attention'"),
        ('hy4_preview', {'rope_parameters': {'mrope_section': [12, 10, 10]}}, 'mrope_section=.* is unknown'),
        ('hy4_preview', {'hc_sinkhorn_iters': 20}, 'hc_sinkhorn_iters=20 is unknown'),
        ('mistral_large4', {'kv_source_layers': [0, 1]}, r'kv_sources=.0, 1. must name'),
        ('mistral_large4', {'kv_source_layers': [0, 1, 2, 2, *range(4, 72)]}, 'kv_sources=.* rotates as it does'),
        ('mistral_large4', {'kv_source_layers': ['0'] * 72}, 'kv_source_layers=.* must be numbers of layers'),
        ('mistral_large4', {'no_rope_layers': [1, 0]}, 'no_rope_layers=.* must be 1 for each of 72 layers'),
        ('mistral_large4', {'q_lora_rank': 64}, 'q_lora_rank=64 is unknown'),
        ('mistral_large4', {'norm_topk_prob': False}, 'norm_topk_prob=False must be True'),
        ('mistral_large4', {'final_logit_softcapping': 0}, 'final_logit_softcapping=0 must be positive'),
        ('mistral_large4', {'rope_parameters': MISTRAL_ROPE | {'attention_factor': None}}, 'attention_factor is missing'),
        ('mistral_large4', {'rope_parameters': MISTRAL_ROPE | {'attention_factor': 1.5}}, 'attention_factor=1.5 must be 1'),
        ('mistral_large4', {'rope_parameters': MISTRAL_ROPE | {'mscale': 1.0}}, "mscale=1.0 is unknown for 'yarn'"),
        ('mistral_large4', {'rope_parameters': {'rope_type': 'default'}}, "type='default' must be 'yarn'"),
        ('mistral_large4', {'rope_parameters': None, 'rope_theta': 5.0}, 'rope_theta=5.0 contradicts'),
        ('axk2_light', {'gated_norm_rank': 0}, 'gated_norm_rank=0 must be positive'),
        ('axk2_light', {'num_nextn_predict_layers': 1}, 'num_nextn_predict_layers=1 must be 0'),
        ('axk2_light', {'scoring_func': 'softmax'}, "scoring_func='softmax' must be 'sigmoid'"),
        ('qwen3_8b', INDEXED, 'index_rope_dim=128 must be even and at most'),
    ],
    ids=str,
)  # fmt: skip
def test_what_other_families_refuse(name, changes, message):
  with pytest.raises(ConfigError, match=message):
    GQA[name](**changes)


@pytest.mark.parametrize(
    'name, changes, fields',
    [
        ('llama3_8b', {'num_key_value_heads': None}, {'n_kv_heads': 32}),
        ('llama3_8b', {'head_dim': None}, {'qk_rope_head_dim': 128, 'v_head_dim': 128}),
        ('llama3_8b', {'head_dim': 64}, {'qk_rope_head_dim': 64, 'v_head_dim': 64}),
        ('llama3_8b', {'rope_theta': None}, {'rope_theta': 10_000.0}),
        ('llama3_8b', {'tie_word_embeddings': None}, {'tie_embeddings': False}),
        ('smollm3_3b', {'tie_word_embeddings': None}, {'tie_embeddings': True}),
        ('smollm3_3b', {'no_rope_layers': None}, {'nope_layers': tuple(range(3, 36, 4))}),
        ('smollm3_3b', {'no_rope_layers': None, 'no_rope_layer_interval': 9}, {'nope_layers': (8, 17, 26, 35)}),
        ('smollm3_3b', {'rope_theta': None}, {'rope_theta': 2e6}),
        ('qwen3_30b_a3b', {'mlp_only_layers': [0, 1]}, {'n_dense_layers': 2}),
        ('qwen3_30b_a3b', {'mlp_only_layers': [3, 0]}, {'n_dense_layers': 1, 'mlp_layers': (3,)}),
        ('qwen3_30b_a3b', {'mlp_only_layers': None, 'decoder_sparse_step': 3},
         {'n_dense_layers': 2, 'mlp_layers': tuple(i for i in range(3, 48) if i % 3 < 2)}),
        ('qwen3_30b_a3b', {'mlp_only_layers': [1, 2], 'decoder_sparse_step': 2},
         {'n_dense_layers': 3, 'mlp_layers': tuple(range(4, 48, 2))}),
        ('qwen3_30b_a3b', {'mlp_only_layers': list(range(48))}, {'n_dense_layers': 48, 'mlp_layers': ()}),
        ('v2_lite', {'moe_layer_freq': 3},
         {'n_dense_layers': 3, 'mlp_layers': tuple(i for i in range(4, 27) if i % 3)}),
        ('moonlight', {'moe_layer_freq': 2, 'first_k_dense_replace': 4},
         {'n_dense_layers': 4, 'mlp_layers': tuple(range(5, 27, 2))}),
        ('qwen3_30b_a3b', {'norm_topk_prob': None}, {'norm_topk_prob': False}),
        ('qwen3_30b_a3b', {'use_qk_norm': True, 'qkv_bias': False, 'shared_expert_intermediate_size': 0},
         {'qk_norm': True, 'n_shared_experts': 0}),  # Qwen3-Coder says so.
        ('qwen3_30b_a3b', {'rope_scaling': {'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32768}},
         {'rope_type': 'yarn', 'rope_factor': 4.0, 'original_seq_len': 32768, 'mscale': 1.0}),
        ('qwen3_30b_a3b', {'rope_scaling': {'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32768,
                                            'attention_factor': 1.1386294361}},
         {'rope_type': 'yarn', 'mscale': 1.0}),
        ('llama3_8b', {'rope_scaling': LONGER | {'attention_factor': 1.0, 'attn_factor': 0.8782}}, {'mscale': 0.0}),
        ('llama3_8b', {'rope_scaling': LONGER | {'attention_factor': 0.9}}, {'mscale': -0.721347520444}),
        ('glm45_air', {'use_qk_norm': True, 'attention_bias': False}, {'qk_norm': True, 'qkv_bias': False}),
        ('glm45_air', {'partial_rotary_factor': None}, {'qk_rope_head_dim': 64, 'qk_nope_head_dim': 64}),
        ('glm45_air', {'partial_rotary_factor': 0.25}, {'qk_rope_head_dim': 32, 'qk_nope_head_dim': 96}),
        ('glm45_air', {'rope_scaling': {'type': 'yarn', 'factor': 4, 'original_max_position_embeddings': 64}},
         {'rope_type': 'yarn', 'qk_rope_head_dim': 64, 'qk_nope_head_dim': 64}),
        ('v2_lite', {'n_group': None, 'topk_method': None}, {'n_expert_groups': 1, 'topk_method': 'greedy'}),
        ('v2_lite', {'q_lora_rank': 1536}, {'q_lora_rank': 1536}),
        ('axk2_light', {'rms_norm_eps': 1e-5}, {'norm_eps': 1e-5, 'latent_eps': 1e-6}),
        ('axk2_light', {'n_group': 8, 'topk_group': 1}, {'n_expert_groups': 8, 'n_limited_groups': 1}),
        ('axk2_light', {}, {'n_dense_layers': 1, 'n_expert_groups': 1, 'rope_theta': 10_000.0}),
        ('axk2_light', {'first_k_dense_replace': 0}, {'n_dense_layers': 0}),
        ('axk2_light', {'mlp_layer_types': ['dense', 'sparse', 'dense', *['sparse'] * 45]},
         {'n_dense_layers': 1, 'mlp_layers': (2,)}),
        ('hy4_preview', {'rope_interleave': False, 'indexer_rope_interleave': False, 'latent_eps': 1e-6},
         {'rope_interleave': False, 'indexer_rope_interleave': False, 'latent_eps': 1e-6}),
        ('hy4', {'rope_parameters': {'rope_type': 'default', 'rope_theta': 5.0, 'mrope_section': [12, 10, 10]}}, {'rope_theta': 5.0}),
        ('hy4_preview', {'indexer_types': ['full'] * 78}, {'indexer_types': (), 'index_norm_eps': 0.0}),
        ('hy4_preview', {'mlp_layer_types': ['sparse'] * 78}, {'n_dense_layers': 0}),
        ('dots3_note', {'indexer_rope_interleave': False, 'index_rope_last': True, 'latent_eps': 1e-6},
         {'indexer_rope_interleave': False, 'index_rope_last': True, 'latent_eps': 1e-6}),
        ('dots3_note', {'apply_mla_qkv_lora_rescale': False}, {'latent_rescale': False}),
        ('dots3_note', {'sliding_window_size': None, 'first_k_dense_replace': None},
         {'sliding_window': 512, 'n_dense_layers': 1, 'window_layers': tuple(i for i in range(2, 46) if i % 4 != 1)}),
        ('dots3_note', {'use_sliding_window': False},
         {'window_layers': (), 'sliding_window': 0, 'window_n_heads': 0, 'window_rope_theta': 0.0}),
        ('dots3_note', DOTS_LAYERS, {'window_layers': tuple(range(2, 46))}),
        ('dots3_note', {'swa_v_head_dim': 64}, {'window_v_head_dim': 64, 'window_q_lora_rank': 0}),
        ('dots3_note', {'moe_shared_expert_intermediate_size': 64}, {'shared_inter_dim': 64}),
        ('dots3_note', {'rope_parameters': {'rope_theta': 5.0, 'rope_type': 'default'}, 'rope_theta': None},
         {'rope_theta': 5.0, 'window_rope_theta': 0.0}),  # A section without kinds is of all layers.
        ('axk2_light', {'norm_topk_prob': False}, {'norm_topk_prob': False}),
        ('mistral_large4', {'rope_parameters': None, 'final_logit_softcapping': None, 'n_group': None},
         {'rope_type': 'yarn', 'rope_factor': 2048.0, 'mscale': 0.0, 'logit_softcap': 30.0}),
        ('mistral_large4', {'no_rope_layers': None, 'no_rope_layer_interval': 36, 'kv_source_layers': None},
         {'nope_layers': (35, 71), 'nope_layers_expand': True, 'kv_sources': ()}),
        ('mistral_large4', {'no_rope_layers': [1] * 72, 'kv_source_layers': [0] * 72},
         {'nope_layers': (), 'nope_layers_expand': False, 'kv_sources': (0,) * 72}),
        ('mistral_large4', {'rope_parameters': MISTRAL_ROPE | {'factor': 4.0}, 'final_logit_softcapping': 5.0},
         {'rope_factor': 4.0, 'logit_softcap': 5.0, 'mscale': 0.0}),
        ('mistral_large4', {'index_topk_freq': 4}, {'indexer_types': ('full', 'full', *(['shared'] * 3 + ['full']) * 17, 'shared', 'shared')}),
        ('mistral_large4', {'n_group': 8, 'topk_group': 2}, {'n_expert_groups': 8, 'n_limited_groups': 2}),
        ('mistral_7b_v03', {'sliding_window': 4096},
         {'window_layers': tuple(range(32)), 'sliding_window': 4096}),
        ('qwen25_0_5b', WINDOWS | {'sliding_window': 512, 'max_window_layers': 21},
         {'window_layers': (21, 22, 23), 'sliding_window': 512}),
        ('qwen25_0_5b', WINDOWS | {'sliding_window': 512, 'max_window_layers': 24}, NO_WINDOWS),
        ('qwen25_0_5b', WINDOWS | {'sliding_window': None}, NO_WINDOWS),
        ('qwen3_8b', WINDOWS | {'sliding_window': 512, 'layer_types': ['full_attention', 'sliding_attention'] * 18},
         {'window_layers': tuple(range(1, 36, 2)), 'sliding_window': 512}),
        ('llama3_8b', INDEXED | {'index_rope_head_dim': 16},
         {'index_n_heads': 4, 'index_head_dim': 32, 'index_topk': 64, 'index_rope_head_dim': 16}),
        ('llama3_8b', INDEXED | {'index_n_heads': 16, 'index_rope_head_dim': 16, 'index_n_selections': 8},
         {'index_n_heads': 16, 'index_n_selections': 8}),
    ],
    ids=str,
)  # fmt: skip
def test_what_other_families_read(name, changes, fields):
  """The fields are as they should be, and what is written of the model reads as the same one."""
  family, model = GQA[name](**changes)
  assert {field: getattr(model, field) for field in fields} == fields
  for base in ({}, {**released.CONFIGS[name], **changes}):
    is_sparse = has_indexer({**released.CONFIGS[name], **changes})
    written = write_config(family, model, base, has_indexer=is_sparse)
    assert read_config(written) == (family, model)


def test_mistral_must_say_whether_it_has_windows():
  config = {k: v for k, v in released.CONFIGS['mistral_7b_v03'].items() if k != 'sliding_window'}
  with pytest.raises(ConfigError, match='sliding_window is missing'):
    read_config(config)


@pytest.mark.parametrize('path', sorted(ROOT.glob('parity/*/config.json')), ids=lambda p: p.parent.name)
def test_what_transformers_writes_is_read(path):
  read_config(json.loads(path.read_text()))


def test_kimi_k2_is_a_deepseek_v3():
  config = released.CONFIGS['v3'] | BESIDE | {
      'model_type': 'kimi_k2', 'num_hidden_layers': 61, 'n_routed_experts': 384, 'n_group': 1,
      'topk_group': 1, 'first_k_dense_replace': 1, 'num_nextn_predict_layers': 0,
      'rope_theta': 50000.0, 'routed_scaling_factor': 2.827, 'num_attention_heads': 64,
      'rope_scaling': YARN | {'factor': 32.0, 'beta_fast': 1.0, 'original_max_position_embeddings': 4096},
  }  # fmt: skip
  family, model = read_config(config)
  assert (family, model.n_routed_experts, model.rope_factor) == ('kimi_k2', 384, 32.0)
  written = write_config(family, model, config)
  assert written['architectures'] == ['DeepseekV3ForCausalLM']
  assert read_config(written) == (family, model)


@pytest.mark.parametrize(
    'changes',
    [
        {'rope_scaling': YARN | {'attention_factor': 1.0, 'truncate': True, 'rope_theta': 10000}},
        {'rope_scaling': YARN | {'rope_type': 'yarn', 'extrapolation_factor': 1, 'attn_factor': 1}},
        {'rope_scaling': YARN | {'partial_rotary_factor': 1.0, 'attention_factor': None}},
        {'rope_parameters': YARN | {'rope_theta': 10000}, 'rope_scaling': None},
        {'rope_parameters': YARN | {'rope_theta': 10000}},  # Both say the same.
        {'original_max_position_embeddings': 64},
        {'partial_rotary_factor': 8 / 24, 'head_dim': 24},
        {'layer_types': ['full_attention'] * 3},
        {'layer_types': ['deepseek_sparse_attention'] * 3},
        {'sliding_window': None, 'use_sliding_window': False, 'qkv_bias': False},
        {'num_local_experts': 4, 'dtype': 'bfloat16', **SIZES},
        {'index_topk_freq': 1, 'indexer_types': ['full'] * 3},
        {'mlp_layer_types': ['dense', 'sparse', 'sparse']},
    ],
    ids=repr,
)
def test_neutral_values_change_nothing(changes):
  assert read(**changes) == read()


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'rope_scaling': YARN | {'attention_factor': 1.5}}, 'attention_factor=1.5 must be 1'),
        ({'rope_scaling': YARN | {'truncate': False}}, 'truncate=False must be True'),
        ({'rope_scaling': YARN | {'mrope_section': [1, 2]}}, 'mrope_section=.* is unknown'),
        ({'rope_scaling': YARN | {'factor': 0.5}}, 'factor=0.5 must be at least 1'),
        ({'rope_scaling': YARN | {'rope_type': 'default'}}, "contradicts rope_type='yarn'"),
        ({'rope_scaling': YARN | {'rope_theta': 1e6}}, 'rope_theta=10000 contradicts'),
        ({'rope_scaling': {'type': 'default', 'factor': 40}}, 'factor=40 must be 1'),
        ({'rope_scaling': {'type': 'default', 'beta_fast': 32}}, 'beta_fast=32 is unknown'),
        ({'rope_scaling': {'type': 'longrope'}}, "type='longrope' must be 'yarn' or 'default'"),
        ({'rope_parameters': {'rope_theta': 10000}}, 'contradict each other'),
        ({'rope_parameters': YARN | {'factor': 4}}, 'factor=40 contradicts factor=4'),
        ({'rope_parameters': YARN | {'truncate': False}}, 'contradict each other'),
        ({'rope_parameters': {'full_attention': YARN}, 'rope_scaling': None}, 'full_attention='),
        ({'original_max_position_embeddings': 128}, 'original_max_position_embeddings=128'),
        ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5 must be 1'),
        ({'rope_scaling': YARN | {'partial_rotary_factor': 0.5}}, 'partial_rotary_factor=0.5'),
        ({'rope_interleave': False}, 'rope_interleave=False must be True'),
        ({'rotary_pct': 0.25}, 'rotary_pct=0.25 is unknown'),
        ({'attn_logit_softcapping': 30.0}, 'attn_logit_softcapping=30.0 is unknown'),
        ({'sliding_window': 128}, 'sliding_window=128 is unknown'),
        ({'use_qk_norm': True}, 'use_qk_norm=True must be False'),
        ({'o_proj_bias': True}, 'o_proj_bias=True is unknown'),
        ({'embedding_multiplier': 12.0}, 'embedding_multiplier=12.0 is unknown'),
        ({'hc_mult': 4}, 'hc_mult=4 is unknown'),
        ({'head_dim': 7}, 'head_dim=7 must be 8 or 24 or 12'),
        ({'num_key_value_heads': 2}, 'num_key_value_heads=2 must be 4'),
        ({'layer_types': ['full_attention', 'sliding_attention', 'full_attention']}, 'layer_types='),
        ({'indexer_types': ['full'] * 3, 'index_topk_freq': 2}, 'index_topk_freq=2 contradicts'),
        ({'indexer_rope_interleave': 'yes'}, "indexer_rope_interleave='yes' must be true or false"),
        ({'mlp_layer_types': ['dense', 'sparse', 'hash_moe']}, "must be a list of 'dense' and 'sparse'"),
        ({'mlp_layer_types': 'dense'}, "mlp_layer_types='dense' must be a list"),
        ({'mlp_layer_types': ['dense', 'sparse']}, 'must have an entry for each of 3 layers'),
        ({'mlp_layer_types': ['sparse', 'sparse', 'dense']}, 'contradicts first_k_dense_replace=1'),
        ({'moe_layer_freq': 2}, 'moe_layer_freq=2 must be 1'),
        ({'num_nextn_predict_layers': '1'}, "num_nextn_predict_layers='1' must be 0 or 1"),
        ({'dtype': 'float32'}, "dtype='float32' contradicts torch_dtype='bfloat16'"),
        ({'torch_dtype': 'fp32'}, "dtype='fp32' must be one of"),
        ({'quantization_config': {'quant_method': 'awq', 'bits': 4}}, "quant_method='awq' must be 'fp8'"),
        ({'quantization_config': {'quant_method': 'compressed-tensors'}}, 'compressed-tensors'),
        ({'quantization_config': {'quant_method': 'fp8', 'weight_block_size': [1, 32]}}, r'\[1, 32\]'),
        ({'quantization_config': {'quant_method': 'fp8', 'weight_per_tensor': True}}, 'weight_per_tensor=True must be False'),
        ({'quantization_config': 'fp8'}, "quantization_config='fp8' must be a section"),
    ],
    ids=repr,
)
def test_other_values_are_refused_by_name(changes, message):
  with pytest.raises(ConfigError, match=message):
    read(**changes)


@pytest.mark.parametrize('config', [released.V32, released.GLM], ids=lambda c: c['model_type'])
@pytest.mark.parametrize('first', [{}, {'first_k_dense_replace': 1}, {'first_k_dense_replace': None}])
def test_layers_with_an_mlp_in_any_order(config, first):
  depth = config['num_hidden_layers']
  types = ['dense', 'sparse', 'dense', 'sparse', 'dense', 'sparse'][:depth]
  config = {k: v for k, v in config.items() if k != 'first_k_dense_replace'} | first
  config |= {'mlp_layer_types': types}
  family, model = read_config(config)
  assert (model.n_dense_layers, model.mlp_layers) == (1, tuple(range(2, depth, 2)))
  for base in ({}, config):
    written = write_config(family, model, base)
    assert read_config(written) == (family, model)
    assert written['mlp_layer_types'] == types
  usual = read_config(config | {'mlp_layer_types': None, 'first_k_dense_replace': 1})[1]
  assert 'mlp_layer_types' not in write_config(family, usual, {})


def test_a_window_has_a_length():
  config = released.CONFIGS['qwen25_0_5b'] | WINDOWS
  assert not read_config(config | {'sliding_window': None})[1].window_layers
  del config['sliding_window']
  with pytest.raises(ConfigError, match='use_sliding_window is true, but there is no sliding_window'):
    read_config(config)


def test_a_source_keeps_its_words_for_kinds_of_layers():
  windows = WINDOWS | {'sliding_window': 512, 'max_window_layers': 21}
  for name, changes in (
      ('qwen3_30b_a3b', {'decoder_sparse_step': 4, 'mlp_only_layers': [3]}),
      ('qwen3_30b_a3b', {'mlp_only_layers': [9, 1]}),
      ('qwen25_0_5b', windows),
      ('qwen25_0_5b', windows | {'use_sliding_window': False}),
      ('qwen3_8b', windows | {'use_sliding_window': None}),
  ):
    config = released.CONFIGS[name] | changes
    family, model = read_config(config)
    written = write_config(family, model, config)
    assert config.items() <= written.items()
    assert read_config(write_config(family, model, {})) == (family, model)


def test_a_dense_family_has_no_keys_of_an_indexer():
  with pytest.raises(ConfigError, match='index_topk=8 is unknown'):
    read_config(released.V3 | {'index_topk': 8})
  family, model = read_config(released.V32)
  assert read_config(write_config('deepseek_v3', model, released.V32))[0] == 'deepseek_v3'


@pytest.mark.parametrize('length', [16, 64, 65, 512])
def test_yarn_goes_by_its_type_whatever_the_length(length):
  """`max_position_embeddings` is the longest context, and no switch."""
  model, usual = read(max_position_embeddings=length), read()
  assert model.uses_yarn and model.rope_type == 'yarn'
  np.testing.assert_array_equal(rope_frequencies(model, 8), rope_frequencies(usual, 8))
  assert model.sm_scale == usual.sm_scale
  for base in ({}, released.V32 | {'max_position_embeddings': length}):
    written = write_config('deepseek_v32', model, base)
    assert written['rope_scaling']['type'] == 'yarn'
    assert read_config(written)[1] == model


@pytest.mark.parametrize('length', [16, 512])
def test_no_yarn_goes_by_its_type_too(length):
  model = read(rope_scaling=None, max_position_embeddings=length)
  assert not model.uses_yarn and model.rope_type == 'default'
  assert read_config(write_config('deepseek_v32', model, {}))[1] == model


def test_a_model_that_rotates_otherwise_than_its_source_says_so():
  model = read(rope_theta=5000.0)
  assert read_config(write_config('deepseek_v32', model, released.V32))[1] == model
