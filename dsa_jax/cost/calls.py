# SPDX-License-Identifier: Apache-2.0
"""Adds up the cost of a whole call from the cost of a token at each position."""

from collections.abc import Mapping

import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.cost.serving import Numbers, Serving, token_seconds


class Curve:
  """The cost of a token by its position, as straight lines between points from position 0 on."""

  def __init__(self, positions: Numbers, costs: Numbers):
    self.positions, self.costs = np.asarray(positions, float), np.asarray(costs, float)
    if self.positions[0] or np.any(np.diff(self.positions) <= 0):
      raise ConfigError(f'positions={list(positions)} must start at 0 and increase.')
    steps = np.diff(self.positions) * (self.costs[1:] + self.costs[:-1]) / 2
    self._totals = np.concatenate([[0.0], np.cumsum(steps)])

  @property
  def limit(self) -> float:
    return self.positions[-1]

  def at(self, position: Numbers) -> Numbers:
    return np.interp(position, self.positions, self.costs)

  def total(self, start: Numbers, stop: Numbers) -> Numbers:
    """Returns the cost of all tokens from position `start` to `stop`, which is left out."""
    return self._until(stop) - self._until(start)

  def _until(self, position: Numbers) -> Numbers:
    position = np.asarray(position, float)
    if np.any(position > self.limit):
      raise ConfigError(f'position={np.max(position):g} must be at most {self.limit:g}.')
    i = np.searchsorted(self.positions, position, side='right') - 1
    rest = position - self.positions[i]
    return self._totals[i] + rest * (self.costs[i] + self.at(position)) / 2


def model_curve(
    cfg: ModelConfig,
    phase: str,
    *,
    sparse: bool,
    serving: Serving = Serving(),
    limit: int = 131_072,
) -> Curve:
  """Returns chip-seconds per token by position, up to a limit."""
  fine, coarse = min(16_384, limit), range(16_384, limit, 4096)
  positions = sorted({*range(0, fine, 256), *coarse, limit})
  seconds = [
      token_seconds(cfg, max(1, p), phase, sparse=sparse, serving=serving) for p in positions
  ]
  return Curve(positions, seconds)


def call_seconds(
    prefill: Curve, decode: Curve, inputs: Numbers, outputs: Numbers, hit_share: Numbers = 0.0
) -> Numbers:
  """Returns what a call costs, in the unit of the curves.

  Args:
    prefill: The cost of a prompt token.
    decode: The cost of a generated token.
    inputs: The number of prompt tokens.
    outputs: The number of generated tokens.
    hit_share: The share of the prompt that is cached. These are its first tokens, and they cost
      nothing.
  """
  if np.any(np.less(hit_share, 0) | np.greater(hit_share, 1)):
    raise ConfigError(f'{hit_share=} must be within 0 and 1.')
  inputs = np.asarray(inputs, float)
  return prefill.total(hit_share * inputs, inputs) + decode.total(inputs, inputs + outputs)


def cheaper_from(
    dense: Mapping[str, Curve],
    sparse: Mapping[str, Curve],
    output_share: float,
    hit_share: float,
    ratio: float = 0.5,
) -> float:
  """Returns the context from which on a sparse call costs at most `ratio` of a dense one.

  The context is the whole call, prompt and answer. It is NaN if there is none up to the curves'
  limit.
  """
  if not 0 <= output_share <= 1:
    raise ConfigError(f'{output_share=} must be within 0 and 1.')
  contexts = np.geomspace(1, dense['prefill'].limit, 1024)
  outputs = output_share * contexts
  costs = [
      call_seconds(c['prefill'], c['decode'], contexts - outputs, outputs, hit_share)
      for c in (dense, sparse)
  ]
  return _below_from(contexts, costs[1] / costs[0], ratio)


def crossover(dense: Curve, sparse: Curve) -> float:
  """Returns the position from which on a sparse token is the cheaper one, or NaN."""
  positions = np.geomspace(1, dense.limit, 4096)
  return _below_from(positions, sparse.at(positions) / dense.at(positions), 1.0)


def price_ratio(
    before: Mapping[str, float], after: Mapping[str, float], output_share: float, hit_share: float
) -> float:
  """Returns what a call costs at the new list price, as a share of the old one's."""
  inputs = 1 - output_share
  shares = {'hit': hit_share * inputs, 'miss': (1 - hit_share) * inputs, 'output': output_share}
  new, old = (sum(share * p[name] for name, share in shares.items()) for p in (after, before))
  return new / old


def _below_from(x: np.ndarray, y: np.ndarray, level: float) -> float:
  above = np.flatnonzero(~(y <= level))
  if not above.size:
    return float(x[0])
  i = above[-1]
  if i == len(x) - 1:
    return float('nan')
  return float(np.interp(level, [y[i + 1], y[i]], [x[i + 1], x[i]]))
