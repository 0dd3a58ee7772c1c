# SPDX-License-Identifier: Apache-2.0
"""Selection and attention in one op: the numbers of the two, also where SparseCores work beside."""

import dataclasses
import functools

import cases
import hostile
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_index_topk import make_inputs as make_index_inputs

from dsa_jax.kernels import indexed_attention
from dsa_jax.kernels.index_topk import tpu as selection
from dsa_jax.kernels.indexed_attention import tpu
from dsa_jax.kernels.sparse_attention import tpu as attention
from dsa_jax.kernels.tpu import chip, sparse_cores

H, E, V = 3, 8, 5
SMALL = tpu.BlockSizes(
    block_t=16,
    select=selection.BlockSizes(step_t=8, step_s=128),
    attend=attention.BlockSizes(step_t=2, line=4, own_tile=8),
)


@pytest.fixture
def sparse_cores_here(monkeypatch):
  cases.give_sparse_cores(monkeypatch)


def make_inputs(visibility, dtype='float32', scores='integers'):
  q, kv = cases.normal(0, (2, cases.T, H, E), (2, cases.S, E), dtype=dtype)
  index_q, index_k, weights = make_index_inputs(scores)
  return q, kv, index_q.astype(dtype), index_k.astype(dtype), weights, *cases.intervals(visibility)


SIZES = dict(topk=cases.K, v_dim=V, sm_scale=0.6)


def attend(q, kv, *index, **options):
  return indexed_attention(q, kv[:, :, None], None, *index, **options)


def run(*inputs, backend):
  with cases.interpreted(backend):
    f = functools.partial(attend, **SIZES, backend=backend)
    return jax.block_until_ready(cases.jit(f)(*inputs))


def run_pipeline(*inputs, blocks=SMALL, races=False):
  sizes = dict(topk=SIZES['topk'], v_dim=V, vmem=chip.vmem_bytes(), blocks=blocks)
  f = functools.partial(tpu.forward, plan=tpu.plan(*inputs[:4], **sizes), sm_scale=SIZES['sm_scale'])
  with cases.interpreted('tpu', races):
    return jax.block_until_ready(cases.jit(f)(*inputs))


def assert_alike(actual, exact, dtype='float32'):
  np.testing.assert_array_equal(actual[1], exact[1])
  cases.assert_matches({'out': actual[0]}, {'out': exact[0]}, cases.TOLERANCE[dtype])
  assert actual[0].dtype == dtype and actual[1].dtype == jnp.int32


@pytest.mark.parametrize('backend', ['xla', 'gpu'])
def test_is_the_two_ops(backend):
  inputs = make_inputs('packed')
  assert_alike(run(*inputs, backend=backend), run(*inputs, backend='reference'))


@pytest.mark.parametrize('n_selections', [1, 2])
@pytest.mark.parametrize('backend', ['xla', 'gpu', 'tpu'])
def test_is_the_two_ops_for_grouped_heads(backend, n_selections):
  shapes = (2, cases.T, 4, E), (2, cases.S, 2, E), (2, cases.S, 2, V)
  q, k, v = cases.normal(0, *shapes)
  index_q, index_k, weights = make_index_inputs('integers')
  index = jnp.repeat(index_q, 2, axis=2), index_k, jnp.tile(weights, 2), *cases.intervals('packed')
  options = dict(topk=cases.K, n_selections=n_selections, sm_scale=0.6)
  with cases.interpreted(backend):
    both = cases.jit(functools.partial(indexed_attention, **options, backend=backend))
    actual = jax.block_until_ready(both(q, k, v, *index))
  assert_alike(actual, indexed_attention(q, k, v, *index, **options, backend='reference'))


@pytest.mark.hostile
def test_beside_sparse_cores_on_the_hostile_input(sparse_cores_here):
  """Two blocks of queries; keys that nothing selects hold NaN."""
  q, kv, index_q, index_k, weights, *_ = make_inputs('causal')
  few, blocks = np.s_[1:, : hostile.T], dataclasses.replace(SMALL, block_t=8)
  kv, index_k = kv[1:, : hostile.S], index_k[1:, : hostile.S]
  inputs = index_q[few], index_k, weights[few], *(x[1:] for x in hostile.intervals())
  exact = run(q[few], kv, *inputs, backend='reference')
  unused = np.setdiff1d(np.arange(hostile.S), exact[1])
  assert unused.size
  poisoned = kv.at[:, unused].set(jnp.nan)
  assert_alike(run_pipeline(q[few], poisoned, *inputs, blocks=blocks), exact)


@pytest.mark.nightly
@pytest.mark.parametrize(
    'visibility, dtype', [('packed', 'float32'), ('empty', 'float32'), ('overhang', 'bfloat16')]
)
def test_beside_sparse_cores(visibility, dtype, sparse_cores_here):
  inputs = make_inputs(visibility, dtype)
  exact = run(*cases.f32(*inputs[:5]), *inputs[5:], backend='reference')
  assert_alike(run_pipeline(*inputs), exact, dtype)


@pytest.mark.nightly
def test_no_races_and_no_keys_that_nothing_selects(sparse_cores_here):
  q, kv, *rest = make_inputs('padded')
  exact = run(q, kv, *rest, backend='reference')
  unused = np.setdiff1d(np.arange(cases.S), exact[1])
  assert unused.size
  assert_alike(run_pipeline(q, kv.at[:, unused].set(jnp.nan), *rest, races=True), exact)


@pytest.mark.parametrize('n_rows', [1, 16, 37, 90])
def test_rows_are_gathered(n_rows, sparse_cores_here):
  table = jnp.arange(50 * 128, dtype=jnp.int32).reshape(50, 128)
  rows = jax.random.randint(jax.random.key(0), (n_rows,), 0, 50)
  with cases.interpreted('tpu', races=True):
    np.testing.assert_array_equal(cases.jit(sparse_cores.gather)(table, rows), table[rows])


def test_no_gradients():
  op = lambda *x: jnp.sum(attend(*x, **SIZES, backend='xla')[0])
  for gradient in jax.grad(op, argnums=range(5))(*make_inputs('causal')):
    assert not gradient.any()


@pytest.mark.parametrize(
    'n_queries, n_keys, asked', [(512, 131_072, True), (8, 131_072, False), (512, 32_768, False)]
)
def test_sparse_cores_are_asked_where_vmem_holds_too_few_keys(monkeypatch, n_queries, n_keys, asked):
  calls = []

  def forward(q, *_, plan, sm_scale):
    calls.append(plan)
    sizes = plan.sizes
    return jnp.zeros((*q.shape[:3], sizes.v_dim)), jnp.zeros((*q.shape[:2], sizes.n_slots), jnp.int32)

  monkeypatch.setattr(sparse_cores, 'available', lambda: True)
  monkeypatch.setattr(tpu, 'forward', forward)
  of = lambda *dims, dtype='bfloat16': jax.ShapeDtypeStruct((1, *dims), dtype)
  index = of(n_queries, 4, 128), of(n_keys, 128), of(n_queries, 4, dtype='float32')
  shapes = of(n_queries, 4, 576), of(n_keys, 576), *index, *[of(n_queries, dtype='int32')] * 2
  op = functools.partial(attend, topk=2048, v_dim=512, sm_scale=1.0, backend='tpu')
  jax.eval_shape(op, *shapes)
  assert bool(calls) == asked


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(topk=0), r'topk=0 must be at least 1'),
        (dict(v_dim=9), r'v_dim=9 must be within 1 and the width of k, 8'),
        (dict(backend='cuda'), r"backend='cuda' must be one of"),
    ],
)
def test_wrong_values(change, message):
  options = SIZES | dict(backend='xla') | change
  with cases.unchecked(), pytest.raises(ValueError, match=message):
    attend(*make_inputs('causal'), **options)
