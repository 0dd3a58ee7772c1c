# SPDX-License-Identifier: Apache-2.0
"""The families of released models, one file each, by the `model_type` of their config.json."""

from dsa_jax.families import deepseek, glm

FAMILIES = {
    'deepseek_v32': deepseek.V32_FAMILY,
    'deepseek_v3': deepseek.V3_FAMILY,
    'kimi_k2': deepseek.KIMI_FAMILY,
    'glm_moe_dsa': glm.FAMILY,
}

# The released models by short names, as commands and reports name them.
SIZES = {name: size for family in FAMILIES.values() for name, size in family.sizes.items()}
