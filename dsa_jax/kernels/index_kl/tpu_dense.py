# SPDX-License-Identifier: Apache-2.0
"""The indexer's divergence over all visible keys on a TPU: blocks of queries meet blocks of keys.

Keys lie along sublanes, queries along lanes: what belongs to a query is a row, and sums over keys
add vectors. A block's target and scores are sums over heads, kept in VMEM while groups of heads
stream by; see `xla` for the sums of a query that the divergence needs.
"""

import dataclasses
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.tpu import resident
from dsa_jax.kernels.tpu.resident import Rows, dot
from dsa_jax.kernels.xla.rows import pad_axis

TOP, TOTAL, MASS, ENTROPY, CROSS = range(5)  # A query's sums, one to a row.
N_SUMS = 8  # Rows of a vector.
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  block_t: int = 1024  # Query rows, forward
  block_t_backward: int = 512  # and backward, where their gradients are in VMEM too, and
  block_s: int = 1024  # keys, whose target and scores are in VMEM.
  heads: int = 8  # Heads of attention that meet them in a step of the grid; fewer if too wide.
  tile_t: int = 256  # Query rows, and
  tile_s: int = 512  # keys, that one product meets.


def forward(constants, index_q, index_k, index_weights, *, sm_scale: float, blocks: BlockSizes):
  """Returns the divergence [B, T], and what its gradient needs, as `xla.forward` does."""
  kernels = _Kernels.of(constants, index_q, sm_scale, blocks, blocks.block_t)
  spans, *operands = kernels.prepare(constants, index_q, index_k, index_weights)
  sums = kernels.forward(spans, operands)[:, :, : index_q.shape[1]]
  top, total, mass, entropy, cross = (sums[:, i] for i in range(5))
  scores_lse = jnp.where(total > 0, top, 0) + jnp.log(jnp.where(total > 0, total, 1))
  return entropy - cross + mass * scores_lse, (scores_lse, mass)


def backward(constants, residuals, dkl, *, sm_scale: float, blocks: BlockSizes):
  """Returns the gradients of the three index inputs.

  With `gate` the gradient of a score where its dot is above 0, a head's are
  weight * (gate @ keys) for its query, dot(query, gate @ keys) for its weight, and
  gate.T @ (weight * query) for the keys.
  """
  index_q, index_k, index_weights, *stats = residuals
  batch, n_queries, n_heads, width = index_q.shape
  kernels = _Kernels.of(constants, index_q, sm_scale, blocks, blocks.block_t_backward)
  spans, *operands = kernels.prepare(constants, index_q, index_k, index_weights)
  scaled = (index_weights.astype(jnp.float32)[..., None] * index_q).astype(index_q.dtype)
  operands += kernels.prepare_backward(scaled, operands[4], [*stats, dkl])
  gated, dindex_k = kernels.backward(spans, operands)
  gated = jnp.moveaxis(gated[:, :n_heads, :, :n_queries], 3, 1)  # B T I J
  dindex_q = index_weights.astype(jnp.float32)[..., None] * gated
  dweights = jnp.sum(index_q.astype(jnp.float32) * gated, axis=-1)
  dindex_k = dindex_k[:, : index_k.shape[1]].astype(index_k.dtype)
  return dindex_q.astype(index_q.dtype), dindex_k, dweights.astype(index_weights.dtype)


@dataclasses.dataclass(frozen=True)
class _Kernels:
  blocks: BlockSizes  # What fits the shapes.
  n_keys: int
  n_groups: int  # Groups of heads, of attention and of the indexer.
  index_heads: int  # Of a group; the last ones may be padding.
  key_heads: int  # Of a group.
  heads_per_key: int
  sm_scale: float

  @classmethod
  def of(cls, constants, index_q, sm_scale, blocks, block_t):
    q, k, *_ = constants
    n_heads, per_key = q.shape[2], q.shape[2] // k.shape[2]
    fits = lambda n: n_heads % n == 0 and (n % per_key == 0 or per_key % n == 0)
    block_t = min(block_t, -(-q.shape[1] // blocks.tile_t) * blocks.tile_t)
    block_s = min(blocks.block_s, -(-k.shape[1] // blocks.tile_s) * blocks.tile_s)
    width = Rows(q.shape[-1], q.dtype)
    bytes_per_head = 2 * (block_t + block_s) * width.channels * width.dtype.itemsize
    most = min(blocks.heads, resident.vmem_bytes() // (3 * bytes_per_head), n_heads)
    heads = max([n for n in range(1, most + 1) if fits(n)], default=1)
    blocks = dataclasses.replace(blocks, block_t=block_t, block_s=block_s, heads=heads)
    n_groups = n_heads // heads
    index_heads = -(-index_q.shape[2] // n_groups)
    key_heads = -(-heads // per_key)
    return cls(blocks, k.shape[1], n_groups, index_heads, key_heads, per_key, sm_scale)

  def prepare(self, constants, index_q, index_k, index_weights):
    """What blocks of queries see, and operands with their heads before their rows.

    What meets a product whose sum counts is filled up with zeros; of the rest, what blocks hold
    beyond the arrays is hidden by the intervals.
    """
    q, k, lse, start, end, _ = constants
    end = jnp.minimum(end, self.n_keys)
    start, end, lse = (pad_axis(x, 1, self.blocks.block_t) for x in (start, end, lse))
    index_q, index_weights = map(self._fill, (index_q, index_weights.astype(jnp.float32)))
    return (
        self._spans(start, end),
        jnp.swapaxes(q, 1, 2),
        jnp.swapaxes(k, 1, 2),
        self._in_groups(LOG2E * lse + math.log2(q.shape[2])),
        jnp.swapaxes(index_q, 1, 2),
        pad_axis(index_k, 1, self.blocks.block_s),
        self._in_groups(index_weights),
        jnp.stack([start, end], axis=1),
    )

  def prepare_backward(self, scaled, index_k, stats):
    """What only the gradient needs: queries times weights, keys turned round, sums and dkl."""
    stats = pad_axis(jnp.stack(stats, axis=1), 2, self.blocks.block_t)
    return jnp.swapaxes(self._fill(scaled), 1, 2), jnp.swapaxes(index_k, 1, 2), stats

  def _fill(self, x):
    """[B, T, I, ...] to whole blocks and groups."""
    x = pad_axis(x, 1, self.blocks.block_t)
    return pad_axis(x, 2, self.n_groups * self.index_heads)

  def _spans(self, start, end):
    """The first key and one past the last that each block of queries sees, [2, B, blocks]."""
    seen = end > jnp.maximum(start, 0)
    rows = lambda x: x.reshape(x.shape[0], -1, self.blocks.block_t)
    first = jnp.min(rows(jnp.where(seen, jnp.maximum(start, 0), self.n_keys)), axis=-1)
    last = jnp.max(rows(jnp.where(seen, end, 0)), axis=-1)
    return jnp.stack([jnp.minimum(first, last), last])

  def _in_groups(self, x):
    """[B, T, H] to [B, groups, H / groups, T]."""
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], self.n_groups, -1, x.shape[1])

  def forward(self, spans, operands):
    """The sums of each query, [B, 8, T]."""
    interval = operands[6]
    sums = jax.ShapeDtypeStruct((interval.shape[0], N_SUMS, interval.shape[2]), jnp.float32)
    out_spec = pl.BlockSpec((1, N_SUMS, self.blocks.block_t), lambda b, t, *_: (b, 0, t))
    specs = self._specs(operands, self.n_groups)
    how = dict(name='index_kl_dense_forward', scratch=self._scores_scratch())
    return self._call(self._diverge, spans, operands, specs, sums, out_spec, self.n_groups, **how)

  def backward(self, spans, operands):
    """Keys met by gated gradients of scores, [B, I, J, T], and the gradient of index keys."""
    index_q, index_k, interval = operands[3], operands[4], operands[6]
    batch, n_heads, _, width = index_q.shape
    block_t, n_steps = self.blocks.block_t, 2 * self.n_groups
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    gated = jax.ShapeDtypeStruct((batch, n_heads, width, interval.shape[2]), jnp.float32)
    dkeys = jnp.zeros(index_k.shape, jnp.float32)
    return self._call(
        self._diverge_backward,
        spans,
        [*operands, dkeys],
        [*self._specs(operands, n_steps), anywhere],
        [gated, jax.ShapeDtypeStruct(dkeys.shape, dkeys.dtype)],
        [anywhere, anywhere],
        n_steps,
        name='index_kl_dense_backward',
        aliases={1 + len(operands): 1},
        scratch=[
            *self._scores_scratch(),
            pltpu.VMEM((n_heads, width, block_t), jnp.float32),
            pltpu.VMEM((self.blocks.block_s, width), jnp.float32),
            pltpu.SemaphoreType.DMA,
        ],
    )

  def _scores_scratch(self):
    return [pltpu.VMEM((self.blocks.block_s, self.blocks.block_t), jnp.float32)] * 2

  def _call(
      self, kernel, spans, operands, specs, out_shape, out_specs, n_steps, *, name, scratch,
      aliases={},
  ):  # fmt: skip
    batch, n_blocks = spans.shape[1:]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, n_blocks, pl.cdiv(self.n_keys, self.blocks.block_s), n_steps),
            in_specs=specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=int(0.95 * resident.vmem_bytes()), disable_bounds_checks=True
        ),
        name=name,
    )(spans, *operands)

  def _specs(self, operands, n_steps):
    """Blocks of the operands. Steps without work fetch what the one before or after them has."""
    block_t, block_s = self.blocks.block_t, self.blocks.block_s
    width, index_width, n_groups = operands[0].shape[3], operands[4].shape[2], self.n_groups

    def spec(shape, index):

      def clamped(b, t, s, step, spans):
        first, last = self._key_blocks(spans, b, t)
        step = jnp.where(s < first, 0, jnp.where(s < last, step, n_steps - 1))
        return index(b, t, jnp.clip(s, first, jnp.maximum(last - 1, first)), step)

      return pl.BlockSpec(shape, clamped)

    group = lambda step: jnp.minimum(step, n_groups - 1)
    key_head = lambda step: group(step) * self.blocks.heads // (
        self.heads_per_key * self.key_heads
    )
    index_rows = 1, self.index_heads, block_t, index_width
    specs = [
        spec((1, self.blocks.heads, block_t, width), lambda b, t, s, g: (b, group(g), t, 0)),
        spec((1, self.key_heads, block_s, width), lambda b, t, s, g: (b, key_head(g), s, 0)),
        spec((1, 1, self.blocks.heads, block_t), lambda b, t, s, g: (b, group(g), 0, t)),
        spec(index_rows, lambda b, t, s, g: (b, g % n_groups, t, 0)),
        spec((1, block_s, index_width), lambda b, t, s, g: (b, s, 0)),
        spec((1, 1, self.index_heads, block_t), lambda b, t, s, g: (b, group(g), 0, t)),
        spec((1, 2, block_t), lambda b, t, s, g: (b, 0, t)),
        spec(index_rows, lambda b, t, s, g: (b, jnp.maximum(g - n_groups, 0), t, 0)),
        spec((1, index_width, block_s), lambda b, t, s, g: (b, 0, s)),
        spec((1, 3, block_t), lambda b, t, s, g: (b, 0, t)),
    ]
    return specs[: len(operands)]

  def _key_blocks(self, spans, b, t):
    """The first block of keys that a block of queries sees, and one past the last."""
    return spans[0, b, t] // self.blocks.block_s, pl.cdiv(spans[1, b, t], self.blocks.block_s)

  def _tiles(self, spans):
    """The first tile, of this step's block of keys, that its queries see; one past the last."""
    b, t, s, _ = (pl.program_id(axis) for axis in range(4))
    begin, tile, n = s * self.blocks.block_s, self.blocks.tile_s, self.blocks.block_s
    first = jnp.clip(spans[0, b, t] - begin, 0, n) // tile
    return first, pl.cdiv(jnp.clip(spans[1, b, t] - begin, 0, n), tile)

  def _each_tile(self, spans, do):
    """Runs `do(rows, columns)` for each tile of keys and queries, less keys that no one sees."""
    first, last = self._tiles(spans)

    for t in range(self.blocks.block_t // self.blocks.tile_t):
      columns = pl.ds(t * self.blocks.tile_t, self.blocks.tile_t)

      def step(s, _, columns=columns):
        begin = pl.multiple_of(s * self.blocks.tile_s, self.blocks.tile_s)
        do(pl.ds(begin, self.blocks.tile_s), columns)
        return 0

      jax.lax.fori_loop(first, last, step, 0)

  def _diverge(
      self, spans, q, k, lse, index_q, index_k, weights, interval, sums, target, scores
  ):  # fmt: skip
    group = pl.program_id(3)

    @pl.when((pl.program_id(2) == 0) & (group == 0))
    def _():
      sums[...] = jnp.zeros(sums.shape, jnp.float32)
      sums[0, TOP : TOP + 1] = jnp.full((1, sums.shape[2]), -jnp.inf)

    def add(rows, columns):
      self._add(sums, target, scores, self._seen(interval, rows, columns), rows, columns)

    self._meet(spans, group, q, k, lse, index_q, index_k, weights, target, scores)
    pl.when(group == self.n_groups - 1)(lambda: self._each_tile(spans, add))

  def _diverge_backward(
      self, spans, q, k, lse, index_q, index_k, weights, interval, scaled, keys_turned, stats,
      _, gated_in_hbm, dkeys_in_hbm, target, scores, gated, dkeys, sem,
  ):  # fmt: skip
    b, t, s, step = (pl.program_id(axis) for axis in range(4))
    block_t, block_s = self.blocks.block_t, self.blocks.block_s
    n_groups = self.n_groups
    first, last = self._tiles(spans)
    dkeys_of_block = dkeys_in_hbm.at[b, pl.ds(s * block_s, block_s)]

    @pl.when((s == 0) & (step == 0))
    def _():
      def clear(i, _):
        gated[i] = jnp.zeros(gated.shape[1:], jnp.float32)
        return 0

      jax.lax.fori_loop(0, gated.shape[0], clear, 0)

    @pl.when(step < n_groups)
    def _():
      self._meet(spans, step, q, k, lse, index_q, index_k, weights, target, scores)

    def differentiate(rows, columns):
      scores_lse, mass, dkl = (stats[0, i : i + 1, columns] for i in range(3))
      probs = jnp.exp(scores[rows, columns] - scores_lse)
      dscores = dkl * (mass * probs - target[rows, columns])
      scores[rows, columns] = jnp.where(self._seen(interval, rows, columns), dscores, 0)

    @pl.when((step == n_groups - 1) & (first < last))
    def _():
      self._each_tile(spans, differentiate)
      pltpu.async_copy(dkeys_of_block, dkeys, sem).wait()

    def gate(rows, columns):
      dscores, total = scores[rows, columns], 0
      for head in range(self.index_heads):
        dots = dot(index_k[0, rows], index_q[0, head, columns], 1, 1)
        gate = jnp.where(dots > 0, dscores, 0).astype(index_k.dtype)
        at = (step - n_groups) * self.index_heads + head
        gated[at, :, columns] += dot(keys_turned[0, :, rows], gate, 1, 0)
        total += dot(gate, scaled[0, head, columns], 1, 0)
      dkeys[rows] += total

    pl.when(step >= n_groups)(lambda: self._each_tile(spans, gate))

    @pl.when((step == 2 * n_groups - 1) & (first < last))
    def _():
      pltpu.async_copy(dkeys, dkeys_of_block, sem).wait()

    @pl.when((step == 2 * n_groups - 1) & (s == pl.num_programs(2) - 1))
    def _():
      out = gated_in_hbm.at[b, :, :, pl.ds(t * block_t, block_t)]
      pltpu.async_copy(gated, out, sem).wait()

  def _meet(self, spans, group, q, k, lse, index_q, index_k, weights, target, scores):
    """Adds a group of heads to target and scores; the first one begins them."""

    def meet(rows, columns):
      more = self._target(q, k, lse, rows, columns)
      target[rows, columns] = jnp.where(group == 0, 0, target[rows, columns]) + more
      more = self._scores(index_q, index_k, weights, rows, columns)
      scores[rows, columns] = jnp.where(group == 0, 0, scores[rows, columns]) + more

    self._each_tile(spans, meet)

  def _target(self, q, k, lse, rows, columns):
    """This group's part of the target, [keys, queries]: a sum, the mean is in `lse`."""
    total = 0
    for head in range(self.blocks.heads):
      key_head = head // self.heads_per_key
      logits = dot(k[0, key_head, rows], q[0, head, columns], 1, 1)
      total += jnp.exp2(LOG2E * self.sm_scale * logits - lse[0, 0, head : head + 1, columns])
    return total

  def _scores(self, index_q, index_k, weights, rows, columns):
    """This group's part of the scores, [keys, queries]."""
    total = 0
    for head in range(self.index_heads):
      dots = dot(index_k[0, rows], index_q[0, head, columns], 1, 1)
      total += jnp.maximum(dots, 0) * weights[0, 0, head : head + 1, columns]
    return total

  def _seen(self, interval, rows, columns):
    shape = self.blocks.tile_s, self.blocks.tile_t
    begin = pl.program_id(2) * self.blocks.block_s + rows.start
    position = begin + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    start, end = (interval[0, i : i + 1, columns] for i in range(2))
    return (position >= start) & (position < end)

  def _add(self, sums, target, scores, seen, rows, columns):
    """Adds a tile to the sums of its queries."""
    row = lambda i: (0, slice(i, i + 1), columns)
    total = lambda x: jnp.sum(x, axis=0, keepdims=True)
    target = jnp.where(seen, target[rows, columns], 0)
    scores = jnp.where(seen, scores[rows, columns], -jnp.inf)
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
