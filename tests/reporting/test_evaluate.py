# SPDX-License-Identifier: Apache-2.0
"""Scores by position, and the verdicts of a report."""

import dataclasses
import math

import jax
import laws
import numpy as np
import pytest

from configs import base, quickstart, recall
from dsa_jax.config import ConfigError
from dsa_jax.nn.attention.types import Mode
from dsa_jax.reporting import evaluate
from dsa_jax.reporting.checks import JUDGES, verdicts
from dsa_jax.reporting.evaluate import Scores
from dsa_jax.selection import RULES
from dsa_jax.training.recipe import CHECKS, ReportConfig

pytestmark = pytest.mark.usefixtures('eager')

CONFIGS = {'quickstart': quickstart, 'recall': recall}
SEVERAL = Mode(attention='sparse', backend='xla', rule=tuple(RULES))


def test_bits_by_position():
  scores = Scores(
      nats=np.log(2) * np.array([1.0, 2.0, 3.0, 5.0]),
      right=np.array([True, False, True, True]),
      n_visible=np.array([1, 2, 3, 8]),
  )
  assert scores.bits() == 2.75
  assert scores.bits(n_visible_above=2) == 4.0
  by_position = scores.bits_by_position([1, 2, 4, 8, 9])
  np.testing.assert_allclose(by_position[:2], [1.0, 2.5])
  assert math.isnan(by_position[2]) and by_position[3] == 5.0


BARS = {'loss_excess': 0.005, 'captured_mass': 0.9, 'mass_above_window': 0.0, 'order_of_rules': 0.0}
RECALL = {'accuracy_share': 0.98, 'window_accuracy_share': 0.5}


def results(**changes):
  values = {
      'validation_bits': {'dense_baseline': 2.0, 'sparse': 2.005},
      'bits_beyond_budget': {
          'oracle': 2.0, 'sparse': 2.01, 'window_sinks': 2.1, 'random': 3.0, 'dense_baseline': 2.0
      },
      'captured_mass': [0.91, 0.93],
      'captured_mass_by_rule': {'indexer': [0.91, 0.93], 'window_sinks': [0.5, 0.9]},
  }
  return values | changes


def passed(values, bars=BARS):
  return [verdict['passed'] for verdict in verdicts(values, bars)]


def test_good_results_pass_every_bar():
  assert passed(results()) == [True] * 4


def test_each_bar_can_fail():
  beyond = results()['bits_beyond_budget']
  mass = results()['captured_mass_by_rule']
  worse = [
      {'validation_bits': {'dense_baseline': 2.0, 'sparse': 2.011}},
      {'captured_mass': [0.85, 0.94]},
      {'captured_mass_by_rule': mass | {'window_sinks': [0.92, 0.1]}},
      {'bits_beyond_budget': beyond | {'oracle': 2.02}},
  ]
  for i, change in enumerate(worse):
    assert passed(results(**change)) == [j != i for j in range(4)]
  assert passed(results(), {'captured_mass': 0.93, 'order_of_rules': 0.1}) == [False, False]


def test_recall_is_judged_by_accuracy():
  accuracy = {'dense_baseline': 1.0, 'sparse': 0.99, 'window_sinks': 0.1}
  judged = lambda **changes: passed(results(accuracy=accuracy | changes), RECALL)
  assert judged() == [True, True]
  assert judged(sparse=0.97) == [False, True]
  assert judged(window_sinks=0.6) == [True, False]


def test_nothing_is_judged_where_selection_never_acted():
  bars = {name: 0.5 for name in JUDGES}
  assert {v['passed'] for v in verdicts(results(left_out=0.0), bars)} == {None}
  acted = [v['passed'] for v in verdicts(results(left_out=0.1), bars)]
  assert acted == [v['passed'] for v in verdicts(results(), bars)] and True in acted


def test_what_has_no_number_is_not_judged():
  nan = dict.fromkeys(results()['bits_beyond_budget'], math.nan)
  assert passed(results(bits_beyond_budget=nan), {'order_of_rules': 0.0}) == [None]
  assert passed(results(accuracy={'dense_baseline': 0.0, 'sparse': 0.0}), RECALL) == [None, None]
  [one] = verdicts(results(validation_bits={}), {'loss_excess': 0.1})
  assert one == {'name': 'loss_excess', 'passed': None, 'detail': 'this run has no such numbers'}


def test_only_a_config_sets_bars():
  assert verdicts(results(), {}) == []
  assert JUDGES.keys() == CHECKS.keys()
  assert not base.get_config().report.checks
  own = {name: dict(module.get_config().report.checks) for name, module in CONFIGS.items()}
  assert own == {'quickstart': BARS, 'recall': RECALL | {'mass_above_window': 0.0}}
  for wrong in {'captured': 0.9}, {'captured_mass': '0.9'}:
    with pytest.raises((ConfigError, TypeError), match='captured'):  # Type checks of tests come first.
      ReportConfig(checks=wrong)


CFG = dataclasses.replace(laws.CFG, n_layers=1, n_dense_layers=1)


def score(rule: str | tuple[str, ...], choice: int | None = None) -> Scores:
  mode = dataclasses.replace(SEVERAL, rule=rule)
  batch = laws.make_batch(laws.LENGTHS)
  return evaluate.evaluate(laws.graph_of(CFG), laws.weights(CFG), [batch], mode, choice)


def test_one_program_scores_every_rule():
  """That each selects what it selects alone is tested with the rules."""
  before = evaluate.score_batch._cache_size()
  with laws.compiled():
    nats = {score(tuple(RULES), i).nats.sum() for i in range(len(RULES))}
  assert evaluate.score_batch._cache_size() == before + 1
  assert len(nats) == len(RULES)


def test_several_rules_are_not_measured_at_once():
  with pytest.raises(ValueError, match='must be empty where rule='):
    dataclasses.replace(SEVERAL, measure=('indexer',))
  with pytest.raises(ValueError, match="'best' must be one of"):
    dataclasses.replace(SEVERAL, rule=('indexer', 'best'))


@pytest.mark.nightly
def test_a_selection_for_each_key_head_is_measured():
  """All rules, those that select once for all heads too; with the whole context as the budget, alike."""
  batch = laws.make_batch(laws.LENGTHS)
  for topk in 5, laws.T:
    cfg = dataclasses.replace(laws.GQA_EACH, index_topk=topk)
    mode = Mode(attention='sparse', backend='xla', measure=tuple(RULES))
    measured = evaluate.measure(laws.graph_of(cfg), laws.weights(cfg), [batch], mode, beyond=(0, topk))
    everywhere, beyond = measured
    assert (beyond is None) == (topk == laws.T)  # No query sees more than that.
    by_rule = beyond or everywhere
    for rule, means in by_rule.items():
      assert means['captured_mass'].shape == (cfg.n_layers,)
      assert np.all(means['left_out'] == float(topk == 5)), rule
      assert np.all(means['captured_mass'] <= 1 + 1e-5)
    oracle, indexer = by_rule['oracle'], by_rule['indexer']
    np.testing.assert_allclose(oracle['topk_recall'], 1)
    if topk == 5:
      assert np.all(oracle['captured_mass'] > indexer['captured_mass'])
    else:
      np.testing.assert_allclose(indexer['captured_mass'], 1, atol=1e-5)


def test_layers_with_a_window_have_no_numbers():
  """Layers 0, 2 and 3 select; what they have is as of all layers, and 0 is compared with 2."""
  cfg = dataclasses.replace(
      laws.CFG, n_layers=5, n_dense_layers=5, window_layers=(1, 4), sliding_window=7
  )
  batch, weights = laws.make_batch(laws.LENGTHS), laws.weights(cfg)
  mode = Mode(attention='sparse', backend='xla', measure=('indexer',))
  [by_rule] = evaluate.measure(laws.graph_of(cfg), weights, [batch], mode, beyond=(cfg.index_topk,))
  counted = np.asarray(batch.end - batch.start) > cfg.index_topk
  whole = jax.jit(lambda w, b: laws.forward(w, b, mode, cfg).measures('indexer'))(weights, batch)
  indices = [[set(row[row >= 0]) for row in np.asarray(of_layer)[counted]] for of_layer in whole.indices]
  pair = lambda a, b: np.mean([len(x & y) / len(y) for x, y in zip(indices[a], indices[b])])
  overlap = [pair(0, 2), np.nan, pair(2, 3), np.nan]
  np.testing.assert_allclose(by_rule['indexer'].pop('layer_overlap'), overlap, rtol=1e-5)
  np.testing.assert_array_equal(by_rule['indexer'].pop('left_out'), [1, np.nan, 1, 1, np.nan])
  for name, got in by_rule['indexer'].items():
    want = np.asarray(getattr(whole, name))[:, counted].mean(axis=1)
    want[[1, 4]] = np.nan
    np.testing.assert_allclose(got, want, rtol=1e-4, err_msg=name)
  seen = evaluate.look(laws.graph_of(cfg), weights, batch, mode)
  assert [x is None for x in seen['captured_mass']] == [False, True, False, False, True]
  assert [x is None for x in seen['layer_overlap']] == [False, True, False, True]
  assert math.isfinite(seen['validation_loss'])


def test_layers_with_a_window_are_judged_by_nothing():
  mass = {'indexer': [None, 0.91, 0.87], 'window_sinks': [None, 0.5, 0.8]}
  several = results(captured_mass=mass['indexer'], captured_mass_by_rule=mass, window_layers=[0])
  assert passed(several, {'captured_mass': 0.89, 'mass_above_window': 0.06}) == [True, True]
  assert passed(several, {'captured_mass': 0.9, 'mass_above_window': 0.08}) == [False, False]
  all_windows = several | {'window_layers': [0, 1, 2]}
  assert passed(all_windows, {'captured_mass': 0.9, 'mass_above_window': 0.0}) == [None, None]
