# SPDX-License-Identifier: Apache-2.0
r"""Hy4-preview, 770B without MTP: the released sparse model goes on with its training.

python -m dsa_jax.convert Hy4-preview checkpoints/hy4
python -m dsa_jax.train --config=configs/hy4.py

The first command reads the release; `configs/released.py` says the rest. Variant `:tiny` is for tests.
"""

from configs import released
from dsa_jax.families.hy4 import HY4_PREVIEW


def get_config(variant: str = 'full'):
  return released.go_on_with(
      'hy4', HY4_PREVIEW, variant,
      tiny=dict(n_streams=2, indexer_types=('full', 'shared')),
  )  # fmt: skip
