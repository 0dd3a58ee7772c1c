# SPDX-License-Identifier: Apache-2.0
"""Scores a model under dense attention, and under every rule and budget; each arm once."""

from collections.abc import Iterator
import io
import json
import logging
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from dsa_jax.data.batch import Batch
from dsa_jax.evaluation.subject import Subject, keep_bytes
from dsa_jax.nn.attention.types import Mode
from dsa_jax.reporting.evaluate import Scores, evaluate, measure
from dsa_jax.reporting.progress import StepProgress
from dsa_jax.reporting.report import finite
from dsa_jax.selection import RULES

SCORES, MEASURES = 'scores', 'measures'  # Folders of what is kept.


class Arm(NamedTuple):
  """One way to attend. Arms are compared target by target."""

  rule: str = ''  # '' is dense attention.
  index_topk: int = 0

  @property
  def name(self) -> str:
    return f'{self.rule}@{self.index_topk}' if self.rule else 'dense'


class Scored(NamedTuple):
  """What an arm made of every target."""

  scores: Scores
  seconds: float  # Compilation is included.


def arms_of(subject: Subject) -> list[Arm]:
  """Returns all arms, dense attention first."""
  settings = subject.settings
  return [Arm()] + [Arm(rule, k) for k in settings.index_topk for rule in settings.rules]


def score_arms(subject: Subject, bar: StepProgress) -> dict[str, Scored]:
  """Scores every arm that has not been scored before.

  Returns:
    What each arm scored, by its name.
  """
  scored = {}
  for arm in arms_of(subject):
    path = subject.settings.out / SCORES / f'{arm.name}.npz'
    scored[arm.name] = kept = _kept(path, subject.n_visible)
    if kept is None:
      scored[arm.name] = _score(subject, arm, bar)
      _keep(path, scored[arm.name])
  return scored


def measure_budgets(subject: Subject, bar: StepProgress) -> dict[int, dict[str, Any]]:
  """Compares the selections of all rules with the true attention, once for each budget.

  Rules that are new are measured beside those that have been measured before.

  A model whose indexer was trained attends sparsely meanwhile, by its own rule, as it does in the
  report of its training. Any other attends densely.

  Returns:
    For each budget `rules`, `seconds`, and by rule and measure the means for each layer: those over
    all queries in `everywhere`, and those over queries that see more than the budget in `beyond`,
    which is None if there are none. A layer with a window has None.
  """
  measured = {}
  for k in subject.settings.index_topk:
    path = subject.settings.out / MEASURES / f'{k}.json'
    kept, asked = read_kept(path), subject.settings.rules
    before = kept.get('rules', []) if kept else []
    if not kept or not set(asked) <= set(before):
      others = tuple(rule for rule in before if rule in RULES and rule not in asked)
      kept = _measure(subject, k, asked + others, bar)
      keep_bytes(path, json.dumps(kept).encode())
    measured[k] = kept
  return measured


def _score(subject: Subject, arm: Arm, bar: StepProgress) -> Scored:
  began, settings = time.monotonic(), subject.settings
  mode, choice = Mode(attention='dense', backend=settings.backend), None
  if arm.rule:  # One program serves all rules of a budget.
    mode = Mode(attention='sparse', backend=settings.backend, rule=settings.rules)
    choice = settings.rules.index(arm.rule)
  graph = subject.graph(arm.index_topk or subject.cfg.index_topk)
  with subject.on_devices():
    params = subject.params
    scores = evaluate(graph, params, _shown(subject, arm.name, bar), mode, choice)
  return Scored(scores, time.monotonic() - began)


def _measure(
    subject: Subject, index_topk: int, rules: tuple[str, ...], bar: StepProgress
) -> dict[str, Any]:
  began, settings = time.monotonic(), subject.settings
  trained = subject.stored.has_trained_indexer
  mode = Mode(
      attention='sparse' if trained else 'dense',
      backend=settings.backend,
      rule=subject.stored.rule,
      measure=rules,
  )
  with subject.on_devices():
    params = subject.params
    batches = _shown(subject, f'measures@{index_topk}', bar)
    means = measure(subject.graph(index_topk), params, batches, mode, beyond=(0, index_topk))
  everywhere, beyond = finite(jax.tree.map(lambda x: x.tolist(), means))
  return {
      'rules': list(rules),
      'attention': mode.attention,
      'everywhere': everywhere,
      'beyond': beyond,
      'seconds': time.monotonic() - began,
  }


def _shown(subject: Subject, name: str, bar: StepProgress) -> Iterator[Batch]:
  """Yields the batches, and shows how many are done."""
  batches, began = subject.batches, time.monotonic()
  bar.start_stage(name, len(batches))
  for i, batch in enumerate(batches, start=1):
    yield batch
    tokens = i * batch.tokens.size
    bar.update(i, tokens / (time.monotonic() - began))


def _keep(path: pathlib.Path, scored: Scored):
  data, scores = io.BytesIO(), scored.scores
  np.savez(data, nats=scores.nats, right=scores.right, seconds=scored.seconds)
  keep_bytes(path, data.getvalue())


def _kept(path: pathlib.Path, n_visible: np.ndarray) -> Scored | None:
  """Returns what an arm has scored before; None if it has not, or not whole."""
  if not path.exists():
    return None
  try:
    with np.load(path) as file:
      nats, right, seconds = file['nats'], file['right'], float(file['seconds'])
  except (OSError, ValueError, KeyError, EOFError) as error:
    logging.warning('%s is damaged and is scored again: %s', path, error)
    return None
  return Scored(Scores(nats, right, n_visible), seconds) if len(nats) == len(n_visible) else None


def read_kept(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns what a file of results holds; None if there is none, or it is not whole."""
  try:
    kept = json.loads(path.read_text())
  except (OSError, ValueError):
    return None
  return kept if isinstance(kept, dict) else None
