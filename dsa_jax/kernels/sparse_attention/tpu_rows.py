# SPDX-License-Identifier: Apache-2.0
"""Attention of each query to rows of its own on a TPU, forward and backward.

The rows lie in HBM one behind the other. In decoding XLA brings them together; otherwise kernels do
(see `gather_scatter`), a block of queries at a time. Backward, SparseCores do where there are some,
while the TensorCore is at the block before; forward alone would wait for them, so that only
`indexed_attention` does it.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dsa_jax.kernels import groups
from dsa_jax.kernels.sparse_attention.tpu_plan import Decode, Together, TogetherBackward
from dsa_jax.kernels.tpu import chip, layout, resident, sparse_cores
from dsa_jax.kernels.tpu.gather_scatter import Fetch, OwnRows
from dsa_jax.kernels.tpu.layout import LANES, Rows
from dsa_jax.kernels.tpu.resident import Sums, dot
from dsa_jax.kernels.tpu.shards import Shards
from dsa_jax.kernels.tpu.slots import sort_slots
from dsa_jax.kernels.xla.rows import gather_rows, scan_rows, whole_block


class Queries(NamedTuple):
  """What `backward` needs of each query."""

  q: jax.Array
  indices: jax.Array
  lse: jax.Array
  dout: jax.Array
  delta: jax.Array


class Gradients(NamedTuple):
  """The gradients from the shards so far, float32."""

  dkv: Any  # Sums that lie as `layout.zero_sums` has them.
  dq: Any  # [B, T, H, E]


class BackwardScratch(NamedTuple):
  """What kernels work in whose keys and gradients lie in VMEM."""

  keys: Any  # A copied tile of each query.
  dkeys: Any  # Its gradient.
  sums: Sums


def decode(q, kv, indices, *, plan: Decode, v_dim: int, sm_scale: float):
  """Attends a few queries to rows that XLA gathers."""
  own = plan.own
  more = [(0, 0)] * 2 + [(0, own.n_rows - indices.shape[2])]
  indices = jnp.pad(indices, more, constant_values=-1)
  keys = gather_rows(kv, indices).reshape(-1, own.n_rows, kv.shape[2])
  keys = layout.pack(keys, Shards(1, own.n_rows, 0))
  seen = (indices >= 0) & (indices < kv.shape[1])
  of_one = lambda x: x.reshape(1, -1, *x.shape[2:])  # Every query is a row of one sequence.
  q_of_one, keys = of_one(q), keys.reshape(1, -1, *keys.shape[2:])
  out, lse = attend(q_of_one, keys, of_one(seen), plan=own, v_dim=v_dim, sm_scale=sm_scale)
  return out.reshape(*q.shape[:3], v_dim), lse.reshape(q.shape[:3])


def forward(q, kv, indices, *, n_wide: int, plan: Together, v_dim: int, sm_scale: float):
  """Brings rows together, then attends to them."""
  gather = plan.gather
  packed = layout.pack(kv, gather.plan.shards)

  def step(memory, block):
    q, indices = block
    memory, seen = gather.run(sort_slots(indices, kv.shape[1]), packed, memory)
    q, sizes = groups.widen(q, n_wide), dict(v_dim=plan.sizes.v_dim, sm_scale=sm_scale)
    out, lse = attend(q, memory, seen, plan=gather.own, **sizes)
    return memory, (groups.narrow(out, n_wide)[..., :v_dim], lse)

  block = plan.block_t, gather.plan.step_t
  return scan_rows(step, gather.memory(q, *block), (q, indices), *block)[1]


def backward(queries: Queries, kv, *, plan: TogetherBackward, sm_scale: float):
  """Differentiates each query's rows, then adds their gradients to those of the keys."""
  rows, gather, scatter = plan.sizes.rows, plan.gather, plan.scatter
  block = plan.block_t, scatter.plan.step_t
  packed = layout.pack(kv, scatter.gather_shards)
  dkv = layout.zero_sums(kv.shape[0], rows, scatter.plan.shards)

  def bring(indices, *memory):
    return gather.run(sort_slots(indices, kv.shape[1]), packed, *memory)

  def finish(block, own, seen, dkv):
    slots, (q_dout, stats) = prepare(block, kv.shape[1])
    dq, dkeys = differentiate(q_dout, stats, own, seen, plan=gather.own, sm_scale=sm_scale)
    return scatter.run(slots, dkeys, dkv), dq[..., : kv.shape[-1]].astype(block.q.dtype)

  def step(state, block):
    dkv, memory = state
    memory, seen = bring(block.indices, memory)
    dkv, dq = finish(block, memory, seen, dkv)
    return (dkv, memory), dq

  def step_while_rows_arrive(state, rows):
    (dkv, own, seen), (block, next_indices) = state, rows
    arriving = bring(next_indices)
    results = finish(block, own, seen, dkv)
    arriving, (dkv, dq) = sparse_cores.beside(arriving, results, own)
    return (dkv, *arriving), dq

  if isinstance(gather, Fetch):
    n = whole_block(queries.q.shape[1], *block)
    padded = jnp.pad(queries.indices, [(0, 0), (0, n), (0, 0)], constant_values=-1)
    state, rows_ahead = (dkv, *bring(padded[:, :n])), (queries, padded[:, n:])
    (dkv, *_), dq = scan_rows(step_while_rows_arrive, state, rows_ahead, *block, unroll=2)
  else:
    state = dkv, gather.memory(queries.q, *block)
    (dkv, _), dq = scan_rows(step, state, queries, *block)
  dkv = layout.unpack_sums(dkv, scatter.plan.shards, *kv.shape[1:])
  return dq, dkv.astype(kv.dtype)


def prepare(block: Queries, n_keys: int):
  """Returns sorted slots, and queries as the kernels read them.

  These are q and the gradients of the output, 2H heads with the channels of a packed key, and
  lse and delta, [B, T, H, 2].
  """
  q, indices, lse, dout, delta = block
  slots = sort_slots(indices, n_keys)
  q = layout.pad_channels(q)
  dout = jnp.pad(dout, [(0, 0)] * 3 + [(0, q.shape[-1] - dout.shape[-1])])
  return slots, (jnp.concatenate([q, dout], axis=2), jnp.stack([lse, delta], -1))


def attend(q, own, seen, *, plan: OwnRows, v_dim: int, sm_scale: float):
  """Attends from q [B, T, H, E] to own rows, packed, to those of N that are `seen`.

  The rows lie one behind the other, [B, T, N x lines, 128]; or by line, [B, T, lines, N, 128], as
  SparseCores bring them.

  Returns:
    out [B, T, H, v_dim] and lse [B, T, H], as the op does.
  """
  sums = (*q.shape[:3], Rows(v_dim, plan.rows.dtype).channels), (*q.shape[:3], 1)
  sums = [jax.ShapeDtypeStruct(x, jnp.float32) for x in sums]
  kernel = functools.partial(_attend, plan.rows, sm_scale)
  queries = [layout.pad_channels(q)]
  out, lse = _call(kernel, 'sparse_attention_rows', queries, (own, seen), sums, [], plan)
  return out[..., :v_dim].astype(q.dtype), lse[..., 0]


def differentiate(q_dout, stats, own, seen, *, plan: OwnRows, sm_scale: float):
  """Returns the gradients of queries [B, T, H, E'], and of each one's rows, [B, T, N x lines, 128].

  Args:
    q_dout: Queries and gradients of the output, as `prepare` makes them.
    stats: lse and delta.
    own: The rows.
    seen: Which of the rows are keys.
    plan: How they are read. Their gradients lie as float32 rows would.
    sm_scale: As the op has it.
  """
  batch, n_queries, heads, channels = q_dout.shape
  dq = jax.ShapeDtypeStruct((batch, n_queries, heads // 2, channels), jnp.float32)
  dkeys = batch, n_queries, seen.shape[2] * plan.rows.blocks, LANES
  dkeys = jax.ShapeDtypeStruct(dkeys, jnp.float32)
  kernel = functools.partial(_differentiate, plan.rows, sm_scale)
  name = 'sparse_attention_rows_backward'
  return _call(kernel, name, [q_dout, stats], (own, seen), [dq], [dkeys], plan)


def _call(kernel, name, queries, keys, sums, of_rows, plan: OwnRows):
  """Runs a kernel on (batch, query steps, tiles of their rows): `sums` are over the tiles."""
  own, seen = keys
  batch, n_queries, n_rows = seen.shape
  grid = plan.grid(batch, n_queries)
  step_t, tile, lines = n_queries // grid[1], plan.tile, plan.rows.lines
  whole = lambda x: pl.BlockSpec(
      (1, step_t, *x.shape[2:]), lambda b, t, j: (b, t, *[0] * len(x.shape[2:]))
  )
  tiled = lambda lines: pl.BlockSpec((1, step_t, tile * lines, LANES), lambda b, t, j: (b, t, j, 0))
  by_line = (1, step_t, lines, tile, LANES), lambda b, t, j: (b, t, 0, j, 0)
  own_rows = pl.BlockSpec(*by_line) if own.ndim == 5 else tiled(lines)
  mask = pl.BlockSpec((1, step_t, 1, tile), lambda b, t, j: (b, t, 0, j))
  return pl.pallas_call(
      kernel,
      grid=grid,
      in_specs=[*map(whole, queries), own_rows, mask],
      out_specs=[*map(whole, sums), *[tiled(plan.rows.blocks) for _ in of_rows]],
      out_shape=[*sums, *of_rows],
      compiler_params=chip.compiler_params(plan.vmem),
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
  """Returns gradients of a query's logits, [H, tile], and these above probabilities, [2H, tile].

  Args:
    dots: Products of the query's heads, then of the output's gradients, with keys, [2H, tile].
    stats: lse and delta, [H, 2].
    seen: Which keys are the query's, [1, tile].
    keys: The keys; only their dtype counts.
    sm_scale: As the op has it.
  """
  n_heads = dots.shape[0] // 2
  lse, delta = stats[:, 0:1], stats[:, 1:2]
  logits, dprobs = sm_scale * dots[:n_heads], dots[n_heads:]
  probs = jnp.where(seen, jnp.exp(logits - lse), 0)
  dlogits = (sm_scale * probs * (dprobs - delta)).astype(keys.dtype)
  return dlogits, jnp.concatenate([dlogits, probs.astype(keys.dtype)], axis=0)


def _read(rows: Rows, own, seen, i: int) -> jax.Array:
  """Returns a tile of query i's rows, [tile, channels]."""
  if len(own.shape) == 5:
    return layout.unpack(rows, [own[0, i, c] for c in range(rows.lines)])
  return resident.read_rows(rows, own.at[0, i], 0, seen.shape[3])


def _earlier(x, i: int, nothing: float):
  """Returns what earlier tiles have left for query i."""
  first = pl.program_id(2) == 0
  return nothing if pl.num_programs(2) == 1 else jnp.where(first, nothing, x[0, i])
