# SPDX-License-Identifier: Apache-2.0
"""Weights that stay narrow in memory: FP8 or int8 codes, and a scale for each block of them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

BLOCK = 128  # The side of a block, as in DeepSeek's checkpoints.
LARGEST = {'float8_e4m3fn': 448.0, 'int8': 127.0}  # The largest code of each format.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaled:
  """A weight whose blocks are codes times a scale. It stands where a module reads an array.

  The sizes of a block are what the shape of the codes is in that of the scales. `astype` returns the
  numbers that it stands for, and an index takes both parts, as of a stack of layers. The parts may be
  shapes or shardings as well.
  """

  codes: Any  # [*shape], float8_e4m3fn or int8.
  scale: Any  # [*blocks], float32.
  # Which kernels widen the codes within products. '': none do.
  backend: str = dataclasses.field(default='', metadata={'static': True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape

  @property
  def ndim(self) -> int:
    return self.codes.ndim

  def __getitem__(self, index: Any) -> 'BlockScaled':
    return self if index is Ellipsis else jax.tree.map(lambda x: x[index], self)

  def as_matrix(self, n_axes: int) -> 'BlockScaled':
    """Joins the first axes into one, and the others. Of the axes that it joins, blocks span the last."""
    join = lambda x: x.reshape(math.prod(x.shape[:n_axes]), -1)
    return jax.tree.map(join, self)

  def astype(self, dtype: DTypeLike) -> Float[Array, '*shape']:
    split, scale = _by_blocks(self.shape, self.scale)
    return (self.codes.reshape(split).astype(jnp.float32) * scale).reshape(self.shape).astype(dtype)


def cast(weights: Float[Array, '*shape'] | BlockScaled, dtype: DTypeLike):
  """Returns weights in a dtype; codes stay what they are, because products widen them."""
  return weights if isinstance(weights, BlockScaled) else weights.astype(dtype)


def _by_blocks(
    shape: tuple[int, ...], scale: Float[Array, '*blocks']
) -> tuple[tuple[int, ...], Float[Array, '*split']]:
  """Returns a shape that gives the numbers of a block an axis, and scales that fit it.

  The last axis, which vectors lie along, stays whole: so a compiler scales numbers where it reads
  them, and writes no array of all their scales.
  """
  *blocks, last = scale.shape
  split = [side for n, size in zip(blocks, shape) for side in (n, size // n)]
  scale = jnp.repeat(scale, shape[-1] // last, axis=-1)
  return (*split, shape[-1]), scale.reshape(*(n for size in blocks for n in (size, 1)), shape[-1])


def block_sizes(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> tuple[int, ...]:
  """Returns the sizes of the blocks of a weight, or of a device's share of one.

  A block spans input and output channels, of one head or of one expert. Its sides divide the weight's,
  and they are 128 where that does.

  Args:
    shape: The shape of the weight, or of the share.
    axes: The names of its dimensions, see `params.param`.
  """
  sides = [math.gcd(size, BLOCK) for size in shape]
  if len(shape) == 3:
    sides[0 if axes[0] in ('heads', 'expert') else 1] = 1
  return tuple(sides)


def quantize(
    x: Float[Array, '*shape'],
    sizes: tuple[int, ...],
    dtype: DTypeLike,
    scale: Float[Array, '*blocks'] | None = None,
) -> BlockScaled:
  """Returns codes of a dtype for blocks of these sizes, with the given scales.

  Without them, each block is scaled so that its largest number fits. Scales of FP8 are then powers of
  two (ue8m0), the smallest ones that do, so a weight that was stored so before, in blocks that these
  divide, is the same afterwards.
  """
  x, largest = x.astype(jnp.float32), LARGEST[jnp.dtype(dtype).name]
  scale = _fitting(x, sizes, largest, dtype) if scale is None else scale
  split, of_numbers = _by_blocks(x.shape, scale)
  scaled = jnp.clip((x.reshape(split) / of_numbers).reshape(x.shape), -largest, largest)
  codes = scaled if jnp.issubdtype(dtype, jnp.floating) else jnp.round(scaled)
  return BlockScaled(codes.astype(dtype), scale)


def _fitting(x, sizes: tuple[int, ...], largest: float, dtype: DTypeLike):
  """Returns scales by which the largest number of each block fits."""
  split = [side for n, size in zip(x.shape, sizes) for side in (n // size, size)]
  inside = tuple(range(1, 2 * x.ndim, 2))
  scale = jnp.maximum(jnp.max(jnp.abs(x.reshape(split)), axis=inside), 1e-12) / largest
  if not jnp.issubdtype(dtype, jnp.floating):
    return scale
  fraction, exponent = jnp.frexp(scale)  # fraction in [0.5, 1).
  return jnp.ldexp(jnp.float32(1), jnp.where(fraction == 0.5, exponent - 1, exponent))
