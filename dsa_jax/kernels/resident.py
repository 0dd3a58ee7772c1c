# SPDX-License-Identifier: Apache-2.0
"""Selected keys on a TPU: shards of keys lie in VMEM, and kernels copy the rows a query selects.

A row copied within VMEM takes about two cycles, one fetched from HBM by its own DMA twenty or more.
A shard is as many keys as VMEM holds; a long context is a few shards, one after the other. A row
lies in whole lines of 128 words, two 16-bit channels to a word, so that a copy is one load and
one store, and cost depends on what is selected, neither on where nor on what neighbours select.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SPARE = 8  # Rows of zeros behind each shard, where slots of other shards point.
ADDED = 16  # Rows of sums whose loads precede all stores.


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


class Shards(NamedTuple):
  """How many keys lie in VMEM at one time, and how many times."""

  n: int
  size: int

  @property
  def stored(self) -> int:
    return self.size + SPARE


def make_shards(n_keys: int, bytes_per_key: int, budget: int) -> Shards:
  """Even shards, as few as the budget of VMEM bytes allows."""
  most = max(budget // bytes_per_key - SPARE, SPARE)
  n = pl.cdiv(n_keys, most)
  return Shards(n, pl.cdiv(pl.cdiv(n_keys, n), 8) * 8)


def fit_tile(tile: int, n_slots: int, shards: Shards) -> int:
  """A tile no larger than what a query has of a shard, where its slots are spread evenly."""
  return min(tile, pl.cdiv(pl.cdiv(n_slots, shards.n), LANES) * LANES)


def fit_group(group: int, tile: int) -> int:
  """A group of at most a quarter of a tile, which a small tile would not fill."""
  return min(group, pl.cdiv(tile, 4))


def fit_added(group: int) -> int:
  """Rows that are added between two branches: all of them are in registers."""
  return min(group, ADDED)


def vmem_bytes() -> int:
  """What the chip has; the least of all chips where there is none to ask."""
  return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else 64 * 2**20


def pad_channels(x: jax.Array) -> jax.Array:
  """Zeros up to whole blocks of 128 channels."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])


def pack(x: jax.Array, shards: Shards) -> jax.Array:
  """Keys [B, S, E] to [B, shards, lines, 128] as `Rows` has them, spare rows of zeros behind."""
  rows = Rows(x.shape[-1], x.dtype)
  words = rows.words
  x = jnp.pad(pad_channels(x), [(0, 0), (0, shards.n * shards.size - x.shape[1]), (0, 0)])
  x = x.reshape(x.shape[0], shards.n, shards.size, rows.blocks, LANES)
  fill = rows.lines * words.itemsize // x.dtype.itemsize - rows.blocks
  x = jnp.pad(x, [(0, 0), (0, 0), (0, SPARE), (0, fill), (0, 0)])
  if x.dtype.itemsize == 2:
    halves = jnp.split(jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32), 2, axis=3)
    x = jax.lax.bitcast_convert_type(halves[0] | halves[1] << 16, words)
  return x.reshape(x.shape[0], shards.n, shards.stored * rows.lines, LANES)


def sums_shape(packed: jax.Array, rows: Rows, shards: Shards) -> tuple[int, ...]:
  """The shape of float32 sums for packed keys."""
  return (*packed.shape[:2], shards.stored * rows.blocks, LANES)


def unpack_sums(x: jax.Array, shards: Shards, n_keys: int, width: int) -> jax.Array:
  """float32 sums [B, shards, lines, 128], laid out like packed float32 keys, to [B, S, width]."""
  x = x.reshape(x.shape[0], shards.n, shards.stored, -1)[:, :, : shards.size]
  return x.reshape(x.shape[0], -1, x.shape[-1])[:, :n_keys, :width]


def sort_slots(indices: jax.Array, n_keys: int) -> jax.Array:
  """Indices in ascending order, empty slots last and as the largest int32."""
  empty = jnp.iinfo(jnp.int32).max
  slots = jnp.where((indices >= 0) & (indices < n_keys), indices, empty)
  ascending = jnp.all(slots[..., 1:] >= slots[..., :-1])
  return jax.lax.cond(ascending, lambda x: x, functools.partial(jnp.sort, axis=-1), slots)


def locate(slots: jax.Array, shard: jax.Array, shards: Shards, tile: int):
  """Where a shard's rows are among sorted slots [B, T, K], and where those rows lie in the shard.

  Returns:
    The first slot and one past the last, [B, T, 2]; rows within the shard, [B, T, K + tile],
    those of other shards and the padding pointing to spare rows.
  """
  begin = shard * shards.size
  count = lambda bound: jnp.sum(slots < bound, axis=-1, dtype=jnp.int32)
  spans = jnp.stack([count(begin), count(begin + shards.size)], axis=-1)
  local = jnp.where(slots < begin + shards.size, slots - begin, shards.size)
  local = jnp.maximum(local, 0)  # Of earlier shards: never read.
  return spans, jnp.pad(local, [(0, 0), (0, 0), (0, tile)], constant_values=shards.size)


@dataclasses.dataclass(frozen=True)
class ShardKernels:
  """What kernels share whose grid is (batch, steps of a few queries) and that meet one shard.

  Their scalars say, for each query, which slots are of the shard and where those rows begin.
  """

  shards: Shards
  step_t: int  # Query rows of a step of the grid.
  tile: int  # Selected rows that are met at one time.
  group: int  # Rows copied between two branches.

  def __post_init__(self):
    if self.tile % self.group:
      raise ValueError(f'tile={self.tile} must be a multiple of group={self.group}.')

  def scalars(self, shard: jax.Array, slots: jax.Array, *lines: int) -> list[jax.Array]:
    """Spans, then slots as lines of arrays of so many lines a row; a step's queries in a row."""
    spans, local = locate(slots, shard, self.shards, self.tile)
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
    return pltpu.VMEM((self.tile * lines, LANES), dtype)

  def sums(self, lines: int) -> list:
    """What `fetch_sums` needs: sums of a shard, and its semaphore."""
    sums = pltpu.VMEM((self.shards.stored * lines, LANES), jnp.float32)
    return [sums, pltpu.SemaphoreType.DMA]

  def tiles(self, spans, i) -> jax.Array:
    """How many tiles query i of a step has."""
    return pl.cdiv(spans[0, 0, 0, 2 * i + 1] - spans[0, 0, 0, 2 * i], self.tile)

  def filled(self, spans, i, j) -> jax.Array:
    """How many rows its j-th tile has."""
    left = spans[0, 0, 0, 2 * i + 1] - spans[0, 0, 0, 2 * i] - j * self.tile
    return jnp.minimum(left, self.tile)

  def seen(self, spans, i, j) -> jax.Array:
    """Which rows of the tile are no filling, [1, tile]."""
    return jax.lax.broadcasted_iota(jnp.int32, (1, self.tile), 1) < self.filled(spans, i, j)

  def read(self, rows: Rows, shard, spans, lines, i, j, buffer) -> jax.Array:
    """Copies the j-th tile of query i and returns it as [tile, channels], zeros as filling."""
    n = self.filled(spans, i, j)
    lines = self._lines(spans, lines, i, j)
    copy_rows(rows.lines, shard.at[0, 0], buffer, lines, n, self.group)
    return read_rows(rows, buffer, n, self.tile)

  def add(self, x: jax.Array, buffer, sums, spans, lines, i, j):
    """Adds float32 [tile, channels] to the rows of the j-th tile of query i."""
    write_sums(buffer, x)
    n = self.filled(spans, i, j)
    lines = self._lines(spans, lines, i, j)
    add_rows(x.shape[1] // LANES, buffer, sums, lines, n, fit_added(self.group))

  def _lines(self, spans, lines, i, j):
    """Where n rows of that tile begin, from a row on: a function of that row and of n."""
    tile = i * (lines.shape[3] // self.step_t) + spans[0, 0, 0, 2 * i] + j * self.tile

    def of_group(row, n):
      first = tile + row  # One sum for all of them: copies wait for the scalar unit.
      return [lines[0, 0, 0, first + r] for r in range(n)]

    return of_group


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


def copy_rows(lines: int, source, target, lines_of_group, n, group: int):
  """Copies n rows of a shard to the start of a buffer.

  Rows go in groups without a branch; up to group - 1 more are copied. Those of the group from the
  i-th row on begin at `lines_of_group(i, group)`.
  """

  def copy(g, _):
    for r, at in enumerate(lines_of_group(g * group, group)):
      target[pl.ds((g * group + r) * lines, lines), :] = source[pl.ds(at, lines), :]
    return 0

  jax.lax.fori_loop(0, pl.cdiv(n, group), copy, 0)


def add_rows(lines: int, source, target, lines_of_group, n, group: int):
  """Adds n float32 rows of a buffer to rows of a shard of sums; see `copy_rows`.

  The rows of a group are distinct, but for spare ones: all loads may precede all stores.
  """

  def add(g, _):
    at = lines_of_group(g * group, group)
    rows = [source[pl.ds((g * group + r) * lines, lines), :] for r in range(group)]
    sums = [target[pl.ds(at, lines), :] + row for at, row in zip(at, rows)]
    for i, x in zip(at, sums):
      target[pl.ds(i, lines), :] = x
    return 0

  jax.lax.fori_loop(0, pl.cdiv(n, group), add, 0)


def read_rows(rows: Rows, buffer, n, tile: int) -> jax.Array:
  """The first n of `tile` rows of a buffer as [tile, channels], zeros behind them."""
  lines = [buffer[pl.ds(c, tile, stride=rows.lines), :] for c in range(rows.lines)]
  filled = jax.lax.broadcasted_iota(jnp.int32, (tile, LANES), 0) < n
  lines = [jnp.where(filled, x, 0) for x in lines]
  if rows.dtype.itemsize == 2:
    low = [_upper_half(x << 16, rows.dtype) for x in lines]
    high = [_upper_half(x & jnp.int32(-65536), rows.dtype) for x in lines]
    lines = (low + high)[: rows.blocks]
  return jnp.concatenate(lines, axis=1)


def write_sums(buffer, x: jax.Array):
  """Writes [tile, channels] float32 to a buffer, row by row."""
  tile, blocks = x.shape[0], x.shape[1] // LANES
  for c in range(blocks):
    buffer[pl.ds(c, tile, stride=blocks), :] = x[:, c * LANES : (c + 1) * LANES]


def _upper_half(words, dtype):
  """The bfloat16 in the upper half of words whose lower half is zero."""
  return jax.lax.bitcast_convert_type(words, jnp.float32).astype(dtype)
