# SPDX-License-Identifier: Apache-2.0
"""Products by group on a GPU: a program computes a tile of the result.

jax's `ragged_dot` multiplies every row with every matrix there, and its experimental kernels for
Hopper unroll a search over all groups in every program. tokamax' kernel transposes all matrices for
the gradient of rows. Here, XLA finds each tile's group beforehand.
"""

from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.block_scaled import BlockScaled
from dsa_jax.kernels.gpu import triton
from dsa_jax.kernels.gpu.triton import (
    LEAST, dot, gather, load_row, load_tile, some_tiles, store, tile_side,
)  # fmt: skip
from dsa_jax.kernels.grouped_matmul.turns import cut

WARPS, STAGES = 8, 3
CODES = (*triton.DTYPES, jnp.float8_e4m3fn)
# Offsets count elements in int32, or in int64 above 2^32 bytes, so codes of one byte overflow in between.
MOST_CODES = 2**31
BESIDE = 8  # Tiles of rows whose programs run side by side, so that they share matrices in cache.


class Tiles(NamedTuple):
  """Sides of the tiles of a product."""

  rows: int
  columns: int
  inner: int  # Channels, or rows, that are multiplied at one time.

  @staticmethod
  def of(rows: int, columns: int, inner: int, dtype) -> 'Tiles':
    """Returns tiles that are no larger than the product needs."""
    wide = jnp.dtype(dtype).itemsize == 4
    most = (64, 64, 32) if wide else (128, 256, 64)
    return Tiles(*map(tile_side, (rows, columns, inner), most))


def product(rows, weights, sizes, *, transposed: bool):
  """Returns each row times its group's matrix, or times the transposed matrix."""
  return _product(rows, weights, None, sizes, transposed=transposed)


def scaled_product(rows, weights: BlockScaled, sizes):
  """Returns each row times its group's matrix, whose codes are widened and scaled tile by tile."""
  n_bands, n_blocks = weights.scale.shape[1:]
  if rows.shape[1] // n_bands < LEAST:  # A product has no smaller tile.
    return product(rows, weights.astype(rows.dtype), sizes, transposed=False)
  if MOST_CODES < weights.codes.size <= 2 * MOST_CODES:
    return _product_of_halves(rows, weights, sizes)
  scale = jnp.repeat(weights.scale, weights.shape[2] // n_blocks, axis=2)
  return _product(rows, weights.codes, scale, sizes, transposed=False)


def _product_of_halves(rows, weights: BlockScaled, sizes):
  """Returns the products with the first half of the groups, and those with the second half."""
  half = len(sizes) // 2
  n_before = jnp.sum(sizes[:half])
  first = scaled_product(rows, weights[:half], sizes[:half])
  second = scaled_product(jnp.roll(rows, -n_before, axis=0), weights[half:], sizes[half:])
  return first + jnp.roll(second, n_before, axis=0)  # Behind its groups, either is zero.


def _product(rows, weights, scale, sizes, *, transposed: bool):
  """Returns the products; `scale` [X, bands of rows, columns] is that of codes, or None."""
  n_rows, n_inner = rows.shape
  n_groups, n_columns = len(sizes), weights.shape[1 if transposed else 2]
  tiles = Tiles.of(n_rows, n_columns, n_inner, rows.dtype)
  if scale is not None:  # A step lies within a band.
    n_bands = scale.shape[1]
    scale, band = scale.reshape(-1, n_columns), n_inner // n_bands
    tiles = tiles._replace(inner=min(tiles.inner, band & -band))
  # Rows behind the last group are a group of their own, whose result is zero.
  of_all = jnp.append(sizes, n_rows - jnp.sum(sizes)).astype(jnp.int32)
  turns = cut(of_all, n_rows, tiles.rows)
  has_products = (turns.first < turns.end) & (turns.group < n_groups)
  steps = jnp.where(has_products, pl.cdiv(n_inner, tiles.inner), 0).astype(jnp.int32)
  n_turns, across = len(turns.group), pl.cdiv(n_columns, tiles.columns)

  def grouped_matmul(steps, group, first, end, rows, weights, scale, out):
    turn, column = _place(pl.program_id(0), n_turns, across)
    own, start = group[turn], column * tiles.columns
    row = first[turn] + jnp.arange(tiles.rows)
    readable = jnp.minimum(row, n_rows - 1)

    def add(i, total):
      at = pl.multiple_of(i * tiles.inner, tiles.inner)
      x = gather(rows, readable, at, tiles.inner, n_inner)
      where = (start, at) if transposed else (at, start)
      sides = (tiles.columns, tiles.inner) if transposed else (tiles.inner, tiles.columns)
      weight = load_tile(weights, own, where, sides, weights.shape[1:]).astype(x.dtype)
      new = dot(x, weight, 1, 1 if transposed else 0)
      if scale is None:
        return total + new
      of_band = own * n_bands + jax.lax.div(at, band)
      return total + new * load_row(scale, of_band, start, tiles.columns, n_columns)[None]

    total = some_tiles(steps[turn], add, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
    columns = start + jnp.arange(tiles.columns)
    mask = (row < end[turn])[:, None] & (columns < n_columns)[None]
    store(out.at[row[:, None], columns[None]], total.astype(out.dtype), mask)

  (out,) = triton.call(
      grouped_matmul, 'grouped_matmul', n_turns * across,
      [jax.ShapeDtypeStruct((n_rows, n_columns), rows.dtype)],
      [steps, turns.group, turns.first, turns.end, rows, weights, scale], warps=WARPS, stages=STAGES,
      dtypes=triton.DTYPES if scale is None else CODES,
  )  # fmt: skip
  return out


def weight_gradients(rows, dout, sizes):
  """Returns the gradients of the matrices, [X, D, F], in the rows' dtype."""
  (n_rows, height), width, n_groups = rows.shape, dout.shape[1], len(sizes)
  tiles = Tiles.of(height, width, n_rows, rows.dtype)
  down, across = pl.cdiv(height, tiles.rows), pl.cdiv(width, tiles.columns)
  end = jnp.cumsum(sizes).astype(jnp.int32)

  def grouped_matmul_weights(first, end, rows, dout, out):
    program = pl.program_id(0)
    group, place = _divide(program, down * across)
    i, j = _divide(place, across)
    above, left = i * tiles.rows, j * tiles.columns

    def add(i, total):
      row = first[group] + i * tiles.inner + jnp.arange(tiles.inner)
      filled = row < end[group]
      x = gather(rows, row, above, tiles.rows, height, filled)
      return total + dot(x, gather(dout, row, left, tiles.columns, width, filled), 0, 0)

    steps = jax.lax.div(end[group] - first[group] + tiles.inner - 1, tiles.inner)
    total = some_tiles(steps, add, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
    triton.store_tile(out, group, (above, left), (height, width), total)

  (out,) = triton.call(
      grouped_matmul_weights, 'grouped_matmul_weights', n_groups * down * across,
      [jax.ShapeDtypeStruct((n_groups, height, width), rows.dtype)],
      [end - sizes, end, rows, dout], warps=WARPS, stages=STAGES,
  )  # fmt: skip
  return out


def _place(program, n_turns: int, across: int):
  """Returns the tile of rows and the tile of columns of a program."""
  band, inside = _divide(program, BESIDE * across)
  column, turn = _divide(inside, jnp.minimum(n_turns - band * BESIDE, BESIDE))
  return band * BESIDE + turn, column


def _divide(x, by):
  """Returns the quotient and the remainder of numbers that are not negative."""
  return jax.lax.div(x, by), jax.lax.rem(x, by)
