# SPDX-License-Identifier: Apache-2.0
"""Attention to a selection on a GPU, forward and backward.

A program takes a query and some of its heads, and gathers the selected rows by pointers, tile by
tile, while the tile before is multiplied. The value is the front of the key: a tile is read once
for both products. Where queries are few, several programs share the tiles of one. At the sizes of
released models the kernels of `hopper.py` do most of the work, in half the time. Backward, a
query's gradient of each selected row is written where the slot is. The gradients of one key are
then added in the order of queries and slots, so that every run adds alike.
"""

import dataclasses
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks, load_kernels
from dsa_jax.kernels.gpu import triton
from dsa_jax.kernels.gpu.selected_rows import Slots, add_rows, flat, positions, slots
from dsa_jax.kernels.gpu.triton import (
    alone,
    column_parts,
    dot,
    gather,
    load_row,
    load_tile,
    some_tiles,
    store_row,
    store_tile,
)
from dsa_jax.kernels.groups import fold_heads, fold_indices, unfold_heads
from dsa_jax.kernels.products import precision_of
from dsa_jax.kernels.xla.rows import map_rows, scan_rows, whole_block

HOPPER_HEADS = 64  # `hopper.HEADS`; not every jaxlib can import that module.
HOPPER_STEP = 64  # `hopper.STEP`.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  heads: int = 64  # Heads of a program.
  tile: int = 64  # Selected rows of one product.
  stages: int = 3  # Tiles in flight or in use.
  block_t: int = 8192  # Query rows per pass, whose slots are prepared at one time.
  block_t_backward: int = 512  # Query rows per backward pass, whose selected rows have gradients.
  programs: int = 132  # Where there are fewer, several share the tiles of a query.


class Plan(NamedTuple):
  """How queries and their selected rows are cut into programs."""

  batch: int
  n_keys: int
  block_t: int  # Query rows per pass.
  heads: int
  block_h: int  # Heads of a program, a power of two.
  n_slots: int  # Selected rows of a query, filled up to whole tiles.
  step: int  # Slots are filled up to a multiple of this.
  tile: int
  shares: int  # Programs that share the tiles of a query, forward.
  parts: tuple[tuple[int, int, int], ...]  # Channels of the value and of the rest.
  wide: bool  # Whether the sizes are those that `hopper.py` is for.

  @property
  def n_rows(self) -> int:
    """Query rows of a pass, of all sequences."""
    return self.batch * self.block_t

  @property
  def head_blocks(self) -> int:
    return pl.cdiv(self.heads, self.block_h)

  @property
  def by_hopper(self) -> bool:
    """Says whether `hopper.py` does the forward pass."""
    return self.wide and self.shares == 1

  @property
  def programs(self) -> int:
    """The programs of a kernel of Triton, but for shares."""
    return self.n_rows * self.head_blocks

  @property
  def programs_of_hopper(self) -> int:
    return self.n_rows * self.heads // HOPPER_HEADS

  def forward_kernels(self) -> dict[str, int]:
    """Returns the programs of each kernel, forward."""
    programs = self.programs_of_hopper if self.by_hopper else self.shares * self.programs
    return {'sparse_attention_forward': programs}

  def backward_kernels(self) -> dict[str, int]:
    """Returns the programs of each kernel, backward."""
    return {
        'sparse_attention_weights': self.programs_of_hopper if self.wide else self.programs,
        'sparse_attention_dq': self.programs,
        'add_rows': self.batch * self.n_keys,
    }


def plan_forward(
    q, kv, n_slots: int, *, n_groups: int, v_dim: int, blocks: BlockSizes
) -> Plan:
  """Returns how `forward` of q [B, T, H, E] and kv [B, S * G, E] is done, with K = n_slots.

  The plan is that of folded queries; see `groups`.
  """
  return _plan(q, kv, n_slots, n_groups, v_dim, blocks, blocks.block_t)


def plan_backward(
    q, kv, n_slots: int, *, n_groups: int, v_dim: int, blocks: BlockSizes
) -> Plan:
  """Returns how `backward` is done; see `plan_forward`."""
  return _plan(q, kv, n_slots, n_groups, v_dim, blocks, blocks.block_t_backward)


def _plan(q, kv, n_slots, n_groups, v_dim, blocks, block_t) -> Plan:
  batch, n_queries, heads, width = q.shape
  n_queries, heads = n_queries * n_groups, heads // n_groups
  block_t = whole_block(n_queries, block_t, n_groups)
  block_h = triton.tile_side(heads, blocks.heads)
  tile = triton.tile_side(n_slots, blocks.tile)
  whole = not (heads % HOPPER_HEADS or width % 64 or v_dim % 64)
  wide = kv.dtype == jnp.bfloat16 and whole and width <= 576 and v_dim < width and v_dim <= 512
  step = max(tile, HOPPER_STEP) if wide else tile
  n_slots = pl.cdiv(n_slots, step) * step
  alone = batch * block_t * pl.cdiv(heads, block_h)
  return Plan(
      batch=batch,
      n_keys=kv.shape[1],
      block_t=block_t,
      heads=heads,
      block_h=block_h,
      n_slots=n_slots,
      step=step,
      tile=tile,
      shares=min(max(blocks.programs // alone, 1), n_slots // tile),
      parts=column_parts(v_dim, width),
      wide=wide,
  )


def forward(
    q, kv, indices, *, n_groups: int, v_dim: int, sm_scale: float, blocks: BlockSizes
):
  """Returns the output and the log-sum-exp, as the op does; keys are folded, see `groups`."""
  sizes = dict(n_groups=n_groups, v_dim=v_dim, blocks=blocks)
  plan, n_keys = plan_forward(q, kv, indices.shape[-1], **sizes), kv.shape[1] // n_groups
  kernel = _Kernel(plan, sm_scale, kv.dtype)

  def attend(block):
    q, indices = block
    block = fold_heads(q, n_groups), fold_indices(indices, n_groups, n_keys)
    return [unfold_heads(x, n_groups) for x in attend_folded(*block)]

  def attend_folded(q, indices):
    selected = slots(indices, positions(indices, kv.shape[1]), kv.shape[1], plan.step)
    if plan.by_hopper:
      out, lse = _hopper().attend(flat(q), flat(kv), selected, v_dim=v_dim, sm_scale=sm_scale)
      return out.reshape(*q.shape[:3], v_dim), lse.reshape(q.shape[:3])
    n_rows, shares = plan.n_rows, plan.shares
    dtype = q.dtype if shares == 1 else jnp.float32
    out, lse = triton.call(
        kernel.attend,
        'sparse_attention_forward',
        shares * plan.programs,
        [
            jax.ShapeDtypeStruct((shares * n_rows, plan.heads, v_dim), dtype),
            jax.ShapeDtypeStruct((shares * n_rows, plan.heads), jnp.float32),
        ],
        [flat(q), flat(kv), selected],
        warps=8,
        stages=blocks.stages,
    )
    if shares > 1:
      out, lse = _join(*(x.reshape(n_rows, shares, *x.shape[1:]) for x in (out, lse)))
    return out.astype(q.dtype).reshape(*q.shape[:3], v_dim), lse.reshape(q.shape[:3])

  return tuple(map_rows(attend, (q, indices), plan.block_t // n_groups))


def _join(out, lse):
  """Joins attention to shares of the rows, which are on axis 1."""
  top = jnp.max(lse, axis=1, keepdims=True)
  weights = jnp.exp(lse - jnp.where(top > -jnp.inf, top, 0))
  total = jnp.sum(weights, axis=1)
  out = jnp.sum(out * weights[..., None], axis=1) / jnp.where(total > 0, total, 1)[..., None]
  return out, top[:, 0] + jnp.log(total)


def backward(
    residuals, dout, delta, *, n_groups: int, v_dim: int, sm_scale: float, blocks: BlockSizes
):
  """Returns the gradients of q and kv; see `logits_delta` for delta."""
  q, kv, indices, lse = residuals

  sizes = dict(n_groups=n_groups, v_dim=v_dim, blocks=blocks)
  plan, n_keys = plan_backward(q, kv, indices.shape[-1], **sizes), kv.shape[1] // n_groups
  kernel = _Kernel(plan, sm_scale, kv.dtype)

  def step(dkv, block):
    q, indices, dout, lse, delta = block
    indices = fold_indices(indices, n_groups, n_keys)
    q, dout, lse, delta = (fold_heads(x, n_groups) for x in (q, dout, lse, delta))
    selected = slots(indices, positions(indices, kv.shape[1]), kv.shape[1], plan.step)
    keys = [flat(kv), selected]
    n_rows, n_slots = plan.n_rows, plan.n_slots
    args = [*map(flat, (q, dout, lse, delta)), *keys]
    if plan.wide:
      weights = _hopper().weigh(*args, sm_scale=sm_scale)
    else:
      (weights,) = triton.call(
          kernel.weigh,
          'sparse_attention_weights',
          plan.programs,
          [jax.ShapeDtypeStruct((2 * n_rows, plan.heads, n_slots), kv.dtype)],
          args,
          warps=8,
          stages=1,  # No more fits beside queries and gradients.
      )
    (dq,) = triton.call(
        kernel.differentiate,
        'sparse_attention_dq',
        plan.programs,
        [jax.ShapeDtypeStruct(flat(q).shape, q.dtype)],
        [weights, *keys],
        warps=8,
        stages=blocks.stages,
    )
    both = jnp.concatenate([flat(q), jnp.pad(flat(dout), _widths(q, dout))], axis=1)
    drows = jnp.einsum(
        'THK,THE->TKE',
        weights.reshape(n_rows, -1, n_slots),
        both,
        precision=precision_of(q.dtype),  # Added in float32, and rounded as their sum over queries will be.
    )
    drows = drows.reshape(-1, kv.shape[-1])
    dkv = add_rows(dkv, drows, jnp.where(selected.bias == 0, selected.rows, -1))
    return dkv, unfold_heads(dq.reshape(q.shape), n_groups)

  dkv = jnp.zeros((kv.shape[0] * kv.shape[1], kv.shape[2]))
  rows = q, indices, dout.astype(kv.dtype), lse, delta
  dkv, dq = scan_rows(step, dkv, rows, plan.block_t // n_groups)
  return dq, dkv.reshape(kv.shape).astype(kv.dtype)


def _hopper():
  """Returns the kernels for Hopper. Not every jaxlib can import them."""
  return load_kernels('dsa_jax.kernels.sparse_attention.hopper')


def _widths(q, dout):
  return [(0, 0), (0, 0), (0, q.shape[-1] - dout.shape[-1])]


@dataclasses.dataclass(frozen=True)
class _Kernel:
  plan: Plan
  sm_scale: float
  dtype: jnp.dtype

  def place(self, program=None):
    """Returns the query and the first of the heads of this program."""
    program = pl.program_id(0) if program is None else program
    head_blocks = self.plan.head_blocks
    return program // head_blocks, program % head_blocks * self.plan.block_h

  def tiles(self, ends, row):
    return pl.cdiv(ends[row], self.plan.tile)

  def load(self, ref, row, head, part):
    first, side, end = part
    sides, ends = (self.plan.block_h, side), (self.plan.heads, end)
    return load_tile(ref, row, (head, first), sides, ends)

  def load_stats(self, ref, row, head):
    return load_row(ref, row, head, self.plan.block_h, self.plan.heads)[:, None]

  def keys(self, kv, rows, row, j):
    """Returns the rows of a tile, in parts."""
    tile = self.plan.tile
    chosen = triton.load(rows.at[row, j * tile + jnp.arange(tile)])
    return [gather(kv, chosen, *part) for part in self.plan.parts]

  def logits(self, q, keys, bias, row, j):
    """Returns logits in units of ln 2, -inf where a slot is empty."""
    dots = alone(row + j >= 0, lambda: dot(q[0], keys[0], 1, 1))
    dots = sum([dot(a, b, 1, 1) for a, b in zip(q[1:], keys[1:])], dots)
    bias = triton.load(bias.at[row, j * self.plan.tile + jnp.arange(self.plan.tile)])
    return triton.LOG2_E * self.sm_scale * dots + bias[None]

  def attend(self, q, kv, selected: Slots, out, lse):
    parts, shares = self.plan.parts, self.plan.shares
    row, head = self.place(pl.program_id(0) // shares)
    share = pl.program_id(0) % shares
    queries = [self.load(q, row, head, part) for part in parts]
    first, last = (self.tiles(selected.ends, row) * i // shares for i in (share, share + 1))

    def attend_tile(j, state):
      j += first
      top, total, value = state
      keys = self.keys(kv, selected.rows, row, j)
      logits = self.logits(queries, keys, selected.bias, row, j)
      new_top = jnp.maximum(top, jnp.max(logits, axis=1))
      safe = jnp.where(new_top > -jnp.inf, new_top, 0)
      shrink = jnp.exp2(top - safe)
      weights = jnp.exp2(logits - safe[:, None])
      total = total * shrink + jnp.sum(weights, axis=1)
      value = value * shrink[:, None] + dot(weights.astype(self.dtype), keys[0], 1, 0)
      return new_top, total, value

    _, side, end = parts[0]
    zero = jnp.zeros(self.plan.block_h)
    state = zero - jnp.inf, zero, jnp.zeros((self.plan.block_h, side))
    top, total, value = some_tiles(last - first, attend_tile, state)
    row = row * shares + share
    value = value / jnp.where(total > 0, total, 1)[:, None]
    store_tile(out, row, (head, 0), (self.plan.heads, end), value)
    store_row(lse, row, head, self.plan.heads, top / triton.LOG2_E + jnp.log(total))

  def weigh(self, q, dout, lse, delta, kv, selected: Slots, weights):
    row, head = self.place()
    queries = [self.load(q, row, head, part) for part in self.plan.parts]
    dvalue = self.load(dout, row, head, self.plan.parts[0])
    lse = triton.LOG2_E * self.load_stats(lse, row, head)
    delta = self.load_stats(delta, row, head)

    def weigh_tile(j, _):
      keys = self.keys(kv, selected.rows, row, j)
      probs = jnp.exp2(self.logits(queries, keys, selected.bias, row, j) - lse)
      dprobs = dot(dvalue, keys[0], 1, 1)
      for i, x in enumerate((self.sm_scale * probs * (dprobs - delta), probs)):
        store_tile(weights, 2 * row + i, (head, j * self.plan.tile), weights.shape[1:], x)

    jax.lax.fori_loop(0, self.tiles(selected.ends, row), weigh_tile, None)

  def differentiate(self, weights, kv, selected: Slots, dq):
    row, head = self.place()
    sides = self.plan.block_h, self.plan.tile

    def differentiate_tile(j, state):
      first = head, j * self.plan.tile
      dlogits = load_tile(weights, 2 * row, first, sides, weights.shape[1:])
      keys = self.keys(kv, selected.rows, row, j)
      return [x + dot(dlogits, part, 1, 0) for x, part in zip(state, keys)]

    state = [jnp.zeros((self.plan.block_h, side)) for _, side, _ in self.plan.parts]
    state = some_tiles(self.tiles(selected.ends, row), differentiate_tile, state)
    for (first, _, end), x in zip(self.plan.parts, state):
      store_tile(dq, row, (head, first), (self.plan.heads, end), x)
