# SPDX-License-Identifier: Apache-2.0
"""The indexer's divergence on selected keys on a GPU, a block of query rows at a time.

Kernels compute the target and the scores of each slot, from rows that they gather; comparing the
two, [T, K], is left to XLA. Backward, the gradients of index keys are written slot by slot and
added in the order of queries and slots (see `selected_rows`).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.gpu import triton
from dsa_jax.kernels.gpu.selected_rows import Slots, add_rows, flat, positions, slots
from dsa_jax.kernels.gpu.triton import (
    column_parts,
    dot,
    gather,
    load_row,
    load_tile,
    store_row,
    store_tile,
)
from dsa_jax.kernels.xla.rows import map_rows, scan_rows, whole_block


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  block_t: int = 1024  # Query rows per pass, whose selected index keys have gradients.
  heads: int = 128  # Heads of the main attention of a program.
  tile: int = 64  # Selected rows that are read at one time.
  stages: int = 2  # Tiles of index keys in flight or in use.


class Plan(NamedTuple):
  """How queries and their selected rows are cut into programs."""

  batch: int
  n_keys: int
  block_t: int  # Query rows per pass.
  n_slots: int  # Selected rows of a query, filled up to whole tiles.
  tile: int
  n_groups: int  # Key heads of the attention.
  per_group: int  # Heads that share a key head.
  block_h: int  # Heads of a program, a power of two.
  index_heads: int
  index_width: int
  stages: int

  @property
  def n_rows(self) -> int:
    """Query rows of a pass, of all sequences."""
    return self.batch * self.block_t

  @property
  def head_blocks(self) -> int:
    """Programs for the heads that share a key head."""
    return pl.cdiv(self.per_group, self.block_h)

  @property
  def target_programs(self) -> int:
    return self.n_rows * self.n_groups * self.head_blocks

  def forward_kernels(self) -> dict[str, int]:
    """Returns the programs of each kernel, forward."""
    return {
        'index_kl_selected_scores': self.n_rows,
        'index_kl_selected_target': self.target_programs,
    }

  def backward_kernels(self) -> dict[str, int]:
    """Returns the programs of each kernel, backward."""
    return {'index_kl_selected_backward': self.n_rows, 'add_rows': self.batch * self.n_keys}


def plan(q, k, index_q, n_slots: int, *, blocks: BlockSizes) -> Plan:
  """Returns how `forward` and `backward` are done; of the arrays only shapes count.

  Args:
    q: The attention's queries.
    k: The attention's keys.
    index_q: The index queries.
    n_slots: K, the selected keys of a query.
    blocks: The op's block sizes.
  """
  batch, n_queries, heads = q.shape[:3]
  n_groups, tile = k.shape[2], triton.tile_side(n_slots, blocks.tile)
  return Plan(
      batch=batch,
      n_keys=k.shape[1],
      block_t=whole_block(n_queries, blocks.block_t, 1),
      n_slots=pl.cdiv(n_slots, tile) * tile,
      tile=tile,
      n_groups=n_groups,
      per_group=heads // n_groups,
      block_h=triton.tile_side(heads // n_groups, blocks.heads),
      index_heads=index_q.shape[2],
      index_width=index_q.shape[3],
      stages=blocks.stages,
  )


def forward(constants, index_q, index_k, index_weights, *, sm_scale: float, blocks: BlockSizes):
  """Returns the divergence [B, T], and what its gradient needs, as `xla.forward` does."""
  q, k, lse, start, end, indices = constants
  kernels = _Kernels(plan(q, k, index_q, indices.shape[2], blocks=blocks), sm_scale)

  def diverge(block):
    q, lse, start, end, indices, index_q, weights = block
    selected = kernels.slots(indices, start, end)
    shape = *indices.shape[:2], -1
    scores = kernels.scores(flat(index_q), flat(index_k), flat(weights), selected).reshape(shape)
    target = kernels.target(flat(q), k, flat(lse), selected).reshape(shape)
    kl, *saved = compare(target, scores)
    return kl, (*saved, target[..., : indices.shape[2]])

  block = q, lse, start, end, indices, index_q, index_weights
  return map_rows(diverge, block, kernels.plan.block_t)


def backward(constants, residuals, dkl, *, sm_scale: float, blocks: BlockSizes):
  """Returns the gradients of the three index inputs."""
  q, k, _, start, end, indices = constants
  index_q, index_k, index_weights, scores_lse, mass, target = residuals
  kernels = _Kernels(plan(q, k, index_q, indices.shape[2], blocks=blocks), sm_scale)

  def step(dindex_k, block):
    start, end, indices, index_q, weights, scores_lse, mass, target, dkl = block
    selected = kernels.slots(indices, start, end)
    stats = jnp.stack([jnp.where(mass > 0, scores_lse, 0), mass, dkl], axis=-1)
    inputs = flat(index_q), flat(index_k), flat(weights), flat(stats), flat(target), selected
    dindex_q, dweights, drows = kernels.differentiate(*inputs)
    drows = flat(drows)
    dindex_k = add_rows(dindex_k, drows, jnp.where(selected.bias == 0, selected.rows, -1))
    return dindex_k, (dindex_q.reshape(index_q.shape), dweights.reshape(weights.shape))

  dindex_k = jnp.zeros(flat(index_k).shape)
  rows = start, end, indices, index_q, index_weights, scores_lse, mass, target, dkl
  dindex_k, (dindex_q, dweights) = scan_rows(step, dindex_k, rows, kernels.plan.block_t)
  return dindex_q, dindex_k.reshape(index_k.shape).astype(index_k.dtype), dweights


def compare(target, scores):
  """Returns the divergence, ln sum exp of the scores and the target's sum of each row.

  Keys that are not seen have a target of 0 and a score of -inf.
  """
  some = target > 0
  top = jnp.max(scores, axis=-1)
  safe = jnp.where(top > -jnp.inf, top, 0)
  scores_lse = safe + jnp.log(jnp.sum(jnp.exp(scores - safe[..., None]), axis=-1))
  mass = jnp.sum(target, axis=-1)
  log_ratio = jnp.log(jnp.where(some, target, 1)) - jnp.where(some, scores, 0)
  kl = jnp.sum(target * log_ratio, axis=-1)
  return kl + mass * jnp.where(mass > 0, scores_lse, 0), scores_lse, mass


class Gradients(NamedTuple):
  """What the backward kernel writes."""

  dindex_q: Any
  dweights: Any
  drows: Any  # float32 [B * T, K, J], of the index key in each slot.


@dataclasses.dataclass(frozen=True)
class _Kernels:
  plan: Plan
  sm_scale: float

  def slots(self, indices, start, end) -> Slots:
    """Returns the slots of keys that are both selected and seen."""
    filled = positions(indices, self.plan.n_keys)
    filled &= (indices >= start[..., None]) & (indices < end[..., None])
    return slots(indices, filled, self.plan.n_keys, self.plan.tile)

  def slot(self, ref, row, j):
    return triton.load(ref.at[row, j * self.plan.tile + jnp.arange(self.plan.tile)])

  def tiles(self, ends, row):
    return pl.cdiv(ends[row], self.plan.tile)

  def target(self, q, k, lse, selected: Slots):
    """Returns the mean over heads of the attention's probabilities, [B * T, K]."""
    n_rows, heads, width = q.shape
    n_groups, per_group, block_h = self.plan.n_groups, self.plan.per_group, self.plan.block_h
    head_blocks, n_slots = self.plan.head_blocks, self.plan.n_slots
    parts = column_parts(width)

    def kernel(q, k, lse, selected: Slots, target):
      program = pl.program_id(0)
      group, head = program // head_blocks, program % head_blocks * block_h
      row = group // n_groups
      load = lambda first, side, end: load_tile(
          q, group, (head, first), (block_h, side), (per_group, end)
      )
      queries = [load(*part) for part in parts]
      lse = triton.LOG2_E * load_row(lse, group, head, block_h, per_group)
      lse = jnp.where(head + jnp.arange(block_h) < per_group, lse, jnp.inf)[:, None]

      def add_tile(j, _):
        chosen = self.slot(selected.rows, row, j) * n_groups + group % n_groups
        keys = [gather(k, chosen, *part) for part in parts]
        dots = sum(dot(a, b, 1, 1) for a, b in zip(queries, keys))
        logits = triton.LOG2_E * self.sm_scale * dots + self.slot(selected.bias, row, j)[None]
        probs = jnp.sum(jnp.exp2(logits - lse), axis=0)
        store_row(target, program, j * self.plan.tile, n_slots, probs)

      jax.lax.fori_loop(0, self.tiles(selected.ends, row), add_tile, None)

    (parts_of_sum,) = triton.call(
        kernel,
        'index_kl_selected_target',
        self.plan.target_programs,
        [jax.ShapeDtypeStruct((self.plan.target_programs, n_slots), jnp.float32)],
        [
            q.reshape(-1, per_group, width),
            k.reshape(-1, width),
            lse.reshape(-1, per_group),
            selected,
        ],
        warps=max(block_h // 16, 1),
        stages=self.plan.stages if block_h <= 64 else 1,  # No more fits beside the queries.
    )
    total = jnp.sum(parts_of_sum.reshape(n_rows, -1, n_slots), axis=1)
    return jnp.where(selected.bias == 0, total / heads, 0)

  def scores(self, index_q, index_k, weights, selected: Slots):
    """Returns the index scores [B * T, K], -inf where a slot is empty."""

    def kernel(index_q, index_k, weights, rows, ends, scores):
      row = pl.program_id(0)
      queries, weights = self._index(index_q, weights, row)

      def score_tile(j, _):
        _, dots = self._dots(queries, index_k, rows, row, j)
        new = jnp.sum(jnp.maximum(dots, 0) * weights[None], axis=1)
        store_row(scores, row, j * self.plan.tile, self.plan.n_slots, new)

      jax.lax.fori_loop(0, self.tiles(ends, row), score_tile, None)

    (scores,) = triton.call(
        kernel,
        'index_kl_selected_scores',
        self.plan.n_rows,
        [jax.ShapeDtypeStruct(selected.rows.shape, jnp.float32)],
        [index_q, index_k, weights, selected.rows, selected.ends],
        warps=4,
        stages=self.plan.stages,
    )
    return jnp.where(selected.bias == 0, scores, -jnp.inf)

  def differentiate(self, index_q, index_k, weights, stats, target, selected: Slots) -> Gradients:
    """Returns the gradients of a pass of queries; `stats` are the numbers of each query."""
    n_slots = self.plan.n_slots
    target = jnp.pad(target, ((0, 0), (0, n_slots - target.shape[1])))
    heads, width = self.plan.index_heads, self.plan.index_width

    def kernel(index_q, index_k, weights, stats, target, selected: Slots, out: Gradients):
      row = pl.program_id(0)
      queries, weights = self._index(index_q, weights, row)
      scores_lse, mass, dkl = (stats[row, i] for i in range(3))

      def differentiate_tile(j, state):
        dindex_q, dweights = state
        keys, dots = self._dots(queries, index_k, selected.rows, row, j)
        scores = jnp.sum(jnp.maximum(dots, 0) * weights[None], axis=1)
        probs = jnp.exp(scores + self.slot(selected.bias, row, j) - scores_lse)
        dscores = dkl * (mass * probs - self.slot(target, row, j))
        dweights += jnp.sum(dscores[:, None] * jnp.maximum(dots, 0), axis=0)
        ddots = jnp.where(dots > 0, dscores[:, None] * weights[None], 0).astype(keys.dtype)
        first = j * self.plan.tile, 0
        store_tile(out.drows, row, first, (n_slots, width), dot(ddots, queries, 1, 0))
        return dindex_q + dot(ddots, keys, 0, 0), dweights

      state = jnp.zeros(queries.shape), jnp.zeros(weights.shape)
      tiles = self.tiles(selected.ends, row)
      new_q, new_weights = triton.some_tiles(tiles, differentiate_tile, state)
      store_tile(out.dindex_q, row, (0, 0), (heads, width), new_q)
      store_row(out.dweights, row, 0, heads, new_weights)

    out = Gradients(
        dindex_q=jax.ShapeDtypeStruct(index_q.shape, index_q.dtype),
        dweights=jax.ShapeDtypeStruct(weights.shape, weights.dtype),
        drows=jax.ShapeDtypeStruct((*selected.rows.shape, width), jnp.float32),
    )
    (gradients,) = triton.call(
        kernel,
        'index_kl_selected_backward',
        self.plan.n_rows,
        [out],
        [index_q, index_k, weights, stats, target, selected],
        warps=4,
        stages=self.plan.stages,
    )
    return gradients

  def _index(self, index_q, weights, row):
    heads, width = self.plan.index_heads, self.plan.index_width
    side = triton.tile_side(heads)
    queries = load_tile(index_q, row, (0, 0), (side, triton.tile_side(width)), (heads, width))
    weights = load_row(weights, row, 0, side, heads)
    return queries, weights.astype(jnp.float32)

  def _dots(self, queries, index_k, rows, row, j):
    """Returns the rows of a tile, and their dots with the index heads, [tile, I]."""
    chosen = self.slot(rows, row, j)
    keys = gather(index_k, chosen, 0, queries.shape[1], self.plan.index_width)
    return keys, dot(keys, queries, 1, 1)
