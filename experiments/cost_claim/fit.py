# SPDX-License-Identifier: Apache-2.0
"""Fits two shares of peak per phase to the published curves, and reports what errors remain."""

import dataclasses
from unittest import mock

import numpy as np
import scipy.optimize

from dsa_jax import cost
from dsa_jax.cost import published, serving as serving_module
from dsa_jax.families.deepseek import DEEPSEEK_V32

CFG = DEEPSEEK_V32
PHASES, KINDS = ('prefill', 'decode'), ('dense', 'sparse')


def fit(phase: str, serving: cost.Serving) -> cost.Serving:
  """Returns the same with the phase's `weights` and `context` of least squared relative error.

  The error is taken over the nine positions of the published table, dense and sparse alike. The
  shares are rounded to three digits.
  """

  def with_shares(x):
    weights, context = map(float, x)
    shares = dataclasses.replace(getattr(serving, phase), weights=weights, context=context)
    return dataclasses.replace(serving, **{phase: shares})

  solution = scipy.optimize.least_squares(
      lambda x: errors(phase, with_shares(x)), x0=(0.4, 0.5), bounds=(0.05, 1.0)
  )
  return with_shares(np.round(solution.x, 3))


def errors(phase: str, serving: cost.Serving, positions=published.POSITIONS) -> np.ndarray:
  """Returns model / published - 1, of dense and then of sparse, at each position."""
  return np.array(
      [
          cost.token_seconds(CFG, max(1, round(p)), phase, sparse=kind == 'sparse', serving=serving)
          / published.CURVES[phase, kind].at(p)
          - 1
          for kind in KINDS
          for p in positions
      ]
  )


def summary(phase: str, serving: cost.Serving) -> dict[str, float]:
  """Returns the shares, the errors, the ratio at 128K and the crossover."""
  misses, limit = errors(phase, serving), published.POSITIONS[-1]
  dense, sparse = model_curves(serving)[phase].values()
  shares = getattr(serving, phase)
  return {
      'weights': shares.weights,
      'context': shares.context,
      'worst_error': float(np.abs(misses).max()),
      'mean_error': float(np.abs(misses).mean()),
      'ratio_at_128k': float(dense.at(limit) / sparse.at(limit)),
      'crossover': cost.crossover(dense, sparse),
  }


def published_summary(phase: str) -> dict[str, float]:
  dense, sparse = (published.CURVES[phase, kind] for kind in KINDS)
  return {
      'ratio_at_128k': float(dense.at(dense.limit) / sparse.at(dense.limit)),
      'crossover': cost.crossover(dense, sparse),
  }


def model_curves(serving: cost.Serving) -> dict[str, dict[str, cost.Curve]]:
  return {
      phase: {
          kind: cost.model_curve(CFG, phase, sparse=kind == 'sparse', serving=serving)
          for kind in KINDS
      }
      for phase in PHASES
  }


def variations(serving: cost.Serving) -> dict[str, dict[str, dict[str, float]]]:
  """Returns the summaries after a fit with each of the stated, unfitted constants changed."""

  def shares(**changed):
    return {p: dataclasses.replace(getattr(serving, p), **changed) for p in PHASES}

  changes = {
      'as stated': {},
      'bandwidth 0.7': shares(bandwidth=0.7),
      'bandwidth 0.9': shares(bandwidth=0.9),
      'gathered attention as fast as dense': shares(gather=1.0),
      'one token per decode step': {'queries': 1},
      'bf16 cache': {'cache': 'bf16'},
      '12 sequences per chip, what 80 GB hold at 128K': {'batch': 12},
  }
  summaries = {name: _fitted(dataclasses.replace(serving, **x)) for name, x in changes.items()}
  original = cost.token_work

  def regrouped(*args, scores='context', **kwargs):
    return original(*args, scores={'context': 'weights', 'weights': 'context'}[scores], **kwargs)

  with mock.patch.object(serving_module, 'token_work', regrouped):
    name = 'index scores at the share of attention (prefill), of the weights (decode)'
    summaries[name] = _fitted(serving)
  return summaries


def _fitted(serving: cost.Serving) -> dict[str, dict[str, float]]:
  return {phase: summary(phase, fit(phase, serving)) for phase in PHASES}


def slopes() -> dict[str, float]:
  """Returns what the published slopes mean on an H800, without any model of the rest.

  These are the FLOP/s of dense attention (MHA in prefill, MQA in decode) and of index scores, and
  the bytes of index keys per second if each decoded token read its own.
  """

  def per_key(phase, kind):
    curve = published.CURVES[phase, kind]
    seconds = (curve.costs[-1] - curve.costs[-2]) / (curve.positions[-1] - curve.positions[-2])
    return seconds / CFG.n_layers

  return {
      'dense prefill, MHA attention, FLOP/s':
          cost.work.mha_flops(CFG) / per_key('prefill', 'dense'),
      'dense decode, MQA attention, FLOP/s':
          cost.work.row_flops(CFG) / per_key('decode', 'dense'),
      'sparse prefill, index scores, FLOP/s':
          cost.work.index_flops(CFG) / per_key('prefill', 'sparse'),
      'sparse decode, index scores, FLOP/s':
          cost.work.index_flops(CFG) / per_key('decode', 'sparse'),
      'sparse decode, index keys, bytes/s':
          cost.work.index_key_bytes(CFG, 'fp8') / per_key('decode', 'sparse'),
  }  # fmt: skip


def unexplained(phase: str, serving: cost.Serving) -> dict[str, float]:
  """Returns what sparse costs more than dense at position 0, where nothing is to be selected.

  `least_error` is the error that two shares of peak cannot avoid there, since they move both alike.
  """
  there = {k: float(published.CURVES[phase, k].at(0)) for k in KINDS}
  model = {
      k: cost.token_seconds(CFG, 1, phase, sparse=k == 'sparse', serving=serving) for k in KINDS
  }
  ratio = there['sparse'] / there['dense'] / (model['sparse'] / model['dense'])
  return {
      'published_microseconds': 1e6 * (there['sparse'] - there['dense']),
      'model_microseconds': 1e6 * (model['sparse'] - model['dense']),
      'least_error': (ratio - 1) / (ratio + 1),
  }
