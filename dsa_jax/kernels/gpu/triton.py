# SPDX-License-Identifier: Apache-2.0
"""What the kernels for GPUs share: how they are called, and tiles of arrays.

A kernel gets whole arrays and loads tiles of them, whose sides are powers of two; what lies
outside an array is not read, and counts as zero.
"""

from collections.abc import Callable, Sequence
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
import jax.numpy as jnp

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
LOG2_E = 1.4426950408889634
LEAST = 16  # Of each side of a product's tile.


def call(
    kernel: Callable,
    name: str,
    programs: int,
    out: Sequence[jax.ShapeDtypeStruct],
    args: Sequence[jax.Array],
    *,
    warps: int,
    stages: int = 1,
    aliases: dict[int, int] | None = None,
) -> Sequence[jax.Array]:
  """Runs `kernel(*args, *out)` as so many programs, each of `warps` times 32 threads."""
  for x in args:
    if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype not in DTYPES:
      raise ValueError(f'on a GPU must be bfloat16, float16 or float32; got {x.dtype}.')
  params = pltriton.CompilerParams(num_warps=warps, num_stages=stages)
  run = pl.pallas_call(
      kernel, out_shape=list(out), grid=(programs,), name=name, compiler_params=params,
      input_output_aliases=aliases or {},
  )  # fmt: skip
  return run(*args)


def tile_side(n: int, most: int | None = None, least: int = LEAST) -> int:
  """The smallest power of two that is at least n, within bounds."""
  side = max(pl.next_power_of_2(n), least)
  return side if most is None else min(side, most)


def column_parts(*ends: int) -> tuple[tuple[int, int, int], ...]:
  """Columns in parts, each a first one, a power of two that holds the part, and its end."""
  if len(ends) == 1:  # The largest power of two, then the rest.
    ends = 1 << (ends[0].bit_length() - 1), *ends
  parts = [(0, *ends)[i : i + 2] for i in range(len(ends))]
  return tuple((first, tile_side(end - first), end) for first, end in parts if end > first)


def load_tile(ref, row, first: tuple, sides: tuple[int, int], ends: tuple[int, int]) -> jax.Array:
  """Reads `ref[row, first[0]:, first[1]:]`, so many rows and columns, zero from `ends` on."""
  axes = [start + jnp.arange(side) for start, side in zip(first, sides)]
  where, mask = _cross(*axes, *_inside(first, sides, ends))
  return load(ref.at[row, *where], mask)


def store_tile(ref, row, first: tuple, ends: tuple[int, int], tile: jax.Array):
  """Writes what of a tile lies before `ends`."""
  axes = [start + jnp.arange(side) for start, side in zip(first, tile.shape)]
  where, mask = _cross(*axes, *_inside(first, tile.shape, ends))
  pltriton.store(ref.at[row, *where], tile.astype(ref.dtype), mask=mask)


def load_row(ref, row, first, side: int, end: int) -> jax.Array:
  """Reads `ref[row, first:]`, `side` values, zero from `end` on."""
  at = first + jnp.arange(side)
  return pltriton.load(ref.at[row, at], mask=at < end, other=0)


def store_row(ref, row, first, end: int, values: jax.Array):
  """Writes what of the values lies before `end`."""
  at = first + jnp.arange(values.size)
  pltriton.store(ref.at[row, at], values.astype(ref.dtype), mask=at < end)


def gather(
    ref, rows: jax.Array, first: int, side: int, end: int, filled: jax.Array | None = None
) -> jax.Array:
  """Reads `ref[rows, first:]`, zero from column `end` on, and where a row is not filled."""
  (inside,) = _inside([first], [side], [end])
  where, mask = _cross(rows, first + jnp.arange(side), filled, inside)
  return load(ref.at[*where], mask)


def load(where, mask: jax.Array | None = None, other: int = 0) -> jax.Array:
  """Reads what a view of an array shows, `other` where masked out."""
  return pltriton.load(where, mask=mask, other=None if mask is None else other)


def store(where, values: jax.Array, mask: jax.Array | None = None):
  """Writes what a view of an array shows, except where masked out."""
  pltriton.store(where, values, mask=mask)


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
  """float32 product over an axis of each; of float32 it is exact to float32's rounding."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(
      a, b, (((a_axis,), (b_axis,)), ((), ())),
      precision=precision, preferred_element_type=jnp.float32,
  )  # fmt: skip


def alone(always, product: Callable) -> jax.Array:
  """A product in a branch that is always taken, which the compiler must not know.

  A product that feeds another one is otherwise not divided among groups of warps: each does all
  of it, so that a row of it stays in one warp.
  """
  shape = jax.eval_shape(product)
  return jax.lax.cond(always, product, lambda: jnp.zeros(shape.shape, shape.dtype))


def some_tiles(n: jax.Array, meet: Callable, state):
  """`state = meet(j, state)` for each j < n. Of a loop that may run no times ptxas makes less."""
  return jax.lax.cond(n > 0, lambda: jax.lax.fori_loop(0, n, meet, state), lambda: state)


def _cross(rows, columns, row_mask, column_mask):
  """Positions of a tile, and which of them count; None if all do."""
  shape = rows.size, columns.size
  spread = lambda x, axis: jnp.broadcast_to(jnp.expand_dims(x, axis), shape)
  masks = [spread(x, 1 - i) for i, x in enumerate((row_mask, column_mask)) if x is not None]
  mask = functools.reduce(jnp.logical_and, masks) if masks else None
  return (spread(rows, 1), spread(columns, 0)), mask


def _inside(first, sides, ends):
  """Of each axis, what lies before the end; None where the tile is known to."""
  for start, side, end in zip(first, sides, ends):
    known = isinstance(start, int) and start + side <= end
    whole = not isinstance(start, int) and end % side == 0  # Tiles start at multiples.
    yield None if known or whole else start + jnp.arange(side) < end
