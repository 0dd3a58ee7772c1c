# SPDX-License-Identifier: Apache-2.0
"""Every op's kernels on the hostile input: values and gradients of the plain definition.

This is what the default tier asks of kernels that only a simulator can run here. The tests of each
op ask for one property at a time; for the kernels of a TPU they belong to the nightly tier.
"""

import cases
import hostile
from hostile import K, S, T
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_dense_attention as dense
import test_index_kl as kl
import test_index_topk as topk
import test_sparse_attention as attention

from dsa_jax.kernels import index_scores
from dsa_jax.kernels.index_kl import tpu as kl_tpu
from dsa_jax.kernels.sparse_attention import tpu as attention_tpu

pytestmark = pytest.mark.hostile
H, E = attention.H, attention.E
FEW_KEYS = attention_tpu.BlockSizes(
    step_t=2, tile=4, line=4, copied=8, vmem_share=2**-12, step_t_compact=2, block_t_compact=8,
    own_tile=16,
)  # fmt: skip
KL_BLOCKS = {('tpu', True): kl_tpu.BlockSizes(step_t=8, tile=6, line=6, copied=16)}
SHARDS = attention_tpu.BlockSizes(block_t=8, step_t=4, tile=8, line=4, copied=4, vmem_share=2e-3)
BLOCKS = [('xla', None), ('gpu', None), ('tpu', None), ('tpu', FEW_KEYS)]


@pytest.mark.parametrize('backend, blocks', BLOCKS, ids=['xla', 'gpu', 'tpu', 'tpu-few'])
def test_sparse_attention(backend, blocks):
  x = hostile.selection()
  q, kv = cases.normal(0, (2, T, H, E), (2, S, E))
  exact = attention.values_and_grads(q, kv, x.indices, backend='reference')
  poisoned = jnp.where(x.unused[..., None], jnp.nan, kv)
  run = lambda: attention.values_and_grads(q, poisoned, x.slots, backend=backend, blocks=blocks)
  actual = run()
  hostile.assert_survived(actual, exact)
  if blocks is None and not cases.is_simulated(backend):  # Once more, and the same to the last bit.
    jax.tree.map(np.testing.assert_array_equal, run(), actual)
  empty = np.asarray(x.indices < 0).all(axis=-1)
  assert (np.asarray(actual['lse'])[empty] == -np.inf).all()
  assert not any(np.any(np.asarray(actual[name])[empty]) for name in ('out', 'dq'))
  assert not np.any(np.asarray(actual['dkv'])[x.unused])


@pytest.mark.parametrize('backend', cases.BACKENDS)
def test_sparse_attention_in_bfloat16_with_large_logits(backend):
  """Logits near 100 in the first sequence and near -100 in the second: empty slots score 0.

  On a TPU, keys are in several shards.
  """
  x = hostile.selection(seed=1)
  q, kv = cases.normal(0, (2, T, H, E), (2, S, E), dtype='bfloat16')
  far = jnp.array([64.0, -64.0])[:, None]
  q, kv = q.at[..., 0].set(2.0), kv.at[..., 0].set(far.astype(kv.dtype))
  exact = attention.values_and_grads(*cases.f32(q, kv), x.indices, backend='reference')
  poisoned = jnp.where(x.unused[..., None], jnp.nan, kv)
  blocks = SHARDS if backend == 'tpu' else None
  actual = attention.values_and_grads(q, poisoned, x.slots, backend=backend, blocks=blocks)
  assert actual['out'].dtype == actual['dq'].dtype == actual['dkv'].dtype == 'bfloat16'
  hostile.assert_survived(actual, exact, cases.TOLERANCE['bfloat16'])


@pytest.mark.parametrize('groups, masked', [(1, True), (2, False), (4, False)])
@pytest.mark.parametrize('backend', cases.BACKENDS)
def test_dense_attention(backend, groups, masked):
  """The slots of a selection may lie outside a query's interval, where they count for nothing."""
  x = hostile.selection()
  shapes = (2, T, dense.H, dense.E), (2, S, groups, dense.E), (2, S, groups, dense.V)
  where = [*cases.normal(0, *shapes), x.start, x.end]
  exact = dense.values_and_grads(*where, x.indices if masked else None, backend='reference')
  actual = dense.values_and_grads(*where, outside(x) if masked else None, backend=backend)
  hostile.assert_survived(actual, exact)
  empty = np.isneginf(np.asarray(exact['lse'])).all(axis=-1)
  assert empty.any() and not any(np.any(np.asarray(actual[x])[empty]) for x in ('out', 'dq'))


SCORES = topk.KINDS  # One sequence of each kind.


def index_inputs():
  """Every kind of scores, each under both sequences' intervals."""
  kinds = [topk.make_inputs(scores) for scores in SCORES]
  pick = lambda i, n: jnp.concatenate([kind[i][:, :n] for kind in kinds])
  start, end = (jnp.tile(x, (len(SCORES), 1)) for x in hostile.intervals())
  return pick(0, T), pick(1, S), pick(2, T), start, end


@pytest.mark.parametrize('n', [K, S + 4])
@pytest.mark.parametrize('backend', cases.BACKENDS)
def test_index_topk(backend, n):
  """Ties of every kind, zeros of both signs, rows that see fewer than n; the same twice."""
  inputs = index_inputs()
  run = lambda: np.asarray(topk.select(*inputs, topk=n, backend=backend))
  chosen = run()
  want = topk.brute_force(index_scores(*inputs[:3]), *inputs[3:], n)
  wrong = sorted({(SCORES[b // 2], t) for b, t, _ in np.argwhere(chosen != want).tolist()})
  assert not wrong, f'differs for scores of this kind, at this query: {wrong}'
  if not cases.is_simulated(backend):
    np.testing.assert_array_equal(run(), chosen)


@pytest.mark.parametrize('backend', ['tpu', 'gpu'])
def test_index_topk_of_bfloat16_over_many_tiles(backend):
  """Products of these integers are exact in float32 and not in bfloat16; a tile is 4096 keys."""
  n, rng = 4099, np.random.default_rng(1)
  q, k, weights = (rng.integers(-99, 99, shape) for shape in [(1, 3, 2, 3), (1, n, 3), (1, 3, 2)])
  start, end = jnp.array([[0, 7, 4000]], jnp.int32), jnp.array([[n, 4098, n + 5]], jnp.int32)
  scores = np.einsum('BTIS,BTI->BTS', np.einsum('BTIJ,BSJ->BTIS', q, k).clip(0), weights)
  inputs = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, weights)]
  chosen = topk.select(*inputs, start, end, topk=40, backend=backend)
  np.testing.assert_array_equal(chosen, topk.brute_force(scores, start, end, 40))


@pytest.mark.parametrize('selected', [False, True])
@pytest.mark.parametrize('backend', cases.BACKENDS)
def test_index_kl(backend, selected):
  """A selection reaches past its interval here, where it counts for nothing."""
  x = hostile.selection()
  shapes = [(2, T, kl.H, kl.E), (2, S, 2, kl.E), (2, T, kl.I, kl.J), (2, S, kl.J), (2, T, kl.I)]
  q, k, *index = cases.normal(0, *shapes)
  indices = x.indices if selected else None
  inputs = q, k, kl.lse_of(q, k, x.start, x.end, indices), *index
  exact = kl.values_and_grads(inputs, x.start, x.end, indices, backend='reference')
  slots = None
  if selected:
    slots = outside(x)
    spoilt = x.unused & ~np.stack([np.isin(np.arange(S), row) for row in np.asarray(slots)])
    poison = lambda a: jnp.where(spoilt.reshape(2, S, *[1] * (a.ndim - 2)), jnp.nan, a)
    inputs = q, poison(k), inputs[2], index[0], poison(index[1]), index[2]
  blocks = KL_BLOCKS.get((backend, selected))
  actual = kl.values_and_grads(inputs, x.start, x.end, slots, backend=backend, blocks=blocks)
  hostile.assert_survived(actual, exact)
  assert not any(np.any(actual[name]) for name in kl.CONSTANT)


def outside(x: hostile.Selection) -> jax.Array:
  """The slots, with a key that the query does not see in one empty slot of each row that has one."""
  slots = np.array(x.slots)
  for b, t in np.ndindex(2, T):
    empty = np.flatnonzero((slots[b, t] < 0) | (slots[b, t] >= S))
    hidden = [s for s in range(S) if not x.start[b, t] <= s < x.end[b, t]]
    if empty.size and hidden:
      slots[b, t, empty[0]] = hidden[-1]
  return jnp.asarray(slots)
