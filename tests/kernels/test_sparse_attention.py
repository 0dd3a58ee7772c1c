# SPDX-License-Identifier: Apache-2.0
"""Attention to a selection: values and gradients, by name, against float32 and float64."""

import dataclasses
import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.kernels import sparse_attention
from dsa_jax.kernels.sparse_attention import gpu, tpu, xla
from dsa_jax.kernels.tpu import chip
from dsa_jax.kernels.tpu.shards import Shards, fit_shards

ALL = ['reference', *cases.BACKENDS]
SMALL = {  # Interpreted: few rows.
    'tpu': tpu.BlockSizes(step_t=8, tile=8, line=8, copied=16, step_t_wide=4, wide_rows=8)
}
BLOCKS = [('xla', xla.BlockSizes(block_t=n)) for n in (1, 1000)]
FEW_KEYS = tpu.BlockSizes(  # In VMEM: rows are brought together in HBM, and met in tiles.
    step_t=2, tile=4, line=4, copied=8, vmem_share=2**-12, step_t_compact=2, block_t_compact=40, own_tile=16
)  # fmt: skip
BLOCKS += [
    ('tpu', FEW_KEYS),
    ('tpu', tpu.BlockSizes(block_t=16, step_t=1, tile=4, line=4, copied=8, vmem_share=1e-6)),
    ('tpu', tpu.BlockSizes(block_t=8, step_t=4, tile=16, line=8, copied=4, vmem_share=2e-3)),
    ('gpu', gpu.BlockSizes(block_t=11, block_t_backward=5)),
]
H, E, V = 3, 8, 5
SCALE = 0.6


def values_and_grads(q, kv, indices, *, v_dim=V, backend, blocks=None, races=False):
  with cases.interpreted(backend, races):
    blocks = blocks or SMALL.get(backend)
    return jax.block_until_ready(_run(q, kv, indices, v_dim=v_dim, backend=backend, blocks=blocks))


@functools.partial(cases.jit, static_argnames=('v_dim', 'backend', 'blocks'))
def _run(q, kv, indices, *, v_dim, backend, blocks):
  def op(q, kv):
    options = dict(v_dim=v_dim, sm_scale=SCALE, backend=backend, blocks=blocks)
    return sparse_attention(q, kv[:, :, None], None, indices, **options)

  (out, lse), vjp = jax.vjp(op, q, kv)
  dq, dkv = vjp(cotangents(out, lse))
  return {'out': out, 'lse': lse, 'dq': dq, 'dkv': dkv}


def cotangents(out, lse):
  """Of both outputs, and not small where a row is empty."""
  weights = [jnp.cos(jnp.arange(x.size) + 1.0).reshape(x.shape) for x in (out, lse)]
  return weights[0].astype(out.dtype), weights[1]


def make_inputs(visibility, dtype='float32', topk=cases.K):
  start, end = cases.intervals(visibility)
  q, kv = cases.normal(0, (2, cases.T, H, E), (2, cases.S, E), dtype=dtype)
  return q, kv, cases.selection(start, end, topk)


def witness(q, kv, indices, v_dim):
  """The op in float64, a query and a head at a time."""
  out = np.zeros((*q.shape[:3], v_dim))
  lse = np.full(q.shape[:3], -np.inf)
  for b, t, h in np.ndindex(q.shape[:3]):
    chosen = kv[b, [i for i in np.asarray(indices)[b, t] if 0 <= i < kv.shape[1]]]
    if len(chosen):
      logits = SCALE * chosen @ q[b, t, h]
      lse[b, t, h] = np.log(np.sum(np.exp(logits - logits.max()))) + logits.max()
      out[b, t, h] = np.exp(logits - lse[b, t, h]) @ chosen[:, :v_dim]
  return out, lse


@pytest.mark.parametrize('visibility', cases.VISIBILITY)
def test_reference_matches_float64(visibility):
  q, kv, indices = make_inputs(visibility)
  actual = values_and_grads(q, kv, indices, backend='reference')
  out, lse = witness(np.float64(q), np.float64(kv), indices, V)
  cases.assert_matches({x: actual[x] for x in ('out', 'lse')}, {'out': out, 'lse': lse})


def test_gradients_of_the_reference_match_finite_differences():
  q, kv = cases.normal(1, (1, 3, 2, 4), (1, 6, 4))
  indices = jnp.array([[[-1, -1, -1], [4, 0, -1], [1, 5, 4]]], jnp.int32)
  actual = values_and_grads(q, kv, indices, v_dim=3, backend='reference')
  dout, dlse = (np.float64(x) for x in cotangents(actual['out'], actual['lse']))

  def total(q, kv):
    out, lse = witness(q, kv, indices, 3)
    return np.sum(dout * out) + np.sum((dlse * lse)[np.isfinite(lse)])

  q, kv = np.float64(q), np.float64(kv)
  dq = cases.numeric_gradient(lambda q: total(q, kv), q)
  dkv = cases.numeric_gradient(lambda kv: total(q, kv), kv)
  cases.assert_matches({x: actual[x] for x in ('dq', 'dkv')}, {'dq': dq, 'dkv': dkv})


@pytest.mark.parametrize('dtype', cases.TOLERANCE)
@pytest.mark.parametrize('visibility', cases.VISIBILITY)
@pytest.mark.parametrize('backend', cases.BACKENDS)
def test_matches_reference(backend, visibility, dtype):
  q, kv, indices = make_inputs(visibility, dtype)
  actual = values_and_grads(q, kv, indices, backend=backend)
  exact = values_and_grads(*cases.f32(q, kv), indices, backend='reference')
  assert actual['out'].dtype == actual['dq'].dtype == actual['dkv'].dtype == dtype
  assert actual['lse'].dtype == jnp.float32
  cases.assert_matches(actual, exact, cases.TOLERANCE[dtype])


GROUPS = [  # Key heads, whether each selects for itself, whether values are given (or lie before
    # keys in one array), the dtype.
    (2, False, True, 'float32'), (2, True, False, 'float32'), (4, True, True, 'bfloat16'),
    (1, True, True, 'float32'), (2, False, 'before', 'bfloat16'),
]  # fmt: skip


@functools.partial(cases.jit, static_argnames=('backend', 'blocks'))
def _run_groups(q, k, v, indices, *, backend, blocks=None):
  v_dim = V if v is None else None
  options = dict(v_dim=v_dim, sm_scale=SCALE, backend=backend, blocks=blocks)
  op = lambda q, k, v: sparse_attention(q, k, v, indices, **options)
  (out, lse), vjp = jax.vjp(op, q, k, v)
  dq, dk, dv = vjp(cotangents(out, lse))
  return {'out': out, 'lse': lse, 'dq': dq, 'dk': dk} | ({} if v is None else {'dv': dv})


def grouped_inputs(visibility, groups, own, given, dtype='float32'):
  start, end = cases.intervals(visibility)
  shapes = (2, cases.T, 4, E), (2, cases.S, groups, E), (2, cases.S, groups, V)
  q, k, v = cases.normal(3, *shapes, dtype=dtype)
  chosen = [cases.selection(start, end, seed=seed) for seed in range(groups)]
  if given == 'before':
    k = jnp.concatenate([v, k], axis=-1)
  return q, k, v if given is True else None, jnp.stack(chosen, axis=2) if own else chosen[0]


def poison(x, indices):
  """Puts NaN in every key, [B, S, G, E], that no query selected for its key head."""
  if indices.ndim == 3:
    indices = jnp.repeat(indices[:, :, None], x.shape[2], axis=2)
  used = (indices[..., None] == jnp.arange(x.shape[1])).any(axis=(1, 3))  # B G S
  return jnp.where(jnp.swapaxes(used, 1, 2)[..., None], x, jnp.nan)


@pytest.mark.parametrize('groups, own, given, dtype', GROUPS)
@pytest.mark.parametrize('backend', cases.BACKENDS)
def test_groups_of_heads_share_keys(backend, groups, own, given, dtype):
  """Keys that nothing selects hold NaN, and some rows are empty."""
  q, k, v, indices = grouped_inputs('empty', groups, own, given, dtype)
  wild = jnp.where(indices < 0, 2**30, indices)
  poisoned = poison(k, indices), None if v is None else poison(v, indices)
  with cases.interpreted(backend):
    actual = _run_groups(q, *poisoned, wild, backend=backend, blocks=SMALL.get(backend))
    jax.block_until_ready(actual)
  exact = jax.tree.map(lambda x: x.astype('float32'), (q, k, v))
  exact = _run_groups(*exact, indices, backend='reference')
  cases.assert_matches(actual, exact, cases.TOLERANCE[dtype])


@pytest.mark.nightly
@pytest.mark.parametrize('blocks', [SMALL['tpu'], FEW_KEYS], ids=['in vmem', 'together'])
def test_key_heads_side_by_side_on_a_tpu(blocks):
  q, k, v, indices = grouped_inputs('empty', 2, False, True)
  poisoned = poison(k, indices), poison(v, indices)
  blocks = dataclasses.replace(blocks, wide_slots=1)
  with cases.interpreted('tpu'):
    actual = _run_groups(q, *poisoned, indices, backend='tpu', blocks=blocks)
    jax.block_until_ready(actual)
  cases.assert_matches(actual, _run_groups(q, k, v, indices, backend='reference'))


@pytest.mark.nightly
@pytest.mark.parametrize('groups, dtype, races', [(4, 'float32', False), (3, 'bfloat16', True)])
def test_gradients_of_key_heads_side_by_side_on_a_tpu(groups, dtype, races):
  """Shards of few tokens, which a query meets in one tile or in several; two sets of key heads."""
  start, end = cases.intervals('empty')
  indices = cases.selection(start, end, 13)
  shapes = (2, cases.T, 2 * groups, E), (2, cases.S, groups, E), (2, cases.S, groups, V)
  q, k, v = cases.normal(5, *shapes, dtype=dtype)
  blocks = dataclasses.replace(  # Less VMEM than a step's queries take: the fewest keys in a shard.
      SMALL['tpu'], wide_heads=3, wide_rows=9, block_t_wide=24, vmem_share_wide=1e-9
  )
  with cases.interpreted('tpu', races):
    poisoned = poison(k, indices), poison(v, indices)
    actual = _run_groups(q, *poisoned, indices, backend='tpu', blocks=blocks)
    jax.block_until_ready(actual)
  exact = _run_groups(*cases.f32(q, k, v), indices, backend='reference')
  cases.assert_matches(actual, exact, cases.TOLERANCE[dtype])


@pytest.mark.parametrize('groups, own, given, _', GROUPS[:2])
def test_groups_are_attention_to_repeated_keys(groups, own, given, _):
  """By the float64 definition, of each head's own key head and selection."""
  q, k, v, indices = grouped_inputs('packed', groups, own, given)
  actual = _run_groups(q, k, v, indices, backend='reference')
  v = k[..., :V] if v is None else v
  for h in range(4):
    g = h // (4 // groups)
    rows = np.concatenate([v[:, :, g], k[:, :, g]], axis=-1, dtype=np.float64)
    queries = np.pad(np.float64(q[:, :, h : h + 1]), [(0, 0)] * 3 + [(V, 0)])
    out, lse = witness(queries, rows, indices[:, :, g] if own else indices, V)
    of_head = {'out': actual['out'][:, :, h], 'lse': actual['lse'][:, :, h]}
    cases.assert_matches(of_head, {'out': out[:, :, 0], 'lse': lse[:, :, 0]})


@pytest.mark.parametrize('backend', ['xla', 'gpu', 'tpu'])
def test_few_queries_of_grouped_heads(backend):
  """As in decoding: fewer rows are selected than there are keys."""
  q, k, v, indices = grouped_inputs('chunk', 2, False, True)
  q, indices = q[:, :3], indices[:, :3]
  with cases.interpreted(backend):
    actual = jax.block_until_ready(_run_groups(q, k, v, indices, backend=backend))
  cases.assert_matches(actual, _run_groups(q, k, v, indices, backend='reference'))


@pytest.mark.parametrize('backend, blocks', BLOCKS, ids=str)
def test_blocks_change_nothing(backend, blocks):
  inputs = make_inputs('packed')
  actual = values_and_grads(*inputs, backend=backend, blocks=blocks)
  cases.assert_matches(actual, values_and_grads(*inputs, backend='reference'))


@pytest.mark.nightly
@pytest.mark.parametrize('visibility, races', [('empty', False), ('packed', True)])
def test_gradients_while_sparse_cores_gather(visibility, races, monkeypatch):
  cases.give_sparse_cores(monkeypatch)
  q, kv, indices = make_inputs(visibility)
  unused = np.setdiff1d(np.arange(cases.S), indices)
  kv = kv.at[:, unused].set(jnp.nan)
  blocks = dataclasses.replace(FEW_KEYS, block_t_compact=24)  # No other test's, whose program would run.
  actual = values_and_grads(q, kv, indices, backend='tpu', blocks=blocks, races=races)
  exact = values_and_grads(q, kv, indices, backend='reference')
  cases.assert_matches(actual, exact)


def test_a_gpu_takes_many_heads_and_slots_in_several_tiles():
  q, kv = cases.normal(0, (1, 7, 40, 24), (1, cases.S, 24))
  indices = np.random.default_rng(0).permuted(np.tile(np.arange(-8, cases.S), (7, 1)), axis=1)
  indices = jnp.asarray(indices[None, :, :41].clip(-1), jnp.int32)
  blocks = gpu.BlockSizes(heads=16, tile=16, block_t=4, block_t_backward=3)
  actual = values_and_grads(q, kv, indices, v_dim=19, backend='gpu', blocks=blocks)
  cases.assert_matches(actual, values_and_grads(q, kv, indices, v_dim=19, backend='reference'))


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='inline PTX has no interpreter')
@pytest.mark.parametrize('heads, topk', [(64, 100), (128, 33), (64, 640)])
def test_wide_rows_on_a_gpu(heads, topk):
  """At sizes that wgmma takes: holes, empty rows, and NaN where nothing is selected."""
  n_rows, n_keys, v_dim = 140, 900, 128
  shapes = (1, n_rows, heads, 192), (1, n_keys, 192)
  q, kv = cases.normal(0, *shapes, dtype='bfloat16')
  q = q / 8
  rng = np.random.default_rng(0)
  indices = np.stack([rng.permutation(n_keys - 1)[:topk] for _ in range(n_rows)])
  indices[::3][rng.random(indices[::3].shape) < 0.5] = -1
  indices[1::5], indices[2::7, :64], indices[3, 64:] = -1, -1, -1
  inputs = kv.at[:, -1].set(jnp.nan), jnp.asarray(indices[None], jnp.int32)
  actual = values_and_grads(q, *inputs, v_dim=v_dim, backend='gpu')
  exact = cases.f32(q, kv)
  expected = values_and_grads(*exact, inputs[1], v_dim=v_dim, backend='reference')
  cases.assert_matches(actual, expected, cases.TOLERANCE['bfloat16'])
  for name, again in values_and_grads(q, *inputs, v_dim=v_dim, backend='gpu').items():
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (actual[name], again)))


def test_wide_rows_trace_without_a_gpu():
  """Mosaic GPU's calls change with jax: tracing shows it where nothing can compile the kernels."""
  options = dict(v_dim=512, sm_scale=0.1, backend='gpu')
  attend = lambda q, kv, i: sparse_attention(q, kv[:, :, None], None, i, **options)[0]
  total = lambda *x: jnp.sum(attend(*x).astype(jnp.float32))
  shapes = (1, 264, 128, 576), (1, 512, 576)
  q, kv = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
  indices = jax.ShapeDtypeStruct((1, 264, 128), jnp.int32)
  jaxpr = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(q, kv, indices))
  for kernel in 'sparse_attention_forward', 'sparse_attention_weights':
    assert kernel in jaxpr
  assert 'wgmma' in jaxpr


MANY_KEYS = tpu.BlockSizes(block_t=16, step_t=4, tile=4, line=4, copied=8, vmem_share=2e-3)


@pytest.mark.nightly
@pytest.mark.parametrize('blocks', [FEW_KEYS, MANY_KEYS], ids=['few', 'many'])
def test_the_kernels_do_not_race(blocks):
  inputs = make_inputs('chunk')
  actual = values_and_grads(*inputs, backend='tpu', blocks=blocks, races=True)
  cases.assert_matches(actual, values_and_grads(*inputs, backend='reference'))


@pytest.mark.nightly
@pytest.mark.parametrize('visibility', ['empty', 'overhang'])
def test_rows_brought_together_match_reference(visibility):
  """As wide that a shard of keys is two of their sums."""
  _, _, indices = make_inputs(visibility)
  q, kv = cases.normal(0, (2, cases.T, H, 200), (2, cases.S, 200), dtype='bfloat16')
  q, options = q / 5, dict(v_dim=130)
  actual = values_and_grads(q, kv, indices, backend='tpu', blocks=FEW_KEYS, **options)
  exact = values_and_grads(*cases.f32(q, kv), indices, backend='reference', **options)
  cases.assert_matches(actual, exact, cases.TOLERANCE['bfloat16'])


@pytest.mark.nightly
def test_memory_of_earlier_queries_is_not_read():
  """A key of all earlier queries is NaN; later ones, the last with nothing to see, have others."""
  q, kv, indices = make_inputs('chunk')
  late = np.s_[:, FEW_KEYS.block_t_compact :]
  indices = jnp.where(indices == 5, -1, indices).at[:, -1].set(-1)
  exact = values_and_grads(q, kv, indices, backend='reference')
  indices = indices.at[:, : FEW_KEYS.block_t_compact].set(5)
  indices = indices.at[:, : FEW_KEYS.block_t_compact, 1:].set(-1)
  kv = kv.at[:, 5].set(jnp.nan)
  actual = values_and_grads(q, kv, indices, backend='tpu', blocks=FEW_KEYS)
  assert np.isnan(actual['out'][0, 0]).all()
  of_late = lambda results: {name: results[name][late] for name in ('out', 'lse', 'dq')}
  cases.assert_matches(of_late(actual), of_late(exact))


@pytest.mark.nightly
@pytest.mark.parametrize('bytes_per_key', [512, 1024], ids=['forward', 'backward'])
def test_keys_in_reach_of_two_shards(bytes_per_key):
  """Three shards with keys in common; each query has its own border between them."""
  n_keys, topk = 600, 384
  rng = np.random.default_rng(4)
  indices = np.stack([np.sort(rng.permutation(n_keys - 1)[:topk]) for _ in range(6)])
  indices[1] = np.arange(100, 100 + topk)
  indices[2, 50:], indices[3] = -1, -1
  q, kv = cases.normal(0, (1, 6, H, E), (1, n_keys, E))
  inputs = kv.at[:, -1].set(jnp.nan), jnp.asarray(indices[None], jnp.int32)
  share = 304 * bytes_per_key / chip.vmem_bytes()
  blocks = tpu.BlockSizes(block_t=4, step_t=2, tile=128, line=8, copied=64, vmem_share=share)
  sizes = n_keys, topk, bytes_per_key, chip.vmem_bytes()
  assert fit_shards(*sizes, blocks) == (Shards(3, 200, 48), 128)
  actual = values_and_grads(q, *inputs, backend='tpu', blocks=blocks)
  exact = values_and_grads(q, kv, inputs[1], backend='reference')
  cases.assert_matches(actual, exact)


@pytest.mark.parametrize('dtype', cases.TOLERANCE)
def test_decoding_reads_only_its_own_rows(dtype):
  """Few queries, many keys: the kernel gets the rows that they selected."""
  q, kv, indices = make_inputs('chunk', dtype)
  q, indices = q[:, :3], jnp.where(indices[:, :3] < 30, indices[:, :3], -1)
  kv = kv.at[:, 30:].set(jnp.nan)
  actual = values_and_grads(q, kv, indices, backend='tpu')
  exact = values_and_grads(*cases.f32(q, kv), indices, backend='reference')
  cases.assert_matches(actual, exact, cases.TOLERANCE[dtype])


@pytest.mark.parametrize('backend', cases.BACKENDS)
def test_the_value_may_be_the_whole_key(backend):
  inputs = make_inputs('chunk')
  exact = values_and_grads(*inputs, v_dim=E, backend='reference')
  cases.assert_matches(values_and_grads(*inputs, v_dim=E, backend=backend), exact)


@pytest.mark.parametrize('backend', ALL)
def test_order_of_indices_does_not_matter(backend):
  q, kv, indices = make_inputs('causal')
  shuffled = np.random.default_rng(2).permuted(np.asarray(indices), axis=-1)
  assert (shuffled != indices).any()
  actual = values_and_grads(q, kv, jnp.asarray(shuffled), backend=backend)
  cases.assert_matches(actual, values_and_grads(q, kv, indices, backend='reference'))


@pytest.mark.parametrize('wild', [cases.S, cases.S + 1, 2**30, 2**31 - 1, -2, -(2**31)])
@pytest.mark.parametrize('backend', ALL)
def test_what_is_no_position_is_an_empty_slot(backend, wild):
  q, kv, indices = make_inputs('causal')
  actual = values_and_grads(q, kv, jnp.where(indices < 0, wild, indices), backend=backend)
  cases.assert_matches(actual, values_and_grads(q, kv, indices, backend='reference'))


@pytest.mark.parametrize('wild', [-1, 2**30])
@pytest.mark.parametrize('backend', ALL)
def test_unselected_keys_may_hold_nan(backend, wild):
  q, kv, indices = make_inputs('packed')
  indices = indices.at[:, ::2, 1].set(-1)
  clean = values_and_grads(q, kv, indices, backend='reference')
  unused = np.ones((2, cases.S), bool)
  for b in range(2):
    unused[b, np.asarray(indices)[b][np.asarray(indices)[b] >= 0]] = False
  assert unused[:, 2:4].all()
  poisoned = jnp.where(unused[..., None], jnp.nan, kv)
  actual = values_and_grads(q, poisoned, jnp.where(indices < 0, wild, indices), backend=backend)
  cases.assert_matches(actual, clean)
  assert not np.any(np.asarray(actual['dkv'])[unused])


@pytest.mark.parametrize('backend', ALL)
def test_nan_at_the_ends_of_the_keys(backend):
  """Where an empty slot that is clipped to a position would read."""
  q, kv, indices = make_inputs('chunk')
  indices = jnp.where((indices == 0) | (indices == cases.S - 1), -1, indices)
  clean = values_and_grads(q, kv, indices, backend='reference')
  poisoned = kv.at[:, 0].set(jnp.nan).at[:, -1].set(jnp.nan)
  for wild in (-1, cases.S):
    slots = jnp.where(indices < 0, wild, indices)
    cases.assert_matches(values_and_grads(q, poisoned, slots, backend=backend), clean)


@pytest.mark.parametrize('empty', [-1, 2**30])
@pytest.mark.parametrize('backend', ALL)
def test_empty_rows_are_zero(backend, empty):
  q, kv, indices = make_inputs('causal')
  rows = np.arange(cases.T) % 3 != 1
  indices = jnp.where(rows[:, None], empty, indices)
  actual = values_and_grads(q, kv, indices, backend=backend)
  assert np.all(np.asarray(actual['lse'])[:, rows] == -np.inf)
  assert not np.any(np.asarray(actual['out'])[:, rows])
  assert not np.any(np.asarray(actual['dq'])[:, rows])
  assert np.isfinite(actual['dkv']).all() and np.any(actual['dkv'])
  actual = values_and_grads(q, kv, jnp.full_like(indices, empty), backend=backend)
  assert not any(np.any(actual[name]) for name in ('out', 'dq', 'dkv'))


@pytest.mark.parametrize('logit', [300.0, -300.0])
@pytest.mark.parametrize('backend', ALL)
def test_large_logits_do_not_overflow(backend, logit):
  """Rows of logits all far from 0, which is what an empty slot would score."""
  q, kv, indices = make_inputs('causal')
  q, kv = q.at[..., 0].set(1.0), kv.at[..., 0].set(logit / SCALE)
  actual = values_and_grads(q, kv, indices, backend=backend)
  out, lse = witness(np.float64(q), np.float64(kv), indices, V)
  # The rounding of logits near 300 is a relative error of the probabilities.
  cases.assert_matches({x: actual[x] for x in ('out', 'lse')}, {'out': out, 'lse': lse}, 1e-4)
  assert np.isfinite(actual['dq']).all() and np.isfinite(actual['dkv']).all()


@pytest.mark.parametrize('backend', cases.BACKENDS)
def test_repeats_bit_by_bit(backend):
  inputs = make_inputs('causal')
  first, *rest = (values_and_grads(*inputs, backend=backend) for _ in range(3))
  for again in rest:
    assert all((first[name] == again[name]).all() for name in first)


def test_memory_is_linear_in_the_context():
  n, topk = 4096, 16
  op = lambda q, k, i, **options: sparse_attention(
      q, k, None, i, v_dim=6, sm_scale=1.0, **options
  )
  shapes = [((1, n, 2, 8), 'float32'), ((1, n, 1, 8), 'float32'), ((1, n, topk), 'int32')]
  for backend in ALL:
    assert cases.largest_array(functools.partial(op, backend=backend), *shapes) < n * n


def test_says_what_is_wrong():
  q, kv, indices = make_inputs('causal')
  k, options = kv[:, :, None], dict(v_dim=V, sm_scale=1.0, backend='xla')
  with pytest.raises(ValueError, match="backend='tpu3' must be one of"):
    sparse_attention(q, k, None, indices, **options | dict(backend='tpu3'))
  for v_dim in (0, -1, E + 1):
    with pytest.raises(ValueError, match=f'{v_dim=} must be within 1 and the width of k, 8'):
      sparse_attention(q, k, None, indices, **options | dict(v_dim=v_dim))
  with pytest.raises(ValueError, match='got v_dim=5 beside v'):
    sparse_attention(q, k, k, indices, **options)
  with pytest.raises(ValueError, match='got neither v nor v_dim'):
    sparse_attention(q, k, None, indices, **options | dict(v_dim=None))
  with pytest.raises(ValueError, match=r'of one dtype .*; got float32 .*, bfloat16'):
    sparse_attention(q, k.astype('bfloat16'), None, indices, **options)
  with pytest.raises(ValueError, match='on a TPU must be bfloat16 or float32; got float16'):
    half = q.astype('float16'), k.astype('float16')
    sparse_attention(*half, None, indices, **options | dict(backend='tpu'))
  with pytest.raises(ValueError, match='on a GPU must be .*; got float8_e4m3fn'):
    eighth = q.astype('float8_e4m3fn'), k.astype('float8_e4m3fn')
    sparse_attention(*eighth, None, indices, **options | dict(backend='gpu'))
  twice, thrice = (jnp.repeat(k, n, axis=2) for n in (2, 3))
  for keys, v in [(k[..., 1:], None), (twice, None), (k, k[:, 1:]), (thrice, k)]:
    sizes = options | dict(v_dim=V if v is None else None)
    with cases.unchecked(), pytest.raises(ValueError, match=r'with G dividing H, .* got'):
      sparse_attention(q, keys, v, indices, **sizes)
  for wrong in (indices[:, 1:], jnp.stack([indices] * 2, axis=2)):
    with cases.unchecked(), pytest.raises(ValueError, match='indices must be .* K per query, or'):
      sparse_attention(q, thrice, None, wrong, **options)
