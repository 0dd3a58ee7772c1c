# SPDX-License-Identifier: Apache-2.0
"""How many keys lie in VMEM at one time, and how many selected ones a query reads at one time."""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

from jax.experimental import pallas as pl

SPARE = 8  # Rows of zeros behind each shard. Slots of other shards point to them.
BEGIN = 128  # Rows that could be read in the time that a grid step takes to begin and to end.
ADDED = 8  # Rows of sums that are in registers at one time.
ADDS = 8  # Groups of `ADDED` rows between two branches.
TILE_BEGIN = 16  # Tokens that could be read in the time that a whole tile takes beside its tokens.


class Shards(NamedTuple):
  """Keys in n shards: each holds an equal share of them, and some of either neighbour's.

  A query reads keys that two shards have in either, so that its part of each makes whole tiles.
  """

  n: int
  share: int  # Keys from one border between shards to the next.
  reach: int  # Keys on each side of a border that both shards hold.

  @property
  def size(self) -> int:
    return self.share + self.reach * min(self.n - 1, 2)

  @property
  def stored(self) -> int:
    return self.size + SPARE

  @property
  def loose(self) -> bool:
    """Says whether tiles must have room to spare."""
    return self.n > 1 and not self.reach

  def begin(self, i):
    """Returns the first key of shard i."""
    return i * self.share - self.reach * (i > 0)


@dataclasses.dataclass(frozen=True)
class ShardPlan:
  """How a kernel with grid (batch, query steps) reads selected keys, shard after shard."""

  shards: Shards
  n_slots: int  # Selected keys of a query.
  step_t: int  # Query rows of a step of the grid.
  tile: int  # Selected rows of a query that are read at one time, a multiple of `line`.
  line: int  # Slots of a line. Tiles begin at lines, which have 128 slots on a chip.
  copied: int  # Rows that are copied between two branches, over all queries of a step.
  vmem: int  # Bytes of VMEM of the chip.

  def __post_init__(self):
    if self.tile % self.line:
      raise ValueError(f'tile={self.tile} must be a multiple of line={self.line}.')

  def grid(self, batch: int, n_queries: int) -> tuple[int, int]:
    return batch, n_queries // self.step_t

  def step_loops(self) -> list[tuple[int, float]]:
    """Returns the loops over grid steps and over tiles, as `KernelPlan.loops` has them."""
    n = self.shards.n
    tiles = n * math.ceil(self.n_slots / n / self.tile)
    return [(1, n / self.step_t), (2, tiles / self.step_t)]

  def copy_loops(self) -> list[tuple[int, float]]:
    """Returns the loops over groups of rows of a tile: those copied, and those cleared.

    All queries of a step copy as many groups as the one that needs most.
    """
    n = self.shards.n
    slots, group = self.n_slots / n, math.gcd(max(self.copied // self.step_t, 1), self.tile)
    most = slots + math.sqrt(slots * (1 - 1 / n)) * self.shards.loose
    copied, all_groups = math.ceil(most / group), math.ceil(slots / self.tile) * self.tile / group
    return [(3, n * groups / self.step_t) for groups in (copied, all_groups - copied)]

  def add_loops(self) -> list[tuple[int, float]]:
    """Returns a loop for each query of a step over the groups of rows that it adds.

    Where slots are not in whole tiles, half a group is in vain.
    """
    groups = self.n_slots / self.shards.n / (ADDED * ADDS)
    groups = groups + 0.5 if self.shards.loose else math.ceil(groups)
    return [(3, self.shards.n * groups / self.step_t)] * self.step_t

  def whole_tile_loops(self) -> list[tuple[int, float]]:
    """Returns the loops over grid steps and over tiles that are read without branches."""
    n = self.shards.n
    tiles = expected_tiles(self.n_slots, n, self.tile, self.step_t)
    return [(1, n / self.step_t), (2, n * tiles / self.step_t)]


def plan_shards(n_keys: int, n_slots: int, bytes_per_key: int, vmem: int, blocks) -> ShardPlan:
  """Returns how a kernel reads the keys that `fit_shards` puts into VMEM.

  Args:
    n_keys: Keys of a sequence.
    n_slots: Selected keys of a query.
    bytes_per_key: Bytes of VMEM that a key takes, with its gradient where there is one.
    vmem: Bytes of VMEM of the chip.
    blocks: The op's block sizes, as `fit_chip` returns them.
  """
  shards, tile = fit_shards(n_keys, n_slots, bytes_per_key, vmem, blocks)
  return ShardPlan(shards, n_slots, blocks.step_t, tile, blocks.line, blocks.copied, vmem)


def fit_chip(blocks, vmem: int):
  """Returns the block sizes for a chip: half as many queries side by side below 128 MiB of VMEM."""
  if vmem >= 128 * 2**20:
    return blocks
  return dataclasses.replace(blocks, step_t=max(blocks.step_t // 2, 1))


def fit_shards(n_keys: int, n_slots: int, bytes_per_key: int, vmem: int, blocks):
  """Returns the shards that minimise rows copied plus overhead per step, and their tile's rows.

  Where it fits, a shard has its neighbours' keys within three standard deviations of where evenly
  spread slots end. Where it does not, tiles have room for three more.
  """
  most = most_keys(bytes_per_key, vmem, blocks)
  fewest = pl.cdiv(n_keys, most)
  reach = eights(math.ceil(1.5 * n_keys / math.sqrt(n_slots)))
  options = []
  for n in range(fewest, 2 * fewest + 1):
    share = eights(pl.cdiv(n_keys, n))
    for shards in (Shards(n, share, 0), Shards(n, share, reach)):
      if shards.size <= most and 2 * shards.reach <= share:
        tiles, tile = fit_tile(n_slots, shards, blocks)
        options.append((n * (tiles * tile + BEGIN), shards, tile))
  _, shards, tile = min(options)
  return shards, tile


def plan_whole_tiles(n_keys: int, n_slots: int, bytes_per_key: int, vmem: int, blocks) -> ShardPlan:
  """Returns the shards and the tile that take least where tiles are whole and begin anywhere.

  The arguments are those of `plan_shards`.
  """
  fewest = pl.cdiv(n_keys, most_keys(bytes_per_key, vmem, blocks))
  options = []
  for n in range(fewest, 2 * fewest):
    for tile in range(min(ADDED, blocks.tile), blocks.tile + 1, ADDED):
      tiles = expected_tiles(n_slots, n, tile, blocks.step_t)
      options.append((n * (tiles * (tile + TILE_BEGIN) + SPARE), n, tile))
  _, n, tile = min(options)
  shards = Shards(n, eights(pl.cdiv(n_keys, n)), 0)
  return ShardPlan(shards, n_slots, blocks.step_t, tile, 1, 0, vmem)


def expected_tiles(n_slots: int, n_shards: int, tile: int, step_t: int) -> float:
  """Returns how many tiles that query of a step has in a shard which has most slots there.

  Slots are spread evenly at random: the number of a query's slots in a shard is binomial.
  """
  if n_shards == 1:
    return float(math.ceil(n_slots / tile))
  at_most = _chances(n_slots, n_shards)
  return sum(1 - at_most[n] ** step_t for n in range(0, n_slots, tile))


@functools.cache
def _chances(n_slots: int, n_shards: int) -> list[float]:
  """Returns the chance that a shard has at most n of the slots, for each n."""

  def chance(n: int) -> float:
    ways = math.lgamma(n_slots + 1) - math.lgamma(n + 1) - math.lgamma(n_slots - n + 1)
    return math.exp(ways + (n_slots - n) * math.log1p(-1 / n_shards) - n * math.log(n_shards))

  return [min(x, 1.0) for x in itertools.accumulate(map(chance, range(n_slots)))]


def most_keys(bytes_per_key: int, vmem: int, blocks) -> int:
  """Returns how many keys a shard may have."""
  return max(int(blocks.vmem_share * vmem) // bytes_per_key - SPARE, SPARE) // 8 * 8


def fit_tile(n_slots: int, shards: Shards, blocks) -> tuple[int, int]:
  """Returns how many even tiles hold a query's part of a shard, and their rows."""
  mean = n_slots / shards.n
  spare = 0 if shards.reach else 3 * math.sqrt(mean * (1 - 1 / shards.n))
  return even_tiles(math.ceil(mean + spare), blocks.tile, blocks.line)


def even_tiles(n: int, most: int, line: int) -> tuple[int, int]:
  """Returns the fewest even tiles of whole lines that hold n rows, and the rows of each."""
  tiles = pl.cdiv(n, most)
  return tiles, pl.cdiv(pl.cdiv(n, tiles), line) * line


def eights(n: int) -> int:
  return pl.cdiv(n, 8) * 8
