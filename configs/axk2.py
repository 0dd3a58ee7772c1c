# SPDX-License-Identifier: Apache-2.0
r"""A.X-K2-Light, 20B: the released sparse model goes on with its training, indexers included.

python -m dsa_jax.convert A.X-K2-Light checkpoints/axk2
python -m dsa_jax.train --config=configs/axk2.py

The first command reads the release; `configs/released.py` says the rest. Variant `:tiny` is for tests.
"""

from configs import released
from dsa_jax.families.axk2 import AXK2_LIGHT


def get_config(variant: str = 'full'):
  return released.go_on_with(
      'axk2', AXK2_LIGHT, variant,
      tiny=dict(gated_norm_rank=4, n_expert_groups=2),
  )  # fmt: skip
