# SPDX-License-Identifier: Apache-2.0
"""The config.json of tiny models of families that have no indexer, with the released files' keys.

No number is a default of the model's class, so that a key which a reader passes over shows.
"""

COMMON = dict(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_act='silu',
    max_position_embeddings=4096,
    attention_dropout=0.0,
    initializer_range=0.02,
    bos_token_id=0,
    eos_token_id=1,
    use_cache=True,
    torch_dtype='float32',
)
LLAMA = COMMON | dict(
    architectures=['LlamaForCausalLM'],
    model_type='llama',
    rms_norm_eps=1e-3,
    rope_theta=500.0,
    attention_bias=False,
    mlp_bias=False,
    pretraining_tp=1,
)
QWEN = COMMON | dict(
    rms_norm_eps=1e-3,
    rope_theta=300.0,
    tie_word_embeddings=False,
    use_sliding_window=False,
    sliding_window=128,
    max_window_layers=1,
)
QWEN3 = QWEN | dict(
    architectures=['Qwen3ForCausalLM'],
    model_type='qwen3',
    head_dim=8,
    attention_bias=False,
    rope_scaling=None,
)
QWEN3_MOE = QWEN3 | dict(
    architectures=['Qwen3MoeForCausalLM'],
    model_type='qwen3_moe',
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    output_router_logits=False,
    router_aux_loss_coef=0.001,
)
# The latent norms of `transformers` have an eps of 1e-6 whatever rms_norm_eps is: see README.md.
MLA = COMMON | dict(
    num_hidden_layers=2,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    kv_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=8,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    moe_intermediate_size=8,
    hidden_act='silu',
    attention_bias=False,
    aux_loss_alpha=0.001,
    seq_aux=True,
    tie_word_embeddings=False,
)
DEEPSEEK_V2 = MLA | dict(
    architectures=['DeepseekV2ForCausalLM'],
    model_type='deepseek_v2',
    norm_topk_prob=False,
    scoring_func='softmax',
    routed_scaling_factor=1.5,
    rope_theta=1000,
    rope_scaling=dict(
        type='yarn',
        factor=20,
        original_max_position_embeddings=64,
        beta_fast=16,
        beta_slow=2,
        mscale=0.707,
        mscale_all_dim=0.707,
    ),
)
MISTRAL = COMMON | dict(
    architectures=['MistralForCausalLM'],
    model_type='mistral',
    num_key_value_heads=1,
    rms_norm_eps=2e-3,
    rope_theta=700.0,
    sliding_window=None,
    tie_word_embeddings=False,
)

DENSE_CASES = {
    'llama': LLAMA | dict(
        head_dim=8,  # hidden_size / num_attention_heads is 6.
        tie_word_embeddings=False,
        # Two of four frequencies are slow, one is in between, one is fast.
        rope_scaling=dict(
            rope_type='llama3',
            factor=8.0,
            low_freq_factor=1.5,
            high_freq_factor=6.0,
            original_max_position_embeddings=96,
        ),
    ),
    'llama_tied': LLAMA | dict(
        num_attention_heads=6,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        rope_scaling=dict(type='linear', factor=3.0),
    ),
    'mistral': MISTRAL,
    'mistral_windows': MISTRAL | dict(sliding_window=24),
    'smollm3': LLAMA | dict(
        architectures=['SmolLM3ForCausalLM'],
        model_type='smollm3',
        pad_token_id=2,
        num_hidden_layers=4,
        no_rope_layers=[1, 0, 1, 0],
        no_rope_layer_interval=2,
        max_window_layers=2,
        use_sliding_window=False,
        sliding_window=None,
        rope_scaling=None,
    ),
    'qwen2': QWEN | dict(
        architectures=['Qwen2ForCausalLM'],
        model_type='qwen2',
        tie_word_embeddings=True,
        rope_scaling=dict(
            type='yarn', factor=4.0, original_max_position_embeddings=32, beta_fast=8, beta_slow=1
        ),
    ),
    'qwen3': QWEN3,
    'qwen3_windows': QWEN3 | dict(
        num_hidden_layers=3, use_sliding_window=True, sliding_window=20, max_window_layers=1
    ),
    'qwen3_moe': QWEN3_MOE,
    'qwen3_moe_plain': QWEN3_MOE | dict(
        norm_topk_prob=False, mlp_only_layers=[0], num_attention_heads=3, num_key_value_heads=3
    ),
    'qwen3_moe_mixed': QWEN3_MOE | dict(  # Layers 3 and 5 have experts.
        num_hidden_layers=6,
        decoder_sparse_step=2,
        mlp_only_layers=[1],
        intermediate_size=16,
        num_experts=4,
        moe_intermediate_size=8,
    ),
    'deepseek_v2': DEEPSEEK_V2 | dict(
        q_lora_rank=None, topk_method='greedy', n_group=1, topk_group=1
    ),
    'deepseek_v2_groups': DEEPSEEK_V2 | dict(
        q_lora_rank=10, topk_method='group_limited_greedy', n_group=4, topk_group=2
    ),
    'moonlight': MLA | dict(
        architectures=['DeepseekV3ForCausalLM'],
        model_type='deepseek_v3',
        q_lora_rank=None,
        n_group=1,
        topk_group=1,
        topk_method='noaux_tc',
        scoring_func='sigmoid',
        norm_topk_prob=True,
        routed_scaling_factor=2.446,
        rope_theta=500.0,
        num_nextn_predict_layers=0,
    ),
    'glm4_moe': COMMON | dict(
        architectures=['Glm4MoeForCausalLM'],
        model_type='glm4_moe',
        head_dim=12,
        partial_rotary_factor=0.34,  # 4.08 of 12 channels, of which 4 are rotated.
        rope_theta=200.0,
        rms_norm_eps=1e-3,
        attention_bias=True,
        use_qk_norm=True,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        moe_intermediate_size=12,
        norm_topk_prob=True,
        routed_scaling_factor=1.7,
        num_nextn_predict_layers=0,
        rope_scaling=None,
        tie_word_embeddings=False,
    ),
}
