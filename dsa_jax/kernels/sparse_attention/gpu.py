# SPDX-License-Identifier: Apache-2.0
"""Attention to a selection on a GPU, forward and backward.

A program takes a query and some of its heads, and gathers the selected rows by pointers, tile by
tile, while the tile before is multiplied. The value is the front of the key: a tile is read once
for both products. Where queries are few, several programs share the tiles of one. At the sizes of
released models the kernels of `hopper.py` do most of it, in half the time. Backward, a query's
gradient of each selected row is written where the slot is; rows of one key are then added in the
order of queries and slots, so that every run adds alike.
"""

import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks, load_kernels
from dsa_jax.kernels.gpu import triton
from dsa_jax.kernels.gpu.selected_rows import add_rows, flat, positions, slots
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
from dsa_jax.kernels.xla.rows import map_rows, scan_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result beyond rounding."""

  heads: int = 64  # Of a program.
  tile: int = 64  # Selected rows that meet them at one time.
  stages: int = 3  # Tiles in flight or in use.
  block_t: int = 8192  # Queries whose slots are prepared at one time,
  block_t_backward: int = 512  # and, backward, whose gradients of selected rows exist.
  programs: int = 132  # Fewer share the tiles of a query among more.


def forward(q, kv, indices, *, v_dim: int, sm_scale: float, blocks: BlockSizes):
  kernel = _Kernel.of(q, kv, indices, v_dim, sm_scale, blocks)

  def attend(block):
    q, indices = block
    where = slots(indices, positions(indices, kv.shape[1]), kv.shape[1], kernel.step)
    n_rows, n_slots = where[0].shape
    alone = n_rows * kernel.head_blocks
    shares = min(max(blocks.programs // alone, 1), n_slots // kernel.tile)
    if kernel.wide and shares == 1:
      out, lse = _hopper().attend(flat(q), flat(kv), *where, v_dim=v_dim, sm_scale=sm_scale)
      return out.reshape(*q.shape[:3], v_dim), lse.reshape(q.shape[:3])
    dtype = q.dtype if shares == 1 else jnp.float32
    out, lse = triton.call(
        functools.partial(kernel.attend, shares=shares),
        'sparse_attention_forward',
        shares * alone,
        [
            jax.ShapeDtypeStruct((shares * n_rows, kernel.heads, v_dim), dtype),
            jax.ShapeDtypeStruct((shares * n_rows, kernel.heads), jnp.float32),
        ],
        [flat(q), flat(kv), *where],
        warps=8,
        stages=blocks.stages,
    )
    if shares > 1:
      out, lse = _join(*(x.reshape(n_rows, shares, *x.shape[1:]) for x in (out, lse)))
    return out.astype(q.dtype).reshape(*q.shape[:3], v_dim), lse.reshape(q.shape[:3])

  return map_rows(attend, (q, indices), blocks.block_t)


def _join(out, lse):
  """Attention to all, from attention to shares of it, on axis 1."""
  top = jnp.max(lse, axis=1, keepdims=True)
  weights = jnp.exp(lse - jnp.where(top > -jnp.inf, top, 0))
  total = jnp.sum(weights, axis=1)
  out = jnp.sum(out * weights[..., None], axis=1) / jnp.where(total > 0, total, 1)[..., None]
  return out, top[:, 0] + jnp.log(total)


def backward(residuals, cotangents, *, v_dim: int, sm_scale: float, blocks: BlockSizes):
  q, kv, indices, out, lse = residuals
  dout, dlse = cotangents
  delta = jnp.sum(out.astype(jnp.float32) * dout, axis=-1) - jnp.where(lse > -jnp.inf, dlse, 0)

  def step(dkv, block):
    q, indices, dout, lse, delta = block
    kernel = _Kernel.of(q, kv, indices, v_dim, sm_scale, blocks)
    rows, bias, ends = slots(indices, positions(indices, kv.shape[1]), kv.shape[1], kernel.step)
    keys = [flat(kv), rows, bias, ends]
    n_rows, n_slots = rows.shape
    args = [*map(flat, (q, dout, lse, delta)), *keys]
    if kernel.wide:
      weights = _hopper().weigh(*args, sm_scale=sm_scale)
    else:
      (weights,) = triton.call(
          kernel.weigh,
          'sparse_attention_weights',
          n_rows * kernel.head_blocks,
          [jax.ShapeDtypeStruct((2 * n_rows, kernel.heads, n_slots), kv.dtype)],
          args,
          warps=8,
          stages=1,  # No more fits beside queries and gradients.
      )
    (dq,) = triton.call(
        kernel.differentiate,
        'sparse_attention_dq',
        n_rows * kernel.head_blocks,
        [jax.ShapeDtypeStruct(flat(q).shape, q.dtype)],
        [weights, *keys],
        warps=8,
        stages=blocks.stages,
    )
    both = jnp.concatenate([flat(q), jnp.pad(flat(dout), _widths(q, dout))], axis=1)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    drows = jnp.einsum(
        'THK,THE->TKE',
        weights.reshape(n_rows, -1, n_slots),
        both,
        precision=precision,  # Added in float32, and rounded as their sum over queries will be.
    )
    dkv = add_rows(dkv, drows.reshape(-1, kv.shape[-1]), jnp.where(bias == 0, rows, -1))
    return dkv, dq.reshape(q.shape)

  dkv = jnp.zeros((kv.shape[0] * kv.shape[1], kv.shape[2]))
  rows = q, indices, dout.astype(kv.dtype), lse, delta
  dkv, dq = scan_rows(step, dkv, rows, blocks.block_t_backward)
  return dq, dkv.reshape(kv.shape).astype(kv.dtype)


def _hopper():
  """Returns the kernels for Hopper. Not every jaxlib can import them."""
  return load_kernels('dsa_jax.kernels.sparse_attention.hopper')


def _widths(q, dout):
  return [(0, 0), (0, 0), (0, q.shape[-1] - dout.shape[-1])]


@dataclasses.dataclass(frozen=True)
class _Kernel:
  heads: int
  block_h: int
  tile: int
  parts: tuple[tuple[int, int, int], ...]  # Channels of the value and of the rest.
  sm_scale: float
  dtype: jnp.dtype

  @classmethod
  def of(cls, q, kv, indices, v_dim, sm_scale, blocks):
    heads, width = q.shape[2:]
    block_h = triton.tile_side(heads, blocks.heads)
    tile = triton.tile_side(indices.shape[2], blocks.tile)
    parts = column_parts(v_dim, width)
    return cls(heads, block_h, tile, parts, sm_scale, kv.dtype)

  @property
  def wide(self) -> bool:
    """Whether the sizes are those that `hopper.py` is for."""
    v_dim, width = self.parts[0][2], self.parts[-1][2]
    whole = not (self.heads % 64 or width % 64 or v_dim % 64)
    return self.dtype == jnp.bfloat16 and whole and width <= 576 and v_dim < width and v_dim <= 512

  @property
  def step(self) -> int:
    """What slots are filled up to a multiple of."""
    return max(self.tile, 64) if self.wide else self.tile

  @property
  def head_blocks(self) -> int:
    return pl.cdiv(self.heads, self.block_h)

  def where(self, program=None):
    """The query and the first of the heads of this program."""
    program = pl.program_id(0) if program is None else program
    return program // self.head_blocks, program % self.head_blocks * self.block_h

  def tiles(self, ends, row):
    return pl.cdiv(ends[row], self.tile)

  def load(self, ref, row, head, part):
    first, side, end = part
    return load_tile(ref, row, (head, first), (self.block_h, side), (self.heads, end))

  def keys(self, kv, rows, row, j):
    """The rows of a tile, in parts."""
    chosen = triton.load(rows.at[row, j * self.tile + jnp.arange(self.tile)])
    return [gather(kv, chosen, *part) for part in self.parts]

  def logits(self, q, keys, bias, row, j):
    """In units of ln 2; -inf where a slot is empty."""
    dots = alone(row + j >= 0, lambda: dot(q[0], keys[0], 1, 1))
    dots = sum([dot(a, b, 1, 1) for a, b in zip(q[1:], keys[1:])], dots)
    bias = triton.load(bias.at[row, j * self.tile + jnp.arange(self.tile)])
    return triton.LOG2_E * self.sm_scale * dots + bias[None]

  def attend(self, q, kv, rows, bias, ends, out, lse, *, shares: int):
    row, head = self.where(pl.program_id(0) // shares)
    share = pl.program_id(0) % shares
    queries = [self.load(q, row, head, part) for part in self.parts]
    first, last = (self.tiles(ends, row) * i // shares for i in (share, share + 1))

    def meet(j, state):
      j += first
      top, total, value = state
      keys = self.keys(kv, rows, row, j)
      logits = self.logits(queries, keys, bias, row, j)
      new_top = jnp.maximum(top, jnp.max(logits, axis=1))
      safe = jnp.where(new_top > -jnp.inf, new_top, 0)
      shrink = jnp.exp2(top - safe)
      weights = jnp.exp2(logits - safe[:, None])
      total = total * shrink + jnp.sum(weights, axis=1)
      value = value * shrink[:, None] + dot(weights.astype(self.dtype), keys[0], 1, 0)
      return new_top, total, value

    _, side, end = self.parts[0]
    zero = jnp.zeros(self.block_h)
    state = zero - jnp.inf, zero, jnp.zeros((self.block_h, side))
    top, total, value = some_tiles(last - first, meet, state)
    row = row * shares + share
    value = value / jnp.where(total > 0, total, 1)[:, None]
    store_tile(out, row, (head, 0), (self.heads, end), value)
    store_row(lse, row, head, self.heads, top / triton.LOG2_E + jnp.log(total))

  def weigh(self, q, dout, lse, delta, kv, rows, bias, ends, weights):
    row, head = self.where()
    queries = [self.load(q, row, head, part) for part in self.parts]
    dvalue = self.load(dout, row, head, self.parts[0])
    lse = triton.LOG2_E * load_row(lse, row, head, self.block_h, self.heads)[:, None]
    delta = load_row(delta, row, head, self.block_h, self.heads)[:, None]

    def meet(j, _):
      keys = self.keys(kv, rows, row, j)
      probs = jnp.exp2(self.logits(queries, keys, bias, row, j) - lse)
      dprobs = dot(dvalue, keys[0], 1, 1)
      for i, x in enumerate((self.sm_scale * probs * (dprobs - delta), probs)):
        store_tile(weights, 2 * row + i, (head, j * self.tile), weights.shape[1:], x)

    jax.lax.fori_loop(0, self.tiles(ends, row), meet, None)

  def differentiate(self, weights, kv, rows, bias, ends, dq):
    row, head = self.where()

    def meet(j, state):
      where = head, j * self.tile
      dlogits = load_tile(weights, 2 * row, where, (self.block_h, self.tile), weights.shape[1:])
      keys = self.keys(kv, rows, row, j)
      return [x + dot(dlogits, part, 1, 0) for x, part in zip(state, keys)]

    state = [jnp.zeros((self.block_h, side)) for _, side, _ in self.parts]
    state = some_tiles(self.tiles(ends, row), meet, state)
    for (first, _, end), x in zip(self.parts, state):
      store_tile(dq, row, (head, first), (self.heads, end), x)
