# SPDX-License-Identifier: Apache-2.0
"""Draws tokens from logits. Nothing here sorts the vocabulary."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dsa_jax.kernels.xla.rows import pad_axis

BLOCK = 256  # Ids whose weights are summed first; the sums are then summed.


def draw(
    logits: Float[Array, 'B W'],
    keys: Key[Array, 'B'],
    temperature: Float[Array, ''] | float,
    top_k: int,
    top_p: Float[Array, ''] | float,
) -> Int[Array, 'B']:
  """Draws an id from each row; at temperature 0 it returns the likeliest, of several the lowest.

  The row is first cut to the `top_k` likeliest ids, then to the fewest that hold `top_p` of the
  probability that is left.
  """
  likeliest = lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32)
  from_some = lambda: draw_from_likeliest(logits, keys, temperature, top_k, top_p)
  from_all = lambda: jax.vmap(draw_from_all, (0, 0, None, None))(logits, keys, temperature, top_p)
  return jax.lax.cond(jnp.asarray(temperature) > 0, from_some if top_k else from_all, likeliest)


def draw_from_likeliest(logits, keys, temperature, top_k: int, top_p) -> Int[Array, 'B']:
  """Draws from the `top_k` likeliest ids."""
  _, order = jax.lax.top_k(logits, top_k)
  scaled = jnp.take_along_axis(logits, order, axis=-1) / temperature
  probs = jax.nn.softmax(scaled, axis=-1)
  kept = jnp.cumsum(probs, axis=-1) - probs < top_p  # All that is likelier holds less than that.
  rank = jax.vmap(jax.random.categorical)(keys, jnp.where(kept, scaled, -jnp.inf))
  return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def draw_from_all(
    logits: Float[Array, 'W'], key: Key[Array, ''], temperature, top_p
) -> Int[Array, '']:
  """Draws from all ids: again and again, until the id is one of those that hold `top_p`.

  Ids are in order of their weight, and then of their number. Each id that is refused leaves only
  those before it for the next draw, so the weight that is left halves on average with each. What
  is drawn in the end has the distribution of a draw from the kept ids alone.
  """
  weights = jnp.exp((logits - jnp.max(logits)) / temperature)
  ids = jnp.arange(len(weights))

  def before(i):
    return (weights > weights[i]) | ((weights == weights[i]) & (ids < i))

  def draw_again(state):
    n, i, _ = state
    left = jnp.where((n == 0) | before(i), weights, 0)
    i = pick(left, jax.random.uniform(jax.random.fold_in(key, n)))
    heavier = jnp.sum(jnp.where(before(i), weights, 0))
    is_kept = (heavier < limit) | ~(heavier > 0)  # The first id always, where anything is NaN, too.
    return n + 1, i, is_kept

  limit = top_p * jnp.sum(weights)
  return jax.lax.while_loop(lambda state: ~state[-1], draw_again, (0, jnp.int32(0), False))[1]


def pick(weights: Float[Array, 'W'], share: Float[Array, '']) -> Int[Array, '']:
  """Returns the first id up to which the ids hold more than a share, below 1, of all weights.

  It has a weight above 0.
  """
  blocks = pad_axis(weights, 0, BLOCK).reshape(-1, BLOCK)
  sums = jnp.sum(blocks, axis=1)
  block, rest = _first_above(sums, share * jnp.sum(sums))
  return block * BLOCK + _first_above(blocks[block], rest)[0]


def _first_above(weights, target):
  """Returns the first place up to which the sum is above a target, and what the target is there.

  Where rounding leaves no such place, it is the last one that has a weight.
  """
  up_to = jnp.cumsum(weights)
  last = jnp.max(jnp.where(weights > 0, jnp.arange(len(weights)), 0))
  i = jnp.minimum(jnp.sum(up_to <= target), last)
  return i, jnp.maximum(target - (up_to[i] - weights[i]), 0)
