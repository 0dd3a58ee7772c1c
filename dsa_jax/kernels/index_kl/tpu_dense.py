# SPDX-License-Identifier: Apache-2.0
"""The indexer's divergence over all visible keys on a TPU: blocks of queries times blocks of keys.

Keys lie along sublanes and queries along lanes: a query's numbers are in a row, and sums over keys
add vectors. A block's target and scores are sums over heads, kept in VMEM while groups of heads
stream by; see `xla_dense` for the sums of a query that the divergence needs.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from dsa_jax.kernels.index_kl.tpu_dense_plan import BlockSizes, Plan, plan_backward, plan_forward
from dsa_jax.kernels.tpu import chip
from dsa_jax.kernels.tpu.resident import dot
from dsa_jax.kernels.xla.rows import pad_axis

TOP, TOTAL, MASS, ENTROPY, CROSS = range(5)  # The row of each of a query's sums.
N_SUMS = 8  # Rows of a vector.
LOG2E = math.log2(math.e)


def forward(constants, index_q, index_k, index_weights, *, sm_scale: float, blocks: BlockSizes):
  """Returns the divergence [B, T], and what its gradient needs, as `xla_dense` does."""
  q, k, *_ = constants
  plan = plan_forward(q, k, index_q, vmem=chip.vmem_bytes(), blocks=blocks)
  kernels = _Kernels(plan, sm_scale)
  spans, operands = kernels.prepare(constants, index_q, index_k, index_weights)
  sums = kernels.forward(spans, operands)[:, :, : index_q.shape[1]]
  top, total, mass, entropy, cross = (sums[:, i] for i in range(5))
  scores_lse = jnp.where(total > 0, top, 0) + jnp.log(jnp.where(total > 0, total, 1))
  return entropy - cross + mass * scores_lse, (scores_lse, mass)


def backward(constants, residuals, dkl, *, sm_scale: float, blocks: BlockSizes):
  """Returns the gradients of the three index inputs.

  Let `gate` be the gradient of a score where its dot is above 0, and 0 elsewhere. Then a head gives
  weight * (gate @ keys) to its query, dot(query, gate @ keys) to its weight, and
  gate.T @ (weight * query) to the keys.
  """
  q, k, *_ = constants
  index_q, index_k, index_weights, *stats = residuals
  n_queries, n_heads = index_q.shape[1:3]
  plan = plan_backward(q, k, index_q, vmem=chip.vmem_bytes(), blocks=blocks)
  kernels = _Kernels(plan, sm_scale)
  spans, operands = kernels.prepare(constants, index_q, index_k, index_weights)
  scaled = (index_weights.astype(jnp.float32)[..., None] * index_q).astype(index_q.dtype)
  more = kernels.prepare_backward(scaled, operands.index_k, [*stats, dkl])
  gated, dindex_k = kernels.backward(spans, operands, more)
  gated = jnp.moveaxis(gated[:, :n_heads, :, :n_queries], 3, 1)  # B T I J
  dindex_q = index_weights.astype(jnp.float32)[..., None] * gated
  dweights = jnp.sum(index_q.astype(jnp.float32) * gated, axis=-1)
  dindex_k = dindex_k[:, : index_k.shape[1]].astype(index_k.dtype)
  return dindex_q.astype(index_q.dtype), dindex_k, dweights.astype(index_weights.dtype)


class DivergeIn(NamedTuple):
  """What both kernels read, heads before rows."""

  q: Any
  k: Any
  lse: Any  # In units of ln 2, with the logarithm of the number of heads.
  index_q: Any
  index_k: Any
  weights: Any
  interval: Any


class BackwardIn(NamedTuple):
  """What the backward kernel alone reads."""

  scaled: Any  # Index queries times their weights.
  keys_turned: Any  # Index keys, [B, J, S].
  stats: Any  # ln sum exp of scores, the target's sum and the gradient of each divergence.


class Gradients(NamedTuple):
  """What the backward kernel writes, float32."""

  gated: Any  # Index keys times gated gradients of scores, [B, I, J, T].
  dkeys: Any


class Scratch(NamedTuple):
  """A block of target and scores, [keys, queries]."""

  target: Any
  scores: Any


class BackwardScratch(NamedTuple):
  """What the backward kernel works in."""

  tiles: Scratch
  gated: Any
  dkeys: Any
  sem: Any


@dataclasses.dataclass(frozen=True)
class _Kernels:
  plan: Plan
  sm_scale: float

  def prepare(self, constants, index_q, index_k, index_weights) -> tuple[jax.Array, DivergeIn]:
    """Returns the keys that blocks of queries see, and what the kernels read.

    Operands whose products are summed are padded with zeros. What blocks of the others hold beyond
    the arrays is hidden by the intervals.
    """
    q, k, lse, start, end, _ = constants
    end = jnp.minimum(end, self.plan.n_keys)
    start, end, lse = (pad_axis(x, 1, self.plan.block_t) for x in (start, end, lse))
    index_q, index_weights = map(self._fill, (index_q, index_weights.astype(jnp.float32)))
    return self._spans(start, end), DivergeIn(
        q=jnp.swapaxes(q, 1, 2),
        k=jnp.swapaxes(k, 1, 2),
        lse=self._in_groups(LOG2E * lse + math.log2(q.shape[2])),
        index_q=jnp.swapaxes(index_q, 1, 2),
        index_k=pad_axis(index_k, 1, self.plan.block_s),
        weights=self._in_groups(index_weights),
        interval=jnp.stack([start, end], axis=1),
    )

  def prepare_backward(self, scaled, index_k, stats) -> BackwardIn:
    """Returns what only the gradient needs, of scaled queries, padded index keys and sums."""
    stats = pad_axis(jnp.stack(stats, axis=1), 2, self.plan.block_t)
    return BackwardIn(jnp.swapaxes(self._fill(scaled), 1, 2), jnp.swapaxes(index_k, 1, 2), stats)

  def _fill(self, x):
    """Pads [B, T, I, ...] to whole blocks and groups."""
    x = pad_axis(x, 1, self.plan.block_t)
    return pad_axis(x, 2, self.plan.n_groups * self.plan.index_heads)

  def _spans(self, start, end):
    """Returns the first key that each block of queries sees, one past the last: [2, B, blocks]."""
    seen = end > jnp.maximum(start, 0)
    rows = lambda x: x.reshape(x.shape[0], -1, self.plan.block_t)
    first = jnp.min(rows(jnp.where(seen, jnp.maximum(start, 0), self.plan.n_keys)), axis=-1)
    last = jnp.max(rows(jnp.where(seen, end, 0)), axis=-1)
    return jnp.stack([jnp.minimum(first, last), last])

  def _in_groups(self, x):
    """Turns [B, T, H] to [B, groups, H / groups, T]."""
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], self.plan.n_groups, -1, x.shape[1])

  def forward(self, spans, operands: DivergeIn):
    """Returns the sums of each query, [B, 8, T]."""
    batch, _, n_queries = operands.interval.shape
    sums = jax.ShapeDtypeStruct((batch, N_SUMS, n_queries), jnp.float32)
    sums_spec = pl.BlockSpec((1, N_SUMS, self.plan.block_t), lambda b, t, *_: (b, 0, t))
    specs = self._specs(operands)
    call = self._call(self._diverge, [specs], sums_spec, sums, [self._scratch()], aliases={})
    return call(spans, operands)

  def backward(self, spans, operands: DivergeIn, more: BackwardIn) -> Gradients:
    batch, n_heads, _, width = operands.index_q.shape
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    gated = batch, n_heads, width, operands.interval.shape[2]
    dkeys = jnp.zeros(operands.index_k.shape, jnp.float32)
    out = Gradients(
        gated=jax.ShapeDtypeStruct(gated, jnp.float32),
        dkeys=jax.ShapeDtypeStruct(dkeys.shape, dkeys.dtype),
    )
    scratch = BackwardScratch(
        tiles=self._scratch(),
        gated=pltpu.VMEM((n_heads, width, self.plan.block_t), jnp.float32),
        dkeys=pltpu.VMEM((self.plan.block_s, width), jnp.float32),
        sem=pltpu.SemaphoreType.DMA,
    )
    inputs = operands, more
    specs = [self._specs(operands), self._specs_backward(more), anywhere]
    n_before = 1 + len(jax.tree.leaves(inputs))
    return self._call(
        self._diverge_backward,
        specs,
        [Gradients(anywhere, anywhere)],
        [out],
        [scratch],
        aliases={n_before: out._fields.index('dkeys')},
    )(spans, *inputs, dkeys)[0]

  def _scratch(self) -> Scratch:
    tile = pltpu.VMEM((self.plan.block_s, self.plan.block_t), jnp.float32)
    return Scratch(tile, tile)

  def _call(self, kernel, specs, out_specs, out_shape, scratch, aliases: dict[int, int]):
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=self.plan.grid,
            in_specs=specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=chip.compiler_params(self.plan.vmem),
        name=self.plan.name,
    )

  def _specs(self, operands: DivergeIn) -> DivergeIn:
    """Returns the block specs of what both kernels read."""
    plan = self.plan
    block_t, block_s = plan.block_t, plan.block_s
    width, index_width = operands.q.shape[3], operands.index_k.shape[2]
    group = lambda step: jnp.minimum(step, plan.n_groups - 1)
    key_head = lambda step: group(step) * plan.heads // (plan.heads_per_key * plan.key_heads)
    return DivergeIn(
        q=self._spec(
            (1, plan.heads, block_t, width), lambda b, t, s, g: (b, group(g), t, 0)
        ),
        k=self._spec(
            (1, plan.key_heads, block_s, width), lambda b, t, s, g: (b, key_head(g), s, 0)
        ),
        lse=self._spec((1, 1, plan.heads, block_t), lambda b, t, s, g: (b, group(g), 0, t)),
        index_q=self._spec(
            (1, plan.index_heads, block_t, index_width),
            lambda b, t, s, g: (b, g % plan.n_groups, t, 0),
        ),
        index_k=self._spec((1, block_s, index_width), lambda b, t, s, g: (b, s, 0)),
        weights=self._spec(
            (1, 1, plan.index_heads, block_t), lambda b, t, s, g: (b, group(g), 0, t)
        ),
        interval=self._spec((1, 2, block_t), lambda b, t, s, g: (b, 0, t)),
    )

  def _specs_backward(self, more: BackwardIn) -> BackwardIn:
    """Returns the block specs of what the backward kernel alone reads."""
    plan, index_width = self.plan, more.scaled.shape[3]
    return BackwardIn(
        scaled=self._spec(
            (1, plan.index_heads, plan.block_t, index_width),
            lambda b, t, s, g: (b, jnp.maximum(g - plan.n_groups, 0), t, 0),
        ),
        keys_turned=self._spec((1, index_width, plan.block_s), lambda b, t, s, g: (b, 0, s)),
        stats=self._spec((1, 3, plan.block_t), lambda b, t, s, g: (b, 0, t)),
    )

  def _spec(self, shape, index) -> pl.BlockSpec:
    """Returns a block spec. Steps without work fetch the block of the step before or after them."""

    def clamped(b, t, s, step, spans):
      first, last = self._key_blocks(spans, b, t)
      step = jnp.where(s < first, 0, jnp.where(s < last, step, self.plan.n_steps - 1))
      return index(b, t, jnp.clip(s, first, jnp.maximum(last - 1, first)), step)

    return pl.BlockSpec(shape, clamped)

  def _key_blocks(self, spans, b, t):
    """Returns the first block of keys that a block of queries sees, and one past the last."""
    return spans[0, b, t] // self.plan.block_s, pl.cdiv(spans[1, b, t], self.plan.block_s)

  def _tiles(self, spans):
    """Returns the first tile of this step's keys that its queries see, and one past the last."""
    b, t, s, _ = (pl.program_id(axis) for axis in range(4))
    begin, tile, n = s * self.plan.block_s, self.plan.tile_s, self.plan.block_s
    first = jnp.clip(spans[0, b, t] - begin, 0, n) // tile
    return first, pl.cdiv(jnp.clip(spans[1, b, t] - begin, 0, n), tile)

  def _each_tile(self, spans, do):
    """Runs `do(rows, columns)` for each tile of keys and queries, except keys that none sees."""
    first, last = self._tiles(spans)

    for t in range(self.plan.block_t // self.plan.tile_t):
      columns = pl.ds(t * self.plan.tile_t, self.plan.tile_t)

      def step(s, _, columns=columns):
        begin = pl.multiple_of(s * self.plan.tile_s, self.plan.tile_s)
        do(pl.ds(begin, self.plan.tile_s), columns)
        return 0

      jax.lax.fori_loop(first, last, step, 0)

  def _diverge(self, spans, inputs: DivergeIn, sums, scratch: Scratch):
    group = pl.program_id(3)

    @pl.when((pl.program_id(2) == 0) & (group == 0))
    def _():
      sums[...] = jnp.zeros(sums.shape, jnp.float32)
      sums[0, TOP : TOP + 1] = jnp.full((1, sums.shape[2]), -jnp.inf)

    def add(rows, columns):
      self._add(sums, scratch, self._seen(inputs.interval, rows, columns), rows, columns)

    self._add_group(spans, group, inputs, scratch)
    pl.when(group == self.plan.n_groups - 1)(lambda: self._each_tile(spans, add))

  def _diverge_backward(
      self,
      spans,
      inputs: DivergeIn,
      more: BackwardIn,
      _,
      in_hbm: Gradients,
      scratch: BackwardScratch,
  ):
    b, t, s, step = (pl.program_id(axis) for axis in range(4))
    block_t, block_s = self.plan.block_t, self.plan.block_s
    n_groups = self.plan.n_groups
    (target, scores), gated, dkeys, sem = scratch
    first, last = self._tiles(spans)
    dkeys_of_block = in_hbm.dkeys.at[b, pl.ds(s * block_s, block_s)]

    @pl.when((s == 0) & (step == 0))
    def _():
      def clear(i, _):
        gated[i] = jnp.zeros(gated.shape[1:], jnp.float32)
        return 0

      jax.lax.fori_loop(0, gated.shape[0], clear, 0)

    @pl.when(step < n_groups)
    def _():
      self._add_group(spans, step, inputs, scratch.tiles)

    def differentiate(rows, columns):
      scores_lse, mass, dkl = (more.stats[0, i : i + 1, columns] for i in range(3))
      probs = jnp.exp(scores[rows, columns] - scores_lse)
      dscores = dkl * (mass * probs - target[rows, columns])
      scores[rows, columns] = jnp.where(self._seen(inputs.interval, rows, columns), dscores, 0)

    @pl.when((step == n_groups - 1) & (first < last))
    def _():
      self._each_tile(spans, differentiate)
      pltpu.async_copy(dkeys_of_block, dkeys, sem).wait()

    def gate(rows, columns):
      dscores, total = scores[rows, columns], 0
      for head in range(self.plan.index_heads):
        dots = dot(inputs.index_k[0, rows], inputs.index_q[0, head, columns], 1, 1)
        gate = jnp.where(dots > 0, dscores, 0).astype(inputs.index_k.dtype)
        at = (step - n_groups) * self.plan.index_heads + head
        gated[at, :, columns] += dot(more.keys_turned[0, :, rows], gate, 1, 0)
        total += dot(gate, more.scaled[0, head, columns], 1, 0)
      dkeys[rows] += total

    pl.when(step >= n_groups)(lambda: self._each_tile(spans, gate))

    @pl.when((step == 2 * n_groups - 1) & (first < last))
    def _():
      pltpu.async_copy(dkeys, dkeys_of_block, sem).wait()

    @pl.when((step == 2 * n_groups - 1) & (s == pl.num_programs(2) - 1))
    def _():
      out = in_hbm.gated.at[b, :, :, pl.ds(t * block_t, block_t)]
      pltpu.async_copy(gated, out, sem).wait()

  def _add_group(self, spans, group, inputs: DivergeIn, scratch: Scratch):
    """Adds a group of heads to target and scores; the first group begins them."""
    target, scores = scratch

    def add(rows, columns):
      more = self._target(inputs.q, inputs.k, inputs.lse, rows, columns)
      target[rows, columns] = jnp.where(group == 0, 0, target[rows, columns]) + more
      more = self._scores(inputs.index_q, inputs.index_k, inputs.weights, rows, columns)
      scores[rows, columns] = jnp.where(group == 0, 0, scores[rows, columns]) + more

    self._each_tile(spans, add)

  def _target(self, q, k, lse, rows, columns):
    """Returns this group's part of the target, [keys, queries]: a sum that `lse` makes a mean."""
    total = 0
    for head in range(self.plan.heads):
      key_head = head // self.plan.heads_per_key
      logits = dot(k[0, key_head, rows], q[0, head, columns], 1, 1)
      total += jnp.exp2(LOG2E * self.sm_scale * logits - lse[0, 0, head : head + 1, columns])
    return total

  def _scores(self, index_q, index_k, weights, rows, columns):
    """Returns this group's part of the scores, [keys, queries]."""
    total = 0
    for head in range(self.plan.index_heads):
      dots = dot(index_k[0, rows], index_q[0, head, columns], 1, 1)
      total += jnp.maximum(dots, 0) * weights[0, 0, head : head + 1, columns]
    return total

  def _seen(self, interval, rows, columns):
    shape = self.plan.tile_s, self.plan.tile_t
    begin = pl.program_id(2) * self.plan.block_s + rows.start
    position = begin + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    start, end = (interval[0, i : i + 1, columns] for i in range(2))
    return (position >= start) & (position < end)

  def _add(self, sums, scratch: Scratch, seen, rows, columns):
    """Adds a tile to the sums of its queries."""
    row = lambda i: (0, slice(i, i + 1), columns)
    total = lambda x: jnp.sum(x, axis=0, keepdims=True)
    target = jnp.where(seen, scratch.target[rows, columns], 0)
    scores = jnp.where(seen, scratch.scores[rows, columns], -jnp.inf)
    top = jnp.maximum(sums[row(TOP)], jnp.max(scores, axis=0, keepdims=True))
    safe = jnp.where(top > -jnp.inf, top, 0)
    some = target > 0
    sums[row(TOTAL)] = sums[row(TOTAL)] * jnp.exp(sums[row(TOP)] - safe) + total(
        jnp.exp(scores - safe)
    )
    sums[row(TOP)] = top
    sums[row(MASS)] += total(target)
    sums[row(ENTROPY)] += total(target * jnp.log(jnp.where(some, target, 1)))
    sums[row(CROSS)] += total(target * jnp.where(some, scores, 0))
