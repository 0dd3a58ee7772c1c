# SPDX-License-Identifier: Apache-2.0
"""Index scores on a GPU, tile by tile: keys against the heads of a few queries side by side.

The products are [keys, queries x heads], so that the sum over heads stays within a warp.
"""

from collections.abc import Callable
import dataclasses

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.gpu import triton
from dsa_jax.kernels.gpu.triton import dot, load_tile

PROGRAMS = 1024  # So many keep every chip busy.


@dataclasses.dataclass(frozen=True)
class ScoreTiles:
  """Kernels that go through tiles of keys k [B, S, J] for steps of a few queries q [B, T, I, J].

  T is a multiple of `step_t`, and heads are those of `pad_heads`.
  """

  n_keys: int
  width: int  # J, the width of an index head.
  heads: int  # I, a power of two.
  step_t: int  # Queries of a step, side by side.
  tile: int  # Keys of a tile.
  stages: int  # Tiles in flight or in use.

  @classmethod
  def of(cls, q, k, columns: int, tile: int, stages: int):
    heads = pl.next_power_of_2(q.shape[2])
    step_t = min(max(columns // heads, 1), pl.next_power_of_2(q.shape[1]))
    return cls(k.shape[1], q.shape[3], heads, step_t, tile, stages)

  @property
  def n_columns(self) -> int:
    return self.step_t * self.heads

  @property
  def padded_keys(self) -> int:
    return pl.cdiv(self.n_keys, self.tile) * self.tile

  def pad_heads(self, q, weights):
    """Adds heads of weight 0, up to a power of two, and turns weights to float32."""
    widths = [(0, 0), (0, 0), (0, self.heads - q.shape[2])]
    return jnp.pad(q, [*widths, (0, 0)]), jnp.pad(weights.astype(jnp.float32), widths)

  def score(
      self, k, q, weights, start, end, *, span: int, encode: Callable = lambda x: x,
      dtype=jnp.float32,
  ):  # fmt: skip
    """Returns the encoded scores [B * T, S], S padded, in the tiles that some query of a step sees.

    A program takes `span` keys, a power of two, at most.
    """
    steps, batch = self.steps(start.size), k.shape[0]
    span = self.span_of_program(start.size, span)
    spans = pl.cdiv(self.n_keys, span)
    args = k, *(self.by_step(x) for x in (q, weights, start, end))

    def kernel(k, q, weights, start, end, scores):
      step, part = pl.program_id(0) // spans, pl.program_id(0) % spans
      queries, weights = self.queries(q, weights, step)
      first, last = self.seen_keys(start, end, step)
      first, last = jnp.maximum(first, part * span), jnp.minimum(last, (part + 1) * span)

      def score_tile(j, _):
        dots = dot(self.keys(k, step * batch // steps, j), queries, 1, 1)
        new = jnp.sum(self.by_query(jnp.maximum(dots, 0) * weights[None]), axis=2)
        triton.store(scores.at[*self.places(step, j)], encode(new))

      jax.lax.fori_loop(first // self.tile, pl.cdiv(last, self.tile), score_tile, None)

    out = jax.ShapeDtypeStruct((start.size, self.padded_keys), dtype)
    return self._call(kernel, 'index_scores', steps * spans, [out], args)[0]

  def steps(self, n_rows: int) -> int:
    """Returns the steps of so many query rows."""
    return n_rows // self.step_t

  def span_of_program(self, n_rows: int, span: int) -> int:
    """Returns the keys of a program that scores: at most `span`, fewer if programs are too few."""
    fewer = pl.next_power_of_2(self.n_keys * self.steps(n_rows) // PROGRAMS)
    return min(span, max(fewer, self.tile))

  def score_programs(self, n_rows: int, span: int) -> int:
    """Returns the programs that score so many query rows."""
    return self.steps(n_rows) * pl.cdiv(self.n_keys, self.span_of_program(n_rows, span))

  def key_programs(self, batch: int) -> int:
    """Returns the programs for gradients of keys."""
    return batch * (self.padded_keys // self.tile)

  def by_step(self, x):
    """Turns [B, T, ...] to a row for each step, and q to [steps, queries x heads, J]."""
    return x.reshape(x.shape[0] * x.shape[1] // self.step_t, -1, *x.shape[3:])

  def by_query(self, x):
    return x.reshape(self.tile, self.step_t, self.heads)

  def queries(self, q, weights, step):
    side, columns = triton.tile_side(self.width), self.n_columns
    queries = load_tile(q, step, (0, 0), (columns, side), (columns, self.width))
    return queries, triton.load(weights.at[step, jnp.arange(columns)])

  def keys(self, k, sequence, j):
    sides = self.tile, triton.tile_side(self.width)
    return load_tile(k, sequence, (j * self.tile, 0), sides, (self.n_keys, self.width))

  def seen_keys(self, start, end, step):
    """Returns the first key that some query of a step sees, and one past the last."""
    starts, ends = (triton.load(x.at[step, jnp.arange(self.step_t)]) for x in (start, end))
    seen = ends > starts
    first = jnp.min(jnp.where(seen, starts, self.n_keys))
    return jnp.maximum(first, 0), jnp.minimum(jnp.max(jnp.where(seen, ends, 0)), self.n_keys)

  def places(self, step, j):
    """Returns the places of a tile, [tile, step_t], in arrays [B * T, S]."""
    shape = self.tile, self.step_t
    rows = step * self.step_t + jnp.arange(self.step_t)
    at = j * self.tile + jnp.arange(self.tile)
    return jnp.broadcast_to(rows[None], shape), jnp.broadcast_to(at[:, None], shape)

  def query_gradients(self, k, q, weights, start, end, dscores):
    """Returns the gradients of queries and weights.

    `dscores` is float32 [B * T, S], S padded, and zero where a query does not see a key.
    """
    shapes = q.shape, weights.shape
    q, weights, start, end = (self.by_step(x) for x in (q, weights, start, end))
    steps, batch = q.shape[0], k.shape[0]

    def kernel(k, q, weights, start, end, dscores, dq, dweights):
      step = pl.program_id(0)
      queries, weights = self.queries(q, weights, step)
      first, last = self.seen_keys(start, end, step)
      first, last = first // self.tile, pl.cdiv(last, self.tile)

      def add_tile(j, state):
        dq, dweights = state
        keys = self.keys(k, step * batch // steps, first + j)
        dots, dscore = self._dots(keys, queries, dscores, step, first + j)
        ddots = jnp.where(dots > 0, dscore * weights[None], 0).astype(keys.dtype)
        dweights += jnp.sum(dscore * jnp.maximum(dots, 0), axis=0)
        return dq + dot(ddots, keys, 0, 0), dweights

      state = jnp.zeros(queries.shape), jnp.zeros(weights.shape)
      new_q, new_weights = triton.some_tiles(last - first, add_tile, state)
      triton.store_tile(dq, step, (0, 0), (self.n_columns, self.width), new_q)
      triton.store_row(dweights, step, 0, self.n_columns, new_weights)

    out = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(weights.shape, jnp.float32)]
    args = k, q, weights, start, end, dscores
    gradients = self._call(kernel, 'index_scores_dq', steps, out, args)
    return [x.reshape(shape) for x, shape in zip(gradients, shapes)]

  def key_gradients(self, k, q, weights, dscores, dk):
    """Returns `dk`, float32 [B, S, J], with the gradients of keys added; see `query_gradients`."""
    q, weights = self.by_step(q), self.by_step(weights)
    tiles = self.padded_keys // self.tile
    steps = q.shape[0] // k.shape[0]  # Steps of a sequence.

    def kernel(k, q, weights, dscores, _, dk):
      sequence, j = pl.program_id(0) // tiles, pl.program_id(0) % tiles
      keys = self.keys(k, sequence, j)

      def add_step(i, total):
        step = sequence * steps + i
        queries, weight = self.queries(q, weights, step)
        dots, dscore = self._dots(keys, queries, dscores, step, j)
        ddots = jnp.where(dots > 0, dscore * weight[None], 0).astype(keys.dtype)
        return total + dot(ddots, queries, 1, 0)

      first, ends = (j * self.tile, 0), (self.n_keys, self.width)
      total = load_tile(dk, sequence, first, keys.shape, ends)
      total = jax.lax.fori_loop(0, steps, add_step, total)
      triton.store_tile(dk, sequence, first, ends, total)

    out = jax.ShapeDtypeStruct(dk.shape, dk.dtype)
    args = k, q, weights, dscores, dk
    aliases = {len(args) - 1: 0}  # dk, which is the result, too.
    programs = self.key_programs(k.shape[0])
    return self._call(kernel, 'index_scores_dk', programs, [out], args, aliases)[0]

  def _call(self, kernel, name, programs, out, args, aliases=None):
    warps = max(self.tile // 16, 1)
    return triton.call(
        kernel, name, programs, out, args, warps=warps, stages=self.stages, aliases=aliases
    )

  def _dots(self, keys, queries, dscores, step, j):
    """Returns the dots [keys, columns], and the gradient of the score beside each."""
    dscore = triton.load(dscores.at[*self.places(step, j)])
    dscore = jnp.broadcast_to(dscore[:, :, None], (*dscore.shape, self.heads))
    return dot(keys, queries, 1, 1), dscore.reshape(self.tile, self.n_columns)
