# SPDX-License-Identifier: Apache-2.0
"""Attention to an interval: the same numbers as the definition, and as sparse attention."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.kernels import dense_attention, sparse_attention
from dsa_jax.kernels.dense_attention import gpu, tpu, xla
from dsa_jax.kernels.dense_attention.spans import rows_of, spans_of

ALL = ['reference', *cases.BACKENDS]
SMALL = tpu.BlockSizes(block_r=16, block_s=32, tile_s=16, tile_s_backward=8, line=8, block_t=16)
ONE = tpu.BlockSizes(block_r=256, block_s=64, tile_s=64, tile_s_backward=64, line=8)  # One block.
BLOCKS = [
    ('xla', xla.BlockSizes(block_t=t, block_s=s), restricted)
    for t, s, restricted in [(1, 1, False), (8, 5, True), (5, 8, False)]
]
BLOCKS += [('gpu', gpu.BlockSizes(block_r=32, tile_s=16, tile_r=16, block_s=32), True)]
BLOCKS += [('tpu', ONE, False), ('tpu', ONE, True)]
SIZES = {'tpu': SMALL}  # The interpreter takes its time.
H, E, V = 4, 6, 5
SCALE = 0.6


def values_and_grads(*args, backend, blocks=None, races=False):
  """Both outputs and the three gradients, by name, of inputs, start, end and maybe indices."""
  with cases.interpreted(backend, races):
    return jax.block_until_ready(_run(*args, backend=backend, blocks=blocks or SIZES.get(backend)))


@functools.partial(cases.jit, static_argnames=('backend', 'blocks'))
def _run(q, k, v, start, end, indices=None, *, backend, blocks):
  def op(q, k, v):
    options = dict(sm_scale=SCALE, indices=indices, backend=backend, blocks=blocks)
    return dense_attention(q, k, v, start, end, **options)

  (out, lse), vjp = jax.vjp(op, q, k, v)
  dq, dk, dv = vjp(cotangents(out, lse))
  return {'out': out, 'lse': lse, 'dq': dq, 'dk': dk, 'dv': dv}


def cotangents(out, lse):
  weights = [jnp.cos(jnp.arange(x.size) + 1.0).reshape(x.shape) for x in (out, lse)]
  return weights[0].astype(out.dtype), weights[1]


def make_inputs(visibility, groups=2, dtype='float32'):
  start, end = cases.intervals(visibility)
  shapes = (2, cases.T, H, E), (2, cases.S, groups, E), (2, cases.S, groups, V)
  return *cases.normal(0, *shapes, dtype=dtype), start, end


def witness(q, k, v, allowed):
  """The op in float64, a query and a head at a time."""
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  lse = np.full(q.shape[:3], -np.inf)
  for b, t, h in np.ndindex(q.shape[:3]):
    keys, g = np.flatnonzero(allowed[b, t]), h * k.shape[2] // q.shape[2]
    if keys.size:
      logits = SCALE * k[b, keys, g] @ q[b, t, h]
      lse[b, t, h] = np.log(np.sum(np.exp(logits - logits.max()))) + logits.max()
      out[b, t, h] = np.exp(logits - lse[b, t, h]) @ v[b, keys, g]
  return out, lse


@pytest.mark.parametrize('groups', [2, H])
@pytest.mark.parametrize('visibility', cases.VISIBILITY)
def test_reference_matches_float64(visibility, groups):
  *qkv, start, end = make_inputs(visibility, groups)
  actual = values_and_grads(*qkv, start, end, backend='reference')
  out, lse = witness(*map(np.float64, qkv), cases.seen(start, end))
  cases.assert_matches({x: actual[x] for x in ('out', 'lse')}, {'out': out, 'lse': lse})


def test_gradients_of_the_reference_match_finite_differences():
  q, k, v = cases.normal(1, (1, 3, 2, 3), (1, 5, 1, 3), (1, 5, 1, 2))
  start, end = jnp.array([[2, 0, 1]], jnp.int32), jnp.array([[2, 3, 5]], jnp.int32)
  actual = values_and_grads(q, k, v, start, end, backend='reference')
  dout, dlse = (np.float64(x) for x in cotangents(actual['out'], actual['lse']))
  allowed = cases.seen(start, end)[..., :5]

  def total(**changed):
    out, lse = witness(*(exact | changed).values(), allowed)
    return np.sum(dout * out) + np.sum((dlse * lse)[np.isfinite(lse)])

  exact = {'q': np.float64(q), 'k': np.float64(k), 'v': np.float64(v)}
  for name, x in exact.items():
    want = cases.numeric_gradient(lambda x, name=name: total(**{name: x}), x)
    cases.assert_matches({name: actual['d' + name]}, {name: want})


@pytest.mark.parametrize('groups, dtype', [(1, 'float32'), (H, 'float32'), (2, 'bfloat16')])
@pytest.mark.parametrize('visibility', cases.VISIBILITY)
@pytest.mark.parametrize('backend', cases.BACKENDS)
def test_matches_reference(backend, visibility, groups, dtype):
  *qkv, start, end = make_inputs(visibility, groups, dtype)
  actual = values_and_grads(*qkv, start, end, backend=backend)
  exact = values_and_grads(*cases.f32(*qkv), start, end, backend='reference')
  assert actual['out'].dtype == actual['dq'].dtype == actual['dk'].dtype == dtype
  assert actual['lse'].dtype == jnp.float32
  cases.assert_matches(actual, exact, cases.TOLERANCE[dtype])


@pytest.mark.parametrize('backend, blocks, restricted', BLOCKS, ids=str)
def test_blocks_change_nothing(backend, blocks, restricted):
  for visibility in ('packed', 'overhang', 'empty'):
    inputs = make_inputs(visibility)
    indices = cases.selection(*inputs[3:]) if restricted else None
    actual = values_and_grads(*inputs, indices, backend=backend, blocks=blocks)
    cases.assert_matches(actual, values_and_grads(*inputs, indices, backend='reference'))


@pytest.mark.nightly
@pytest.mark.parametrize('restricted', [False, True])
def test_the_kernels_do_not_race(restricted):
  inputs = make_inputs('chunk', groups=1)
  indices = cases.selection(*inputs[3:]) if restricted else None
  actual = values_and_grads(*inputs, indices, backend='tpu', races=True)
  cases.assert_matches(actual, values_and_grads(*inputs, indices, backend='reference'))


@pytest.mark.parametrize('width, v_dim', [(192, 128), (64, 64)])
@pytest.mark.parametrize('backend', ['tpu', 'gpu'])
def test_widths_of_released_models(backend, width, v_dim):
  """With the blocks that a chip gets, but for the keys of one, which are few."""
  shapes = (1, 200, 2, width), (1, 300, 1, width), (1, 300, 1, v_dim)
  q, k, v = (x / 4 for x in cases.normal(0, *shapes, dtype='bfloat16'))
  end = jnp.arange(101, 301)[None]
  start = jnp.where(end > 220, 130, 0)
  blocks = {'tpu': tpu.BlockSizes(block_r=128, block_s=256), 'gpu': gpu.BlockSizes()}[backend]
  actual = values_and_grads(q, k, v, start, end, backend=backend, blocks=blocks)
  exact = values_and_grads(*cases.f32(q, k, v), start, end, backend='reference')
  cases.assert_matches(actual, exact, cases.TOLERANCE['bfloat16'])


@functools.partial(cases.jit, static_argnames='backend')
def sparse_values_and_grads(q, kv, indices, *, backend):
  options = dict(v_dim=V, sm_scale=SCALE, backend=backend)
  attend = lambda q, kv: sparse_attention(q, kv[:, :, None], None, indices, **options)
  (out, lse), vjp = jax.vjp(attend, q, kv)
  dq, dkv = vjp(cotangents(out, lse))
  return {'out': out, 'lse': lse, 'dq': dq, 'dkv': dkv}


def shared_values_and_grads(q, kv, *where, backend):
  """Dense attention over the one vector per token that sparse attention takes."""
  shared = values_and_grads(q, kv[:, :, None], kv[:, :, None, :V], *where, backend=backend)
  dkv = np.array(shared.pop('dk')[:, :, 0])
  dkv[..., :V] += shared.pop('dv')[:, :, 0]
  return shared | {'dkv': dkv}


@pytest.mark.parametrize('visibility', cases.VISIBILITY)
@pytest.mark.parametrize('backend', ALL)
def test_selecting_everything_is_dense_attention(backend, visibility):
  start, end = cases.intervals(visibility)
  q, kv = cases.normal(0, (2, cases.T, H, E), (2, cases.S, E))
  everything = np.where(cases.seen(start, end), np.arange(cases.S), -1)
  sparse = sparse_values_and_grads(q, kv, jnp.asarray(everything, jnp.int32), backend='reference')
  cases.assert_matches(shared_values_and_grads(q, kv, start, end, backend=backend), sparse)


@pytest.mark.parametrize('empty', [-1, 2**30])
@pytest.mark.parametrize('visibility', cases.VISIBILITY)
@pytest.mark.parametrize('backend', ALL)
def test_restricted_to_a_selection_is_sparse_attention(backend, visibility, empty):
  start, end = cases.intervals(visibility)
  q, kv = cases.normal(0, (2, cases.T, H, E), (2, cases.S, E))
  indices = cases.selection(start, end)
  sparse = sparse_values_and_grads(q, kv, indices, backend='reference')
  indices = jnp.where(indices < 0, empty, indices)
  cases.assert_matches(shared_values_and_grads(q, kv, start, end, indices, backend=backend), sparse)


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('backend', ALL)
def test_a_selection_for_each_key_head(backend, groups):
  *qkv, start, end = make_inputs('packed', groups)
  chosen = [cases.selection(start, end, seed=seed) for seed in range(groups)]
  allowed = [np.asarray(x)[..., None] == np.arange(cases.S) for x in chosen]
  actual = values_and_grads(*qkv, start, end, jnp.stack(chosen, axis=2), backend=backend)
  for g, of_group in enumerate(np.split(np.arange(H), groups)):
    q, k, v = (np.float64(x) for x in qkv)
    inputs = q[:, :, of_group], k[:, :, g : g + 1], v[:, :, g : g + 1]
    out, lse = witness(*inputs, allowed[g].any(axis=2))
    results = {x: actual[x][:, :, of_group] for x in ('out', 'lse')}
    cases.assert_matches(results, {'out': out, 'lse': lse})
  exact = values_and_grads(*qkv, start, end, jnp.stack(chosen, axis=2), backend='reference')
  cases.assert_matches(actual, exact)


@pytest.mark.parametrize('backend', ALL)
def test_a_selection_stays_within_the_interval(backend):
  start, end = cases.intervals('packed')
  q, kv = cases.normal(0, (2, cases.T, H, E), (2, cases.S, E))
  anywhere = cases.selection(jnp.zeros_like(start), jnp.full_like(end, cases.S))
  within = jnp.where((anywhere >= start[..., None]) & (anywhere < end[..., None]), anywhere, -1)
  sparse = sparse_values_and_grads(q, kv, within, backend='reference')
  dense = shared_values_and_grads(q, kv, start, end, anywhere, backend=backend)
  cases.assert_matches(dense, sparse)


@pytest.mark.parametrize('backend', ALL)
def test_empty_rows_are_zero(backend):
  *qkv, start, end = make_inputs('causal')
  rows = np.arange(cases.T) % 3 != 1
  start = jnp.where(rows, end, start)
  actual = values_and_grads(*qkv, start, end, backend=backend)
  actual = {name: np.asarray(x) for name, x in actual.items()}
  assert np.all(actual['lse'][:, rows] == -np.inf)
  assert not np.any(actual['out'][:, rows]) and not np.any(actual['dq'][:, rows])
  assert all(np.isfinite(actual[name]).all() and np.any(actual[name]) for name in ('dk', 'dv'))
  actual = values_and_grads(*qkv, end, end, backend=backend)
  assert not any(np.any(actual[name]) for name in ('out', 'dq', 'dk', 'dv'))


@pytest.mark.parametrize('unseen', [300.0, -300.0])
@pytest.mark.parametrize('backend', ALL)
def test_large_logits_do_not_overflow(backend, unseen):
  """What a row does not see may score far more than all that it sees."""
  q, k, v, start, end = make_inputs('causal')
  q, k = q.at[..., 0].set(1 / SCALE), k.at[..., 0].set(-unseen).at[:, 20:, :, 0].set(unseen)
  actual = values_and_grads(q, k, v, start, end, backend=backend)
  exact = witness(*map(np.float64, (q, k, v)), cases.seen(start, end))
  want = dict(zip(('out', 'lse'), exact))
  cases.assert_matches({x: actual[x] for x in want}, want, 1e-4)  # Rounding of logits near 300.
  assert all(np.isfinite(actual[name]).all() for name in ('dq', 'dk', 'dv'))


@pytest.mark.parametrize('backend', ALL)
def test_packed_documents_are_separate(backend):
  """What is in the other documents changes no bit of this one, and gets no gradient from it."""
  q, k, v, start, end = make_inputs('packed')
  inside = slice(8, 21)  # The third document of the first row.
  other = [x.at[0].set(7 * x[0]).at[0, inside].set(x[0, inside]) for x in (q, k, v)]
  before = values_and_grads(q, k, v, start, end, backend=backend)
  after = values_and_grads(*other, start, end, backend=backend)
  for name, x in before.items():
    np.testing.assert_array_equal(after[name][0, inside], x[0, inside], err_msg=name)
    if name != 'dv':
      assert (after[name] != x).any(), name


@pytest.mark.parametrize('restricted', [False, True])
def test_memory_is_linear_in_the_context(restricted):
  n = 4096
  shapes = [((1, n, 2, 8), 'float32')] * 3 + [((1, n), 'int32')] * 2
  if restricted:
    shapes.append(((1, n, 16), 'int32'))

  def largest(backend):
    def op(q, k, v, start, end, indices=None):
      options = dict(indices=indices, sm_scale=1.0, backend=backend)
      return dense_attention(q, k, v, start, end, **options)

    return cases.largest_array(op, *shapes)

  assert largest('reference') >= n * n  # The count sees what it must.
  for backend in cases.PORTABLE:
    assert largest(backend) < n * n


def test_spans_are_those_of_the_rows():
  """Each block of rows, and each block of keys, is told of all that see one another."""
  block_r, block_s = 8, 16
  start, end = cases.intervals('causal')
  intervals = {name: cases.intervals(name) for name in cases.VISIBILITY}
  intervals['few'] = start, jnp.minimum(end, 9)  # Keys that nobody sees, after those that all do.
  intervals['late'] = jnp.maximum(start, 40), jnp.full_like(end, cases.S)
  for visibility, interval in intervals.items():
    rows = rows_of(*interval, cases.S, 2, block_r)
    spans = jax.tree.map(np.asarray, spans_of(rows, cases.S, block_r, block_s, masked=False))
    seen = cases.seen(*rows).reshape(2, -1, block_r, cases.S)
    first, last, all_first, all_last = spans.keys[..., None]
    at = np.arange(cases.S)
    assert (((at >= first) & (at < last)) >= seen.any(axis=2)).all()
    np.testing.assert_array_equal((at >= all_first) & (at < all_last), seen.all(axis=2))
    padded = np.pad(seen.any(axis=2), [(0, 0), (0, 0), (0, -cases.S % block_s)])
    sees = padded.reshape(*padded.shape[:2], -1, block_s).any(axis=-1)  # [B, row blocks, key blocks]
    number = np.arange(sees.shape[1])[:, None]
    inside = (number >= spans.rows[0, :, None]) & (number < spans.rows[1, :, None])
    assert (inside >= sees).all() and (spans.rows[0] < sees.shape[1]).all()
    if visibility in ('causal', 'packed', 'chunk'):
      np.testing.assert_array_equal(inside, sees)


def test_plans_refuse_what_does_not_fit():
  q, k = (jax.ShapeDtypeStruct((8, 2**18, n, 64), 'bfloat16') for n in (128, 1))
  with pytest.raises(ValueError, match='words of scalar memory, .* give fewer sequences'):
    tpu.plan_forward(q, k, k, masked=False, vmem=2**26, blocks=tpu.BlockSizes())
  tpu.plan_forward(q, k, k, masked=True, vmem=2**26, blocks=tpu.BlockSizes())
  q, k = (jax.ShapeDtypeStruct((1, 16, n, 2048), 'bfloat16') for n in (2, 1))
  with pytest.raises(ValueError, match='a key of 2048 channels .* has room for 5120'):
    gpu.plan(q, k, k, masked=False, blocks=gpu.BlockSizes())


def test_says_what_is_wrong():
  q, k, v, start, end = make_inputs('causal')
  with pytest.raises(ValueError, match="backend='' must be one of"):
    dense_attention(q, k, v, start, end, sm_scale=1.0, backend='')
  with pytest.raises(ValueError, match='end must be int32 .*; got int8'):
    dense_attention(q, k, v, start, end.astype('int8'), sm_scale=1.0, backend='xla')
  with pytest.raises(ValueError, match='share a dtype; got float32, bfloat16 and float32'):
    dense_attention(q, k.astype('bfloat16'), v, start, end, sm_scale=1.0, backend='xla')
  with pytest.raises(ValueError, match='with G dividing H; got'):
    k, v = (jnp.concatenate([x, x[:, :, :1]], axis=2) for x in (k, v))
    dense_attention(q, k, v, start, end, sm_scale=1.0, backend='xla')
  with cases.unchecked(), pytest.raises(ValueError, match='start must be int32'):
    dense_attention(q, k, v, start[:1], end, sm_scale=1.0, backend='xla')
