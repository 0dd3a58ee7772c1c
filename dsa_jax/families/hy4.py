# SPDX-License-Identifier: Apache-2.0
"""Tencent's Hy4-preview and the text part of Hy4: DeepSeek-V3.2 with residual streams, sinks, and gates.

Its indexers rotate their last channels, share selections as GLM-5.2's do, and norm index keys with
`rms_norm_eps`. Experts lie in one tensor, gate projections before up projections.

Three readings differ between engines, and each is a field that config.json may set:
  `rope_interleave`, `indexer_rope_interleave`: `transformers` 5.24.0 rotates halves. vLLM rotates
    neighbouring channels, with which the released weights are said to predict far better (a loss of
    1.86 in place of 5.02 nats). The default follows the weights: neighbours.
  `latent_eps`: the text class of `transformers` norms latents with 1e-6, and its class for pictures,
    which says that it follows the checkpoint, with `rms_norm_eps`. That is the default.
Its class for pictures, which is Hy4's, rotates neighbouring channels, too: both defaults are as it is. Each
picture has positions along three axes there. Those of a text are the same along all, and so one.

Source:
  `models/hy_v4` in `transformers` 5.24.0. The sizes are the defaults of the text part of
  `models/hy_v4_vl` there, which are those of Hy4-preview. MTP layers are left out.
"""

import dataclasses

from dsa_jax.config import ModelConfig
from dsa_jax.families import deepseek

HY4_PREVIEW = ModelConfig(
    vocab_size=120_832,
    dim=6144,
    n_layers=78,
    n_dense_layers=1,
    inter_dim=18_432,
    norm_eps=1e-5,
    n_streams=4,
    streams_magnitude=2.0,
    streams_eps=1e-6,
    n_routed_experts=256,
    n_shared_experts=1,
    n_activated_experts=8,
    n_expert_groups=1,
    n_limited_groups=1,
    moe_inter_dim=2048,
    swiglu_limit=10.0,
    route_scale=2.827,
    n_heads=64,
    q_lora_rank=2048,
    kv_lora_rank=512,
    output_gate='hidden',
    attention_sinks=True,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    v_head_dim=256,
    index_n_heads=32,
    index_head_dim=128,
    index_topk=2048,
    index_rope_last=True,
    index_norm_eps=0.0,
    indexer_rope_interleave=True,
    indexer_types=tuple('full' if max(i - 1, 0) % 4 == 0 else 'shared' for i in range(78)),
    rope_type='default',
    max_seq_len=262_144,
    original_seq_len=262_144,
    rope_theta=10_000.0,
)


def _streams(ours: str, theirs: str) -> dict[str, tuple[str, str]]:
  """Returns the names of the weights that read and write residual streams."""
  return {
      f'{ours}/map': (f'{theirs}_fn', 'm (n d) -> n d m'),
      f'{ours}/base': (f'{theirs}_base', 'm -> m'),
      f'{ours}/scale': (f'{theirs}_scale', 'k -> k'),
  }


_V32 = deepseek.V32_FAMILY
_MOE = deepseek.TENSORS.moe

FAMILY = dataclasses.replace(
    _V32,
    architecture='HYV4ForCausalLM',
    sizes={'hy4_preview': HY4_PREVIEW},
    tensors=dataclasses.replace(
        deepseek.TENSORS,
        model=deepseek.TENSORS.model | _streams('streams', 'model.hc_pre.hc_head.hc_head'),
        layer={
            **deepseek.TENSORS.layer,
            'attn/wg': ('self_attn.linear_gate.weight', '(h v) d -> d h v'),
            'attn/sinks': ('self_attn.learnable_sink_param', 'h -> h'),
            **_streams('attn_streams', 'hc_pre.hc_attn_layer.hc'),
            **_streams('ffn_streams', 'hc_pre.hc_mlp_layer.hc'),
        },
        without_q_latent={},
        moe={
            **_MOE,
            'ffn/w1': ('mlp.experts.gate_up_proj', 'x f d -> x d f'),
            'ffn/w3': ('mlp.experts.gate_up_proj', 'x f d -> x d f'),
            'ffn/w2': ('mlp.experts.down_proj', 'x d f -> x f d'),
        },
        mtp={},
        mtp_copies={},
        # `transformers` gives these names to all gate projections that it saves.
        aliases={
            'mlp.linear_gate': 'mlp.gate_proj',
            'mlp.shared_experts.linear_gate': 'mlp.shared_experts.gate_proj',
        },
        unread=('model.mtp_layers.',),
        quantized=(*deepseek.TENSORS.quantized, 'linear_gate'),
    ),
    fields=_V32.fields | {
        'q_lora_rank': 'q_lora_rank',
        'hc_mult': 'n_streams',
        'hc_magnitude': 'streams_magnitude',
        'hc_eps': 'streams_eps',
        'swiglu_limit': 'swiglu_limit',
    },
    optional={
        'norm_topk_prob': ('norm_topk_prob', True),
        'rope_interleave': ('rope_interleave', True),
        'latent_eps': ('latent_eps', 0.0),
    },
    constants={
        'output_gate': 'hidden',
        'attention_sinks': True,
        'index_rope_last': True,
        'index_norm_eps': 0.0,
    },
    fixed={key: _V32.fixed[key] for key in ('hidden_act', 'attention_bias', 'tie_word_embeddings')},
    neutral={'scoring_func': 'sigmoid', 'topk_method': 'noaux_tc', 'mlp_bias': False},
    ignored=('learnable_sink_init', 'num_nextn_predict_layers'),
    layer_keys=('mlp_layer_types',),
    leading_mlp_layers=1,
    rope_theta=10_000.0,
    indexer_rope_interleave=True,
    disputes_rotation=True,
    index_topk_freq=4,
    lists_indexers=True,
    norms='BF16',
)  # fmt: skip

# The text stands in a section of its own. Parts for pictures and films are left out.
FAMILY_VL = dataclasses.replace(
    FAMILY,
    architecture='HYV4VLForConditionalGeneration',
    other_names=('hy_v4_vl_text',),
    sizes={'hy4': HY4_PREVIEW},
    tensors=dataclasses.replace(
        FAMILY.tensors,
        # `transformers` 5.24.0 writes these two in the other order than for Hy4-preview, and does not read
        # that one. Which one the release has is not known here, so both are read.
        model=deepseek.TENSORS.model | _streams('streams', 'model.hc_head.hc_pre.hc_head'),
        aliases=FAMILY.tensors.aliases | {'hc_pre.hc_head': 'hc_head.hc_pre'},
        unread=('model.mtp_layers.', 'vit.'),
    ),
    towers=('vision_config',),
    tower_width='out_hidden_size',
    text_type='hy_v4_vl_text',
    beside_text=('vision_config', 'image_token_id', 'video_token_id'),
    rope_ignored=('mrope_section',),
)
