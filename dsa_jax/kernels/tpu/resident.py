# SPDX-License-Identifier: Apache-2.0
"""Kernels that copy selected keys within VMEM, where a shard of the keys lies.

Copying a row within VMEM takes 1.2 cycles, fetching one from HBM by its own DMA twenty or more. A
shard is as many keys as VMEM holds; a long context is read as a few shards, one after the other.
The cost depends on how much is selected, not on where it lies or on what neighbours select.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from dsa_jax.kernels.products import precision_of
from dsa_jax.kernels.tpu import chip
from dsa_jax.kernels.tpu.layout import LANES, Rows, unpack
from dsa_jax.kernels.tpu.shards import ADDED, ADDS, ShardPlan
from dsa_jax.kernels.tpu.slots import locate, split


class Scalars(NamedTuple):
  """What the scalar unit reads, an array row for each grid step; arrays or refs to them."""

  spans: Any  # For each query, its first slot of the shard and how many it has.
  tables: tuple[Any, ...]  # For each kind of row, the line where the row of each slot begins.


class Sums(NamedTuple):
  """Scratch that holds the float32 sums of a shard while kernels add to them."""

  rows: Any
  sem: Any


@dataclasses.dataclass(frozen=True)
class ShardKernels:
  """Base class of kernels with grid (batch, query steps) that read one shard of the keys.

  The queries of a step run side by side, tile by tile.
  """

  plan: ShardPlan

  def part(self, slots: jax.Array, shard: jax.Array) -> list[jax.Array]:
    """Returns the first of sorted slots [B, T, K] that is in a shard, and one past the last."""
    units = self.plan.line, self.plan.tile
    return [split(slots, shard + i, self.plan.shards, units) for i in (0, 1)]

  def scalars(self, shard: jax.Array, slots: jax.Array, *lines: int) -> Scalars:
    """Returns the scalars of a shard, with a table for each layout that has so many lines a row."""
    plan, part = self.plan, self.part(slots, shard)
    spans, local = locate(slots, shard, part, plan.shards, plan.line, plan.tile)
    scalars = Scalars(spans, tuple(local * n for n in lines))
    by_step = lambda x: x.reshape(x.shape[0], -1, 1, plan.step_t * x.shape[2])
    return jax.tree.map(by_step, scalars)

  def call(self, kernel, name, shard, scalars, inputs, specs, state, state_specs, scratch):
    """Runs `kernel(shard, scalars, inputs, state, new_state, scratch)` and returns the new state.

    The new state takes the memory of the state.

    Args:
      kernel: Gets refs in trees of these types.
      name: The kernel's name.
      shard: The number of the shard.
      scalars: A tree of arrays that `scalars` made, which go to SMEM.
      inputs: A tree of arrays.
      specs: A tree of block specs for them.
      state: A tree of arrays.
      state_specs: A tree of block specs for them.
      scratch: A tree of memory that the kernel works in.
    """
    index = lambda b, t, _: (b, t, 0, 0)
    smem = lambda x: pl.BlockSpec((1, 1, *x.shape[2:]), index, memory_space=pltpu.SMEM)
    first_state = 1 + len(jax.tree.leaves((scalars, inputs)))
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=scalars[0].shape[:2],
            in_specs=[jax.tree.map(smem, scalars), specs, state_specs],
            out_specs=[state_specs],
            scratch_shapes=[scratch],
        ),
        out_shape=[jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)],
        input_output_aliases={first_state + i: i for i in range(len(jax.tree.leaves(state)))},
        compiler_params=chip.compiler_params(self.plan.vmem),
        name=name,
    )
    return call(jnp.reshape(shard, 1), scalars, inputs, state)[0]

  def queries(self, x: jax.Array) -> pl.BlockSpec:
    """Returns the spec of a step's part of an array [B, T, ...]."""
    rest = x.shape[2:]
    return pl.BlockSpec((1, self.plan.step_t, *rest), lambda b, t, _: (b, t, *[0] * len(rest)))

  def shard(self, packed: jax.Array) -> pl.BlockSpec:
    """Returns the spec of the shard of packed keys, which is fetched once."""
    index = lambda b, t, shard: (b, shard[0], 0, 0)
    return pl.BlockSpec((1, 1, *packed.shape[2:]), index, pipeline_mode=pl.Buffered(1))

  def buffer(self, lines: int, dtype):
    """Returns scratch for a tile of each query of a step, one after the other."""
    return pltpu.VMEM((self.plan.step_t * self.plan.tile * lines, LANES), dtype)

  def sums(self, lines: int) -> Sums:
    """Returns scratch for the sums of a shard."""
    rows = pltpu.VMEM((self.plan.shards.stored * lines, LANES), jnp.float32)
    return Sums(rows, pltpu.SemaphoreType.DMA)

  def tiles(self, spans) -> jax.Array:
    """Returns the number of tiles of the query that has most in a step."""
    return pl.cdiv(self._most(spans), self.plan.tile)

  def seen(self, spans, i, j) -> jax.Array:
    """Says which rows of the j-th tile of query i are of the shard, [1, tile]; others are zeros."""
    row = jax.lax.broadcasted_iota(jnp.int32, (1, self.plan.tile), 1)
    return row < self._left(spans, i, j)

  def copy(self, lines: int, shard, spans, table, j, buffer):
    """Copies the j-th tile of every query, and writes zeros behind its last row."""
    tables = [self._table(spans, table, i, j) for i in range(self.plan.step_t)]
    n = self._most(spans) - j * self.plan.tile
    copy_rows(lines, shard.at[0, 0], buffer, tables, n, self.plan.copied)

  def read(self, rows: Rows, buffer, i: int) -> jax.Array:
    """Returns the copied tile of query i, [tile, channels]."""
    return read_rows(rows, buffer, i * self.plan.tile, self.plan.tile)

  def add(self, lines: int, buffer, sums, spans, table, i: int, j):
    """Adds a tile of float32 rows, written for query i, to the rows of its j-th tile."""
    table = self._table(spans, table, i, j)
    n = jnp.clip(self._left(spans, i, j), 0, self.plan.tile)
    add_rows(lines, buffer, i * self.plan.tile, sums, table, n)

  def _span(self, spans, i: int):
    """Returns query i's first slot of the shard, and how many it has."""
    return spans[0, 0, 0, 2 * i], spans[0, 0, 0, 2 * i + 1]

  def _most(self, spans):
    """Returns the slots in the shard of the query that has most in a step."""
    of_queries = [self._span(spans, i)[1] for i in range(self.plan.step_t)]
    return functools.reduce(jnp.maximum, of_queries)

  def _left(self, spans, i: int, j):
    """Returns how many slots query i has from its j-th tile on."""
    return self._span(spans, i)[1] - j * self.plan.tile

  def _table(self, spans, table, i: int, j):
    """Views the lines where the rows of the j-th tile of query i begin; spare rows' at its end."""
    n_slots, tile = table.shape[3] // self.plan.step_t, self.plan.tile
    slot = jnp.minimum(self._span(spans, i)[0] + j * tile, n_slots - tile)
    begin = pl.multiple_of(i * n_slots + slot, self.plan.line)
    return table.at[0, 0, 0, pl.ds(begin, tile)]


def fetch_sums(shard, in_hbm, sums: Sums):
  """Brings the sums of earlier blocks of queries to VMEM, in the first step of each sequence."""

  @pl.when(pl.program_id(1) == 0)
  def _():
    pltpu.async_copy(in_hbm.at[pl.program_id(0), shard[0]], sums.rows, sums.sem).wait()


def store_sums(shard, in_hbm, sums: Sums):
  """Takes the sums back to HBM, in the last step of each sequence."""

  @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
  def _():
    pltpu.async_copy(sums.rows, in_hbm.at[pl.program_id(0), shard[0]], sums.sem).wait()


def dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
  """Returns a product over one axis of each, summed in float32."""
  dims = ((x_axis,), (y_axis,)), ((), ())
  return jax.lax.dot_general(x, y, dims, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)


def copy_rows(lines: int, source, target, tables, n, between: int):
  """Copies n rows, or a few more, from the lines that each table names; then writes zeros.

  The rows of one table lie behind those of the table before. Copying waits for the scalar unit,
  where an address is a sum, a load and a sum. The first sum is the same in all tables, so these
  take turns, row by row.
  """
  n_rows = tables[0].shape[0]
  group = math.gcd(max(between // len(tables), 1), n_rows)
  groups = jnp.clip(pl.cdiv(n, group), 0, n_rows // group)

  def copy(g, _):
    for r in range(group):
      row = g * group + r
      for i, table in enumerate(tables):
        target[pl.ds((i * n_rows + row) * lines, lines), :] = source[pl.ds(table[row], lines), :]
    return 0

  def clear(g, _):
    for i in range(len(tables)):
      rest = pl.ds((i * n_rows + g * group) * lines, group * lines)
      target[rest, :] = jnp.zeros((group * lines, LANES), target.dtype)
    return 0

  jax.lax.fori_loop(0, groups, copy, 0)
  jax.lax.fori_loop(groups, n_rows // group, clear, 0)


def add_rows(lines: int, source, first, target, table, n):
  """Adds n float32 rows of a buffer, from the `first` on, to rows that begin at a table's lines.

  The rows of a table are distinct, so the loads of some may precede the stores of those before
  them. A few rows behind the n may be added, where the table points to a spare row.
  """
  rows = math.gcd(ADDED, table.shape[0])
  times = math.gcd(ADDS, table.shape[0] // rows)
  group = rows * times

  def add(g, _):
    def load(n):
      these = [g * group + n * rows + r for r in range(rows)]
      at = [table[row] for row in these]
      new = [source[pl.ds((first + row) * lines, lines), :] for row in these]
      return at, [target[pl.ds(i, lines), :] + x for i, x in zip(at, new)]

    def store(_, at, sums):
      for i, x in zip(at, sums):
        target[pl.ds(i, lines), :] = x

    overlap(load, store, times)
    return 0

  jax.lax.fori_loop(0, pl.cdiv(n, group), add, 0)


def overlap(start, finish, n: int, ahead: int = 1) -> list:
  """Finishes n pieces of work, each after so many more were started, and returns the results.

  The matrix unit keeps the order of the program, so it computes the next piece's products while the
  vector unit is at this one's. Memory keeps it, too, so the next loads need not wait for these
  stores. Two pieces ahead occupy two matrix units, and take more registers.
  """
  started, results = [start(i) for i in range(min(ahead, n))], []
  for i in range(n):
    if i + ahead < n:
      started.append(start(i + ahead))
    results.append(finish(i, *started[i]))
  return results


def read_rows(rows: Rows, buffer, begin: int, n: int) -> jax.Array:
  """Returns n rows of a buffer from `begin` on as [n, channels]."""
  first = begin * rows.lines
  line = lambda c: buffer[pl.ds(first + c, n, stride=rows.lines), :]
  return unpack(rows, [line(c) for c in range(rows.lines)])


def write_rows(buffer, begin: int, x: jax.Array):
  """Writes [n, channels] float32 to a buffer, row by row, from row `begin` on."""
  n, blocks = x.shape[0], x.shape[1] // LANES
  for c in range(blocks):
    buffer[pl.ds(begin * blocks + c, n, stride=blocks), :] = x[:, c * LANES : (c + 1) * LANES]
