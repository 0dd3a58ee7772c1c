# SPDX-License-Identifier: Apache-2.0
"""Every rule of the package keeps the contract of a selection; and the measures measure."""

import functools
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from dsa_jax import selection
from dsa_jax.kernels import dense_attention
from dsa_jax.selection import RULES, Candidates, find_rule, measures

pytestmark = pytest.mark.usefixtures('eager')

K = 5
LENGTHS = ((17, 12), (21, 5))


def make_candidates(backend='xla', seed=0, key=0, topk=K) -> Candidates:
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  b, t = 2, laws.T
  batch = laws.make_batch(LENGTHS)
  return Candidates(
      normal(b, t, 2, 12), normal(b, t, 12), normal(b, t, 2), 2 * normal(b, t, 3, 14),
      normal(b, t, 3, 14), batch.start, batch.end, jax.random.key(key),
      choice=None, sm_scale=0.4, topk=topk, backend=backend,
  )


@functools.cache
def choose(rule: str, backend: str = 'xla', key: int = 0, topk: int = K) -> np.ndarray:
  return np.asarray(RULES[rule](make_candidates(backend, key=key, topk=topk)))


@pytest.mark.parametrize('topk', [K, laws.T + 3])
@pytest.mark.parametrize('backend', laws.BACKENDS)
@pytest.mark.parametrize('rule', RULES)
def test_contract(rule, backend, topk):
  c, indices = make_candidates(backend, topk=topk), choose(rule, backend, topk=topk)
  check_contract(c, indices)
  np.testing.assert_array_equal(RULES[rule](c), indices)


def check_contract(c: Candidates, indices: np.ndarray):
  topk = c.topk
  assert indices.dtype == np.int32 and indices.shape == (2, laws.T, topk)
  for row, start, end in zip(
      indices.reshape(-1, topk), np.ravel(c.start).tolist(), np.ravel(c.end).tolist()
  ):
    n = min(topk, end - start)
    chosen = row[:n].tolist()
    assert (row[n:] == -1).all(), row
    assert chosen == sorted(set(chosen)), row
    assert all(start <= s < end for s in chosen), row


def test_the_rule_of_the_readme():
  readme = (pathlib.Path(__file__).parents[2] / 'README.md').read_text()
  [code] = [c for c in re.findall(r'```python\n(.*?)```', readme, re.DOTALL) if 'Candidates' in c]
  exec(code, names := {})
  c = make_candidates()
  check_contract(c, indices := np.asarray(names['every_16th'](c)))
  np.testing.assert_array_equal(indices[0, 16], [0, 13, 14, 15, 16])


def test_no_rule_hides_its_module():
  for path in pathlib.Path(selection.__file__).parent.glob('[!_]*.py'):
    assert isinstance(getattr(selection, path.stem), types.ModuleType), path


@pytest.mark.parametrize('rule', RULES)
def test_backends_agree(rule):
  np.testing.assert_array_equal(choose(rule, 'xla'), choose(rule, 'reference'))


@pytest.mark.parametrize('rule', RULES)
def test_one_of_several_selects_as_it_does_alone(rule):
  choice = jnp.int32(list(RULES).index(rule))
  c = make_candidates()._replace(choice=choice)
  np.testing.assert_array_equal(find_rule(tuple(RULES))(c), choose(rule))
  np.testing.assert_array_equal(find_rule(rule)(c), choose(rule))


@pytest.mark.parametrize('change', ['set', 'update', 'delete first'])
def test_a_rule_that_takes_a_name_over_is_compiled_anew(change):
  n = lambda value: lambda c: jnp.full((1, 1, 1), value, jnp.int32)
  selected = jax.jit(lambda: find_rule('mine')(make_candidates('xla', topk=1)))
  RULES['mine'] = n(1)
  with laws.compiled():
    assert selected() == 1
    if change == 'update':
      RULES.update(mine=n(2))
    else:
      if change == 'delete first':
        del RULES['mine']
      RULES['mine'] = n(2)
    assert selected() == 2
  del RULES['mine']


def test_rules_differ():
  chosen = [choose(rule) for rule in RULES]
  for i, a in enumerate(chosen):
    for b in chosen[:i]:
      assert (a != b).any()


def captured(rule: str) -> np.ndarray:
  c = make_candidates()
  _, lse = dense_attention(
      c.q, c.k, c.k, c.start, c.end, sm_scale=c.sm_scale, backend='reference'
  )
  indices = jnp.asarray(choose(rule))
  _, chosen = dense_attention(
      c.q, c.k, c.k, c.start, c.end, sm_scale=c.sm_scale, indices=indices, backend='reference'
  )
  return np.asarray(measures.captured_mass(chosen, lse))


@pytest.mark.parametrize('rule', RULES)
def test_captured_mass(rule):
  """Against a softmax written out; and no rule captures more than the oracle, at any query."""
  c, mass = make_candidates(), captured(rule)
  for b, t in np.ndindex(*mass.shape):
    start, end = int(c.start[b, t]), int(c.end[b, t])
    want = 0.0
    if end > start:
      logits = 0.4 * np.einsum(
          'he,she->hs', np.asarray(c.q[b, t], np.float64), np.asarray(c.k[b, start:end], np.float64)
      )
      probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
      chosen = [s - start for s in choose(rule)[b, t].tolist() if s >= 0]
      want = probs.mean(0)[chosen].sum()
    np.testing.assert_allclose(mass[b, t], want, atol=1e-5)
  assert (captured('oracle') >= mass - 1e-6).all()


def test_window_sinks_by_hand():
  indices = choose('window_sinks')  # One sink of the five.
  np.testing.assert_array_equal(indices[0, 3], [0, 1, 2, 3, -1])
  np.testing.assert_array_equal(indices[0, 4], [0, 1, 2, 3, 4])
  np.testing.assert_array_equal(indices[0, 16], [0, 13, 14, 15, 16])
  np.testing.assert_array_equal(indices[0, 28], [17, 25, 26, 27, 28])
  np.testing.assert_array_equal(indices[1, 28], [-1] * 5)
  indices = choose('window_sinks', topk=3)
  np.testing.assert_array_equal(indices[0, 16], [14, 15, 16])
  indices = choose('window_sinks', topk=4)
  np.testing.assert_array_equal(indices[0, 16], [0, 14, 15, 16])
  indices = choose('window_sinks', topk=9)  # Two of them.
  np.testing.assert_array_equal(indices[0, 16], [0, 1, 10, 11, 12, 13, 14, 15, 16])


def test_random_goes_by_position():
  """A query draws the same, whichever other queries and later keys there are."""
  c = make_candidates()
  piece = c._replace(**{name: getattr(c, name)[:, 9:14] for name in ('q', 'start', 'end')})
  piece = piece._replace(k=c.k[:, :17])
  np.testing.assert_array_equal(RULES['random'](piece), choose('random')[:, 9:14])


def test_random_goes_by_the_row():
  """Rows of the same lengths differ, and each goes by its number in the batch, wherever it lies."""
  c = make_candidates()
  same = c._replace(start=c.start[:1].repeat(2, 0), end=c.end[:1].repeat(2, 0))
  first, second = np.asarray(RULES['random'](same))
  assert (first != second).any()
  swapped = np.asarray(RULES['random'](same._replace(row=jnp.array([1, 0]))))
  np.testing.assert_array_equal(swapped, [second, first])


def test_random_goes_by_its_key():
  a, b = choose('random', key=0), choose('random', key=1)
  assert (a != b).any()
  few = np.asarray(make_candidates().end - make_candidates().start) <= K
  np.testing.assert_array_equal(a[few], b[few])
  zeros = jnp.zeros((30, 1), jnp.int32)  # A query of each of 30 rows.
  first = np.asarray(RULES['random'](make_candidates()._replace(start=zeros, end=zeros + 17)))
  count = np.bincount(first.ravel(), minlength=17)
  assert count.min() > 0 and count.max() < 25, count  # 150 draws from 17 keys.


def test_overlap_and_distance():
  rng = np.random.default_rng(0)
  rows = [np.sort(rng.permutation(12)[:n]) for n in rng.integers(0, 6, size=24)]
  padded = np.full((2, 12, 5), -1, np.int32)
  for row, chosen in zip(padded.reshape(-1, 5), rows):
    row[: len(chosen)] = chosen
  end = rng.integers(12, 20, size=(2, 12)).astype(np.int32)
  share = lambda a, b: len(set(a) & set(b)) / len(a) if len(a) else 0
  before = [np.array([])] + rows[:-1]
  before[12] = np.array([])  # The first query of the second row.
  want = np.reshape([share(a, b) for a, b in zip(rows, before)], (2, 12))
  np.testing.assert_allclose(measures.neighbour_overlap(jnp.asarray(padded)), want, rtol=1e-6)
  others = rows[::-1]
  want = np.reshape([share(a, b) for a, b in zip(rows, others)], (2, 12))
  other = jnp.asarray(padded.reshape(-1, 5)[::-1].reshape(padded.shape))
  np.testing.assert_allclose(measures.overlap(jnp.asarray(padded), other), want, rtol=1e-6)
  want = [np.mean(e - 1 - row) if len(row) else 0 for e, row in zip(end.ravel(), rows)]
  got = measures.selected_distance(jnp.asarray(padded), jnp.asarray(end))
  np.testing.assert_allclose(got, np.reshape(want, (2, 12)), rtol=1e-6)
