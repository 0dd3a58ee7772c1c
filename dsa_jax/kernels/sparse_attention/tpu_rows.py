# SPDX-License-Identifier: Apache-2.0
"""Attention of each query to rows of its own on a TPU, forward and backward.

The rows lie in HBM one behind the other: in decoding XLA brings them together, otherwise kernels
do (see `compact`), a block of queries at a time; backward, SparseCores where there are some, while
the TensorCore is at the block before. Forward alone would wait for them: see `indexed_attention`.
"""

import dataclasses
import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from dsa_jax.kernels.tpu import gather_scatter, resident, sparse_cores
from dsa_jax.kernels.tpu.resident import LANES, Rows, dot
from dsa_jax.kernels.tpu.shards import Shards
from dsa_jax.kernels.xla.rows import gather_rows, scan_rows, whole_block


def decode(q, kv, indices, *, v_dim: int, sm_scale: float, blocks):
  """The op for a few queries."""
  rows = Rows(kv.shape[-1], kv.dtype)
  tiles, tile = gather_scatter.own_tiles(indices.shape[2], rows, blocks)
  more = [(0, 0)] * 2 + [(0, tiles * tile - indices.shape[2])]
  indices = jnp.pad(indices, more, constant_values=-1)
  own = gather_rows(kv, indices).reshape(-1, tiles * tile, kv.shape[2])
  own = resident.pack(own, Shards(1, tiles * tile, 0))
  seen = (indices >= 0) & (indices < kv.shape[1])
  of_one = lambda x: x.reshape(1, -1, *x.shape[2:])  # Every query is a row of one sequence.
  how = dict(rows=rows, v_dim=v_dim, sm_scale=sm_scale, blocks=blocks)
  out, lse = attend(of_one(q), own.reshape(1, -1, *own.shape[2:]), of_one(seen), **how)
  return out.reshape(*q.shape[:3], v_dim), lse.reshape(q.shape[:3])


def forward(q, kv, indices, *, v_dim: int, sm_scale: float, blocks):
  """The op where rows are brought together first."""
  rows = Rows(kv.shape[-1], kv.dtype)
  gather, _ = gather_scatter.fit(rows, kv.shape[1], indices.shape[2], resident.vmem_bytes(), blocks)
  packed = resident.pack(kv, gather.shards)

  def step(memory, block):
    q, indices = block
    memory, seen = gather.run(resident.sort_slots(indices, kv.shape[1]), packed, memory)
    how = dict(rows=rows, v_dim=v_dim, sm_scale=sm_scale, blocks=blocks)
    return memory, attend(q, memory, seen, **how)

  block = blocks.block_t_compact, gather.step_t
  return scan_rows(step, gather.memory(q, *block), (q, indices), *block)[1]


def backward(queries, kv, *, sm_scale: float, blocks):
  """Its gradients: each query's rows get theirs, which then go to their keys.

  Args:
    queries: q, indices, lse, the gradient of the output and delta, as `prepare` reads them.
    kv: As the op has it.
    sm_scale: As the op has it.
    blocks: As the op has it.
  """
  q, indices = queries[:2]
  rows = Rows(kv.shape[-1], kv.dtype)
  sizes = kv.shape[1], indices.shape[2]
  gather, scatter = gather_scatter.fit(rows, *sizes, resident.vmem_bytes(), blocks)
  block = blocks.block_t_compact // 2, gather.step_t
  has_sparse_cores = sparse_cores.available()
  if has_sparse_cores:
    gather = gather_scatter.Fetch.of(rows, *sizes, blocks)
    scatter = dataclasses.replace(scatter, gather=gather)
  packed = resident.pack(kv, gather.shards)
  dkv = resident.zero_sums(kv.shape[0], rows, scatter.shards)

  def bring(indices, *memory):
    return gather.run(resident.sort_slots(indices, kv.shape[1]), packed, *memory)

  def finish(block, own, seen, dkv):
    slots, (q_dout, stats) = prepare(block, kv)
    how = dict(rows=rows, sm_scale=sm_scale, blocks=blocks)
    dq, dkeys = differentiate(q_dout, stats, own, seen, **how)
    return scatter.run(slots, dkeys, dkv), dq[..., : kv.shape[-1]].astype(q.dtype)

  def step(state, block):
    dkv, memory = state
    memory, seen = bring(block[1], memory)
    dkv, dq = finish(block, memory, seen, dkv)
    return (dkv, memory), dq

  def step_while_rows_arrive(state, rows):
    (dkv, own, seen), (block, next_indices) = state, rows
    arriving = bring(next_indices)
    results = finish(block, own, seen, dkv)
    arriving, (dkv, dq) = sparse_cores.beside(arriving, results, own)
    return (dkv, *arriving), dq

  if has_sparse_cores:
    n = whole_block(q.shape[1], *block)
    padded = jnp.pad(indices, [(0, 0), (0, n), (0, 0)], constant_values=-1)
    state, rows_ahead = (dkv, *bring(padded[:, :n])), (queries, padded[:, n:])
    (dkv, *_), dq = scan_rows(step_while_rows_arrive, state, rows_ahead, *block, unroll=2)
  else:
    (dkv, _), dq = scan_rows(step, (dkv, gather.memory(q, *block)), queries, *block)
  dkv = resident.unpack_sums(dkv, scatter.shards, *kv.shape[1:])
  return dq, dkv.astype(kv.dtype)


def prepare(block, kv):
  """Sorted slots, and queries as the kernels read them.

  These are q and the gradients of the output, 2H heads with the channels of a packed key, and
  lse and delta, [B, T, H, 2].
  """
  q, indices, lse, dout, delta = block
  slots = resident.sort_slots(indices, kv.shape[1])
  q = resident.pad_channels(q)
  dout = jnp.pad(dout, [(0, 0)] * 3 + [(0, q.shape[-1] - dout.shape[-1])])
  return slots, (jnp.concatenate([q, dout], axis=2), jnp.stack([lse, delta], -1))


def attend(q, own, seen, *, rows: Rows, v_dim: int, sm_scale: float, blocks):
  """Attends from q [B, T, H, E] to own rows, packed, to those of N that are `seen`.

  The rows lie one behind the other, [B, T, N x lines, 128], or the first lines of all of them do,
  then the others, [B, T, lines, N, 128].

  Returns:
    out [B, T, H, v_dim] and lse [B, T, H], as the op does.
  """
  sums = (*q.shape[:3], Rows(v_dim, rows.dtype).channels), (*q.shape[:3], 1)
  sums = [jax.ShapeDtypeStruct(x, jnp.float32) for x in sums]
  kernel = functools.partial(_attend, rows, sm_scale)
  queries = [resident.pad_channels(q)]
  out, lse = _call(kernel, 'sparse_attention_rows', queries, (own, seen), sums, [], rows, blocks)
  return out[..., :v_dim].astype(q.dtype), lse[..., 0]


def differentiate(q_dout, stats, own, seen, *, rows: Rows, sm_scale: float, blocks):
  """The gradients of queries [B, T, H, E'], and of each one's rows, [B, T, N x lines, 128].

  Args:
    q_dout: As `prepare` makes it, and
    stats: lse and delta.
    own: The rows, and
    seen: which of them are keys.
    rows: How they lie; their gradients do as float32 ones would.
    sm_scale: As the op has it.
    blocks: As the op has it.
  """
  batch, n_queries, heads, channels = q_dout.shape
  dq = jax.ShapeDtypeStruct((batch, n_queries, heads // 2, channels), jnp.float32)
  dkeys = batch, n_queries, seen.shape[2] * rows.blocks, LANES
  dkeys = jax.ShapeDtypeStruct(dkeys, jnp.float32)
  kernel, name = functools.partial(_differentiate, rows, sm_scale), 'sparse_attention_rows_backward'
  return _call(kernel, name, [q_dout, stats], (own, seen), [dq], [dkeys], rows, blocks)


def _call(kernel, name, queries, keys, sums, of_rows, rows, blocks):
  """A grid of (batch, steps of a few queries, tiles of their rows): `sums` are over the tiles."""
  own, seen = keys
  batch, n_queries, n_rows = seen.shape
  step_t = math.gcd(blocks.step_t, n_queries)
  n_tiles, tile = gather_scatter.own_tiles(n_rows, rows, blocks)
  whole = lambda x: pl.BlockSpec(
      (1, step_t, *x.shape[2:]), lambda b, t, j: (b, t, *[0] * len(x.shape[2:]))
  )
  tiled = lambda lines: pl.BlockSpec((1, step_t, tile * lines, LANES), lambda b, t, j: (b, t, j, 0))
  by_line = (1, step_t, rows.lines, tile, LANES), lambda b, t, j: (b, t, 0, j, 0)
  own_rows = pl.BlockSpec(*by_line) if own.ndim == 5 else tiled(rows.lines)
  mask = pl.BlockSpec((1, step_t, 1, tile), lambda b, t, j: (b, t, 0, j))
  return pl.pallas_call(
      kernel,
      grid=(batch, n_queries // step_t, n_tiles),
      in_specs=[*map(whole, queries), own_rows, mask],
      out_specs=[*map(whole, sums), *[tiled(rows.blocks) for _ in of_rows]],
      out_shape=[*sums, *of_rows],
      compiler_params=pltpu.CompilerParams(
          vmem_limit_bytes=int(0.95 * resident.vmem_bytes()), disable_bounds_checks=True
      ),
      name=name,
  )(*queries, own, seen.astype(jnp.int32)[:, :, None])


def _attend(rows, sm_scale, q, own, seen, out, lse):
  def score(i):
    keys = _read(rows, own, seen, i)
    return keys, sm_scale * dot(q[0, i], keys, 1, 1)

  def weigh(i, keys, logits):
    logits = jnp.where(seen[0, i] > 0, logits, -jnp.inf)
    before = _earlier(lse, i, -jnp.inf)
    top = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    finite = jnp.where(top > -jnp.inf, top, 0)
    weights, weight_before = jnp.exp(logits - finite), jnp.exp(before - finite)
    total = weight_before + jnp.sum(weights, axis=1, keepdims=True)
    total = jnp.where(top > -jnp.inf, total, 1)
    value = dot(weights.astype(keys.dtype), keys[:, : out.shape[-1]], 1, 0)
    out[0, i] = (_earlier(out, i, 0.0) * weight_before + value) / total
    lse[0, i] = top + jnp.log(total)

  resident.overlap(score, weigh, q.shape[1])


def _differentiate(rows, sm_scale, q_dout, stats, own, seen, dq, dkeys):
  def score(i):
    keys = _read(rows, own, seen, i)
    return keys, dot(q_dout[0, i], keys, 1, 1)

  def differentiate(i, keys, dots):
    gradients = differentiate_logits(dots, stats[0, i], seen[0, i] > 0, keys, sm_scale)
    dlogits, dlogits_probs = gradients
    dq[0, i] = _earlier(dq, i, 0.0) + dot(dlogits, keys, 1, 0)
    resident.write_rows(dkeys.at[0, i], 0, dot(dlogits_probs, q_dout[0, i], 0, 0))

  resident.overlap(score, differentiate, q_dout.shape[1])


def differentiate_logits(dots, stats, seen, keys, sm_scale: float):
  """Gradients of a query's logits, [H, tile], and they above the probabilities, [2H, tile].

  Args:
    dots: Of the query's heads and of the output's gradients with keys, [2H, tile].
    stats: lse and delta, [H, 2].
    seen: Which keys are the query's, [1, tile].
    keys: For their dtype.
    sm_scale: As the op has it.
  """
  n_heads = dots.shape[0] // 2
  lse, delta = stats[:, 0:1], stats[:, 1:2]
  logits, dprobs = sm_scale * dots[:n_heads], dots[n_heads:]
  probs = jnp.where(seen, jnp.exp(logits - lse), 0)
  dlogits = (sm_scale * probs * (dprobs - delta)).astype(keys.dtype)
  return dlogits, jnp.concatenate([dlogits, probs.astype(keys.dtype)], axis=0)


def _read(rows: Rows, own, seen, i: int) -> jax.Array:
  """A tile of query i's rows, [tile, channels]."""
  if len(own.shape) == 5:
    return resident.unpack(rows, [own[0, i, c] for c in range(rows.lines)])
  return resident.read_rows(rows, own.at[0, i], 0, seen.shape[3])


def _earlier(x, i: int, nothing: float):
  """What earlier tiles have left for query i."""
  first = pl.program_id(2) == 0
  return nothing if pl.num_programs(2) == 1 else jnp.where(first, nothing, x[0, i])
