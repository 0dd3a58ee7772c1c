# SPDX-License-Identifier: Apache-2.0
"""One optax chain for each part of the model. Neither sees the gradients of the other."""

import dataclasses

import optax

from dsa_jax.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """The settings of AdamW, which all stages share. The published recipe names no optimiser."""

  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0  # The backbone's gradient and the indexer's are clipped separately.
  bias_rate: float = 1e-3  # The experts' selection bias moves by this much in every step.
  mtp_weight: float = 0.3  # The weight of the MTP layer's loss; the next token's has 1.

  def __post_init__(self):
    for name in ('b1', 'b2'):
      if not 0 <= getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 0 and below 1.')
    for name in ('eps', 'clip_norm'):
      if not getattr(self, name) > 0:
        raise ConfigError(f'{name}={getattr(self, name)} must be above 0.')
    for name in ('weight_decay', 'bias_rate', 'mtp_weight'):
      if not getattr(self, name) >= 0:
        raise ConfigError(f'{name}={getattr(self, name)} must be 0 or more.')


def make_schedule(*, peak: float, warmup_steps: int, steps: int, end_share: float) -> optax.Schedule:
  """Returns a linear warm-up to `peak`, then a cosine down to `end_share` of it at the last step."""
  if warmup_steps == 0:
    return optax.cosine_decay_schedule(peak, steps, end_share)
  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, steps, peak * end_share)


def make_optimizer(optim: OptimConfig) -> optax.GradientTransformation:
  """Returns AdamW with its own clipping and a learning rate of one.

  The step multiplies the updates by the learning rate that it is given, so stages that differ only
  in their schedules share one compiled program.
  """
  return optax.chain(
      optax.clip_by_global_norm(optim.clip_norm),
      optax.adamw(
          1.0, b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay
      ),
  )
