# SPDX-License-Identifier: Apache-2.0
"""The families of released models, one file each, by the `model_type` of their config.json."""

from dsa_jax.families import axk2, deepseek, dots3, glm, hy4, llama, mistral4, qwen

FAMILIES = {
    'deepseek_v32': deepseek.V32_FAMILY,
    'deepseek_v3': deepseek.V3_FAMILY,
    'deepseek_v2': deepseek.V2_FAMILY,
    'kimi_k2': deepseek.KIMI_FAMILY,
    'glm_moe_dsa': glm.FAMILY,
    'glm4_moe': glm.FAMILY_4,
    'axk2': axk2.FAMILY,
    'hy_v4': hy4.FAMILY,
    'hy_v4_vl': hy4.FAMILY_VL,
    'dots3_note': dots3.FAMILY,
    'mistral_large4': mistral4.FAMILY,
    'llama': llama.LLAMA_FAMILY,
    'mistral': llama.MISTRAL_FAMILY,
    'smollm3': llama.SMOLLM3_FAMILY,
    'qwen2': qwen.QWEN2_FAMILY,
    'qwen3': qwen.QWEN3_FAMILY,
    'qwen3_moe': qwen.QWEN3_MOE_FAMILY,
}

# The released models by short names, as commands and reports name them.
SIZES = {name: size for family in FAMILIES.values() for name, size in family.sizes.items()}
