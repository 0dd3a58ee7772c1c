# SPDX-License-Identifier: Apache-2.0
"""Selected rows of a query side by side in HBM, for a chip whose VMEM holds too few keys.

The TensorCore gathers them shard by shard: copied within VMEM (see `resident`), they leave by DMA, a
tile at a time. A shard's rows begin where a DMA may, at multiples of eight, and rows of zeros lie
between them. SparseCores fetch them all from HBM while the TensorCore does something else.
"""

import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from dsa_jax.kernels.tpu import resident, sparse_cores
from dsa_jax.kernels.tpu.resident import LANES, Rows, ShardKernels
from dsa_jax.kernels.tpu.shards import Shards, eights, even_tiles, fit_tile, most_keys
from dsa_jax.kernels.xla.rows import whole_block

ALIGNED = 8  # Rows.


def fit(rows: Rows, n_keys: int, n_slots: int, vmem: int, blocks) -> tuple['Gather', 'Scatter']:
  """Kernels that bring rows together, and that take sums apart: as few shards as fit."""
  fewest = lambda size: pl.cdiv(n_keys, most_keys(size, vmem, blocks))
  n = fewest(rows.bytes)
  parts = pl.cdiv(fewest(4 * rows.channels), n)
  share = eights(pl.cdiv(n_keys, n * parts))
  of_keys, of_sums = Shards(n, share * parts, 0), Shards(n * parts, share, 0)
  tiles, tile = own_tiles(n_slots + (n + 1) * ALIGNED, rows, blocks)
  how = lambda shards: (
      shards,
      blocks.step_t_compact,
      fit_tile(n_slots, shards, blocks)[1],
      blocks.line,
      blocks.copied,
  )
  gather = Gather(*how(of_keys), rows, tiles * tile)
  return gather, Scatter(*how(of_sums), gather)


def own_tiles(n: int, rows: Rows, blocks) -> tuple[int, int]:
  """Tiles of n rows of its own that a query meets: how many, and their rows."""
  return even_tiles(n, blocks.own_tile * 2 // rows.dtype.itemsize, blocks.line)


@dataclasses.dataclass(frozen=True)
class Gather(ShardKernels):
  """Brings together the rows of queries, [B, T, lines, 128], each query's in ascending order."""

  rows: Rows
  n_rows: int  # Of a query, zeros among them.

  def begin(self, first: jax.Array, shard: jax.Array) -> jax.Array:
    """The row where a shard's rows begin, whose first slot is given."""
    return (pl.cdiv(first, ALIGNED) + shard) * ALIGNED

  def place(self, slots: jax.Array, shard: jax.Array, slot: jax.Array) -> jax.Array:
    """The row of a slot of a shard."""
    first, _ = self.part(slots, shard)
    return self.begin(first, shard) + slot - first

  def memory(self, q: jax.Array, block: int, multiple: int) -> jax.Array:
    """Where rows go of a block of queries [B, T, ...]; a last tile may reach behind them."""
    n_queries = whole_block(q.shape[1], block, multiple)
    lines = (self.n_rows + self.tile) * self.rows.lines
    return jax.lax.empty((q.shape[0], n_queries, lines, LANES), self.rows.words)

  def run(self, slots: jax.Array, packed: jax.Array, memory: jax.Array):
    """Brings the rows of sorted slots [B, T, K] together.

    Returns:
      The memory, and which of its rows are keys, bool [B, T, n_rows]; others are zeros.
    """
    row = jnp.arange(self.n_rows)
    buffers = 2, self.step_t * self.tile * self.rows.lines, LANES

    def step(shard, state):
      memory, seen = state
      first, end = self.part(slots, shard)
      begin = self.begin(first, shard)
      seen |= (row >= begin[..., None]) & (row < (begin + end - first)[..., None])
      last = shard == self.shards.n - 1
      fill = jnp.where(last, self.n_rows, self.begin(end, shard + 1)) - begin
      places = jnp.stack([begin, fill], axis=-1)
      spans, table = self.scalars(shard, slots, self.rows.lines)
      anywhere = pl.BlockSpec(memory_space=pl.ANY)
      [memory] = self.call(
          self._gather,
          'gather_selected_rows',
          shard,
          [spans, places.reshape(spans.shape), table],
          [packed, memory],
          [self.shard(packed), anywhere],
          [anywhere],
          aliases={1: 0},
          scratch=[
              pltpu.VMEM(buffers, self.rows.words),
              pltpu.SMEM((2, self.step_t), jnp.int32),
              pltpu.SMEM((1,), jnp.int32),
              pltpu.SemaphoreType.DMA((2,)),
          ],
      )
      return memory, seen

    seen = jnp.zeros((*slots.shape[:2], self.n_rows), bool)
    return jax.lax.fori_loop(0, self.shards.n, step, (memory, seen))

  def _gather(self, _, spans, places, table, kv, __, memory, buffers, leaving, turn, sems):
    """Fills one buffer while the other leaves."""
    lines, queries = self.tile * self.rows.lines, range(self.step_t)
    begins = [places[0, 0, 0, 2 * i] for i in queries]
    tiles = [pl.cdiv(places[0, 0, 0, 2 * i + 1], self.tile) for i in queries]

    def leave(buffer, i, row):
      to = pl.ds(pl.multiple_of(row * self.rows.lines, ALIGNED), lines)
      query = pl.program_id(1) * self.step_t + i
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

    def meet(j, _):
      buffer = turn[0]
      wait(buffer)
      self.copy(self.rows.lines, kv, spans, table, j, buffers.at[buffer])
      for i in queries:
        pl.when(j < tiles[i])(lambda: leave(buffer, i, begins[i] + j * self.tile).start())
        leaving[buffer, i] = (j < tiles[i]).astype(jnp.int32)
      turn[0] = 1 - buffer
      return 0

    jax.lax.fori_loop(0, functools.reduce(jnp.maximum, tiles), meet, 0)

    @pl.when(
        (pl.program_id(0) == pl.num_programs(0) - 1) & (pl.program_id(1) == pl.num_programs(1) - 1)
    )
    def _():
      wait(0)
      wait(1)


@dataclasses.dataclass(frozen=True)
class Fetch:
  """Brings rows together by SparseCores, [B, T, lines, N, 128], in the order of the slots."""

  rows: Rows
  n_keys: int
  n_rows: int  # Of a query, zeros behind its last slot among them: whole tiles.

  @classmethod
  def of(cls, rows: Rows, n_keys: int, n_slots: int, blocks) -> 'Fetch':
    tiles, tile = own_tiles(n_slots, rows, blocks)
    return cls(rows, n_keys, tiles * tile)

  @property
  def shards(self) -> Shards:
    """Keys, and a row of zeros for each slot that is empty: they come from many places."""
    return Shards(1, self.n_keys + self.n_rows, 0)

  def place(self, slots: jax.Array, shard: jax.Array, slot: jax.Array) -> jax.Array:
    """The row of a slot."""
    return slot

  def nothing(self, *queries: int) -> tuple[jax.Array, jax.Array]:
    """What `run` returns for queries [B, T] that select nothing."""
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


@dataclasses.dataclass(frozen=True)
class Scatter(ShardKernels):
  """Adds float32 rows, in the order in which keys were brought together, to sums of these.

  Its shards are parts of those that the rows were gathered from.
  """

  gather: Gather | Fetch

  @property
  def fetched(self) -> int:
    """Rows of a query that come to VMEM at one time."""
    return min(self.tile + ALIGNED, self.gather.n_rows)

  def run(self, slots: jax.Array, rows: jax.Array, sums: jax.Array) -> jax.Array:
    """Adds rows [B, T, N x lines, 128] of sorted slots [B, T, K] to `resident` sums."""
    lines = self.gather.rows.blocks
    parts = self.shards.n // self.gather.shards.n

    def step(shard, sums):
      first, _ = self.part(slots, shard)
      place = self.gather.place(slots, shard // parts, first)
      spans, table = self.scalars(shard, slots, lines)
      anywhere = pl.BlockSpec(memory_space=pl.ANY)
      more = resident.ADDED * resident.ADDS  # Rows that may be added to a spare row.
      buffers = 2, (self.step_t * self.fetched + more) * lines, LANES
      [sums] = self.call(
          self._add,
          'scatter_selected_rows',
          shard,
          [spans, table],
          [place.reshape(-1, 1, self.step_t), rows, sums],
          [pl.BlockSpec(memory_space=pltpu.SMEM), anywhere, anywhere],
          [anywhere],
          aliases={2: 0},
          scratch=[
              pltpu.VMEM(buffers, jnp.float32),
              pltpu.SemaphoreType.DMA((2,)),
              *self.sums(lines),
          ],
      )
      return sums

    return jax.lax.fori_loop(0, self.shards.n, step, sums)

  def _add(self, shard, spans, table, places, rows, _, new_sums, buffers, sems, *sums):
    """Adds the rows of a step's queries while those of the next step arrive."""
    lines, queries = self.gather.rows.blocks, range(self.step_t)
    size = self.fetched * lines
    b, t, n_steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    now = b * n_steps + t

    def begin(step, i, j):
      """The first row that is fetched for the j-th tile of query i, and the tile's first."""
      row = places[step, 0, i] + j * self.tile
      return jnp.minimum(row & -ALIGNED, self.gather.n_rows - self.fetched), row

    def fetch(b, t, step, j):
      for i in queries:
        at = pl.multiple_of(begin(step, i, j)[0] * lines, ALIGNED)
        source = rows.at[b, t * self.step_t + i, pl.ds(at, size)]
        target = buffers.at[step & 1, pl.ds(i * size, size)]
        pltpu.make_async_copy(source, target, sems.at[step & 1]).start()

    def meet(j, _):
      pl.when(j > 0)(lambda: fetch(b, t, now, j))
      all_queries = buffers.at[now & 1, pl.ds(0, self.step_t * size)]
      pltpu.make_async_copy(all_queries, all_queries, sems.at[now & 1]).wait()
      for i in queries:  # Two queries may add to the same row.
        fetched, row = begin(now, i, j)
        at = i * self.fetched + row - fetched
        n = jnp.clip(self._left(spans, i, j), 0, self.tile)
        table_of = self._table(spans, table, i, j)
        resident.add_rows(lines, buffers.at[now & 1], at, sums[0], table_of, n)
      return 0

    pl.when(now == 0)(lambda: fetch(0, 0, 0, 0))
    ends = t + 1 == n_steps
    next_b, next_t = jnp.where(ends, b + 1, b), jnp.where(ends, 0, t + 1)
    pl.when(next_b < pl.num_programs(0))(lambda: fetch(next_b, next_t, now + 1, 0))
    resident.fetch_sums(shard, new_sums, *sums)
    jax.lax.fori_loop(0, jnp.maximum(self.tiles(spans), 1), meet, 0)
    resident.store_sums(shard, new_sums, *sums)
