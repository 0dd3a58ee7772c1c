# SPDX-License-Identifier: Apache-2.0
"""Mistral Large 4, its text part: layers without positions, and layers that read the latents of others.

Queries come from hidden states without a latent between, and grow with the logarithm of their position,
those of the indexer, too, which norms what its queries are made of. Every fourth layer rotates nothing,
and its keys come from latents alone. The other layers share learned factors of their frequencies. Logits
are soft-capped. Experts are chosen by a softmax. Those of dropped groups score 0, as in `transformers`,
which is below every score of a softmax.

The layer whose latents another one reads is named in config.json by `kv_source_layers`, and here by
`kv_sources`. `transformers` 5.24.0 looks it up by kind: whatever the number, a layer reads the last layer
before it that rotates as it does and that any layer reads. With one source of each kind, as is said of the
release, both are the same. The default follows the numbers, because the documentation of that package says
that they mean this, and its lookup drops them. Whoever wants what it reads instead gives other numbers.

Parts for pictures and the draft heads (`mtp_dspark`) are left out. An export has the names and the keys
of the release, with a section for the text. `transformers` has no class for the text alone. It fills the
parts for pictures at random, and a text does not pass them. The names of its classes, which a file may
have, too, are read as well.

Source:
  `models/mistral_large4` in `transformers` 5.24.0. The sizes are the defaults of its text config. That
  layers 39, 43 and so on up to 71 read layer 35 is said of the release, and has not been seen here.
"""

import dataclasses

from dsa_jax.config import ModelConfig
from dsa_jax.families import deepseek
from dsa_jax.families.family import TensorNames

NOPE_LAYERS = range(3, 72, 4)

MISTRAL_LARGE_4 = ModelConfig(
    vocab_size=204_800,
    dim=6144,
    n_layers=72,
    n_dense_layers=1,
    inter_dim=24_576,
    norm_eps=1e-5,
    logit_softcap=30.0,
    n_routed_experts=128,
    n_shared_experts=1,
    n_activated_experts=4,
    n_expert_groups=1,
    n_limited_groups=1,
    zero_dropped_groups=True,
    moe_inter_dim=6144,
    route_scale=1.0,
    score_func='softmax',
    topk_method='best_two_of_groups',
    n_heads=64,
    q_lora_rank=0,
    kv_lora_rank=512,
    kv_sources=tuple(35 if i > 35 and i in NOPE_LAYERS else i for i in range(72)),
    query_log_scale=True,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=128,
    nope_layers=NOPE_LAYERS,
    nope_layers_expand=True,
    index_n_heads=32,
    index_head_dim=128,
    index_topk=2048,
    indexer_rope_interleave=True,
    index_query_norm=True,
    rope_type='yarn',
    max_seq_len=1_048_576,
    original_seq_len=512,
    rope_theta=10_000.0,
    rope_factor=2048.0,
    mscale=0.0,
    learned_frequencies=True,
)


def _growing(ours: str, theirs: str, scale: str, bias: str) -> dict[str, tuple[str, str]]:
  """Returns the names of what queries grow by."""
  return {
      f'{ours}/q_scale/scale': (f'{theirs}.{scale}', 'h -> h'),
      f'{ours}/q_scale/bias': (f'{theirs}.{bias}', 'h -> h'),
  }


RELEASED = 'ssmax_scaling.s', 'ssmax_scaling.b'
OF_CLASS = 'softmax_scaling.scale', 'softmax_scaling.bias'

TENSORS = TensorNames(
    model={
        'embed': ('tok_embeddings.weight', 'w d -> w d'),
        'norm/scale': ('norm.weight', 'd -> d'),
        'head': ('output.weight', 'w d -> d w'),
        'rope_factors': ('lerope.alpha', 'r -> r'),
    },
    layers='layers.',
    layer={
        'attn_norm/scale': ('attention_norm.weight', 'd -> d'),
        'attn/wq_b': ('attention.wq.weight', '(h e) d -> d h e'),
        'attn/wkv_a': ('attention.wkv_a_with_mqa.weight', 'e d -> d e'),
        'attn/kv_norm/scale': ('attention.kv_a_norm.weight', 'c -> c'),
        'attn/wkv_b': ('attention.wkv_b.weight', '(h e) c -> c h e'),
        'attn/wo': ('attention.wo.weight', 'd (h v) -> h v d'),
        **_growing('attn', 'attention', *RELEASED),
        'attn/indexer/q_norm/scale': ('attention.indexer.q_input_norm.weight', 'd -> d'),
        'attn/indexer/q_norm/bias': ('attention.indexer.q_input_norm.bias', 'd -> d'),
        'attn/indexer/wq_b': ('attention.indexer.wq_b.weight', '(i j) d -> d i j'),
        'attn/indexer/wk': ('attention.indexer.wk.weight', 'j d -> d j'),
        'attn/indexer/k_norm/scale': ('attention.indexer.k_norm.weight', 'j -> j'),
        'attn/indexer/k_norm/bias': ('attention.indexer.k_norm.bias', 'j -> j'),
        'attn/indexer/weights_proj': ('attention.indexer.weights_proj.weight', 'i d -> d i'),
        **_growing('attn/indexer', 'attention.indexer', *RELEASED),
        'ffn_norm/scale': ('ffn_norm.weight', 'd -> d'),
    },
    mlp={
        'ffn/w1': ('feed_forward.w1.weight', 'f d -> d f'),
        'ffn/w3': ('feed_forward.w3.weight', 'f d -> d f'),
        'ffn/w2': ('feed_forward.w2.weight', 'd f -> f d'),
    },
    moe={
        'ffn/gate': ('gate.weight', 'x d -> d x'),
        'ffn/w1': ('experts.{}.w1.weight', 'f d -> d f'),
        'ffn/w3': ('experts.{}.w3.weight', 'f d -> d f'),
        'ffn/w2': ('experts.{}.w2.weight', 'd f -> f d'),
        'ffn/shared/w1': ('shared_experts.w1.weight', 'f d -> d f'),
        'ffn/shared/w3': ('shared_experts.w3.weight', 'f d -> d f'),
        'ffn/shared/w2': ('shared_experts.w2.weight', 'd f -> f d'),
    },
    unread=(
        'vision_encoder.', 'pre_mm_projector_norm.', 'patch_merger.', 'vision_language_adapter.',
        'mtp_dspark.',
    ),
    quantized=('wq', 'wkv_a_with_mqa', 'wkv_b', 'wo', 'wq_b', 'wk', 'w1', 'w2', 'w3'),
)  # fmt: skip

_HF, _MOE = deepseek.TENSORS.layer, deepseek.TENSORS.moe

# The names within the classes of `transformers`, which `save_pretrained(save_original_format=False)` keeps.
IN_MEMORY = dataclasses.replace(
    deepseek.TENSORS,
    model={
        'embed': ('model.language_model.embed_tokens.weight', 'w d -> w d'),
        'norm/scale': ('model.language_model.norm.weight', 'd -> d'),
        'head': ('lm_head.weight', 'w d -> d w'),
        'rope_factors': ('model.language_model.rotary_emb.alpha', 'r -> r'),
    },
    layers='model.language_model.layers.',
    layer={
        **{name: _HF[name] for name in _HF if name not in ('attn/wq_a', 'attn/q_norm/scale')},
        'attn/wq_b': ('self_attn.q_proj.weight', '(h e) d -> d h e'),
        **_growing('attn', 'self_attn', *OF_CLASS),
        'attn/indexer/q_norm/scale': ('self_attn.indexer.q_input_norm.weight', 'd -> d'),
        'attn/indexer/q_norm/bias': ('self_attn.indexer.q_input_norm.bias', 'd -> d'),
        **_growing('attn/indexer', 'self_attn.indexer', *OF_CLASS),
    },
    without_q_latent={},
    moe={
        **{name: _MOE[name] for name in _MOE if name != 'ffn/bias'},
        'ffn/w1': ('mlp.experts.gate_up_proj', 'x f d -> x d f'),
        'ffn/w3': ('mlp.experts.gate_up_proj', 'x f d -> x d f'),
        'ffn/w2': ('mlp.experts.down_proj', 'x d f -> x f d'),
    },
    mtp={},
    mtp_copies={},
    unread=('model.vision_tower.', 'model.multi_modal_projector.', 'mtp_dspark.'),
)

_V32 = deepseek.V32_FAMILY

FAMILY = dataclasses.replace(
    _V32,
    architecture='MistralLarge4ForConditionalGeneration',
    other_names=('mistral_large4_text',),
    sizes={'mistral_large4': MISTRAL_LARGE_4},
    tensors=TENSORS,
    in_memory=IN_MEMORY,
    towers=('vision_config',),
    text_type='mistral_large4_text',
    beside_text=(
        'vision_config', 'image_token_index', 'projector_hidden_act', 'vision_feature_layer',
        'multimodal_projector_bias', 'spatial_merge_size',
    ),
    fields={key: field for key, field in _V32.fields.items() if 'group' not in key},
    optional={
        'n_group': ('n_expert_groups', 1),
        'topk_group': ('n_limited_groups', 1),
        'final_logit_softcapping': ('logit_softcap', 30.0),
    },
    constants={
        'q_lora_rank': 0,
        'query_log_scale': True,
        'nope_layers_expand': True,
        'learned_frequencies': True,
        'index_query_norm': True,
        'score_func': 'softmax',
        'topk_method': 'best_two_of_groups',
        'zero_dropped_groups': True,
        'mscale': 0.0,
    },
    fixed={key: _V32.fixed[key] for key in ('hidden_act', 'attention_bias', 'tie_word_embeddings')},
    neutral={'mlp_bias': False, 'norm_topk_prob': True},
    layer_keys=(
        'first_k_dense_replace', 'mlp_layer_types', 'no_rope_layers', 'no_rope_layer_interval',
        'kv_source_layers',
    ),
    leading_mlp_layers=1,
    nope_interval=4,
    ropes={'yarn': {key: field for key, field in deepseek.YARN.items() if key != 'mscale'}},
    usual_rope={
        'rope_type': 'yarn',
        'rope_theta': 10_000.0,
        'factor': 2048.0,
        'original_max_position_embeddings': 512,
        'attention_factor': 1.0,
    },
    rope_theta=10_000.0,
    indexer_rope_interleave=True,
    lists_indexers=True,
    norms='BF16',
)  # fmt: skip
