# SPDX-License-Identifier: Apache-2.0
"""The k highest of each row, exactly: a threshold by bisection, then the positions above it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.kernels.xla import set_bits

# A row of values is folded into so many rows of a multiple of so many lanes, and reduced over
# these rows first. XLA:CPU splits a reduction of more than 32 rows in two, which is slower.
_ROWS, _LANES = 8, 16


def best_positions(
    values: Float[Array, '... W'],
    k: int,
    *,
    spare: int = 0,
    floor: Float[Array, '...'] | None = None,
) -> Int[Array, '... {k}+{spare}']:
  """Returns the positions of the k highest values of each row, ascending, then -1.

  Ties at the cut go to the lowest position. -inf is never chosen. A row must not hold both +0 and
  -0. Up to `spare` of the next highest values may come along, which makes the cut easier to find.
  So does a `floor` that k values of the row are known to reach, or -inf.
  """
  widths = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % (_ROWS * _LANES))]
  values = jnp.pad(values, widths, constant_values=-jnp.inf)
  most = k + spare
  cut = threshold(values, k, most, floor)[..., None]
  above, tied = set_bits.pack(values > cut), set_bits.pack(values == cut)
  missing = most - jnp.sum(set_bits.count(above), axis=-1)
  return set_bits.positions(above | set_bits.keep_first(tied, missing), most)


def threshold(
    values: Float[Array, '... W'], least: int, most: int, floor: Float[Array, '...'] | None = None
) -> Float[Array, '...']:
  """Returns a value that `least` to `most` values of each row reach; where ties forbid it, the tie.

  Bisects integers that are ordered like the values, 32 times at most; a row that is decided
  earlier waits for the others. W is a multiple of 128.
  """
  lanes = lambda x: x.reshape(*x.shape[:-1], _ROWS, -1)

  def by_lane(reduce, x):
    """Reduces integers, as XLA:CPU does in the loop that makes them."""
    return _from_order(reduce(_to_order(lanes(x)), axis=-2))

  def count(chosen):
    held = jnp.sum(lanes(chosen), axis=-2, dtype=jnp.int32)
    return jnp.sum(held.astype(jnp.float32), axis=-1)  # Of another type, or both sums become one.

  def bisect(low, high, done):
    middle = (low >> 1) + (high >> 1) + (low & high & 1)
    n = count(values >= _from_order(middle)[..., None])
    low = jnp.where(~done & (n >= least), middle, low)
    high = jnp.where(~done & (n < least), middle, high)
    return low, high, done | ((n >= least) & (n <= most)) | (high <= low + 1)

  def settle_ties(low, high, done):
    """A row is decided if the lowest value left is one that it cannot do without."""
    left = jnp.where(values >= _from_order(low)[..., None], values, jnp.inf)
    lowest = jnp.min(left, axis=-1)
    tied = ~done & (count(values > lowest[..., None]) < least)
    return jnp.where(tied, _to_order(lowest), low), high, done | tied

  def step(state):
    i, *row = state
    return i + 1, *jax.lax.cond(i % 8 == 7, settle_ties, bisect, *row)

  lowest = by_lane(jnp.min, jnp.where(values > -jnp.inf, values, jnp.inf))
  highest = by_lane(jnp.max, values)
  low = jnp.min(lowest, axis=-1)
  low = low if floor is None else jnp.maximum(low, floor)
  if highest.shape[-1] >= least:
    low = jnp.maximum(low, jnp.min(highest, axis=-1))  # A value of each lane reaches it.
  done = count(values >= low[..., None]) <= most
  state = 0, _to_order(low), _to_order(jnp.max(highest, axis=-1)) + 1, done
  _, low, *_ = jax.lax.while_loop(lambda state: ~jnp.all(state[-1]), step, state)
  return _from_order(low)


def _to_order(x):
  """Turns float32 to int32 of the same order."""
  return _flip(jax.lax.bitcast_convert_type(x, jnp.int32))


def _from_order(x):
  return jax.lax.bitcast_convert_type(_flip(x), jnp.float32)


def _flip(bits):
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)
