# SPDX-License-Identifier: Apache-2.0
r"""Makes a checkpoint whose index keys begin as the model's own keys.

    python experiments/smollm2/own_keys.py checkpoints/smollm2/shared checkpoints/smollm2/own_keys

The projection of an indexer's keys becomes the mean of its layer's key heads, which have as many
channels, at the size of the random one that it replaces. All else stays as it is.
"""

import pathlib
import shutil
import sys

import numpy as np

from dsa_jax.convert.building import building
from dsa_jax.convert.stream import Streamed, write_step
from dsa_jax.training.stored_arrays import open_tree

LAYER = 'params', 'dense_blocks', 'attn'


def main(source: pathlib.Path, target: pathlib.Path):
  arrays = {path: stored.read().result() for path, stored in open_tree(source / '0' / 'state').items()}
  own = arrays[*LAYER, 'wk'].astype(np.float32).mean(2)
  random = arrays[*LAYER, 'indexer', 'wk']
  arrays[*LAYER, 'indexer', 'wk'] = own * (random.std() / own.std((1, 2), keepdims=True))
  with building(target, needs=sum(x.nbytes for x in arrays.values())) as partial:
    for path in source.iterdir():
      if path.is_file():
        shutil.copyfile(path, partial / path.name)
    write_step(partial / '0', {'state': {path: _whole(x) for path, x in arrays.items()}})


def _whole(x: np.ndarray) -> Streamed:
  return Streamed(x.shape, x.dtype, 0, lambda: iter([((), x)]))


if __name__ == '__main__':
  main(*map(pathlib.Path, sys.argv[1:]))
