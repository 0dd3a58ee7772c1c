# SPDX-License-Identifier: Apache-2.0
"""Whether selection acted at all, and whether quality jumps where it begins to act."""

from collections.abc import Mapping
import itertools
from typing import Any

import numpy as np

EQUAL = 1e-5  # Nats; arms that do the same differ by less, on average.
ROUNDING = {'float32': 1e-3, 'bfloat16': 0.05}  # So much may two programs differ that should agree.
JUMP = 0.01  # A larger excess over dense just above the budget is a jump, as a share.
FEWEST = 30  # A verdict needs as many targets.


def acted(
    nats: Mapping[str, np.ndarray], n_visible: np.ndarray, budgets: Mapping[str, int], dtype: str
) -> dict[str, dict[str, Any]]:
  """Says of each sparse arm whether its selection made a difference.

  A query that sees no more than the budget leaves nothing out, so there the arm must agree with
  dense attention, up to rounding.

  Args:
    nats: The score of every target, by arm; one of them is `dense`.
    n_visible: The number of tokens that each target's query sees.
    budgets: The budget of each sparse arm.
    dtype: That of activations, which says how well two programs agree.

  Returns:
    By arm, `left_out` (the share of the queries that see more than the budget),
    `differs_within_budget` and `differs_beyond_budget` (the mean absolute differences from dense
    attention in nats, None where there is no such query), and `verdict`: 'acted', 'nothing to leave
    out', 'equal to dense', or 'wrong within the budget'.
  """
  verdicts = {}
  for name, topk in budgets.items():
    beyond = n_visible > topk
    difference = np.abs(nats[name].astype(np.float64) - nats['dense'])
    within = _mean(difference[~beyond])
    outside = _mean(difference[beyond])
    verdicts[name] = {
        'left_out': float(beyond.mean()),
        'differs_within_budget': within,
        'differs_beyond_budget': outside,
        'verdict': _acted(within, outside, ROUNDING[dtype]),
    }
  return verdicts


def _acted(within: float | None, beyond: float | None, rounding: float) -> str:
  if within is not None and within > rounding:
    return 'wrong within the budget'
  if beyond is None:
    return 'nothing to leave out'
  return 'equal to dense' if beyond <= max(EQUAL, 2 * (within or 0)) else 'acted'


def equal_arms(nats: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
  """Returns the pairs of arms that scored every target alike, up to rounding."""
  pairs = itertools.combinations(nats, 2)
  return [(a, b) for a, b in pairs if np.abs(nats[a] - nats[b]).mean() <= EQUAL]


def self_test(
    nats: Mapping[str, np.ndarray], n_visible: np.ndarray, arms: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
  """Compares the arms with dense attention at a context of the budget, and a little above it.

  Just above its budget K, an indexer leaves out a few tokens of many. If it is right they are the
  least important ones, so quality barely changes. If it is grossly wrong, quality jumps there. With
  a model of `configs/quickstart.py:short` (2026-11-29), an indexer of the opposite sign jumped by
  9.9 %. One that rotated the wrong pairs of channels did not: it lost 0.26 % in all, not 0.15 %.

  Args:
    nats: The score of every target, by arm; one of them is `dense`.
    n_visible: The number of tokens that each target's query sees.
    arms: The budget of each arm that is tested.

  Returns:
    By arm, `windows`, which hold `from` and `to` (what the queries see), `targets`, and the mean
    nats `dense` and `sparse` (None where there is no target), and `verdict`: 'smooth', 'jump' or
    'too few targets'. A jump is an excess over dense in the first window above the budget that is
    above 1 % and above twice its standard error.
  """
  return {name: _test(nats['dense'], nats[name], n_visible, topk) for name, topk in arms.items()}


def _test(
    dense: np.ndarray, sparse: np.ndarray, n_visible: np.ndarray, topk: int
) -> dict[str, Any]:
  step = max(topk // 8, 1)
  offsets = topk // 2 - topk, 1 - step, 1, 1 + step, 1 + 2 * step, 1 + topk
  edges = sorted({max(topk + offset, 1) for offset in offsets})
  windows = []
  for low, high in itertools.pairwise(edges):
    own = (n_visible >= low) & (n_visible < high)
    means = [float(x[own].mean()) if own.any() else None for x in (dense, sparse)]
    window = {'from': low, 'to': high - 1, 'targets': int(own.sum())}
    windows.append(window | dict(zip(('dense', 'sparse'), means)))
  above = (n_visible > topk) & (n_visible <= topk + step)
  return {'windows': windows, 'verdict': _smooth(dense[above], sparse[above])}


def _smooth(dense: np.ndarray, sparse: np.ndarray) -> str:
  if len(dense) < FEWEST:
    return 'too few targets'
  excess = sparse.astype(np.float64) - dense
  error = excess.std(ddof=1) / len(excess) ** 0.5
  return 'jump' if excess.mean() > max(JUMP * dense.mean(), 2 * error) else 'smooth'


def _mean(values: np.ndarray) -> float | None:
  return float(values.mean()) if values.size else None
