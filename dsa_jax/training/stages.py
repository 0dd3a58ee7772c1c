# SPDX-License-Identifier: Apache-2.0
"""The stages of a recipe, as data."""

import dataclasses
import functools

from flax import nnx
import jax
import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.params import BackboneParam, IndexerParam
from dsa_jax.training.optim import make_schedule

PARTS: dict[str, type[nnx.Variable]] = {'backbone': BackboneParam, 'indexer': IndexerParam}


@dataclasses.dataclass(frozen=True)
class Stage:
  """How a stage attends, and which parts of the model it trains.

  The backbone learns from the language-model loss only, the indexer from its divergence only:
  over all visible keys where attention is dense, over the selected ones where it is not.
  """

  attention: tuple[str, ...]  # The modes it may run in; the first is the default.
  trains: tuple[str, ...]  # Keys of PARTS.


STAGES = {
    'dense': Stage(('dense',), ('backbone',)),
    'warmup': Stage(('dense',), ('indexer',)),
    'sparse': Stage(('sparse', 'masked', 'auto'), ('backbone', 'indexer')),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
  """One entry of a recipe: a stage, and how long and on what it runs."""

  stage: str  # A key of STAGES.
  init_from: str = ''  # An earlier entry of the recipe, or a checkpoint folder of another run.
  steps: int
  batch_size: int
  seq_len: int
  micro_batches: int = 1  # Gradients are accumulated over them; the numbers stay the same.
  data_seed: int = 0  # Entries with one seed, batch and length read the same batches.
  attention: str = ''  # '': the stage's default. 'auto': the cheaper of 'sparse' and 'masked'.
  backbone_lr: float = 0.0
  indexer_lr: float = 0.0
  warmup_steps: int = 0  # Of the learning rates, to their peak.
  end_share: float = 0.1  # Of the peak, at the last step of the cosine.

  def __post_init__(self):
    if self.stage not in STAGES:
      raise ConfigError(f'stage={self.stage!r} must be one of {tuple(STAGES)}.')
    for name in ('steps', 'batch_size', 'micro_batches'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.seq_len < 2:
      raise ConfigError(f'{self.seq_len=} must be at least 2: one token and its target.')
    if self.batch_size % self.micro_batches:
      raise ConfigError(f'{self.batch_size=} must be a multiple of {self.micro_batches=}.')
    if not 0 <= self.end_share <= 1:
      raise ConfigError(f'{self.end_share=} must be within 0 and 1.')
    if not 0 <= self.warmup_steps < self.steps:
      raise ConfigError(f'{self.warmup_steps=} must be within 0 and {self.steps=}.')
    if self.attention and self.attention not in STAGES[self.stage].attention:
      allowed = STAGES[self.stage].attention
      raise ConfigError(f'attention={self.attention!r} of a {self.stage} stage must be of {allowed}.')
    for part in STAGES[self.stage].trains:
      if not 0 < self.learning_rate(part) < float('inf'):
        raise ConfigError(f'a {self.stage} stage trains the {part}: {part}_lr must be above 0.')

  def learning_rate(self, part: str) -> float:
    return {'backbone': self.backbone_lr, 'indexer': self.indexer_lr}[part]

  def rates(self) -> dict[str, np.ndarray]:
    """Returns the learning rates of each trained part, one for every step."""
    shape = {'warmup_steps': self.warmup_steps, 'steps': self.steps, 'end_share': self.end_share}
    steps, schedule = np.arange(self.steps), functools.partial(make_schedule, **shape)
    rates = lambda part: jax.jit(schedule(peak=self.learning_rate(part)))(steps)
    return {part: np.asarray(rates(part), np.float32) for part in self.trains}

  @property
  def trains(self) -> tuple[str, ...]:
    return STAGES[self.stage].trains

  @property
  def mode(self) -> str:
    """How the stage attends; 'auto' is for who knows the backend to settle."""
    return self.attention or STAGES[self.stage].attention[0]

  @property
  def tokens(self) -> int:
    return self.steps * self.batch_size * self.seq_len
