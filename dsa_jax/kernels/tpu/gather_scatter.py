# SPDX-License-Identifier: Apache-2.0
"""Selected rows of a query side by side in HBM, for a chip whose VMEM holds too few keys.

The TensorCore gathers them shard by shard: it copies them within VMEM (see `resident`), and a DMA
takes them away, a tile at a time. A shard's rows begin where a DMA may, at multiples of eight, and
rows of zeros lie between them. SparseCores fetch all of them from HBM while the TensorCore does
something else.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from dsa_jax.kernels.tpu import resident, sparse_cores
from dsa_jax.kernels.tpu.layout import LANES, Rows
from dsa_jax.kernels.tpu.plans import KernelPlan
from dsa_jax.kernels.tpu.resident import ShardKernels, Sums
from dsa_jax.kernels.tpu.shards import (
    ADDED,
    ADDS,
    ShardPlan,
    Shards,
    eights,
    even_tiles,
    fit_tile,
    most_keys,
)
from dsa_jax.kernels.xla.rows import whole_block

ALIGNED = 8  # DMAs begin at multiples of so many rows.


@dataclasses.dataclass(frozen=True)
class OwnRows:
  """How a kernel with grid (batch, query steps, tiles) reads rows that are each query's own."""

  rows: Rows
  step_t: int  # At most so many query rows in a step of the grid.
  n_tiles: int
  tile: int  # Rows of a query that are read at one time.
  vmem: int  # Bytes of VMEM of the chip.

  @property
  def n_rows(self) -> int:
    """Rows of a query: whole tiles."""
    return self.n_tiles * self.tile

  def grid(self, batch: int, n_queries: int) -> tuple[int, int, int]:
    return batch, n_queries // math.gcd(self.step_t, n_queries), self.n_tiles

  def kernel(self, batch: int, n_queries: int, hbm_bytes: int | float) -> KernelPlan:
    """Returns the plan of such a kernel, for a block of queries."""
    grid = self.grid(batch, n_queries)
    return KernelPlan(grid, [(1, self.n_tiles * grid[1] / n_queries)], float(hbm_bytes))


def plan_own(n: int, rows: Rows, vmem: int, blocks) -> OwnRows:
  """Returns how n rows of each query are read."""
  tiles, tile = even_tiles(n, blocks.own_tile * 2 // rows.dtype.itemsize, blocks.line)
  return OwnRows(rows, blocks.step_t, tiles, tile, vmem)


def plan_gather(
    rows: Rows, n_keys: int, n_slots: int, vmem: int, blocks
) -> tuple['Gather', 'Scatter']:
  """Returns the gather and scatter kernels with the fewest shards that fit VMEM."""
  fewest = lambda size: pl.cdiv(n_keys, most_keys(size, vmem, blocks))
  n = fewest(rows.bytes)
  parts = pl.cdiv(fewest(rows.sum_bytes), n)
  share = eights(pl.cdiv(n_keys, n * parts))

  def read(shards: Shards) -> ShardPlan:
    _, tile = fit_tile(n_slots, shards, blocks)
    return ShardPlan(
        shards=shards,
        n_slots=n_slots,
        step_t=blocks.step_t_compact,
        tile=tile,
        line=blocks.line,
        copied=blocks.copied,
        vmem=vmem,
    )

  own = plan_own(n_slots + (n + 1) * ALIGNED, rows, vmem, blocks)
  gather = Gather(read(Shards(n, share * parts, 0)), own)
  return gather, Scatter(read(Shards(n * parts, share, 0)), gather)


class GatherScalars(NamedTuple):
  """What the scalar unit reads of `Gather`; see `resident.Scalars`."""

  spans: Any
  places: Any  # For each query, the row where the shard's rows begin, and how many rows are filled.
  table: Any


class GatherScratch(NamedTuple):
  """What `Gather` works in."""

  buffers: Any  # Two, of which one is filled while the other leaves.
  leaving: Any  # Whether a DMA takes a query's part of a buffer away.
  turn: Any  # The buffer that is filled next.
  sems: Any


@dataclasses.dataclass(frozen=True)
class Gather(ShardKernels):
  """Brings together the rows of queries, [B, T, lines, 128], each query's in ascending order."""

  own: OwnRows  # Rows of zeros are among them.

  @property
  def rows(self) -> Rows:
    return self.own.rows

  @property
  def n_rows(self) -> int:
    return self.own.n_rows

  def kernel(self, batch: int, n_queries: int) -> KernelPlan:
    """Returns the plan of the kernel, for a block of queries."""
    plan = self.plan
    loops = [*plan.step_loops(), *plan.copy_loops()]
    shards = plan.shards.n * plan.shards.stored * self.rows.bytes / n_queries
    return KernelPlan(plan.grid(batch, n_queries), loops, self.n_rows * self.rows.bytes + shards)

  def begin(self, first: jax.Array, shard: jax.Array) -> jax.Array:
    """Returns the row where a shard's rows begin, whose first slot is given."""
    return (pl.cdiv(first, ALIGNED) + shard) * ALIGNED

  def place(self, slots: jax.Array, shard: jax.Array, slot: jax.Array) -> jax.Array:
    """Returns the row of a slot of a shard."""
    first, _ = self.part(slots, shard)
    return self.begin(first, shard) + slot - first

  def memory(self, q: jax.Array, block: int, multiple: int) -> jax.Array:
    """Returns memory for the rows of a block of queries [B, T, ...], and for a last tile's rest."""
    n_queries = whole_block(q.shape[1], block, multiple)
    lines = (self.n_rows + self.plan.tile) * self.rows.lines
    return jax.lax.empty((q.shape[0], n_queries, lines, LANES), self.rows.words)

  def run(self, slots: jax.Array, packed: jax.Array, memory: jax.Array):
    """Brings the rows of sorted slots [B, T, K] together.

    Returns:
      The memory, and which of its rows are keys, bool [B, T, n_rows]; others are zeros.
    """
    row = jnp.arange(self.n_rows)
    scratch = GatherScratch(
        buffers=pltpu.VMEM(
            (2, self.plan.step_t * self.plan.tile * self.rows.lines, LANES), self.rows.words
        ),
        leaving=pltpu.SMEM((2, self.plan.step_t), jnp.int32),
        turn=pltpu.SMEM((1,), jnp.int32),
        sems=pltpu.SemaphoreType.DMA((2,)),
    )

    def step(shard, state):
      memory, seen = state
      first, end = self.part(slots, shard)
      begin = self.begin(first, shard)
      seen |= (row >= begin[..., None]) & (row < (begin + end - first)[..., None])
      last = shard == self.plan.shards.n - 1
      fill = jnp.where(last, self.n_rows, self.begin(end, shard + 1)) - begin
      places = jnp.stack([begin, fill], axis=-1)
      spans, (table,) = self.scalars(shard, slots, self.rows.lines)
      memory = self.call(
          self._gather,
          'gather_selected_rows',
          shard,
          GatherScalars(spans, places.reshape(spans.shape), table),
          packed,
          self.shard(packed),
          memory,
          pl.BlockSpec(memory_space=pl.ANY),
          scratch,
      )
      return memory, seen

    seen = jnp.zeros((*slots.shape[:2], self.n_rows), bool)
    return jax.lax.fori_loop(0, self.plan.shards.n, step, (memory, seen))

  def _gather(self, _, scalars: GatherScalars, kv, __, memory, scratch: GatherScratch):
    """Fills one buffer while the other leaves."""
    spans, places, table = scalars
    buffers, leaving, turn, sems = scratch
    lines, queries = self.plan.tile * self.rows.lines, range(self.plan.step_t)
    begins = [places[0, 0, 0, 2 * i] for i in queries]
    tiles = [pl.cdiv(places[0, 0, 0, 2 * i + 1], self.plan.tile) for i in queries]

    def leave(buffer, i, row):
      to = pl.ds(pl.multiple_of(row * self.rows.lines, ALIGNED), lines)
      query = pl.program_id(1) * self.plan.step_t + i
      return pltpu.make_async_copy(
          buffers.at[buffer, pl.ds(i * lines, lines)],
          memory.at[pl.program_id(0), query, to],
          sems.at[buffer],
      )

    def wait(buffer):
      for i in queries:
        pl.when(leaving[buffer, i] == 1)(lambda: leave(buffer, i, 0).wait())

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def _():
      turn[0] = 0
      for buffer in range(2):
        for i in queries:
          leaving[buffer, i] = 0

    def copy_tile(j, _):
      buffer = turn[0]
      wait(buffer)
      self.copy(self.rows.lines, kv, spans, table, j, buffers.at[buffer])
      for i in queries:
        first = lambda: begins[i] + j * self.plan.tile
        pl.when(j < tiles[i])(lambda: leave(buffer, i, first()).start())
        leaving[buffer, i] = (j < tiles[i]).astype(jnp.int32)
      turn[0] = 1 - buffer
      return 0

    jax.lax.fori_loop(0, functools.reduce(jnp.maximum, tiles), copy_tile, 0)

    @pl.when(
        (pl.program_id(0) == pl.num_programs(0) - 1) & (pl.program_id(1) == pl.num_programs(1) - 1)
    )
    def _():
      wait(0)
      wait(1)


@dataclasses.dataclass(frozen=True)
class Fetch:
  """Brings rows together by SparseCores, [B, T, lines, N, 128], in the order of the slots."""

  own: OwnRows  # Rows of zeros are behind the last slot.
  n_keys: int
  n_slots: int

  @property
  def rows(self) -> Rows:
    return self.own.rows

  @property
  def n_rows(self) -> int:
    return self.own.n_rows

  @property
  def bytes(self) -> int:
    """What SparseCores fetch for one query."""
    return self.n_slots * self.rows.bytes

  @property
  def shards(self) -> Shards:
    """One shard: the keys, and a row of zeros for each slot that is empty.

    Empty slots share no row of zeros, so that the reads go to many places.
    """
    return Shards(1, self.n_keys + self.n_rows, 0)

  def place(self, slots: jax.Array, shard: jax.Array, slot: jax.Array) -> jax.Array:
    """Returns the row of a slot."""
    return slot

  def nothing(self, *queries: int) -> tuple[jax.Array, jax.Array]:
    """Returns what `run` returns for queries [B, T] that select nothing."""
    own = jnp.zeros((*queries, self.rows.lines, self.n_rows, LANES), self.rows.words)
    return own, jnp.zeros((*queries, self.n_rows), bool)

  def run(self, slots: jax.Array, packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Brings the rows of slots [B, T, K] together.

    Returns:
      The rows, and which of them are keys, bool [B, T, N]; others are zeros.
    """
    more = [(0, 0)] * 2 + [(0, self.n_rows - slots.shape[2])]
    slots = jnp.pad(slots, more, constant_values=-1)
    seen = (slots >= 0) & (slots < self.n_keys)
    row = jnp.where(seen, slots, self.n_keys + jnp.arange(self.n_rows))
    row += self.shards.stored * jnp.arange(row.shape[0])[:, None, None]
    lines = self.rows.lines * row[:, :, None] + jnp.arange(self.rows.lines)[:, None]
    fetched = sparse_cores.gather(packed.reshape(-1, LANES), lines.reshape(-1))
    return fetched.reshape(*lines.shape, LANES), seen


def plan_fetch(rows: Rows, n_keys: int, n_slots: int, vmem: int, blocks) -> Fetch:
  """Returns how SparseCores bring n_slots rows of each query together."""
  return Fetch(plan_own(n_slots, rows, vmem, blocks), n_keys, n_slots)


class ScatterIn(NamedTuple):
  """What `Scatter` reads."""

  places: Any  # The row where each query's rows for the shard begin.
  rows: Any


class ScatterScratch(NamedTuple):
  """What `Scatter` works in."""

  buffers: Any  # Two, of which one arrives while the other is added.
  sems: Any
  sums: Sums


@dataclasses.dataclass(frozen=True)
class Scatter(ShardKernels):
  """Adds float32 rows, in the order in which keys were brought together, to sums of these.

  Its shards are parts of those that the rows were gathered from.
  """

  gather: Gather | Fetch

  @property
  def fetched(self) -> int:
    """Rows of a query that come to VMEM at one time."""
    return min(self.plan.tile + ALIGNED, self.gather.n_rows)

  @property
  def parts(self) -> int:
    """Shards of sums for each shard of keys."""
    return self.plan.shards.n // self.gather_shards.n

  @property
  def gather_shards(self) -> Shards:
    gather = self.gather
    return gather.shards if isinstance(gather, Fetch) else gather.plan.shards

  def kernel(self, batch: int, n_queries: int, n_rows: int) -> KernelPlan:
    """Returns the plan of the kernel, for a block of queries that have so many rows each."""
    plan, sum_bytes = self.plan, self.gather.rows.sum_bytes
    loops = [*plan.step_loops(), *plan.add_loops()]
    sums = 2 * (plan.shards.n * plan.shards.stored * sum_bytes / n_queries)  # In and out.
    return KernelPlan(plan.grid(batch, n_queries), loops, n_rows * sum_bytes + sums)

  def run(self, slots: jax.Array, rows: jax.Array, sums: jax.Array) -> jax.Array:
    """Adds rows [B, T, N x lines, 128] of sorted slots [B, T, K] to sums of `layout.zero_sums`."""
    lines, plan = self.gather.rows.blocks, self.plan
    more = ADDED * ADDS  # Rows that may be added to a spare row.
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    scratch = ScatterScratch(
        buffers=pltpu.VMEM((2, (plan.step_t * self.fetched + more) * lines, LANES), jnp.float32),
        sems=pltpu.SemaphoreType.DMA((2,)),
        sums=self.sums(lines),
    )

    def step(shard, sums):
      first, _ = self.part(slots, shard)
      place = self.gather.place(slots, shard // self.parts, first)
      return self.call(
          self._add,
          'scatter_selected_rows',
          shard,
          self.scalars(shard, slots, lines),
          ScatterIn(place.reshape(-1, 1, plan.step_t), rows),
          ScatterIn(pl.BlockSpec(memory_space=pltpu.SMEM), anywhere),
          sums,
          anywhere,
          scratch,
      )

    return jax.lax.fori_loop(0, plan.shards.n, step, sums)

  def _add(self, shard, scalars, inputs: ScatterIn, _, new_sums, scratch: ScatterScratch):
    """Adds the rows of a step's queries while those of the next step arrive."""
    spans, (table,) = scalars
    places, rows = inputs
    buffers, sems, sums = scratch
    lines, queries = self.gather.rows.blocks, range(self.plan.step_t)
    size = self.fetched * lines
    b, t, n_steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    now = b * n_steps + t

    def begin(step, i, j):
      """Returns the first row that is fetched for query i's j-th tile, and the tile's first."""
      row = places[step, 0, i] + j * self.plan.tile
      return jnp.minimum(row & -ALIGNED, self.gather.n_rows - self.fetched), row

    def fetch(b, t, step, j):
      for i in queries:
        at = pl.multiple_of(begin(step, i, j)[0] * lines, ALIGNED)
        source = rows.at[b, t * self.plan.step_t + i, pl.ds(at, size)]
        target = buffers.at[step & 1, pl.ds(i * size, size)]
        pltpu.make_async_copy(source, target, sems.at[step & 1]).start()

    def add_tile(j, _):
      pl.when(j > 0)(lambda: fetch(b, t, now, j))
      all_queries = buffers.at[now & 1, pl.ds(0, self.plan.step_t * size)]
      pltpu.make_async_copy(all_queries, all_queries, sems.at[now & 1]).wait()
      for i in queries:  # Two queries may add to the same row.
        fetched, row = begin(now, i, j)
        at = i * self.fetched + row - fetched
        n = jnp.clip(self._left(spans, i, j), 0, self.plan.tile)
        table_of = self._table(spans, table, i, j)
        resident.add_rows(lines, buffers.at[now & 1], at, sums.rows, table_of, n)
      return 0

    pl.when(now == 0)(lambda: fetch(0, 0, 0, 0))
    ends = t + 1 == n_steps
    next_b, next_t = jnp.where(ends, b + 1, b), jnp.where(ends, 0, t + 1)
    pl.when(next_b < pl.num_programs(0))(lambda: fetch(next_b, next_t, now + 1, 0))
    resident.fetch_sums(shard, new_sums, sums)
    jax.lax.fori_loop(0, jnp.maximum(self.tiles(spans), 1), add_tile, 0)
    resident.store_sums(shard, new_sums, sums)
