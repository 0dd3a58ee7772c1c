# SPDX-License-Identifier: Apache-2.0
"""Whether selection acted, and whether quality jumps where it begins to act."""

import numpy as np

from dsa_jax.evaluation.verdicts import acted, equal_arms, self_test

SEEN = np.tile(np.arange(1, 65), 8)
DENSE = np.random.default_rng(0).gamma(4, 0.5, SEEN.size).astype(np.float32)
NOISE = np.random.default_rng(1).normal(0, 1e-7, SEEN.size).astype(np.float32)


def arm(topk, excess):
  return DENSE + NOISE + np.where(SEEN > topk, np.float32(excess), 0)


def test_each_verdict():
  nats = {
      'dense': DENSE,
      'good@32': arm(32, 0.01),
      'idle@64': arm(64, 0.01),
      'same@32': arm(32, 0),
      'wrong@32': arm(0, 0.01),
  }
  budgets = {name: int(name.partition('@')[2]) for name in nats if name != 'dense'}
  about = acted(nats, SEEN, budgets, 'float32')
  assert {name: x['verdict'] for name, x in about.items()} == {
      'good@32': 'acted',
      'idle@64': 'nothing to leave out',
      'same@32': 'equal to dense',
      'wrong@32': 'wrong within the budget',
  }
  assert about['good@32']['left_out'] == 0.5 and about['idle@64']['left_out'] == 0
  assert about['idle@64']['differs_beyond_budget'] is None
  np.testing.assert_allclose(about['good@32']['differs_beyond_budget'], 0.01, rtol=1e-3)
  noisy = {'wrong@32': 32}  # Programs in bfloat16 agree less.
  assert acted(nats, SEEN, noisy, 'bfloat16')['wrong@32']['verdict'] == 'equal to dense'


def test_equal_arms_are_named():
  nats = {'dense': DENSE, 'a': arm(32, 0.1), 'b': arm(32, 0.1), 'c': arm(32, 0.2), 'd': arm(64, 1)}
  assert equal_arms(nats) == [('dense', 'd'), ('a', 'b')]


def test_a_jump_is_found_just_above_the_budget():
  nats = {'dense': DENSE, 'good': arm(40, 0.3), 'bad': arm(32, 0.3), 'idle': arm(64, 0.3)}
  tests = self_test(nats, SEEN, {'good': 32, 'bad': 32, 'idle': 64})
  assert {name: test['verdict'] for name, test in tests.items()} == {
      'good': 'smooth', 'bad': 'jump', 'idle': 'too few targets'
  }
  windows = [(w['from'], w['to'], w['targets']) for w in tests['bad']['windows']]
  assert windows == [(16, 28, 104), (29, 32, 32), (33, 36, 32), (37, 40, 32), (41, 64, 192)]
  excess = [w['sparse'] - w['dense'] for w in tests['bad']['windows']]
  np.testing.assert_allclose(excess, [0, 0, 0.3, 0.3, 0.3], atol=1e-5)
  assert tests['idle']['windows'][-1]['dense'] is None
  assert self_test(nats, SEEN, {'bad': 1})['bad']['windows'][0]['from'] == 1
