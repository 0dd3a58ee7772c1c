# SPDX-License-Identifier: Apache-2.0
"""How sorted rows are cut into tiles of one group each."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Turns(NamedTuple):
  """Tiles of rows, each of which starts where its group starts, or a multiple of a tile later."""

  group: Int[Array, 'U']
  first: Int[Array, 'U']  # The first row of each tile.
  end: Int[Array, 'U']  # One past its group's last row. The tile may reach beyond.
  used: Int[Array, '']  # How many tiles there are; the others have no rows.


def cut(sizes: Int[Array, 'X'], n_rows: int, tile: int) -> Turns:
  """Returns the tiles of all groups, in the order of their rows.

  Args:
    sizes: Rows of each group.
    n_rows: What the sizes add up to at most.
    tile: Rows of a tile.
  """
  end = jnp.cumsum(sizes)
  tiles = -(-sizes // tile)
  up_to = jnp.cumsum(tiles)
  turn = jnp.arange(n_rows // tile + min(len(sizes), n_rows), dtype=jnp.int32)
  groups = jnp.arange(len(sizes), dtype=jnp.int32)
  group = jnp.repeat(groups, tiles, total_repeat_length=len(turn))
  first = (end - sizes)[group] + (turn - (up_to - tiles)[group]) * tile
  is_used = turn < up_to[-1]
  return Turns(group, jnp.where(is_used, first, n_rows), jnp.where(is_used, end[group], 0), up_to[-1])
