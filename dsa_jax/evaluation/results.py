# SPDX-License-Identifier: Apache-2.0
"""Every number that evaluate.json holds."""

from collections.abc import Mapping
import dataclasses
import datetime
import importlib.metadata
import math
import resource
import sys
from typing import Any

from dsa_jax.evaluation.arms import Arm, Scored, arms_of
from dsa_jax.evaluation.subject import Subject
from dsa_jax.evaluation.verdicts import acted, equal_arms, self_test
from dsa_jax.reporting.evaluate import Scores
from dsa_jax.reporting.meter import device_memory
from dsa_jax.reporting.results import describe_machine

STRETCHES = 8  # Parts of a row, for scores by position.


def collect(
    subject: Subject, scored: Mapping[str, Scored], measured: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
  """Returns all results, but for the tasks; see `page` for what they mean."""
  settings, n_visible = subject.settings, subject.n_visible
  arms = {arm.name: arm for arm in arms_of(subject)}
  nats = {name: of_arm.scores.nats for name, of_arm in scored.items()}
  budgets = {name: arm.index_topk for name, arm in arms.items() if arm.rule}
  tested = {name: k for name, k in budgets.items() if arms[name].rule == 'indexer'}
  context = settings.context
  seen = [2**i for i in range(context.bit_length()) if 2**i < context] + [context + 1]
  places = sorted({round(i * context / STRETCHES) for i in range(STRETCHES + 1)})
  by_place = {n: Scores(x, scored[n].scores.right, subject.positions) for n, x in nats.items()}
  n_rows = sum(len(batch.tokens) for batch in subject.batches)
  length = subject.data.bytes_per_target(context, n_rows)
  return {
      'checkpoint': subject.identity['checkpoint'],
      'step': subject.identity['step'],
      'machine': describe_machine(),
      'date': datetime.date.today().isoformat(),
      'versions': {p: importlib.metadata.version(p) for p in ('jax', 'flax')},
      'memory': memory(),
      'settings': _plain(dataclasses.asdict(settings)),
      'has_trained_indexer': subject.stored.has_trained_indexer,
      'n_layers': subject.cfg.n_layers,
      'window_layers': list(subject.cfg.window_layers),
      'context': context,
      'targets': len(n_visible),
      'seen': {'mean': float(n_visible.mean()), 'most': int(n_visible.max())},  # Tokens, by their queries.
      'unit': subject.data.unit,
      'bytes_per_target': length,
      'arms': {n: _numbers(arms[n], scored[n], scored['dense'], length) for n in arms},
      'visible_edges': seen,
      'bits_by_visible': {n: of_arm.scores.bits_by_position(seen) for n, of_arm in scored.items()},
      'position_edges': places,
      'bits_by_position': {n: scores.bits_by_position(places) for n, scores in by_place.items()},
      'acted': acted(nats, n_visible, budgets, subject.cfg.dtype),
      'equal_arms': equal_arms(nats),
      'self_test': self_test(nats, n_visible, tested),
      'measures': {str(k): dict(of_budget) for k, of_budget in measured.items()},
  }


def memory() -> dict[str, float]:
  """Returns the most GiB that this process has used, and a device where jax reports it."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  unit = 1 if sys.platform == 'darwin' else 1024
  return {'host_gib': peak * unit / 2**30, **device_memory()}


def _numbers(arm: Arm, scored: Scored, dense: Scored, length: float | None) -> dict[str, Any]:
  """Returns the numbers of the main table. `length` is that of a target in bytes, if known."""
  scores, beyond = scored.scores, scored.scores.n_visible > arm.index_topk
  nats = {'nats_per_token': float(scores.nats.mean())}
  if arm.rule and beyond.any():
    nats['nats_beyond_budget'] = float(scores.nats[beyond].mean())
    nats['dense_nats_beyond_budget'] = float(dense.scores.nats[beyond].mean())
  bits = {
      name.replace('nats', 'bits').replace('per_token', 'per_byte'): x / (length * math.log(2))
      for name, x in nats.items()
      if length
  }
  return {
      'rule': arm.rule,
      'index_topk': arm.index_topk or None,
      **nats,
      **bits,
      'accuracy': float(scores.right.mean()),
      'seconds': scored.seconds,
  }


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  return value if value is None or isinstance(value, (bool, int, float)) else str(value)
