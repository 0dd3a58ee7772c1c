# SPDX-License-Identifier: Apache-2.0
"""Dots Studio's dots3-note, its text part: layers with windows, whose attention has other sizes.

Every fourth layer selects, and so do the first two. The others see the latest 513 tokens, through
fewer heads, a wider latent and a shorter base of rotary positions. Normed latents are as long as the
hidden state is, rotary keys are normed, and each head has a gate from the hidden state.

Three readings differ between engines, and each is a field that config.json may set:
  `indexer_rope_interleave`, `index_rope_last`: `transformers` 5.24.0 rotates neighbouring channels of
    the indexer, the first ones. vLLM rotates neighbours, too, but is said to take the last channels.
    llama.cpp rotates halves. The default is what `transformers` does, since most agree with it.
  `latent_rescale`: `transformers` rescales latents whatever config.json says. Others read the key
    `apply_mla_qkv_lora_rescale`, which the release sets. So do we, and without it we rescale.
`latent_eps` is another such key, as for Hy4: here all engines norm latents with `rms_norm_eps`.

Parts for pictures and sound, and the MTP layer, are left out. An export has the keys of the release.
What `transformers` saves, with sections for kinds of layers, is read, too.

Source:
  `models/dots3_note` in `transformers` 5.24.0. The sizes are the defaults of its text config, except
  that the released config.json has a window of 513 tokens.
"""

import dataclasses

from dsa_jax.config import ModelConfig
from dsa_jax.families import deepseek

DOTS3_NOTE = ModelConfig(
    vocab_size=152_064,
    dim=5120,
    n_layers=46,
    n_dense_layers=1,
    inter_dim=13_824,
    norm_eps=1e-5,
    n_routed_experts=256,
    n_shared_experts=1,
    n_activated_experts=8,
    n_expert_groups=1,
    n_limited_groups=1,
    moe_inter_dim=1536,
    route_scale=1.0,
    n_heads=128,
    q_lora_rank=1024,
    kv_lora_rank=512,
    latent_rescale=True,
    rope_key_norm=True,
    output_gate='heads',
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    window_layers=tuple(i for i in range(46) if max(i - 1, 0) % 4),
    sliding_window=513,
    window_n_heads=64,
    window_kv_lora_rank=1024,
    window_qk_nope_head_dim=192,
    window_rope_theta=5e4,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=2048,
    indexer_rope_interleave=True,
    rope_type='default',
    max_seq_len=524_288,
    original_seq_len=524_288,
    rope_theta=8e7,
)

_V32 = deepseek.V32_FAMILY

FAMILY = dataclasses.replace(
    _V32,
    architecture='Dots3NoteForCausalLM',
    sizes={'dots3_note': DOTS3_NOTE},
    tensors=dataclasses.replace(
        deepseek.TENSORS,
        layer={
            **deepseek.TENSORS.layer,
            'attn/k_rope_norm/scale': ('self_attn.k_rope_only_layernorm.weight', 'r -> r'),
            'attn/wg': ('self_attn.g_proj.weight', 'h d -> d h'),
        },
        without_q_latent={},
        mtp={},
        mtp_copies={},
        unread=('vision_encoder.', 'audio_encoder.', 'model.mtp.', 'model.layers.46.'),
        quantized=(*deepseek.TENSORS.quantized, 'g_proj'),
    ),
    other_names=('dots3_note_text',),
    renamed={
        'sliding_window': 'sliding_window_size',
        'shared_experts_intermediate_size': 'moe_shared_expert_intermediate_size',
    },
    fields={key: field for key, field in _V32.fields.items() if 'group' not in key} | {
        'q_lora_rank': 'q_lora_rank',
    },
    optional={
        'n_group': ('n_expert_groups', 1),
        'topk_group': ('n_limited_groups', 1),
        'norm_topk_prob': ('norm_topk_prob', True),
        'apply_mla_qkv_lora_rescale': ('latent_rescale', True),
        'index_rope_last': ('index_rope_last', False),
        'latent_eps': ('latent_eps', 0.0),
        'moe_shared_expert_intermediate_size': ('shared_inter_dim', 0),
    },
    constants={'output_gate': 'heads', 'rope_key_norm': True},
    fixed={key: _V32.fixed[key] for key in ('hidden_act', 'attention_bias', 'tie_word_embeddings')},
    neutral={
        'scoring_func': 'sigmoid',
        'topk_method': 'noaux_tc',
        'mlp_bias': False,
        'use_dsa': True,
        'attention_gate_type': 'headwise',
        'swa_attention_gate_type': 'headwise',
        'k_rope_only_layernorm': True,
        'rope_interleave': True,
    },
    # A head's width is the sum of two keys. The key of this name says another one.
    ignored=(
        'head_dim', 'num_nextn_predict_layers', 'image_token_id', 'video_token_id', 'audio_token_id',
    ),
    towers=('vision_config', 'audio_config'),
    tower_width='adapter_out_dim',
    layer_keys=(
        'first_k_dense_replace', 'moe_layer_freq', 'mlp_layer_types', 'use_sliding_window',
        'sliding_window_size', 'layer_types',
    ),
    leading_mlp_layers=1,
    usual_window=512,
    windows_between=4,
    window_prefix='swa_',
    window_fields={
        'num_attention_heads': ('window_n_heads', 64),
        'q_lora_rank': ('window_q_lora_rank', 1024),
        'kv_lora_rank': ('window_kv_lora_rank', 1024),
        'qk_nope_head_dim': ('window_qk_nope_head_dim', 192),
        'qk_rope_head_dim': ('window_qk_rope_head_dim', 64),
        'v_head_dim': ('window_v_head_dim', 128),
        'rope_theta': ('window_rope_theta', 5e4),
    },
    ropes={'default': {}},
    rope_theta=8e7,
    indexer_rope_interleave=True,
    disputes_rotation=True,
    norms='BF16',
)  # fmt: skip
