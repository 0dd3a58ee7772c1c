# SPDX-License-Identifier: Apache-2.0
r"""The text part of dots3-note, 280B: the released sparse model goes on with its training.

python -m dsa_jax.convert dots3-note-prev checkpoints/dots3
python -m dsa_jax.train --config=configs/dots3.py

The first command reads the release; `configs/released.py` says the rest. Variant `:tiny` is for tests.
"""

from configs import released
from dsa_jax.families.dots3 import DOTS3_NOTE


def get_config(variant: str = 'full'):
  return released.go_on_with(
      'dots3', DOTS3_NOTE, variant,
      tiny=dict(
          n_layers=3, n_heads=4, window_layers=(1,), sliding_window=16, window_n_heads=2,
          window_kv_lora_rank=24, window_qk_nope_head_dim=12,
      ),
  )  # fmt: skip
