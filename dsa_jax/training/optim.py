# SPDX-License-Identifier: Apache-2.0
"""One optax chain for each part of the model; neither sees the other's gradients."""

import dataclasses

import optax

from dsa_jax.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """What all stages share. AdamW; the published recipe does not name its optimiser."""

  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0  # Of the backbone's gradient and of the indexer's, each by itself.
  bias_rate: float = 1e-3  # Step of the experts' selection bias, after every step.
  mtp_weight: float = 0.3  # Of the MTP layer's loss beside the next token's.

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
  """Linear warm-up to `peak`, then a cosine down to `end_share` of it at the last step."""
  if warmup_steps == 0:
    return optax.cosine_decay_schedule(peak, steps, end_share)
  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, steps, peak * end_share)


def make_optimizer(optim: OptimConfig) -> optax.GradientTransformation:
  """Returns AdamW behind its own clipping, for a learning rate of one.

  The step scales the updates by the rate it is given, so that stages which differ in their
  schedules only share one compiled program.
  """
  return optax.chain(
      optax.clip_by_global_norm(optim.clip_norm),
      optax.adamw(
          1.0, b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay
      ),
  )
