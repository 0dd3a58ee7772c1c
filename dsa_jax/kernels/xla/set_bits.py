# SPDX-License-Identifier: Apache-2.0
"""Rows of flags as 32-bit words: where the set ones are, without a sort or a scatter."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt

WORD = 32


def pack(flags: Bool[Array, '... W']) -> UInt[Array, '... N']:
  """Packs flags into words, the first flag in the lowest bit; W is a multiple of 32."""
  flags = flags.reshape(*flags.shape[:-1], -1, WORD).astype(jnp.uint32)
  return jnp.sum(flags << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def count(words: UInt[Array, '... N']) -> Int[Array, '... N']:
  return jax.lax.population_count(words).astype(jnp.int32)


def nth(word: UInt[Array, '...'], n: Int[Array, '...']) -> Int[Array, '...']:
  """Returns where the n-th set bit of a word is, from n = 0; 31 where there are fewer."""
  bit = jnp.zeros(word.shape, jnp.int32)
  for half in (16, 8, 4, 2, 1):
    below = count(word & jnp.uint32((1 << half) - 1))
    upper = n >= below
    n = jnp.where(upper, n - below, n)
    word = jnp.where(upper, word >> half, word)
    bit += jnp.where(upper, half, 0)
  return bit


def keep_first(words: UInt[Array, '... N'], n: Int[Array, '...']) -> UInt[Array, '... N']:
  """Clears all but the first n set bits of each row."""
  held = count(words)
  left = n[..., None] - (running_sum(held) - held)
  below = (jnp.uint32(1) << nth(words, left).astype(jnp.uint32)) - 1
  return jnp.where(left >= held, words, jnp.where(left > 0, words & below, 0))


def positions(words: UInt[Array, '... N'], n: int) -> Int[Array, '... {n}']:
  """Returns where the first n set bits of each row are, ascending, then -1."""
  held = count(words)
  end = running_sum(held)
  slots = jnp.arange(n)
  word = _word_of_slot(end - held, n)
  at = lambda x: jnp.take_along_axis(x, word, axis=-1, mode='clip')
  bit = nth(at(words), slots - at(end - held))
  return jnp.where(slots < end[..., -1:], word * WORD + bit, -1)


def _word_of_slot(first_slot, n):
  """Returns the last word that begins at or before each of n slots; words mark where they begin."""
  mark = lambda slots: jnp.zeros(n, jnp.int32).at[slots].add(1, mode='drop')
  marks = jax.vmap(mark)(first_slot.reshape(-1, first_slot.shape[-1]))
  return (running_sum(marks) - 1).reshape(*first_slot.shape[:-1], n)


def running_sum(x: Int[Array, '... W']) -> Int[Array, '... W']:
  """Returns `jnp.cumsum` of rows: products with a triangle, then the same of the blocks' own sums.

  Such products vectorise; XLA:CPU's own scan of a row does not.
  """
  width, block = x.shape[-1], 16
  n_blocks = -(-width // block)
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n_blocks * block - width)])
  x = x.reshape(*x.shape[:-1], n_blocks, block)
  up_to = jnp.triu(jnp.ones((block, block), x.dtype))
  sums = jnp.sum(x[..., :, None] * up_to, axis=-2, dtype=x.dtype)
  if n_blocks > 1:
    total = sums[..., -1]
    sums += (running_sum(total) - total)[..., None]
  return sums.reshape(*sums.shape[:-2], -1)[..., :width]
