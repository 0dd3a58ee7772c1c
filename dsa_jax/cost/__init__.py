# SPDX-License-Identifier: Apache-2.0
"""Computes the cost of a token and of a call: python -m dsa_jax.cost --context=131072"""

from dsa_jax.cost.calls import (
    Curve,
    call_seconds,
    cheaper_from,
    crossover,
    model_curve,
    price_ratio,
)
from dsa_jax.cost.chips import CHIPS, FITTED, Chip, Efficiency
from dsa_jax.cost.serving import Serving, dollars_per_million, token_parts, token_seconds
from dsa_jax.cost.work import attention_flops, cache_bytes, token_work, training_flops
