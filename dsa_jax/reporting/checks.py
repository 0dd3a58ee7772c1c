# SPDX-License-Identifier: Apache-2.0
"""Whether a run met the bars that its config sets; see `training.recipe.CHECKS`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dsa_jax.reporting.metrics import of_selecting


class Verdict(NamedTuple):
  """One line of the report's checks."""

  name: str
  passed: bool | None  # None: the results lack what it is judged by.
  detail: str  # The number behind it.


def verdicts(results: Mapping[str, Any], bars: Mapping[str, float]) -> list[dict[str, Any]]:
  """Returns the verdicts of all checks that have a bar."""
  if never_acted(results):
    return [Verdict(name, None, 'no query had to leave anything out')._asdict() for name in bars]
  judged = ((name, JUDGES[name](results, bar)) for name, bar in bars.items())
  return [(verdict or _not_judged(name))._asdict() for name, verdict in judged]


def never_acted(results: Mapping[str, Any]) -> bool:
  """Returns whether no query saw more than it may select, so that nothing tells sparse from dense."""
  return results.get('left_out') == 0 and 'sparse' in results['validation_bits']


def _not_judged(name: str) -> Verdict:
  return Verdict(name, None, 'this run has no such numbers')


def _loss_excess(results, bar: float) -> Verdict | None:
  bits = results['validation_bits']
  if not {'dense_baseline', 'sparse'} <= bits.keys():
    return None
  excess = bits['sparse'] / bits['dense_baseline'] - 1
  name = f'sparse loss within {bar:.1%} of the dense baseline'
  return Verdict(name, excess <= bar, f'{excess:+.2%}')


def _accuracy_share(results, bar: float) -> Verdict | None:
  if (share := _of_baseline(results, 'sparse')) is None:
    return None
  return Verdict(f'sparse reaches {bar:.0%} of the dense accuracy', share >= bar, f'{share:.4f}')


def _window_accuracy_share(results, bar: float) -> Verdict | None:
  if (share := _of_baseline(results, 'window_sinks')) is None:
    return None
  name = f'window and sinks fail (below {bar:.0%} of the dense accuracy)'
  return Verdict(name, share < bar, f'{share:.4f}')


def _of_baseline(results, model: str) -> float | None:
  accuracy = results.get('accuracy', {})
  if model not in accuracy or not accuracy.get('dense_baseline'):
    return None
  return accuracy[model] / accuracy['dense_baseline']


def _captured_mass(results, bar: float) -> Verdict | None:
  if not (mass := _of_selecting(results, results['captured_mass'])):
    return None
  mean = float(np.mean(mass))
  return Verdict(f'captured attention mass at least {bar:g} on average', mean >= bar, f'{mean:.3f}')


def _mass_above_window(results, bar: float) -> Verdict | None:
  window = results['captured_mass_by_rule'].get('window_sinks')
  if not (mass := _of_selecting(results, results['captured_mass'])) or window is None:
    return None
  margin = float((np.array(mass) - _of_selecting(results, window)).min())
  name = 'captured mass above window and sinks in every layer' + (f' by {bar:g}' if bar else '')
  return Verdict(name, margin > bar, f'smallest margin {margin:+.3f}')


def _order_of_rules(results, bar: float) -> Verdict | None:
  beyond, order = results['bits_beyond_budget'], ('oracle', 'sparse', 'window_sinks', 'random')
  if not all(np.isfinite(beyond.get(name, np.nan)) for name in order):
    return None
  oracle, *others = (beyond[name] for name in order)
  passed = oracle <= others[0] and min(np.diff(others)) > bar
  name = 'beyond the budget: oracle <= sparse < window and sinks < random'
  return Verdict(name, bool(passed), ', '.join(f'{name} {beyond[name]:.4f}' for name in order))


def _of_selecting(results, values):
  return of_selecting(values, results.get('window_layers', ()))


JUDGES = {
    'loss_excess': _loss_excess,
    'accuracy_share': _accuracy_share,
    'window_accuracy_share': _window_accuracy_share,
    'captured_mass': _captured_mass,
    'mass_above_window': _mass_above_window,
    'order_of_rules': _order_of_rules,
}
