# SPDX-License-Identifier: Apache-2.0
"""The scales of a checkpoint that was released in FP8, in the blocks of our arrays.

A released matrix has a scale for each 128 x 128 block of its own two axes. Our arrays have these axes
in another order, and apart where one is of heads and their channels, so their blocks may be smaller.
"""

import functools

import numpy as np

from dsa_jax.config import ModelConfig
from dsa_jax.families import FAMILIES
from dsa_jax.kernels.block_scaled import BLOCK
from dsa_jax.nn.layers import OF_EXPERTS

Path = tuple[str, ...]  # The path of a weight in our tree.


def equation_of(cfg: ModelConfig, family: str, path: Path) -> str | None:
  """Returns what turns a released matrix into our array; None where it makes up a part of another one."""
  tensors = FAMILIES[family].tensors
  stack, *names = path
  names = names[1:] if stack == 'mtp' else names
  has_experts = cfg.n_dense_layers < cfg.n_layers if stack == 'mtp' else stack in OF_EXPERTS
  known = tensors.layer | ({} if cfg.q_lora_rank else dict(tensors.without_q_latent))
  known |= tensors.moe if has_experts else tensors.mlp
  name, equation = known.get('/'.join(names), ('', ''))
  is_joined = sum(other == name for other, _ in known.values()) > 1
  return equation if name and not is_joined else None


def scales_of_blocks(
    scale: np.ndarray, equation: str, shape: tuple[int, ...], sizes: tuple[int, ...]
) -> np.ndarray:
  """Returns the scale of each block of an array.

  Args:
    scale: Those of the released matrices, [..., rows / 128, columns / 128]. Leading axes are of layers
      and experts.
    equation: What turns a matrix into an array, such as '(h e) q -> q h e'.
    shape: The shape of the array, without the leading axes.
    sizes: The sizes of its blocks, which divide the shape, 128, and what lies in a row of blocks.
  """
  theirs, ours = equation.split(' -> ')
  ours = ours.split()
  extent, side = dict(zip(ours, shape)), dict(zip(ours, sizes))
  order = []
  for axis, names in zip((-2, -1), _axes(theirs)):
    scale = np.take(scale, _released_blocks(names, extent, side), axis=axis)
    order += names
  n_leading = scale.ndim - 2
  blocks = {name: extent[name] // side[name] for name in ours}
  scale = scale.reshape(*scale.shape[:n_leading], *(blocks[name] for name in order))
  return scale.transpose(*range(n_leading), *(n_leading + order.index(name) for name in ours))


def _axes(theirs: str) -> list[list[str]]:
  """Returns the names that make up each axis, such as [['h', 'e'], ['q']] of '(h e) q'."""
  if '(' not in theirs:
    return [[name] for name in theirs.split()]
  before, rest = theirs.split('(')
  inside, after = rest.split(')')
  return [*([name] for name in before.split()), inside.split(), *([name] for name in after.split())]


def _released_blocks(names: list[str], extent: dict[str, int], side: dict[str, int]) -> np.ndarray:
  """Returns the number of the released block in which each block of ours begins, along one axis."""
  starts = (np.arange(0, extent[name], side[name]) for name in names)
  strides = [int(np.prod([extent[name] for name in names[i + 1 :]])) for i in range(len(names))]
  places = [start * stride for start, stride in zip(starts, strides)]
  return functools.reduce(np.add.outer, places).ravel() // BLOCK
