# SPDX-License-Identifier: Apache-2.0
"""What DeepSeek published about the cost of V3.1-Terminus (dense) and V3.2-Exp (sparse)."""

import numpy as np

from dsa_jax.cost.calls import Curve

PRICE = 2.0  # The dollars per H800 and hour that the curves assume.

# The corners of the straight lines in figure 3 of the V3.2-Exp report, read from its vector paths
# to 0.0005: positions in units of 1024 tokens, and dollars per million tokens.
_CORNERS = {
    ('prefill', 'dense'): [(0, 0.0529), (128, 0.6658)],
    ('prefill', 'sparse'): [(0, 0.0611), (6.6, 0.0999), (128, 0.1871)],
    ('decode', 'dense'): [(0, 0.0705), (128, 2.1543)],
    ('decode', 'sparse'): [(0, 0.0951), (2.06, 0.1457), (101.6, 0.2274), (128, 0.2491)],
}
CURVES = {  # Chip-seconds per token, by phase and kind.
    key: Curve([1024 * k for k, _ in corners], np.array([d for _, d in corners]) * 3600e-6 / PRICE)
    for key, corners in _CORNERS.items()
}
# The positions, in tokens, at which the curves are also printed as a table.
POSITIONS = [1024 * k for k in (0, 2, 4, 8, 16, 32, 64, 96, 128)]

# Dollars per million tokens from 2025-09-05 and from 2025-09-29, by api-docs.deepseek.com.
PRICES_BEFORE = {'hit': 0.07, 'miss': 0.56, 'output': 1.68}
PRICES_AFTER = {'hit': 0.028, 'miss': 0.28, 'output': 0.42}

# DeepSeek's own service took in 608 billion tokens on a day of February 2025, of which 56.3 % were
# cached, and gave out 168 billion (its overview of the inference system).
SERVICE_MIX = {'output_share': 168 / (608 + 168), 'hit_share': 0.563}
