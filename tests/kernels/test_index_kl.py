# SPDX-License-Identifier: Apache-2.0
"""The indexer's loss: its values, and the gradients that train the indexer and nothing else."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.kernels import dense_attention, index_kl
from dsa_jax.kernels.index_kl import gpu, gpu_dense, tpu, tpu_dense, xla, xla_dense

ALL = ['reference', *cases.BACKENDS]
SMALL = tpu.BlockSizes(step_t=8, tile=8, line=8, copied=16)  # The interpreter takes its time.
MANY = tpu.BlockSizes(block_t=16, step_t=4, tile=4, line=4, copied=8, vmem_share=1e-3)  # 2 shards.
BLOCKS = [('xla', xla.BlockSizes(block_t=1), True)]
BLOCKS += [('xla', xla_dense.BlockSizes(block_t=1000), False)]
BLOCKS += [('tpu', MANY, True), ('gpu', gpu.BlockSizes(block_t=5, heads=16, tile=16), True)]
DENSE = tpu_dense.BlockSizes(
    block_t=24, block_t_backward=16, block_s=32, heads=2, tile_t=8, tile_s=16
)
ONE = tpu_dense.BlockSizes(tile_t=40, tile_s=56)  # A block, a tile, a group of heads.
BLOCKS += [('tpu', DENSE, False), ('tpu', ONE, False)]
TILES = dict(tile=16, index_tile=16, index_tile_backward=32, span=32)
DENSE_GPU = gpu_dense.BlockSizes(block_t=16, columns=16, columns_queries=32, **TILES)
BLOCKS += [('gpu', DENSE_GPU, False)]
H, E, I, J = 4, 6, 3, 5
CONSTANT, TRAINED = ('q', 'k', 'lse'), ('index_q', 'index_k', 'index_weights')
SCALE = 0.6


def values_and_grads(*args, n_selections=1, backend, blocks=None, races=False):
  """The divergence and all six gradients, by name, of inputs, start, end and maybe indices."""
  selected = len(args) > 3 and args[3] is not None
  if blocks is None and backend == 'tpu':
    blocks = SMALL if selected else DENSE
  if blocks is None and backend == 'gpu' and not selected:
    blocks = gpu_dense.BlockSizes(block_t=48, columns=32, columns_keys=64, **TILES)
  with cases.interpreted(backend, races):
    options = dict(n_selections=n_selections, backend=backend, blocks=blocks)
    return jax.block_until_ready(_run(*args, **options))


@functools.partial(cases.jit, static_argnames=('n_selections', 'backend', 'blocks'))
def _run(inputs, start, end, indices=None, *, n_selections, backend, blocks):
  options = dict(indices=indices, n_selections=n_selections, backend=backend, blocks=blocks)

  def op(*inputs):
    return index_kl(*inputs, start, end, sm_scale=SCALE, **options)

  kl, vjp = jax.vjp(op, *inputs)
  grads = vjp(jnp.cos(jnp.arange(kl.size) + 1.0).reshape(kl.shape))
  return {'kl': kl} | dict(zip(CONSTANT + TRAINED, grads))


@cases.jit
def lse_of(q, k, start, end, indices=None):
  options = dict(sm_scale=SCALE, indices=indices, backend='reference')
  return dense_attention(*cases.f32(q, k, k), start, end, **options)[1]


def make_inputs(visibility, selected, groups=2, dtype='float32'):
  """The six arrays, the interval, and a selection or None."""
  start, end = cases.intervals(visibility)
  shapes = (2, cases.T, H, E), (2, cases.S, groups, E)
  shapes += (2, cases.T, I, J), (2, cases.S, J), (2, cases.T, I)
  q, k, *index_inputs = cases.normal(0, *shapes, dtype=dtype)
  indices = cases.selection(start, end) if selected else None
  return (q, k, lse_of(q, k, start, end, indices), *index_inputs), start, end, indices


def allowed_keys(start, end, indices):
  allowed = cases.seen(start, end)
  if indices is not None:
    allowed &= (np.asarray(indices)[..., None] == np.arange(cases.S)).any(axis=2)
  return allowed


def witness(inputs, allowed):
  """The op in float64, a query at a time."""
  q, k, lse, index_q, index_k, index_weights = inputs
  kl = np.zeros(q.shape[:2])
  for b, t in np.ndindex(kl.shape):
    keys = np.flatnonzero(allowed[b, t])
    if keys.size:
      heads = np.repeat(k[b, keys], q.shape[2] // k.shape[2], axis=1)
      target = np.exp(SCALE * np.einsum('HE,SHE->HS', q[b, t], heads) - lse[b, t][:, None]).mean(0)
      scores = index_weights[b, t] @ np.maximum(index_q[b, t] @ index_k[b, keys].T, 0)
      log_probs = scores - scores.max() - np.log(np.sum(np.exp(scores - scores.max())))
      kl[b, t] = np.sum(target * (np.log(target) - log_probs))
  return kl


@pytest.mark.parametrize('selected', [False, True])
@pytest.mark.parametrize('visibility', cases.VISIBILITY)
def test_reference_matches_float64(visibility, selected):
  inputs, *where = make_inputs(visibility, selected)
  kl = witness([np.float64(x) for x in inputs], allowed_keys(*where))
  assert kl.max() > 0.1
  actual = values_and_grads(inputs, *where, backend='reference')['kl']
  cases.assert_matches({'kl': actual}, {'kl': kl})


@pytest.mark.parametrize('selected', [False, True])
@pytest.mark.parametrize('backend', ALL)
def test_gradients_match_finite_differences(backend, selected):
  shapes = (1, 4, 2, 3), (1, 6, 1, 3), (1, 4, 2, 3), (1, 6, 3), (1, 4, 2)
  q, k, *index_inputs = cases.normal(5, *shapes)
  start, end = jnp.array([[0, 0, 2, 4]], jnp.int32), jnp.array([[4, 6, 5, 4]], jnp.int32)
  indices = jnp.array([[[3, -1, 1], [5, 0, 2], [0, 4, -1], [4, 0, 5]]], jnp.int32)
  indices = indices if selected else None
  inputs = q, k, lse_of(q, k, start, end, indices), *index_inputs
  actual = values_and_grads(inputs, start, end, indices, backend=backend)
  exact, allowed = [np.float64(x) for x in inputs], allowed_keys(start, end, indices)[..., :6]
  dkl = np.cos(np.arange(4) + 1.0)[None]
  for i, name in enumerate(TRAINED, start=3):

    def total(x, i=i):
      return np.sum(dkl * witness([*exact[:i], x, *exact[i + 1 :]], allowed))

    want = cases.numeric_gradient(total, exact[i], h=1e-6)
    cases.assert_matches({name: actual[name]}, {name: want})


@pytest.mark.parametrize('groups, dtype', [(2, 'float32'), (1, 'bfloat16')])
@pytest.mark.parametrize('selected', [False, True])
@pytest.mark.parametrize('visibility', cases.VISIBILITY)
@pytest.mark.parametrize('backend', cases.BACKENDS)
def test_matches_reference(backend, visibility, selected, groups, dtype):
  inputs, *where = make_inputs(visibility, selected, groups, dtype)
  actual = values_and_grads(inputs, *where, backend=backend)
  exact = values_and_grads(cases.f32(*inputs), *where, backend='reference')
  assert actual['kl'].dtype == jnp.float32
  assert all(actual[name].dtype == dtype for name in TRAINED)
  cases.assert_matches(actual, exact, cases.TOLERANCE[dtype])


@pytest.mark.parametrize('selected, dtype', [(False, 'float32'), (True, 'float32'), (True, 'bfloat16')])
@pytest.mark.parametrize('backend', ALL)
def test_an_indexer_for_each_key_head(backend, selected, dtype):
  """The mean over key heads of the divergence of a model that has no other."""
  start, end = cases.intervals('empty')
  shapes = (2, cases.T, H, E), (2, cases.S, 2, E), (2, cases.T, 6, J), (2, cases.S, J), (2, cases.T, 6)
  q, k, index_q, index_k, weights = cases.normal(0, *shapes, dtype=dtype)
  chosen = [cases.selection(start, end, seed=seed) if selected else None for seed in range(2)]
  heads = [np.s_[:, :, : H // 2], np.s_[:, :, H // 2 :]]
  lse = jnp.concatenate(
      [lse_of(q[own], k[:, :, g : g + 1], start, end, chosen[g]) for g, own in enumerate(heads)], axis=2
  )
  indices = jnp.stack(chosen, axis=2) if selected else None
  inputs, sizes = (q, k, lse, index_q, index_k, weights), dict(n_selections=2)
  actual = values_and_grads(inputs, start, end, indices, **sizes, backend=backend)
  inputs = cases.f32(*inputs)
  exact = values_and_grads(inputs, start, end, indices, **sizes, backend='reference')
  cases.assert_matches(actual, exact, cases.TOLERANCE[dtype])
  kl = []
  for g, own in enumerate(heads):
    q, k, lse, index_q, index_k, weights = map(np.float64, inputs)
    index = np.s_[:, :, 3 * g : 3 * g + 3]
    one = q[own], k[:, :, g : g + 1], lse[own], index_q[index], index_k, weights[index]
    kl.append(witness(one, allowed_keys(start, end, chosen[g])))
  cases.assert_matches({'kl': exact['kl']}, {'kl': np.mean(kl, axis=0)})


@pytest.mark.parametrize('backend, blocks, selected', BLOCKS, ids=str)
def test_blocks_change_nothing(backend, blocks, selected):
  inputs, *where = make_inputs('packed', selected)
  actual = values_and_grads(inputs, *where, backend=backend, blocks=blocks)
  cases.assert_matches(actual, values_and_grads(inputs, *where, backend='reference'))


@pytest.mark.nightly
def test_the_kernels_do_not_race():
  inputs, *where = make_inputs('chunk', selected=True)
  actual = values_and_grads(inputs, *where, backend='tpu', blocks=MANY, races=True)
  cases.assert_matches(actual, values_and_grads(inputs, *where, backend='reference'))


@pytest.mark.parametrize('visibility', ['causal', 'overhang', 'empty'])
@pytest.mark.parametrize('backend', ['reference', *cases.PORTABLE])
def test_selecting_everything_is_the_dense_loss(backend, visibility):
  inputs, start, end, _ = make_inputs(visibility, selected=False)
  everything = np.where(cases.seen(start, end), np.arange(cases.S), -1)
  everything = np.random.default_rng(1).permuted(everything, axis=-1)
  actual = values_and_grads(inputs, start, end, jnp.asarray(everything, jnp.int32), backend=backend)
  cases.assert_matches(actual, values_and_grads(inputs, start, end, backend=backend))


@pytest.mark.parametrize('wild', [cases.S, cases.S + 2, 2**30, -5])
@pytest.mark.parametrize('backend', ALL)
def test_what_is_no_position_is_an_empty_slot(backend, wild):
  """Also where the interval reaches past the keys."""
  (q, k, _, *index_inputs), start, end, indices = make_inputs('overhang', selected=True)
  indices = indices.at[:, ::2, 1].set(-1)
  inputs = (q, k, lse_of(q, k, start, end, indices), *index_inputs)
  slots = jnp.where(indices < 0, wild, indices)
  exact = values_and_grads(inputs, start, end, indices, backend='reference')
  cases.assert_matches(values_and_grads(inputs, start, end, slots, backend=backend), exact)


@pytest.mark.parametrize('backend', ALL)
def test_a_selection_stays_within_the_interval(backend):
  _, start, end, _ = make_inputs('packed', selected=True)
  anywhere = cases.selection(jnp.zeros_like(start), jnp.full_like(end, cases.S))
  within = jnp.where((anywhere >= start[..., None]) & (anywhere < end[..., None]), anywhere, -1)
  (q, k, _, *index_inputs), *_ = make_inputs('packed', selected=True)
  inputs = (q, k, lse_of(q, k, start, end, within), *index_inputs)
  exact = values_and_grads(inputs, start, end, within, backend='reference')
  cases.assert_matches(values_and_grads(inputs, start, end, anywhere, backend=backend), exact)


@pytest.mark.parametrize('backend', cases.BACKENDS)
def test_unselected_keys_may_hold_nan(backend):
  inputs, start, end, indices = make_inputs('packed', selected=True)
  clean = values_and_grads(inputs, start, end, indices, backend='reference')
  q, k, lse, index_q, index_k, index_weights = inputs
  unused = ~allowed_keys(start, end, indices).any(axis=1)
  assert unused[:, 2:4].all()
  k = jnp.where(unused[..., None, None], jnp.nan, k)
  index_k = jnp.where(unused[..., None], jnp.nan, index_k)
  poisoned = q, k, lse, index_q, index_k, index_weights
  actual = values_and_grads(poisoned, start, end, indices, backend=backend)
  cases.assert_matches(actual, clean)
  assert not np.any(np.asarray(actual['index_k'])[unused])


@pytest.mark.parametrize('selected', [False, True])
@pytest.mark.parametrize('backend', ALL)
def test_empty_rows_are_zero(backend, selected):
  inputs, start, end, indices = make_inputs('empty', selected)
  rows = ~allowed_keys(start, end, indices).any(axis=-1)
  assert rows.any() and not rows.all()
  actual = values_and_grads(inputs, start, end, indices, backend=backend)
  for name in ('kl', 'index_q', 'index_weights'):
    assert not np.any(np.asarray(actual[name])[rows]), name
  assert all(np.isfinite(actual[name]).all() and np.any(actual[name]) for name in TRAINED)
  nothing = values_and_grads(inputs, end, end, indices, backend=backend)
  assert not any(np.any(x) for x in nothing.values())


def one_hot_inputs(visibility, selected, log_scores):
  """Index inputs by which the score of key s for query t is `log_scores[b, t, s]`, if above 0."""
  inputs, start, end, indices = make_inputs(visibility, selected)
  index_k = jnp.broadcast_to(jnp.eye(cases.S), (2, cases.S, cases.S))
  index_q = jnp.asarray(log_scores, jnp.float32)[:, :, None]
  return (*inputs[:3], index_q, index_k, jnp.ones((*start.shape, 1))), start, end, indices


def target_of(inputs, allowed):
  q, k, lse = (np.float64(x) for x in inputs[:3])
  logits = SCALE * np.einsum('BTHE,BSHE->BTHS', q, k.repeat(H // k.shape[2], axis=2))
  lse = np.where(np.isfinite(lse), lse, 0)
  return np.where(allowed, np.exp(logits - lse[..., None]).mean(axis=2), 0)


@pytest.mark.parametrize('selected', [False, True])
@pytest.mark.parametrize('backend', ALL)
def test_score_gradient_is_softmax_less_target(backend, selected):
  scores = np.random.default_rng(3).uniform(0.1, 3, (2, cases.T, cases.S))
  inputs, *where = one_hot_inputs('packed', selected, scores)
  allowed = allowed_keys(*where)
  probs = np.where(allowed, np.exp(scores), 0)
  probs /= np.maximum(probs.sum(axis=-1, keepdims=True), 1e-30)
  dkl = np.cos(np.arange(2 * cases.T) + 1.0).reshape(2, cases.T, 1)
  actual = values_and_grads(inputs, *where, backend=backend)['index_q'][:, :, 0]
  cases.assert_matches({'q': actual}, {'q': dkl * (probs - target_of(inputs, allowed))})
  assert not np.any(np.asarray(actual)[~allowed])


@pytest.mark.parametrize('selected', [False, True])
@pytest.mark.parametrize('backend', ALL)
def test_is_zero_only_where_the_indexer_says_what_attention_does(backend, selected):
  shape = (2, cases.T, cases.S)
  inputs, *where = one_hot_inputs('causal', selected, np.ones(shape))
  allowed = allowed_keys(*where)
  target = target_of(inputs, allowed)
  perfect = np.log(np.where(allowed, target, 1)) + 20  # Above 0, where the ReLU is the identity.
  inputs, *where = one_hot_inputs('causal', selected, perfect)
  agreed = values_and_grads(inputs, *where, backend=backend)
  np.testing.assert_allclose(agreed['kl'], 0, atol=2e-5)  # Scores near 20, rounded.
  np.testing.assert_allclose(agreed['index_q'], 0, atol=2e-5)
  for seed in range(3):
    other = perfect + np.random.default_rng(seed).normal(size=shape)
    inputs, *where = one_hot_inputs('causal', selected, other)
    kl = np.asarray(values_and_grads(inputs, *where, backend=backend)['kl'])
    choice = allowed.sum(axis=-1) > 1
    assert np.all(kl[choice] > 0) and np.all(np.abs(kl[~choice]) < 2e-5)


@pytest.mark.parametrize('selected', [False, True])
@pytest.mark.parametrize('backend', ALL)
def test_attention_is_constant(backend, selected):
  inputs, *where = make_inputs('causal', selected)
  actual = values_and_grads(inputs, *where, backend=backend)
  assert not any(np.any(actual[name]) for name in CONSTANT)
  assert all(np.any(actual[name]) for name in TRAINED)


@pytest.mark.parametrize('selected', [False, True])
@pytest.mark.parametrize('backend', ALL)
def test_large_scores_do_not_overflow(backend, selected):
  inputs, *where = make_inputs('packed', selected)
  inputs = *inputs[:3], 1e2 * inputs[3], *inputs[4:]
  kl = witness([np.float64(x) for x in inputs], allowed_keys(*where))
  assert kl.max() > 200
  actual = values_and_grads(inputs, *where, backend=backend)
  cases.assert_matches({'kl': actual['kl']}, {'kl': kl})
  assert all(np.isfinite(x).all() for x in actual.values())


@pytest.mark.parametrize('backend', cases.BACKENDS)
def test_repeats_bit_by_bit(backend):
  inputs, *where = make_inputs('causal', selected=True)
  first, *rest = (values_and_grads(inputs, *where, backend=backend) for _ in range(3))
  for again in rest:
    assert all((first[name] == again[name]).all() for name in first)


@pytest.mark.parametrize('selected', [False, True])
def test_memory_is_linear_in_the_context(selected):
  n = 4096
  widths = (2, 8), (1, 8), (2,), (2, 8), (8,), (2,)  # q, k, lse; index q, k, weights.
  shapes = [((1, n, *width), 'float32') for width in widths] + [((1, n), 'int32')] * 2
  if selected:
    shapes.append(((1, n, 16), 'int32'))

  def largest(backend):
    def op(q, k, lse, index_q, index_k, index_weights, start, end, indices=None):
      options = dict(indices=indices, sm_scale=1.0, backend=backend)
      return index_kl(q, k, lse, index_q, index_k, index_weights, start, end, **options)

    return cases.largest_array(op, *shapes)

  assert largest('reference') >= n * n  # The count sees what it must.
  for backend in cases.BACKENDS:
    assert largest(backend) < n * n


def test_says_what_is_wrong():
  (q, k, lse, *index_inputs), start, end, _ = make_inputs('causal', selected=False)
  options = dict(sm_scale=1.0, backend='xla')
  with pytest.raises(ValueError, match="backend='pallas' must be one of"):
    index_kl(q, k, lse, *index_inputs, start, end, sm_scale=1.0, backend='pallas')
  with pytest.raises(ValueError, match='end must be int32 .*; got int8'):
    index_kl(q, k, lse, *index_inputs, start, end.astype('int8'), **options)
  with pytest.raises(ValueError, match='share a dtype; got bfloat16 and float32'):
    index_q, *others = index_inputs
    index_kl(q, k, lse, index_q.astype('bfloat16'), *others, start, end, **options)
  with cases.unchecked(), pytest.raises(ValueError, match='with G dividing H; got'):
    index_kl(q, k[..., 1:], lse, *index_inputs, start, end, **options)
  with cases.unchecked(), pytest.raises(ValueError, match='indices must be .* K per query, or'):
    index_kl(q, k, lse, *index_inputs, start, end, indices=start[:, 1:, None], **options)
  with cases.unchecked(), pytest.raises(ValueError, match='lse must be .* per query and head; got'):
    index_kl(q, k, lse[..., 1:], *index_inputs, start, end, **options)
  with pytest.raises(ValueError, match='n_selections=2 must divide the 3 index heads'):
    index_kl(q, k, lse, *index_inputs, start, end, n_selections=2, **options)
  with pytest.raises(ValueError, match='n_selections=3 must be 1 or the number of key heads, 2'):
    index_kl(q, k, lse, *index_inputs, start, end, n_selections=3, **options)
