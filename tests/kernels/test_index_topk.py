# SPDX-License-Identifier: Apache-2.0
"""Selection is exact: the K best visible keys, ties to the lowest position, every time."""

import dataclasses
import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.kernels import index_scores, index_topk
from dsa_jax.kernels.index_topk import gpu, tpu, xla
from dsa_jax.kernels.select_topk import select_topk
from dsa_jax.kernels.tpu import chip

ALL = ['reference', *cases.BACKENDS]
GROUPED = xla.BlockSizes(ungrouped_s=0, block_s=8)  # As among many keys: groups, block by block.
WAYS = {'xla': [None, GROUPED]}
BLOCKS = [('xla', dataclasses.replace(GROUPED, block_t=n)) for n in (1, 8)]
BLOCKS += [('tpu', tpu.BlockSizes(block_t=16, step_t=16, step_s=128))]
BLOCKS += [('gpu', gpu.BlockSizes(block_t=6, columns=16, tile=16, span=32, chunk=16, groups=16))]
I, J = 3, 4
SHAPES = (2, cases.T, I, J), (2, cases.S, J), (2, cases.T, I)


def select(*inputs, topk=cases.K, n_selections=1, backend, blocks=None, races=False):
  options = dict(topk=topk, n_selections=n_selections, backend=backend, blocks=blocks)
  with cases.interpreted(backend, races):
    return jax.block_until_ready(_run(*inputs, **options))


@functools.partial(cases.jit, static_argnames=('topk', 'n_selections', 'backend', 'blocks'))
def _run(q, k, weights, start, end, **options):
  return index_topk(q, k, weights, start, end, **options)


def make_inputs(scores):
  """Index inputs by the kind of scores that they give."""
  rng = np.random.default_rng(0)
  if scores == 'random':
    q, k, weights = (rng.normal(size=shape) for shape in SHAPES)
  elif scores == 'integers':  # Ties everywhere, of both signs.
    q, k, weights = (rng.integers(-2, 3, shape) for shape in SHAPES)
  elif scores == 'zeros':  # Weights below 0 make -0 of what the ReLU cut off.
    q, k, weights = -np.ones(SHAPES[0]), np.ones(SHAPES[1]), rng.integers(-1, 2, SHAPES[2])
    weights[:, ::2] = -1
  elif scores == 'sparse':  # A few keys on a plateau of zeros, the cut within the plateau.
    q, k = rng.integers(1, 3, SHAPES[0]), -rng.integers(0, 2, SHAPES[1])
    k[:, ::7] = 1
    weights = rng.integers(-2, 3, SHAPES[2])
  elif scores == 'negative':
    q, k, weights = (np.abs(rng.normal(size=shape)) for shape in SHAPES)
    weights = -weights
  elif scores == 'wide':  # From 1e-15 to 1e15, of both signs.
    q, k, weights = (rng.normal(size=shape) for shape in SHAPES)
    k *= 10 ** rng.uniform(-15, 15, (2, cases.S, 1))
  return [jnp.asarray(x, jnp.float32) for x in (q, k, weights)]


KINDS = ('random', 'integers', 'zeros', 'sparse', 'negative', 'wide')


def brute_force(scores, start, end, topk):
  scores, start, end = (np.asarray(x).tolist() for x in (scores, start, end))
  out = np.full((len(start), len(start[0]), topk), -1)
  for b, rows in enumerate(scores):
    for t, row in enumerate(rows):
      visible = [s for s in range(len(row)) if start[b][t] <= s < end[b][t]]
      best = sorted(visible, key=lambda s: (-row[s], s))[:topk]
      out[b, t, : len(best)] = sorted(best)
  return out


def test_scores_are_the_formula():
  q, k, weights = (np.asarray(x, np.float64) for x in make_inputs('random'))
  want = np.zeros((2, cases.T, cases.S))
  for b, t, s, i in np.ndindex(2, cases.T, cases.S, I):
    want[b, t, s] += weights[b, t, i] * max(q[b, t, i] @ k[b, s], 0)
  actual = index_scores(*make_inputs('random'))
  assert actual.dtype == jnp.float32
  cases.assert_matches({'scores': actual}, {'scores': want})


@pytest.mark.parametrize('visibility', cases.VISIBILITY)
@pytest.mark.parametrize('scores', KINDS)
@pytest.mark.parametrize('backend', ALL)
def test_matches_brute_force(backend, scores, visibility):
  q, k, weights = make_inputs(scores)
  start, end = cases.intervals(visibility)
  want = brute_force(index_scores(q, k, weights), start, end, cases.K)
  for blocks in WAYS.get(backend, [None]):
    actual = select(q, k, weights, start, end, backend=backend, blocks=blocks)
    assert actual.dtype == jnp.int32
    np.testing.assert_array_equal(actual, want)


@pytest.mark.parametrize('n_rows', [cases.T, 1])
@pytest.mark.parametrize('backend', ALL)
def test_a_selection_for_each_key_head(backend, n_rows):
  """Index heads 0 and 1 score for the first key head, 2 and 3 for the second; ties everywhere."""
  rng = np.random.default_rng(0)
  shapes = (2, n_rows, 4, J), (2, cases.S, J), (2, n_rows, 4)
  q, k, weights = (jnp.asarray(rng.integers(-2, 3, shape), jnp.float32) for shape in shapes)
  start, end = (x[:, -n_rows:] for x in cases.intervals('packed'))
  actual = select(q, k, weights, start, end, n_selections=2, backend=backend)
  assert actual.shape == (2, n_rows, 2, cases.K)
  for g, heads in enumerate([np.s_[:, :, :2], np.s_[:, :, 2:]]):
    want = brute_force(index_scores(q[heads], k, weights[heads]), start, end, cases.K)
    np.testing.assert_array_equal(actual[:, :, g], want)


@pytest.mark.parametrize('topk', [1, 52, 53, 54, 70])
@pytest.mark.parametrize('backend', ALL)
def test_any_topk(backend, topk):
  inputs = *make_inputs('integers'), *cases.intervals('chunk')
  want = brute_force(index_scores(*inputs[:3]), *inputs[3:], topk)
  for blocks in WAYS.get(backend, [None]):
    actual = select(*inputs, topk=topk, backend=backend, blocks=blocks)
    np.testing.assert_array_equal(actual, want)


TIES = {1: [6], 2: [1, 6], 3: [1, 3, 6], 4: [1, 3, 4, 6], 5: [0, 1, 3, 4, 6], 7: [*range(7)]}


@pytest.mark.parametrize('topk, want', TIES.items())
@pytest.mark.parametrize('backend', ALL)
def test_ties_go_to_the_lowest_position(backend, topk, want):
  k = jnp.array([-1.0, 3, -1, 1, 1, -2, 5, 0])[None, :, None]
  q, weights = jnp.ones((1, 1, 1, 1)), jnp.ones((1, 1, 1))
  start, end = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 8, jnp.int32)
  for blocks in WAYS.get(backend, [None]):
    got = select(q, k, weights, start, end, topk=topk, backend=backend, blocks=blocks)
    np.testing.assert_array_equal(got[0, 0], want)


@pytest.mark.parametrize('backend', ALL)
def test_zeros_of_both_signs_tie(backend):
  """Of all weights below 0, so that cut-off keys score -0 and are the best there are."""
  k = jnp.array([2.0, -1, 0, 1, -3, 0, -0.0, 1])[None, :, None]
  q, weights = jnp.ones((1, 1, 1, 1)), -jnp.ones((1, 1, 1))
  start, end = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 8, jnp.int32)
  for topk, want in [(1, [1]), (3, [1, 2, 4]), (6, [1, 2, 3, 4, 5, 6])]:
    got = select(q, k, weights, start, end, topk=topk, backend=backend)
    np.testing.assert_array_equal(got[0, 0], want)


@pytest.mark.parametrize('zeros', [[-0.0, 0.0], [0.0, -0.0]])
def test_select_topk_ignores_the_sign_of_zero(zeros):
  scores = jnp.array([-1.0, *zeros, *zeros, 2.0, *zeros])[None, None]
  start, end = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 8, jnp.int32)
  got = select_topk(scores, start, end, topk=4)
  np.testing.assert_array_equal(got[0, 0], [1, 2, 3, 5])


@pytest.mark.parametrize('visibility', ['packed', 'chunk'])
@pytest.mark.parametrize('backend, blocks', BLOCKS, ids=str)
def test_blocks_change_nothing(backend, blocks, visibility):
  for scores in ('random', 'sparse'):
    inputs = *make_inputs(scores), *cases.intervals(visibility)
    want = select(*inputs, backend='reference')
    np.testing.assert_array_equal(select(*inputs, backend=backend, blocks=blocks), want)


@pytest.mark.parametrize('backend', ALL)
def test_bfloat16_inputs_are_scored_in_float32(backend):
  """Products of these integers are exact in float32 and not in bfloat16."""
  rng = np.random.default_rng(1)
  q, k = (jnp.asarray(rng.integers(-99, 99, shape), jnp.bfloat16) for shape in SHAPES[:2])
  weights = jnp.asarray(rng.integers(-9, 9, SHAPES[2]), jnp.bfloat16)
  start, end = cases.intervals('causal')
  got = select(q, k, weights, start, end, backend=backend)
  exact = np.einsum('BTIJ,BSJ->BTIS', np.float64(q), np.float64(k)).clip(0)
  exact = np.einsum('BTIS,BTI->BTS', exact, np.float64(weights))
  np.testing.assert_array_equal(got, brute_force(exact, start, end, cases.K))


@pytest.mark.nightly
def test_the_kernels_do_not_race():
  inputs = *make_inputs('integers'), *cases.intervals('packed')
  want = select(*inputs, backend='reference')
  np.testing.assert_array_equal(select(*inputs, backend='tpu', races=True), want)


@pytest.mark.parametrize('n, visibility', [(9001, 'causal'), (9001, 'late'), (33_001, 'late')])
@pytest.mark.parametrize('backend', ['tpu', 'gpu'])
def test_many_tiles_and_chunks(backend, n, visibility):
  """A TPU's tile is 4096 keys, a chunk of words 32K: ties across them, rows that skip some."""
  rng = np.random.default_rng(0)
  topk = 300
  q, k = rng.integers(-2, 3, (1, 11, 2, 3)), rng.integers(-2, 3, (1, n, 3))
  inputs = [jnp.asarray(x, jnp.float32) for x in (q, k, rng.integers(-1, 3, (1, 11, 2)))]
  end = jnp.asarray([np.linspace(1, n, 11)], jnp.int32)
  start = jnp.maximum(end - 5000, 0) if visibility == 'late' else jnp.zeros_like(end)
  want = brute_force(index_scores(*inputs), start, end, topk)
  np.testing.assert_array_equal(select(*inputs, start, end, topk=topk, backend=backend), want)


@pytest.mark.nightly
def test_fewer_rows_where_their_scores_would_fill_vmem(monkeypatch):
  """Of a million keys, 8 rows are all that the smaller chips hold."""
  inputs = *make_inputs('integers'), *cases.intervals('packed')
  bytes_of_row = 4 * tpu.TILE
  few = 2 * 15 * bytes_of_row
  monkeypatch.setattr(chip, 'vmem_bytes', lambda: few)
  plan = tpu.plan(*inputs[:2], topk=6, vmem=few, blocks=tpu.BlockSizes())
  assert plan.step_t == 8
  want = select(*inputs, topk=6, backend='reference')
  np.testing.assert_array_equal(select(*inputs, topk=6, backend='tpu'), want)
  monkeypatch.setattr(chip, 'vmem_bytes', lambda: 2 * 7 * bytes_of_row)
  with pytest.raises(ValueError, match='n_keys=4096 are too many for VMEM; at most 3584'):
    select(*inputs, topk=7, backend='tpu')


@pytest.mark.parametrize('backend', cases.BACKENDS)
def test_repeats_bit_by_bit(backend):
  inputs = *make_inputs('sparse'), *cases.intervals('packed')
  first, *rest = (np.asarray(select(*inputs, backend=backend)) for _ in range(10))
  assert all((first == again).all() for again in rest)


@pytest.mark.parametrize('backend', ALL)
def test_later_keys_change_nothing(backend):
  q, k, weights = make_inputs('random')
  start, end = cases.intervals('causal')
  changed = k.at[:, 20:].set(9)
  before, after = (select(q, k, weights, start, end, backend=backend) for k in (k, changed))
  np.testing.assert_array_equal(before[:, :20], after[:, :20])
  assert (before != after).any()


@pytest.mark.parametrize(
    'backend, n_rows, n_keys',
    [('xla', 1, cases.S), ('xla', cases.T, 48), ('xla', 1, 64), ('xla', cases.T, 5)]
    + [(backend, 1, 5) for backend in ALL if backend != 'xla'],
)
def test_keys_within_a_longer_array(backend, n_rows, n_keys):
  """Few rows read them in place, others copy them; what lies around them does not matter."""
  q, _, weights = (x[:, -n_rows:] for x in make_inputs('integers'))
  k = jnp.asarray(np.random.default_rng(1).integers(-2, 3, (2, 3 * n_keys, J)), jnp.float32)
  end = jnp.array([n_keys, n_keys - 2])[:, None] - jnp.arange(n_rows)[::-1]
  end = jnp.maximum(end, 0).astype(jnp.int32)
  blocks = dataclasses.replace(GROUPED, few_block_s=16) if backend == 'xla' else None

  @cases.jit
  def select_within(k, first):
    span = first, n_keys
    return index_topk(q, k, weights, 0 * end, end, topk=2, backend=backend, blocks=blocks, span=span)

  for i in (0, 1, 2) if backend == 'xla' else (1,):
    here = k.at[:, : i * n_keys].set(jnp.nan).at[:, (i + 1) * n_keys :].set(jnp.nan)
    with cases.interpreted(backend):
      got = jax.block_until_ready(select_within(here, jnp.int32(i * n_keys)))
    cut = k[:, i * n_keys : (i + 1) * n_keys]
    np.testing.assert_array_equal(got, select(q, cut, weights, 0 * end, end, topk=2, backend='reference'))


@pytest.mark.parametrize('backend', ALL)
def test_one_key(backend):
  q, k, weights = jnp.ones((1, 2, 1, 1)), jnp.ones((1, 1, 1)), jnp.ones((1, 2, 1))
  start, end = jnp.zeros((1, 2), jnp.int32), jnp.array([[0, 1]], jnp.int32)
  got = select(q, k, weights, start, end, topk=2, backend=backend)
  np.testing.assert_array_equal(got, [[[-1, -1], [0, -1]]])


@pytest.mark.parametrize('backend', ALL)
def test_carries_no_gradient(backend):
  inputs, (start, end) = make_inputs('random'), cases.intervals('causal')

  def total(*inputs):
    with cases.interpreted(backend):
      indices = index_topk(*inputs, start, end, topk=cases.K, backend=backend)
    return indices.astype(jnp.float32).sum()

  assert not any(np.any(x) for x in jax.grad(total, argnums=(0, 1, 2))(*inputs))


def test_memory_is_linear_in_the_context():
  n = 4096
  shapes = [((1, n, 2, 8), 'float32'), ((1, n, 8), 'float32'), ((1, n, 2), 'float32')]
  shapes += [((1, n), 'int32')] * 2

  def largest(backend):
    return cases.largest_array(functools.partial(index_topk, topk=16, backend=backend), *shapes)

  assert largest('reference') >= n * n  # The count sees what it must.
  for backend in cases.BACKENDS:
    assert largest(backend) < n * n


def test_says_what_is_wrong():
  q, k, weights = make_inputs('random')
  start, end = cases.intervals('causal')
  with pytest.raises(ValueError, match="backend='cuda' must be one of"):
    index_topk(q, k, weights, start, end, topk=4, backend='cuda')
  with pytest.raises(ValueError, match='topk=0 must be at least 1'):
    index_topk(q, k, weights, start, end, topk=0, backend='xla')
  with pytest.raises(ValueError, match='share a dtype; got float32 and bfloat16'):
    index_topk(q, k.astype('bfloat16'), weights, start, end, topk=4, backend='xla')
  with pytest.raises(ValueError, match='start must be int32 .*; got int16'):
    index_topk(q, k, weights, start.astype('int16'), end, topk=4, backend='xla')
  with cases.unchecked():
    with pytest.raises(ValueError, match=r'end must be int32 \(2, 37\).* got int32 \(2, 36\)'):
      index_topk(q, k, weights, start, end[:, 1:], topk=4, backend='xla')
    with pytest.raises(ValueError, match='index inputs must be q'):
      index_topk(q, k[..., 1:], weights, start, end, topk=4, backend='xla')
