# SPDX-License-Identifier: Apache-2.0
r"""The text part of Mistral Large 4, 1T: the released sparse model goes on with its training.

python -m dsa_jax.convert Mistral-Large-4-1T-A52B checkpoints/mistral_large4
python -m dsa_jax.train --config=configs/mistral_large4.py

The first command reads the release; `configs/released.py` says the rest. Variant `:tiny` is for tests.
"""

from configs import released
from dsa_jax.families.mistral4 import MISTRAL_LARGE_4


def get_config(variant: str = 'full'):
  return released.go_on_with(
      'mistral_large4', MISTRAL_LARGE_4, variant,
      tiny=dict(
          n_layers=5, q_lora_rank=0, nope_layers=(1, 2), kv_sources=(0, 1, 1, 0, 4), original_seq_len=16,
          indexer_types=('full', 'full', 'full', 'shared', 'full'),
      ),
  )  # fmt: skip
