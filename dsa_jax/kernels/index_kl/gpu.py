# SPDX-License-Identifier: Apache-2.0
"""The indexer's divergence on selected keys on a GPU, a block of query rows at a time.

Kernels make the target and the scores of each slot, from rows that they gather; what compares the
two, [T, K], is left to XLA. Backward, the gradients of index keys are written slot by slot and
added in the order of queries and slots (see `selected_rows`).
"""

import dataclasses

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.gpu import triton
from dsa_jax.kernels.gpu.selected_rows import add_rows, flat, positions, slots
from dsa_jax.kernels.gpu.triton import (
    column_parts,
    dot,
    gather,
    load_row,
    load_tile,
    store_row,
    store_tile,
)
from dsa_jax.kernels.xla.rows import map_rows, scan_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  block_t: int = 1024  # Query rows whose gradients of selected index keys exist at one time.
  heads: int = 128  # Of the main attention, of a program.
  tile: int = 64  # Selected rows that are met at one time.
  stages: int = 2  # Tiles in flight or in use, of index keys.


def forward(constants, index_q, index_k, index_weights, *, sm_scale: float, blocks: BlockSizes):
  """Returns the divergence [B, T], and what its gradient needs, as `xla.forward` does."""
  q, k, lse, start, end, indices = constants

  def diverge(block):
    q, lse, start, end, indices, index_q, weights = block
    kernel, where = _prepare(index_q, k, indices, start, end, sm_scale, blocks)
    shape = *indices.shape[:2], -1
    scores = kernel.scores(flat(index_q), flat(index_k), flat(weights), *where).reshape(shape)
    target = kernel.target(flat(q), k, flat(lse), *where).reshape(shape)
    kl, *saved = compare(target, scores)
    return kl, (*saved, target[..., : indices.shape[2]])

  block = q, lse, start, end, indices, index_q, index_weights
  return map_rows(diverge, block, blocks.block_t)


def backward(constants, residuals, dkl, *, sm_scale: float, blocks: BlockSizes):
  _, k, _, start, end, indices = constants
  index_q, index_k, index_weights, scores_lse, mass, target = residuals

  def step(dindex_k, block):
    start, end, indices, index_q, weights, scores_lse, mass, target, dkl = block
    kernel, where = _prepare(index_q, k, indices, start, end, sm_scale, blocks)
    stats = jnp.stack([jnp.where(mass > 0, scores_lse, 0), mass, dkl], axis=-1)
    dindex_q, dweights, drows = kernel.differentiate(
        flat(index_q), flat(index_k), flat(weights), flat(stats), flat(target), *where
    )
    rows, bias, _ = where
    dindex_k = add_rows(dindex_k, flat(drows), jnp.where(bias == 0, rows, -1))
    return dindex_k, (dindex_q.reshape(index_q.shape), dweights.reshape(weights.shape))

  dindex_k = jnp.zeros(flat(index_k).shape)
  rows = start, end, indices, index_q, index_weights, scores_lse, mass, target, dkl
  dindex_k, (dindex_q, dweights) = scan_rows(step, dindex_k, rows, blocks.block_t)
  return dindex_q, dindex_k.reshape(index_k.shape).astype(index_k.dtype), dweights


def compare(target, scores):
  """Divergence, ln sum exp of the scores and sum of the target of each row; -inf is not seen."""
  some = target > 0
  top = jnp.max(scores, axis=-1)
  safe = jnp.where(top > -jnp.inf, top, 0)
  scores_lse = safe + jnp.log(jnp.sum(jnp.exp(scores - safe[..., None]), axis=-1))
  mass = jnp.sum(target, axis=-1)
  log_ratio = jnp.log(jnp.where(some, target, 1)) - jnp.where(some, scores, 0)
  kl = jnp.sum(target * log_ratio, axis=-1)
  return kl + mass * jnp.where(mass > 0, scores_lse, 0), scores_lse, mass


def _prepare(index_q, k, indices, start, end, sm_scale, blocks):
  """The kernels, and where they find rows: see `slots`."""
  filled = positions(indices, k.shape[1])
  filled &= (indices >= start[..., None]) & (indices < end[..., None])
  tile = triton.tile_side(indices.shape[2], blocks.tile)
  where = slots(indices, filled, k.shape[1], tile)
  return _Kernel(*index_q.shape[2:], where[0].shape[1], tile, sm_scale, blocks), where


@dataclasses.dataclass(frozen=True)
class _Kernel:
  index_heads: int
  index_width: int
  n_slots: int
  tile: int
  sm_scale: float
  blocks: BlockSizes

  def call(self, kernel, name, programs, out, args, **how):
    out = [jax.ShapeDtypeStruct(*x) for x in out]
    how = dict(warps=4, stages=self.blocks.stages) | how
    return triton.call(kernel, f'index_kl_selected_{name}', programs, out, args, **how)

  def slot(self, ref, row, j):
    return triton.load(ref.at[row, j * self.tile + jnp.arange(self.tile)])

  def tiles(self, ends, row):
    return pl.cdiv(ends[row], self.tile)

  def target(self, q, k, lse, rows, bias, ends):
    """Mean over heads of the attention's probabilities, [B * T, K]."""
    n_groups = k.shape[2]
    n_rows, heads, width = q.shape
    per_group = heads // n_groups
    block_h = triton.tile_side(per_group, self.blocks.heads)
    head_blocks = pl.cdiv(per_group, block_h)
    parts = column_parts(width)

    def kernel(q, k, lse, rows, bias, ends, target):
      program = pl.program_id(0)
      group, head = program // head_blocks, program % head_blocks * block_h
      row = group // n_groups
      load = lambda first, side, end: load_tile(
          q, group, (head, first), (block_h, side), (per_group, end)
      )
      queries = [load(*part) for part in parts]
      lse = triton.LOG2_E * load_row(lse, group, head, block_h, per_group)
      lse = jnp.where(head + jnp.arange(block_h) < per_group, lse, jnp.inf)[:, None]

      def meet(j, _):
        chosen = self.slot(rows, row, j) * n_groups + group % n_groups
        keys = [gather(k, chosen, *part) for part in parts]
        dots = sum(dot(a, b, 1, 1) for a, b in zip(queries, keys))
        logits = triton.LOG2_E * self.sm_scale * dots + self.slot(bias, row, j)[None]
        probs = jnp.sum(jnp.exp2(logits - lse), axis=0)
        store_row(target, program, j * self.tile, self.n_slots, probs)

      jax.lax.fori_loop(0, self.tiles(ends, row), meet, None)

    args = q.reshape(-1, per_group, width), k.reshape(-1, width), lse.reshape(-1, per_group)
    programs = n_rows * n_groups * head_blocks
    out = [((programs, self.n_slots), jnp.float32)]
    stages = self.blocks.stages if block_h <= 64 else 1  # No more fits beside the queries.
    how = dict(warps=max(block_h // 16, 1), stages=stages)
    (parts_of_sum,) = self.call(kernel, 'target', programs, out, [*args, rows, bias, ends], **how)
    total = jnp.sum(parts_of_sum.reshape(n_rows, -1, self.n_slots), axis=1)
    return jnp.where(bias == 0, total / heads, 0)

  def scores(self, index_q, index_k, weights, rows, bias, ends):
    """The index scores [B * T, K], -inf where a slot is empty."""

    def kernel(index_q, index_k, weights, rows, ends, scores):
      row = pl.program_id(0)
      queries, weights = self._index(index_q, weights, row)

      def meet(j, _):
        _, dots = self._dots(queries, index_k, rows, row, j)
        new = jnp.sum(jnp.maximum(dots, 0) * weights[None], axis=1)
        store_row(scores, row, j * self.tile, self.n_slots, new)

      jax.lax.fori_loop(0, self.tiles(ends, row), meet, None)

    out = [(rows.shape, jnp.float32)]
    args = index_q, index_k, weights, rows, ends
    (scores,) = self.call(kernel, 'scores', rows.shape[0], out, args)
    return jnp.where(bias == 0, scores, -jnp.inf)

  def differentiate(self, index_q, index_k, weights, stats, target, rows, bias, ends):
    """Gradients of queries and weights, and of the index keys slot by slot, [B * T, K, J]."""
    target = jnp.pad(target, ((0, 0), (0, self.n_slots - target.shape[1])))
    heads, width = self.index_heads, self.index_width

    def kernel(
        index_q, index_k, weights, stats, target, rows, bias, ends, dindex_q, dweights, drows
    ):  # fmt: skip
      row = pl.program_id(0)
      queries, weights = self._index(index_q, weights, row)
      scores_lse, mass, dkl = (stats[row, i] for i in range(3))

      def meet(j, state):
        dindex_q, dweights = state
        keys, dots = self._dots(queries, index_k, rows, row, j)
        scores = jnp.sum(jnp.maximum(dots, 0) * weights[None], axis=1)
        probs = jnp.exp(scores + self.slot(bias, row, j) - scores_lse)
        dscores = dkl * (mass * probs - self.slot(target, row, j))
        dweights += jnp.sum(dscores[:, None] * jnp.maximum(dots, 0), axis=0)
        ddots = jnp.where(dots > 0, dscores[:, None] * weights[None], 0).astype(keys.dtype)
        where = j * self.tile, 0
        store_tile(drows, row, where, (self.n_slots, width), dot(ddots, queries, 1, 0))
        return dindex_q + dot(ddots, keys, 0, 0), dweights

      state = jnp.zeros(queries.shape), jnp.zeros(weights.shape)
      new_q, new_weights = triton.some_tiles(self.tiles(ends, row), meet, state)
      store_tile(dindex_q, row, (0, 0), (heads, width), new_q)
      store_row(dweights, row, 0, heads, new_weights)

    out = [
        (index_q.shape, index_q.dtype),
        (weights.shape, weights.dtype),
        ((*rows.shape, width), jnp.float32),
    ]
    args = index_q, index_k, weights, stats, target, rows, bias, ends
    return self.call(kernel, 'backward', rows.shape[0], out, args)

  def _index(self, index_q, weights, row):
    side = triton.tile_side(self.index_heads)
    sides = side, triton.tile_side(self.index_width)
    queries = load_tile(index_q, row, (0, 0), sides, (self.index_heads, self.index_width))
    weights = load_row(weights, row, 0, side, self.index_heads)
    return queries, weights.astype(jnp.float32)

  def _dots(self, queries, index_k, rows, row, j):
    """Rows of a tile, and their dots with the index heads, [tile, I]."""
    keys = gather(index_k, self.slot(rows, row, j), 0, queries.shape[1], self.index_width)
    return keys, dot(keys, queries, 1, 1)
