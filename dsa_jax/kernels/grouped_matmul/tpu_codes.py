# SPDX-License-Identifier: Apache-2.0
"""Products by group with codes on a TPU, which widens a tile of codes in VMEM.

Rows are cut into tiles wherever groups end. A step of the grid is a visit: a tile of rows meets the
matrix of one of its groups, and keeps the results of that group's rows.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsa_jax.kernels.block_scaled import BlockScaled
from dsa_jax.kernels.tpu import chip
from dsa_jax.kernels.tpu.layout import LANES
from dsa_jax.kernels.tpu.resident import dot

ROWS = 128  # A tile has at most so many rows.
SIDE, MOST = 2**11, 2**22  # The channels and the codes of a tile of codes, if the matrix can be cut so.
SUBLANES = 8  # A tile of scales has so many bands, or all of them.
LEAST_BAND = 32  # The fewest rows of codes that may share a line of scales: a vector has as many.


class Visits(NamedTuple):
  """Which tile of rows meets which group, in the order of their rows. Most may be of no rows."""

  group: Int[Array, 'V']
  tile: Int[Array, 'V']
  start: Int[Array, 'V']  # The group's first row.
  end: Int[Array, 'V']  # One past its last; `start` where the visit has nothing to do.


GROUP, TILE, START, END = range(len(Visits._fields))  # Rows of the table that the kernel gets.


def plan_visits(sizes: Int[Array, 'X'], n_rows: int, tile: int) -> Visits:
  """Returns the visits of all tiles. Every tile has one, so that its rows of no group become zero."""
  n_groups = len(sizes)
  of_all = jnp.append(sizes, n_rows - jnp.sum(sizes))  # Rows behind the last group are one, too.
  ends = jnp.cumsum(of_all)
  starts = ends - of_all
  first = starts // tile
  counts = jnp.where(of_all > 0, (ends - 1) // tile - first + 1, 0)
  up_to = jnp.cumsum(counts)
  visit = jnp.arange(pl.cdiv(n_rows, tile) + n_groups, dtype=jnp.int32)
  visit = jnp.minimum(visit, up_to[-1] - 1)  # Those behind the last one repeat it, to no effect.
  group = jnp.searchsorted(up_to, visit, side='right').astype(jnp.int32)
  idle = (group == n_groups) | (jnp.arange(len(visit)) >= up_to[-1])
  return Visits(
      group=jnp.minimum(group, n_groups - 1),
      tile=first[group] + visit - (up_to - counts)[group],
      start=starts[group],
      end=jnp.where(idle, starts[group], ends[group]),
  )


def sides_of(n_inner: int, n_columns: int, band: int) -> tuple[int, int]:
  """Returns the rows and the columns of a tile of codes."""
  inner = _side(n_inner, SUBLANES * band, SIDE)
  columns = _side(n_columns, LANES, MOST // inner)
  return _side(n_inner, SUBLANES * band, MOST // columns), columns


def _side(size: int, step: int, most: int) -> int:
  """Returns the largest multiple of `step` that divides a size and is at most `most`, or one step.

  If there is none, or the size is no larger, it returns the size.
  """
  if size <= most:
    return size
  sides = range(step, max(most, step) + 1, step)
  return max((side for side in sides if size % side == 0), default=size)


def product(rows, weights: BlockScaled, sizes):
  """Returns each row times its group's matrix."""
  (n_rows, n_inner), n_columns = rows.shape, weights.shape[2]
  n_bands, n_blocks = weights.scale.shape[1:]
  band = n_inner // n_bands
  tile = min(ROWS, pl.cdiv(n_rows, 16) * 16)
  inner, columns = sides_of(n_inner, n_columns, band)
  steps = n_inner // inner
  visits = plan_visits(sizes, n_rows, tile)
  scale = jnp.repeat(weights.scale, n_columns // n_blocks, axis=2)
  # A visit without rows reads what is there already.
  at = lambda v, k, table: jnp.where(table[START, v] < table[END, v], k, steps - 1)
  of_rows = lambda j, v, k, table: (table[TILE, v], at(v, k, table))
  of_codes = lambda j, v, k, table: (table[GROUP, v], at(v, k, table), j)
  grid = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(n_columns // columns, len(visits.group), steps),
      in_specs=[
          pl.BlockSpec((tile, inner), of_rows),
          pl.BlockSpec((None, inner, columns), of_codes),
          pl.BlockSpec((None, inner // band, columns), of_codes),
      ],
      out_specs=pl.BlockSpec((tile, columns), lambda j, v, k, table: (table[TILE, v], j)),
      scratch_shapes=[pltpu.VMEM((tile, columns), jnp.float32)],
  )
  run = pl.pallas_call(
      functools.partial(_kernel, band=band),
      out_shape=jax.ShapeDtypeStruct((n_rows, n_columns), rows.dtype),
      grid_spec=grid,
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary', 'arbitrary'),
          vmem_limit_bytes=int(0.95 * chip.vmem_bytes()),
      ),
      name='grouped_matmul_codes',
  )
  return run(jnp.stack(visits), rows, weights.codes, scale)


def _kernel(visits, rows, codes, scale, out, total, *, band: int):
  visit, step = pl.program_id(1), pl.program_id(2)
  tile, start, end = (visits[row, visit] for row in (TILE, START, END))
  is_new = (visit == 0) | (tile != visits[TILE, jnp.maximum(visit - 1, 0)])

  @pl.when((step == 0) & is_new)
  def _():
    out[...] = jnp.zeros_like(out)

  @pl.when(step == 0)
  def _():
    total[...] = jnp.zeros_like(total)

  @pl.when(start < end)
  def _():
    for i in range(len(codes) // band):
      of_band = slice(i * band, (i + 1) * band)
      weight = codes[of_band].astype(jnp.float32).astype(rows.dtype)
      total[...] += dot(rows[:, of_band], weight, 1, 0) * scale[i][None]

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
      row = tile * len(rows) + jax.lax.broadcasted_iota(jnp.int32, (len(rows), 1), 0)
      own = (row >= start) & (row < end)
      out[...] = jnp.where(own, total[...].astype(out.dtype), out[...])
