# SPDX-License-Identifier: Apache-2.0
"""Selected keys on a TPU: shards of keys lie in VMEM, and kernels copy the rows a query selects.

A row copied within VMEM takes 1.2 cycles, one fetched from HBM by its own DMA twenty or more. A
shard is as many keys as VMEM holds; a long context is a few shards, one after the other. A row
lies in whole lines of 128 words, two 16-bit channels to a word, so that a copy is one load and
one store, and cost depends on what is selected, neither on where nor on what neighbours select.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from dsa_jax.kernels.tpu.shards import SPARE, Shards

LANES = 128
ADDED = 8  # Rows of sums in registers at one time,
ADDS = 8  # and how many times between two branches.


class Rows(NamedTuple):
  """How one row of `width` channels lies in VMEM: `lines` lines of 128 words of 32 bits."""

  width: int
  dtype: jnp.dtype

  @property
  def blocks(self) -> int:
    """Blocks of 128 channels."""
    return pl.cdiv(self.width, LANES)

  @property
  def lines(self) -> int:
    return pl.cdiv(self.blocks * self.dtype.itemsize, 4)

  @property
  def channels(self) -> int:
    """The width that kernels compute with."""
    return self.blocks * LANES

  @property
  def words(self) -> jnp.dtype:
    """What a packed row is made of."""
    if self.dtype not in (jnp.bfloat16, jnp.float32):
      raise ValueError(f'keys on a TPU must be bfloat16 or float32; got {self.dtype}.')
    return jnp.dtype(jnp.int32) if self.dtype.itemsize == 2 else self.dtype

  @property
  def bytes(self) -> int:
    return self.lines * LANES * 4


def vmem_bytes() -> int:
  """What the chip has; the least of all chips where there is none to ask."""
  return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else 64 * 2**20


def fit_chip(blocks, vmem: int):
  """Block sizes for a chip's bytes of VMEM: half as many queries side by side below 128 MiB."""
  if vmem >= 128 * 2**20:
    return blocks
  return dataclasses.replace(blocks, step_t=max(blocks.step_t // 2, 1))


def pad_channels(x: jax.Array) -> jax.Array:
  """Zeros up to whole blocks of 128 channels."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])


def pack(x: jax.Array, shards: Shards) -> jax.Array:
  """Keys [B, S, E] to [B, shards, lines, 128] as `Rows` has them, spare rows of zeros behind."""
  rows = Rows(x.shape[-1], x.dtype)
  words = rows.words
  begins = [shards.begin(i) for i in range(shards.n)]
  x = jnp.pad(pad_channels(x), [(0, 0), (0, begins[-1] + shards.size - x.shape[1]), (0, 0)])
  x = jnp.stack([x[:, i : i + shards.size] for i in begins], axis=1)
  x = x.reshape(*x.shape[:3], rows.blocks, LANES)
  fill = rows.lines * words.itemsize // x.dtype.itemsize - rows.blocks
  x = jnp.pad(x, [(0, 0), (0, 0), (0, SPARE), (0, fill), (0, 0)])
  if x.dtype.itemsize == 2:
    halves = jnp.split(jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32), 2, axis=3)
    x = jax.lax.bitcast_convert_type(halves[0] | halves[1] << 16, words)
  return x.reshape(x.shape[0], shards.n, shards.stored * rows.lines, LANES)


def zero_sums(batch: int, rows: Rows, shards: Shards) -> jax.Array:
  """float32 sums for packed keys, [B, shards, lines, 128]."""
  return jnp.zeros((batch, shards.n, shards.stored * rows.blocks, LANES))


def unpack_sums(x: jax.Array, shards: Shards, n_keys: int, width: int) -> jax.Array:
  """float32 sums [B, shards, lines, 128], laid out like packed float32 keys, to [B, S, width]."""
  x = x.reshape(x.shape[0], shards.n, shards.stored, -1)[:, :, : shards.size, :width]
  begins = [shards.begin(i) for i in range(shards.n)]
  total = jnp.zeros((x.shape[0], begins[-1] + shards.size, width))
  for i, begin in enumerate(begins):
    total = total.at[:, begin : begin + shards.size].add(x[:, i])
  return total[:, :n_keys]


def sort_slots(indices: jax.Array, n_keys: int) -> jax.Array:
  """Indices in ascending order, empty slots last and as the largest int32."""
  empty = jnp.iinfo(jnp.int32).max
  slots = jnp.where((indices >= 0) & (indices < n_keys), indices, empty)
  ascending = jnp.all(slots[..., 1:] >= slots[..., :-1])
  return jax.lax.cond(ascending, lambda x: x, functools.partial(jnp.sort, axis=-1), slots)


def split(slots: jax.Array, i: jax.Array, shards: Shards, units: tuple[int, ...]) -> jax.Array:
  """How many of sorted slots [B, T, K] are met before shard i.

  What is in reach may be met on either side: a multiple of the last unit that this allows.
  """
  count = lambda bound: jnp.sum(slots < bound, axis=-1, dtype=jnp.int32)
  border, reach = i * shards.share, shards.reach * ((i > 0) & (i < shards.n))
  least = n = count(border - reach)
  most = count(border + reach)
  for unit in units:
    whole = most // unit * unit
    n = jnp.where(whole >= least, whole, n)
  return n


def locate(slots: jax.Array, shard: jax.Array, part, shards: Shards, line: int, tile: int):
  """Where a shard's rows are among sorted slots [B, T, K], and where those rows lie in the shard.

  Returns:
    The first slot of the shard, at the beginning of a line, and how many there are, [B, T, 2];
    rows within the shard, [B, T, a line and a tile more than K], others pointing to a spare row.
  """
  first, end = part
  slot = jnp.arange(slots.shape[-1])
  met = (slot >= first[..., None]) & (slot < end[..., None])
  local = jnp.where(met, slots - shards.begin(shard), shards.size)
  padding = -slots.shape[-1] % line + line + tile
  local = jnp.pad(local, [(0, 0), (0, 0), (0, padding)], constant_values=shards.size)
  right = -first % line
  return jnp.stack([first + right, end - first], axis=-1), shift(local, right, line)


def shift(x: jax.Array, places: jax.Array, line: int) -> jax.Array:
  """Rolls rows [..., N] to the right, each by its own number of places, fewer than a line."""

  def step(i, x):
    moves = (places >> i & 1)[..., None] == 1
    return jnp.where(moves, jnp.roll(x, 1 << i, axis=-1), x)

  return jax.lax.fori_loop(0, (line - 1).bit_length(), step, x)


@dataclasses.dataclass(frozen=True)
class ShardKernels:
  """What kernels share whose grid is (batch, steps of a few queries) and that meet one shard.

  The queries of a step go side by side, tile by tile. Their scalars say, for each query, which
  slots are of the shard and where those rows begin.
  """

  shards: Shards
  step_t: int  # Query rows of a step of the grid.
  tile: int  # Selected rows of a query that are met at one time: whole lines.
  line: int  # Slots of a line, where tiles may begin; LANES on a chip.
  copied: int  # Rows copied between two branches, of all queries of a step.

  def __post_init__(self):
    if self.tile % self.line:
      raise ValueError(f'tile={self.tile} must be a multiple of line={self.line}.')

  def part(self, slots: jax.Array, shard: jax.Array) -> list[jax.Array]:
    """The first of sorted slots [B, T, K] that is met in a shard, and the first behind them."""
    units = self.line, self.tile
    return [split(slots, shard + i, self.shards, units) for i in (0, 1)]

  def scalars(self, shard: jax.Array, slots: jax.Array, *lines: int) -> list[jax.Array]:
    """Spans, then slots as lines of arrays of so many lines a row; a step's queries in a row."""
    part = self.part(slots, shard)
    spans, local = locate(slots, shard, part, self.shards, self.line, self.tile)
    scalars = [spans, *(local * n for n in lines)]
    return [x.reshape(x.shape[0], -1, 1, self.step_t * x.shape[2]) for x in scalars]

  def call(self, kernel, name, shard, scalars, inputs, in_specs, out_specs, *, aliases, scratch):
    """Runs a kernel; `aliases` says which of the inputs become which outputs."""
    index = lambda b, t, _: (b, t, 0, 0)
    smem = lambda x: pl.BlockSpec((1, 1, *x.shape[2:]), index, memory_space=pltpu.SMEM)
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=scalars[0].shape[:2],
            in_specs=[*map(smem, scalars), *in_specs],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(inputs[i].shape, inputs[i].dtype) for i in aliases],
        input_output_aliases={1 + len(scalars) + i: to for i, to in aliases.items()},
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=int(0.95 * vmem_bytes()), disable_bounds_checks=True
        ),
        name=name,
    )
    return call(jnp.reshape(shard, 1), *scalars, *inputs)

  def queries(self, x: jax.Array) -> pl.BlockSpec:
    """A step's part of what is [B, T, ...]."""
    rest = x.shape[2:]
    return pl.BlockSpec((1, self.step_t, *rest), lambda b, t, _: (b, t, *[0] * len(rest)))

  def shard(self, packed: jax.Array) -> pl.BlockSpec:
    """The shard of packed keys, fetched once."""
    index = lambda b, t, shard: (b, shard[0], 0, 0)
    return pl.BlockSpec((1, 1, *packed.shape[2:]), index, pipeline_mode=pl.Buffered(1))

  def buffer(self, lines: int, dtype):
    """A tile of each query of a step, one after the other."""
    return pltpu.VMEM((self.step_t * self.tile * lines, LANES), dtype)

  def sums(self, lines: int) -> list:
    """What `fetch_sums` needs: sums of a shard, and its semaphore."""
    sums = pltpu.VMEM((self.shards.stored * lines, LANES), jnp.float32)
    return [sums, pltpu.SemaphoreType.DMA]

  def tiles(self, spans) -> jax.Array:
    """How many tiles the queries of a step have, the most of any."""
    return pl.cdiv(self._most(spans), self.tile)

  def seen(self, spans, i, j) -> jax.Array:
    """Which rows of the j-th tile of query i are of the shard, [1, tile]; others are zeros."""
    row = jax.lax.broadcasted_iota(jnp.int32, (1, self.tile), 1)
    return row < self._left(spans, i, j)

  def copy(self, lines: int, shard, spans, table, j, buffer):
    """Copies the j-th tile of every query, and zeros behind its last row."""
    tables = [self._table(spans, table, i, j) for i in range(self.step_t)]
    n = self._most(spans) - j * self.tile
    copy_rows(lines, shard.at[0, 0], buffer, tables, n, self.copied)

  def read(self, rows: Rows, buffer, i: int) -> jax.Array:
    """The copied tile of query i, [tile, channels]."""
    return read_rows(rows, buffer, i * self.tile, self.tile)

  def add(self, lines: int, buffer, sums, spans, table, i: int, j):
    """Adds a tile of float32 rows, written for query i, to the rows of its j-th tile."""
    table = self._table(spans, table, i, j)
    n = jnp.clip(self._left(spans, i, j), 0, self.tile)
    add_rows(lines, buffer, i * self.tile, sums, table, n)

  def _span(self, spans, i: int):
    """Query i's first slot of the shard, and how many it has."""
    return spans[0, 0, 0, 2 * i], spans[0, 0, 0, 2 * i + 1]

  def _most(self, spans):
    """How many slots of the shard a query of the step has, the most of any."""
    return functools.reduce(jnp.maximum, [self._span(spans, i)[1] for i in range(self.step_t)])

  def _left(self, spans, i: int, j):
    """How many slots of query i there are from its j-th tile on."""
    return self._span(spans, i)[1] - j * self.tile

  def _table(self, spans, table, i: int, j):
    """The lines where the rows of the j-th tile of query i begin; spare rows' behind its last."""
    n_slots = table.shape[3] // self.step_t
    slot = jnp.minimum(self._span(spans, i)[0] + j * self.tile, n_slots - self.tile)
    begin = pl.multiple_of(i * n_slots + slot, self.line)
    return table.at[0, 0, 0, pl.ds(begin, self.tile)]


def fetch_sums(shard, in_hbm, sums, sem):
  """In the first step of each sequence, brings the sums of earlier blocks of queries to VMEM."""

  @pl.when(pl.program_id(1) == 0)
  def _():
    pltpu.async_copy(in_hbm.at[pl.program_id(0), shard[0]], sums, sem).wait()


def store_sums(shard, in_hbm, sums, sem):
  """In its last step, takes them back."""

  @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
  def _():
    pltpu.async_copy(sums, in_hbm.at[pl.program_id(0), shard[0]], sem).wait()


def dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
  """A product over one axis of each, summed in float32."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  dims = ((x_axis,), (y_axis,)), ((), ())
  return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def copy_rows(lines: int, source, target, tables, n, between: int):
  """Copies n rows or a few more that begin at the lines of each table, one table behind the other.

  The scalar unit is what copies wait for: an address is a sum, a load and a sum. The first is the
  same in all tables, which hence take turns, row by row. Behind the copied rows are zeros.
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

  These are distinct; a few behind them may be added, where the table points to a spare row. So
  the loads of some may precede the stores of those before them.
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


def overlap(start, finish, n: int) -> list:
  """Finishes n pieces of work, each after the next was started.

  The matrix unit keeps the order of the program: so it has the next piece's products while the
  vector unit is at this one's. Memory does: so the next loads need not wait for these stores.
  """
  started, results = [start(0)], []
  for i in range(n):
    if i + 1 < n:
      started.append(start(i + 1))
    results.append(finish(i, *started[i]))
  return results


def read_rows(rows: Rows, buffer, begin: int, n: int) -> jax.Array:
  """n rows of a buffer from `begin` on as [n, channels]."""
  first = begin * rows.lines
  line = lambda c: buffer[pl.ds(first + c, n, stride=rows.lines), :]
  return unpack(rows, [line(c) for c in range(rows.lines)])


def unpack(rows: Rows, lines: list[jax.Array]) -> jax.Array:
  """[n, channels] of the lines of n rows, [n, 128] each."""
  if rows.dtype.itemsize == 2:
    low = [_upper_half(x << 16, rows.dtype) for x in lines]
    high = [_upper_half(x & jnp.int32(-65536), rows.dtype) for x in lines]
    lines = (low + high)[: rows.blocks]
  return jnp.concatenate(lines, axis=1)


def write_rows(buffer, begin: int, x: jax.Array):
  """Writes [n, channels] float32 to a buffer, row by row, from row `begin` on."""
  n, blocks = x.shape[0], x.shape[1] // LANES
  for c in range(blocks):
    buffer[pl.ds(begin * blocks + c, n, stride=blocks), :] = x[:, c * LANES : (c + 1) * LANES]


def _upper_half(words, dtype):
  """The bfloat16 in the upper half of words whose lower half is zero."""
  return jax.lax.bitcast_convert_type(words, jnp.float32).astype(dtype)
