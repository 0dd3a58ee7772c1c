# SPDX-License-Identifier: Apache-2.0
"""One optax chain for each part of the model. Neither sees the gradients of the other."""

import dataclasses
import importlib
import logging

from flax import nnx
import jax
import numpy as np
import optax

from dsa_jax.config import ConfigError


BIASES = ('bq', 'bk', 'bv')  # Of heads, in a row for each head.
DECAYS = ('all', 'matrices')
SCHEDULES = ('cosine', 'constant', 'wsd')


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """The settings of AdamW, which all stages share. The published recipe names no optimiser."""

  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  decays: str = 'all'  # The weights that decay: 'all', or 'matrices' without embeddings and norms.
  clip_norm: float = 1.0  # The backbone's gradient and the indexer's are clipped separately.
  bias_rate: float = 1e-3  # The experts' selection bias moves by this much in every step.
  mtp_weight: float = 0.3  # The weight of the MTP layer's loss; the next token's has 1.

  def __post_init__(self):
    if self.decays not in DECAYS:
      raise ConfigError(f'decays={self.decays!r} must be one of {DECAYS}.')
    for name in ('b1', 'b2'):
      if not 0 <= getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 0 and below 1.')
    for name in ('eps', 'clip_norm'):
      if not getattr(self, name) > 0:
        raise ConfigError(f'{name}={getattr(self, name)} must be above 0.')
    for name in ('weight_decay', 'bias_rate', 'mtp_weight'):
      if not getattr(self, name) >= 0:
        raise ConfigError(f'{name}={getattr(self, name)} must be 0 or more.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
  """The learning rate of every step of a stage, as shares of its peak."""

  kind: str  # One of SCHEDULES, or 'MODULE:FUNCTION', a function of step, steps and peak: it decides every rate.
  warmup_steps: int  # The rate rises to its peak in this many steps.
  steps: int
  end_share: float  # The share of the peak at which 'cosine' and 'wsd' end.
  decay_share: float  # The share of the steps in which 'wsd' falls, at the end.


def learning_rates(schedule: ScheduleConfig, peak: float) -> np.ndarray:
  """Returns the rate of each step, float32.

  'cosine' falls from the peak to `end_share` of it, 'constant' stays, and 'wsd' (warm-up, stable,
  decay) stays and then falls in a straight line.

  Raises:
    ConfigError: A function of one's own cannot be imported, or gives something else than a rate.
  """
  if schedule.kind not in SCHEDULES:
    return _own_rates(schedule, peak)
  rates = jax.jit(_optax_schedule(schedule, peak))(np.arange(schedule.steps))
  return np.broadcast_to(np.asarray(rates, np.float32), schedule.steps)


def _optax_schedule(schedule: ScheduleConfig, peak: float) -> optax.Schedule:
  warmup, steps, end = schedule.warmup_steps, schedule.steps, peak * schedule.end_share
  if schedule.kind == 'cosine' and not warmup:
    return optax.cosine_decay_schedule(peak, steps, schedule.end_share)
  if schedule.kind == 'cosine':
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end)
  parts = [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)]
  fall = min(round(schedule.decay_share * steps), steps - warmup) if schedule.kind == 'wsd' else 0
  parts.append(optax.linear_schedule(peak, end, fall))
  return optax.join_schedules(parts, [warmup, steps - fall])


def _own_rates(schedule: ScheduleConfig, peak: float) -> np.ndarray:
  module, _, name = schedule.kind.partition(':')
  try:
    function = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as error:
    raise ConfigError(
        f'schedule={schedule.kind!r} must be one of {SCHEDULES}, or MODULE:FUNCTION ({error}).'
    ) from error
  if schedule.warmup_steps:
    logging.warning(f'schedule={schedule.kind!r} decides every rate: warmup_steps={schedule.warmup_steps} changes none.')
  rates = [float(function(step, schedule.steps, peak)) for step in range(schedule.steps)]
  if not all(0 <= rate < float('inf') for rate in rates):
    raise ConfigError(f'schedule={schedule.kind!r} must give rates of 0 or more; it gave {min(rates)}.')
  return np.array(rates, np.float32)


def make_optimizer(optim: OptimConfig) -> optax.GradientTransformation:
  """Returns AdamW with its own clipping and a learning rate of one.

  The step multiplies the updates by the learning rate that it is given, so stages that differ only
  in their schedules share one compiled program.
  """
  mask = _are_matrices if optim.decays == 'matrices' else None
  return optax.chain(
      optax.clip_by_global_norm(optim.clip_norm),
      optax.adamw(
          1.0, b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay, mask=mask
      ),
  )


def _are_matrices(params: nnx.State) -> nnx.State:
  """Returns which weights decay: those with two axes or more, but for embeddings and biases of heads."""

  def decays(path, x: nnx.Variable) -> nnx.Variable:
    axes, name = x.get_metadata()['axes'], path[-1].key
    return x.replace(len(axes) > 1 and axes[0] != 'vocab' and name not in BIASES)

  is_leaf = lambda x: isinstance(x, nnx.Variable)
  return jax.tree_util.tree_map_with_path(decays, params, is_leaf=is_leaf)
