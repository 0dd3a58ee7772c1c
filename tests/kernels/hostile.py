# SPDX-License-Identifier: Apache-2.0
"""One input that holds everything a kernel must survive, small enough for a simulator.

The first sequence packs three documents. In the second, queries look back over a few keys and reach
past the last one, some see nothing in each of the ways to say so, and the last two are padding. The
slots of a selection come in any order, with empty ones anywhere, and what stands in an empty slot
is any number that is no position. Keys that nothing selects hold NaN, the first and the last key
among them: an empty slot that is clipped to a position would read these.
"""

from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np

T, S, K = 13, 23, 5  # Primes: no block size divides them.
DOCUMENTS = (5, 1, 7)
WILD = (-1, S, S + 1, 2**30, 2**31 - 1, -2, -(2**31))


class Selection(NamedTuple):
  start: jax.Array
  end: jax.Array
  indices: jax.Array  # Ascending, then -1.
  slots: jax.Array  # The same positions in another order, with wild numbers in empty slots.
  unused: np.ndarray  # [2, S]: keys that nothing selects.


def intervals() -> tuple[jax.Array, jax.Array]:
  t = np.arange(T)
  start, end = np.stack([np.zeros(T, int), t - 4]), np.stack([t + 1, t + S - T + 6])
  start[0] = np.repeat(np.cumsum((0, *DOCUMENTS[:-1])), DOCUMENTS)
  start[1, 1::4], end[1, 1::4] = end[1, 1::4], end[1, 1::4]
  start[1, 2], end[1, 2] = 9, 4
  start[1, -2:], end[1, -2:] = 0, 0
  return jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)


def selection(seed: int = 0) -> Selection:
  rng = np.random.default_rng(seed)
  start, end = intervals()
  visible = (np.arange(S) >= np.asarray(start)[..., None]) & (np.arange(S) < np.asarray(end)[..., None])
  visible[..., 2:4] = visible[..., 0] = visible[..., -1] = False
  indices = np.full((2, T, K), -1)
  slots = rng.choice(WILD, (2, T, K))
  for row, shuffled, mask in zip(indices.reshape(-1, K), slots.reshape(-1, K), visible.reshape(-1, S)):
    chosen = rng.permutation(np.flatnonzero(mask))[: rng.integers(2, K + 1)]
    row[: chosen.size] = np.sort(chosen)
    shuffled[rng.permutation(K)[: chosen.size]] = chosen
  unused = np.ones((2, S), bool)
  for b, chosen in enumerate(indices):
    unused[b, chosen[chosen >= 0]] = False
  empty = (indices < 0).all(axis=-1)
  assert empty.any() and not empty.all() and unused[:, [0, 2, 3, -1]].all()
  return Selection(start, end, *(jnp.asarray(x, jnp.int32) for x in (indices, slots)), unused)


def assert_survived(actual: dict, exact: dict, tolerance: float = cases.TOLERANCE['float32']):
  """Compares by name; says of which queries or keys a result differs, and what is special there."""
  for name, want in exact.items():
    got, want = (np.asarray(x, np.float64) for x in (actual[name], want))
    limit = tolerance * np.abs(want[np.isfinite(want)]).max(initial=0)
    with np.errstate(invalid='ignore'):  # Infinities must agree.
      wrong = ~((np.abs(got - want) <= limit) | (got == want))
    rows = sorted({tuple(at[:2]) for at in np.argwhere(wrong).tolist()})
    assert not rows, f'{name} differs at (sequence, row): {[(*row, traits(*row)) for row in rows]}'


def traits(sequence: int, row: int) -> str:
  """What is special about a query, or a key, of this number."""
  start, end = (int(x[sequence, row]) if row < T else 0 for x in intervals())
  if row >= T:
    return 'a late key'
  if start >= end:
    return 'sees nothing'
  return 'packed' if sequence == 0 else 'reaches past the keys' if end > S else 'a window'
