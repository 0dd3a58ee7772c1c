# SPDX-License-Identifier: Apache-2.0
"""SK Telecom's A.X-K2: DeepSeek-V3.2 with gates on norms and on what heads have read.

The projection of queries makes the gates of heads, too, and its matrix stays one, because its FP8
tiles do. Norms of latents have an eps of 1e-6 whatever `rms_norm_eps` is: nothing but the package
below defines this model, so it is followed in that. Experts of dropped groups score 0. A.X-K2-Light
has no groups, which null means.

Source:
  `models/axk2` in `transformers` 5.24.0. The defaults of its config are the sizes of A.X-K2-Light.
  Those of the model of 688B parameters are not known here.
"""

import dataclasses

from dsa_jax.config import ModelConfig
from dsa_jax.families import deepseek

AXK2_LIGHT = ModelConfig(
    vocab_size=163_840,
    dim=2048,
    n_layers=48,
    n_dense_layers=1,
    inter_dim=5120,
    norm_eps=1e-6,
    gated_norm_rank=16,
    n_routed_experts=128,
    n_shared_experts=1,
    n_activated_experts=8,
    n_expert_groups=1,
    n_limited_groups=1,
    zero_dropped_groups=True,
    moe_inter_dim=512,
    route_scale=2.5,
    n_heads=32,
    q_lora_rank=384,
    kv_lora_rank=128,
    latent_eps=1e-6,
    output_gate='latents',
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    index_n_heads=16,
    index_head_dim=128,
    index_topk=2048,
    rope_type='default',
    max_seq_len=131_072,
    original_seq_len=131_072,
    rope_theta=10_000.0,
)


def _gated(ours: str, theirs: str) -> dict[str, tuple[str, str]]:
  """Returns the names of the weights of a norm with gates."""
  return {
      f'{ours}/scale': (f'{theirs}.norm.weight', 'd -> d'),
      f'{ours}/w_down': (f'{theirs}.W_down.weight', 'r d -> d r'),
      f'{ours}/w_up': (f'{theirs}.W_up.weight', 'd r -> r d'),
  }


_V32 = deepseek.V32_FAMILY

FAMILY = dataclasses.replace(
    _V32,
    architecture='AXK2ForCausalLM',
    sizes={'axk2_light': AXK2_LIGHT},
    tensors=dataclasses.replace(
        deepseek.TENSORS,
        layer=deepseek.TENSORS.layer | _gated('attn_norm', 'input_layernorm'),
        without_q_latent={},
        moe=deepseek.TENSORS.moe | _gated('ffn_norm', 'post_attention_layernorm'),
        mtp={},
        mtp_copies={},
        never_quantized=('W_down', 'W_up'),
    ),
    fields={key: field for key, field in _V32.fields.items() if 'group' not in key} | {
        'q_lora_rank': 'q_lora_rank',
        'gated_norm_rank': 'gated_norm_rank',
    },
    optional={
        'n_group': ('n_expert_groups', 1),
        'topk_group': ('n_limited_groups', 1),
        'norm_topk_prob': ('norm_topk_prob', True),
    },
    null_together=('n_group', 'topk_group'),
    constants={'latent_eps': 1e-6, 'output_gate': 'latents', 'zero_dropped_groups': True},
    fixed={key: _V32.fixed[key] for key in ('hidden_act', 'attention_bias', 'tie_word_embeddings')},
    neutral=_V32.neutral | {
        'scoring_func': 'sigmoid',
        'topk_method': 'noaux_tc',
        'mlp_bias': False,
        'num_nextn_predict_layers': 0,
    },
    layer_keys=('first_k_dense_replace', 'moe_layer_freq', 'mlp_layer_types'),
    leading_mlp_layers=1,
    rope_theta=10_000.0,
    norms='BF16',
)  # fmt: skip
