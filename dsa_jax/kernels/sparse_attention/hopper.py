# SPDX-License-Identifier: Apache-2.0
"""Attention to a selection by Hopper's wgmma, at the sizes of released models.

A program takes a query and 64 of its heads. One group of threads gathers rows (see `hopper.Ring`),
two multiply, 32 rows each in a step. Forward, both agree on the highest logit, then each adds the
values of both tiles, half of the channels each; the other's probabilities come through shared
memory.
"""

from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from dsa_jax.kernels.gpu import hopper
from dsa_jax.kernels.gpu.hopper import BY_ROW, HEADS, STEP, TILE, Ring, RingMemory
from dsa_jax.kernels.gpu.selected_rows import Slots

LOG2_E = 1.4426950408889634
ROUNDS = 2  # Steps in flight or in use; backward, there is room for one.


class AttendScratch(NamedTuple):
  """Shared memory and barriers of the forward kernel."""

  q_front: Any
  q_rest: Any
  probs: Any  # The probabilities of both groups' tiles.
  notes: Any  # The highest logit of each head in both groups, and log-sum-exps.
  q_ready: Any
  met: Any  # Both groups arrive where they exchange notes.
  created: Any
  ring: RingMemory


class WeighScratch(NamedTuple):
  """Shared memory and barriers of the backward kernel."""

  q_front: Any
  q_rest: Any
  dvalue: Any
  staged: Any  # The results of a tile of both groups.
  q_ready: Any
  created: Any
  ring: RingMemory


def attend(q, kv, slots: Slots, *, v_dim: int, sm_scale: float):
  """Attends each query to its rows.

  Args:
    q: bfloat16 [R, H, E].
    kv: bfloat16 [N, E].
    slots: Selected rows, filled up to a multiple of `STEP`.
    v_dim: The width of the value.
    sm_scale: As the op has it.

  Returns:
    bfloat16 [R, H, V] and float32 [R, H], the log-sum-exp in nats.
  """
  n_rows, heads, width = q.shape
  half = v_dim // 2
  front, rest = pl.ds(0, v_dim), pl.ds(v_dim, width - v_dim)

  def sparse_attention_forward(q, kv, slots: Slots, out, lse, scratch: AttendScratch):
    q_front, q_rest, probs, notes, q_ready, met, created, ring = scratch
    ring = Ring(ring, rounds=ROUNDS)
    row, where = _place(heads)
    steps = slots.ends[row] // STEP
    tops, sums = notes.at[:2], notes.at[2]

    def exchange():
      plgpu.barrier_arrive(met)
      plgpu.barrier_wait(met)

    def produce():
      plgpu.set_max_registers(40, action='decrease')
      plgpu.copy_gmem_to_smem(q.at[*where, front], q_front, q_ready)
      plgpu.copy_gmem_to_smem(q.at[*where, rest], q_rest, q_ready)
      ring.fill(kv, slots.rows.at[row], slots.bias.at[row], steps)

    def consume(own):
      plgpu.set_max_registers(232, action='increase')
      columns = pl.ds(pl.multiple_of(own * half, half), half)
      plgpu.barrier_wait(q_ready)

      def step(i, state):
        value, top, total = state
        mine, other = (ring.tile(i, side) for side in (own, 1 - own))
        ring.wait(i, own)

        def score(dots):
          for part, channels in ((q_front, front), (q_rest, rest)):
            plgpu.wgmma(dots, part, mine.at[:, channels].transpose((1, 0)))
          return dots[...]

        logits = pl.run_scoped(score, plgpu.ACC((HEADS, TILE), jnp.float32))
        logits = LOG2_E * sm_scale * logits + _down(ring.bias(i, own))
        highest = jnp.max(logits, axis=1)
        tops[own] = highest
        exchange()
        others = hopper.load(tops.at[1 - own], BY_ROW)
        new_top = jnp.maximum(jnp.maximum(top, highest), others)
        safe = jnp.where(new_top > -jnp.inf, new_top, 0.0)
        shrink = jnp.exp2(top - safe)
        weights = jnp.exp2(logits - _across(safe, TILE))
        total = total * shrink + jnp.sum(weights, axis=1)
        weights = weights.astype(jnp.bfloat16)
        probs[own] = weights
        plgpu.commit_smem()

        def add(value):
          plgpu.wgmma(value, weights, mine.at[:, columns])
          exchange()
          ring.wait(i, 1 - own)
          plgpu.wgmma(value, probs.at[1 - own], other.at[:, columns])

        value = pl.run_state(add)(plgpu.ACC.init(value * _across(shrink, half)))
        for side in range(2):
          ring.release(i, side)
        return value, new_top, total

      state = _fill(0, HEADS, half), _fill(-jnp.inf, HEADS), _fill(0, HEADS)
      value, top, total = jax.lax.fori_loop(0, steps, step, state)
      tops[own] = total
      exchange()
      total += hopper.load(tops.at[1 - own], BY_ROW)
      some = jnp.where(total > 0, total, 1.0)
      q_front[:, columns] = (value / _across(some, half)).astype(jnp.bfloat16)
      plgpu.commit_smem()
      exchange()

      @pl.when(own == 0)
      def _():
        sums[...] = jnp.where(total > 0, top / LOG2_E + jnp.log(some), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_front, out.at[*where])
        plgpu.copy_smem_to_gmem(sums, lse.at[*where])
        plgpu.wait_smem_to_gmem(0)

    _divide(ring, created, consume, produce)

  out = [
      jax.ShapeDtypeStruct((n_rows, heads, v_dim), q.dtype),
      jax.ShapeDtypeStruct((n_rows, heads), jnp.float32),
  ]
  scratch = AttendScratch(
      q_front=hopper.tile(HEADS, v_dim),
      q_rest=hopper.tile(HEADS, width - v_dim),
      probs=hopper.tile(2, HEADS, TILE),
      notes=plgpu.SMEM((3, HEADS), jnp.float32),
      q_ready=plgpu.Barrier(num_arrivals=2),
      met=plgpu.Barrier(num_arrivals=2),
      created=plgpu.Barrier(num_arrivals=3),
      ring=Ring.scratch(ROUNDS, width, readers=2),
  )
  programs = n_programs(n_rows, heads)
  return hopper.call(sparse_attention_forward, programs, out, [q, kv, slots], scratch)


def n_programs(n_rows: int, heads: int) -> int:
  return n_rows * heads // HEADS


def weigh(q, dout, lse, delta, kv, slots: Slots, *, sm_scale: float):
  """Returns what `backward` multiplies: gradients of logits, and probabilities, of each slot.

  Args:
    q: As `attend` takes it.
    dout: bfloat16 [R, H, V], the gradient of the output.
    lse: float32 [R, H], as `attend` returns it.
    delta: float32 [R, H]; see `logits_delta`.
    kv: As `attend` takes it.
    slots: As `attend` takes them.
    sm_scale: As the op has it.

  Returns:
    bfloat16 [2 R, H, K], the two of each query side by side; what lies past `ends` is undefined.
  """
  n_rows, heads, width = q.shape
  v_dim = dout.shape[2]
  front, rest = pl.ds(0, v_dim), pl.ds(v_dim, width - v_dim)

  def sparse_attention_weights(q, dout, lse, delta, kv, slots: Slots, out, scratch: WeighScratch):
    q_front, q_rest, dvalue, staged, q_ready, created, ring = scratch
    ring = Ring(ring, rounds=1)
    row, where = _place(heads)
    steps = slots.ends[row] // STEP

    def produce():
      plgpu.set_max_registers(40, action='decrease')
      plgpu.copy_gmem_to_smem(q.at[*where, front], q_front, q_ready)
      plgpu.copy_gmem_to_smem(q.at[*where, rest], q_rest, q_ready)
      plgpu.copy_gmem_to_smem(dout.at[*where], dvalue, q_ready)
      ring.fill(kv, slots.rows.at[row], slots.bias.at[row], steps)

    def consume(own):
      plgpu.set_max_registers(232, action='increase')
      highest, mean = (hopper.load(x.at[*where], BY_ROW) for x in (lse, delta))
      highest *= LOG2_E
      tile = ring.memory.tiles.at[own]
      plgpu.barrier_wait(q_ready)

      def step(i, _):
        ring.wait(i, own)

        def score(dots, dprobs):
          for part, channels in ((q_front, front), (q_rest, rest)):
            plgpu.wgmma(dots, part, tile.at[:, channels].transpose((1, 0)))
          plgpu.wgmma(dprobs, dvalue, tile.at[:, front].transpose((1, 0)))
          return dots[...], dprobs[...]

        acc = plgpu.ACC((HEADS, TILE), jnp.float32)
        logits, dprobs = pl.run_scoped(score, acc, acc)
        logits = LOG2_E * sm_scale * logits + _down(ring.bias(i, own))
        ring.release(i, own)
        probs = jnp.exp2(logits - _across(highest, TILE))
        dlogits = sm_scale * probs * (dprobs - _across(mean, TILE))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for j, x in enumerate((dlogits, probs)):
          staged[own, j] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        columns = pl.ds(i * STEP + own * TILE, TILE)
        for j in range(2):
          plgpu.copy_smem_to_gmem(staged.at[own, j], out.at[2 * row + j, where[1], columns])
        return ()

      jax.lax.fori_loop(0, steps, step, ())
      plgpu.wait_smem_to_gmem(0)

    _divide(ring, created, consume, produce)

  out = [jax.ShapeDtypeStruct((2 * n_rows, heads, slots.rows.shape[1]), kv.dtype)]
  scratch = WeighScratch(
      q_front=hopper.tile(HEADS, v_dim),
      q_rest=hopper.tile(HEADS, width - v_dim),
      dvalue=hopper.tile(HEADS, v_dim),
      staged=hopper.tile(2, 2, HEADS, TILE),
      q_ready=plgpu.Barrier(num_arrivals=3),
      created=plgpu.Barrier(num_arrivals=3),
      ring=Ring.scratch(1, width, readers=1),
  )
  args = [q, dout, lse, delta, kv, slots]
  return hopper.call(sparse_attention_weights, n_programs(n_rows, heads), out, args, scratch)[0]


def _place(heads):
  """Returns the query of this program, and the index of it and its heads."""
  program, blocks = jax.lax.axis_index('program'), heads // HEADS
  row = program // blocks
  return row, (row, pl.ds(program % blocks * HEADS, HEADS))


def _divide(ring, created, consume, produce):
  """Has two groups consume and the third produce, once the ring is there."""
  group = jax.lax.axis_index('group')
  pl.when(group == 2)(ring.create)
  plgpu.barrier_arrive(created)
  plgpu.barrier_wait(created)
  pl.when(group < 2)(lambda: consume(group))
  pl.when(group == 2)(produce)


def _fill(x, *shape):
  layout = plgpu.Layout.WGMMA if len(shape) == 2 else BY_ROW
  return plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)


def _across(x, n):
  """Spreads [rows] to [rows, n]."""
  return jax.lax.broadcast_in_dim(x, (x.size, n), [0])


def _down(x):
  """Spreads [columns] to [heads, columns]."""
  return jax.lax.broadcast_in_dim(x, (HEADS, x.size), [1])
