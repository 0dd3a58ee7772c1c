# SPDX-License-Identifier: Apache-2.0
"""How many keys lie in VMEM at one time, and how many selected ones a query meets at one time."""

import math
from typing import NamedTuple

from jax.experimental import pallas as pl

SPARE = 8  # Rows of zeros behind each shard, where slots of other shards point.
BEGIN = 128  # Rows that could be met in the time that a step takes to begin and to end.


class Shards(NamedTuple):
  """Keys that lie in VMEM at one time: n shares of all, and what is in reach of either neighbour's.

  A query meets the latter in one of two shards, so that what it has of each makes whole tiles.
  """

  n: int
  share: int
  reach: int

  @property
  def size(self) -> int:
    return self.share + self.reach * min(self.n - 1, 2)

  @property
  def stored(self) -> int:
    return self.size + SPARE

  @property
  def loose(self) -> bool:
    """Whether tiles must have room to spare."""
    return self.n > 1 and not self.reach

  def begin(self, i):
    """The first key of shard i."""
    return i * self.share - self.reach * (i > 0)


def fit_shards(n_keys: int, n_slots: int, bytes_per_key: int, vmem: int, blocks):
  """Chooses shards that fit, and tiles for them: as little to copy and to begin as may be.

  Three standard deviations of where slots lie, any in any place, are in reach where that fits,
  and a shard has its part of them. Where it does not, tiles have room for three more.

  Returns:
    Shards, and the rows of a tile.
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


def most_keys(bytes_per_key: int, vmem: int, blocks) -> int:
  """Keys of a shard that fit."""
  return max(int(blocks.vmem_share * vmem) // bytes_per_key - SPARE, SPARE) // 8 * 8


def fit_tile(n_slots: int, shards: Shards, blocks) -> tuple[int, int]:
  """Even tiles for a query's part of a shard: how many, and their rows."""
  mean = n_slots / shards.n
  spare = 0 if shards.reach else 3 * math.sqrt(mean * (1 - 1 / shards.n))
  return even_tiles(math.ceil(mean + spare), blocks.tile, blocks.line)


def even_tiles(n: int, most: int, line: int) -> tuple[int, int]:
  """As few even tiles of whole lines for n rows as may be: how many, and their rows."""
  tiles = pl.cdiv(n, most)
  return tiles, pl.cdiv(pl.cdiv(n, tiles), line) * line


def eights(n: int) -> int:
  return pl.cdiv(n, 8) * 8
