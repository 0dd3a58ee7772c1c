# SPDX-License-Identifier: Apache-2.0
"""The keys that a block of query rows meets: block after block of all keys, or their selections."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsa_jax.kernels.visibility import visible_keys
from dsa_jax.kernels.xla.rows import (
    add_block,
    gather_rows,
    key_range,
    pad_axis,
    scatter_rows,
    take_block,
)


class Keys(NamedTuple):
  k: jax.Array  # [B, S, G, E], or each query's own [B, T, S, G, E]; so with `index_k`.
  index_k: jax.Array
  seen: jax.Array  # [B, T, S]
  place: jax.Array | int  # The number of the block, or the indices of the selection.

  @property
  def own(self) -> bool:
    return self.index_k.ndim == 4

  def add_to(self, x: jax.Array, dkeys: jax.Array) -> jax.Array:
    return scatter_rows(x, self.place, dkeys) if self.own else add_block(x, self.place, dkeys)


def over_keys(
    meet: Callable, state: Any, k, index_k, start, end, indices, block: int
) -> Any:
  """Runs `state = meet(keys, state)` over the keys that a block of rows sees; S is padded."""
  n_keys = k.shape[1]
  if indices is not None:
    seen = (indices >= jnp.maximum(start, 0)[..., None]) & (indices < end[..., None])
    seen &= indices < n_keys
    return meet(Keys(gather_rows(k, indices), gather_rows(index_k, indices), seen, indices), state)

  def step(j, state):
    seen = visible_keys(start, jnp.minimum(end, n_keys), j * block + jnp.arange(block))
    return meet(Keys(take_block(k, j, block), take_block(index_k, j, block), seen, j), state)

  k, index_k = pad_axis(k, 1, block), pad_axis(index_k, 1, block)
  first, last = key_range(start, end, n_keys, block)
  return jax.lax.fori_loop(first, last, step, state)
