# SPDX-License-Identifier: Apache-2.0
"""What the kernels for GPUs share: how they are called, and tiles of arrays.

A kernel gets whole arrays and loads tiles of them, whose sides are powers of two. What lies outside
an array is not read, and counts as zero.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
import jax.numpy as jnp

from dsa_jax.kernels.products import precision_of

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
LOG2_E = 1.4426950408889634
LEAST = 16  # The least side of a product's tile.


def call(
    kernel: Callable,
    name: str,
    programs: int,
    out: Sequence[Any],
    args: Sequence[Any],
    *,
    warps: int,
    stages: int = 1,
    aliases: dict[int, int] | None = None,
    dtypes: Sequence[Any] = DTYPES,
) -> Sequence[Any]:
  """Runs `kernel(*args, *out)` as so many programs, each of `warps` times 32 threads.

  Args and results may be trees of arrays, and `kernel` gets trees of refs. Floats are of these dtypes.
  """
  for x in jax.tree.leaves(args):
    if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype not in dtypes:
      raise ValueError(f'on a GPU must be bfloat16, float16 or float32; got {x.dtype}.')
  params = pltriton.CompilerParams(num_warps=warps, num_stages=stages)
  run = pl.pallas_call(
      kernel, out_shape=list(out), grid=(programs,), name=name, compiler_params=params,
      input_output_aliases=aliases or {},
  )  # fmt: skip
  return run(*args)


def tile_side(n: int, most: int | None = None, least: int = LEAST) -> int:
  """Returns the smallest power of two that is at least n, within bounds."""
  side = max(pl.next_power_of_2(n), least)
  return side if most is None else min(side, most)


def column_parts(*ends: int) -> tuple[tuple[int, int, int], ...]:
  """Cuts columns into parts: the first of each, a power of two that holds it, and its end."""
  if len(ends) == 1:  # The largest power of two, then the rest.
    ends = 1 << (ends[0].bit_length() - 1), *ends
  parts = [(0, *ends)[i : i + 2] for i in range(len(ends))]
  return tuple((first, tile_side(end - first), end) for first, end in parts if end > first)


def load_tile(ref, row, first: tuple, sides: tuple[int, int], ends: tuple[int, int]) -> jax.Array:
  """Reads a tile of `sides` from `ref[row, first[0]:, first[1]:]`, zero from `ends` on."""
  axes = [start + jnp.arange(side) for start, side in zip(first, sides)]
  where, mask = _cross(*axes, *_inside(first, sides, ends))
  return load(ref.at[row, *where], mask)


def store_tile(ref, row, first: tuple, ends: tuple[int, int], tile: jax.Array):
  """Writes the part of a tile that lies before `ends`."""
  axes = [start + jnp.arange(side) for start, side in zip(first, tile.shape)]
  where, mask = _cross(*axes, *_inside(first, tile.shape, ends))
  pltriton.store(ref.at[row, *where], tile.astype(ref.dtype), mask=mask)


def load_row(ref, row, first, side: int, end: int) -> jax.Array:
  """Reads `ref[row, first:]`, `side` values, zero from `end` on."""
  at = first + jnp.arange(side)
  return pltriton.load(ref.at[row, at], mask=at < end, other=0)


def store_row(ref, row, first, end: int, values: jax.Array):
  """Writes the values that lie before `end`."""
  at = first + jnp.arange(values.size)
  pltriton.store(ref.at[row, at], values.astype(ref.dtype), mask=at < end)


def gather(
    ref,
    rows: jax.Array,
    first: int | jax.Array,
    side: int,
    end: int,
    filled: jax.Array | None = None,
) -> jax.Array:
  """Reads `ref[rows, first:]`, zero from column `end` on, and where a row is not filled.

  A `first` that is an array is a multiple of `side`.
  """
  (inside,) = _inside([first], [side], [end])
  where, mask = _cross(rows, first + jnp.arange(side), filled, inside)
  return load(ref.at[*where], mask)


def load(where, mask: jax.Array | None = None, other: int | float = 0) -> jax.Array:
  """Reads a view of an array, `other` where masked out."""
  other = float(other) if where.dtype == jnp.float8_e4m3fn else other  # No integer becomes FP8.
  return pltriton.load(where, mask=mask, other=None if mask is None else other)


def store(where, values: jax.Array, mask: jax.Array | None = None):
  """Writes to a view of an array, except where masked out."""
  pltriton.store(where, values, mask=mask)


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
  """Returns a float32 product over an axis of each, to float32's rounding if they are float32."""
  return jax.lax.dot_general(
      a, b, (((a_axis,), (b_axis,)), ((), ())),
      precision=precision_of(a.dtype), preferred_element_type=jnp.float32,
  )  # fmt: skip


def alone(always, product: Callable) -> jax.Array:
  """Returns a product from a branch that is always taken, which the compiler must not know.

  Otherwise a product that feeds another one is not divided among groups of warps: each group
  computes all of it, so that a row of it stays in one warp.
  """
  shape = jax.eval_shape(product)
  return jax.lax.cond(always, product, lambda: jnp.zeros(shape.shape, shape.dtype))


def some_tiles(n: jax.Array, step: Callable, state):
  """Runs `state = step(j, state)` for each j < n.

  ptxas optimises a possibly empty loop badly, so a branch guards it.
  """
  return jax.lax.cond(n > 0, lambda: jax.lax.fori_loop(0, n, step, state), lambda: state)


def _cross(rows, columns, row_mask, column_mask):
  """Returns the positions of a tile, and which of them count; None if all do."""
  shape = rows.size, columns.size
  spread = lambda x, axis: jnp.broadcast_to(jnp.expand_dims(x, axis), shape)
  masks = [spread(x, 1 - i) for i, x in enumerate((row_mask, column_mask)) if x is not None]
  mask = functools.reduce(jnp.logical_and, masks) if masks else None
  return (spread(rows, 1), spread(columns, 0)), mask


def _inside(first, sides, ends):
  """Yields for each axis which positions lie before the end; None if all are known to."""
  for start, side, end in zip(first, sides, ends):
    known = isinstance(start, int) and start + side <= end
    whole = not isinstance(start, int) and end % side == 0  # Tiles start at multiples.
    yield None if known or whole else start + jnp.arange(side) < end
