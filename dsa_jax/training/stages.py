# SPDX-License-Identifier: Apache-2.0
"""The stages of a recipe, as data."""

from collections.abc import Sequence
import dataclasses

from flax import nnx
import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.params import BackboneParam, IndexerParam
from dsa_jax.training.optim import ScheduleConfig, learning_rates

PARTS: dict[str, type[nnx.Variable]] = {'backbone': BackboneParam, 'indexer': IndexerParam}


@dataclasses.dataclass(frozen=True)
class Stage:
  """A kind of training: its attention, and the parts of the model that learn.

  The backbone learns from the language-model loss only, and the indexer only from its divergence.
  The divergence is over all visible keys where attention is dense, and over the selected ones where
  it is not.
  """

  attention: tuple[str, ...]  # The modes that the stage may run in. The first is the default.
  trains: tuple[str, ...]  # The keys of PARTS that learn.


STAGES = {
    'dense': Stage(('dense',), ('backbone',)),
    'warmup': Stage(('dense',), ('indexer',)),
    'sparse': Stage(('sparse', 'masked', 'auto'), ('backbone', 'indexer')),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
  """One entry of a recipe: a stage with its data, length and learning rates."""

  stage: str  # A key of STAGES.
  trains: Sequence[str] = ()  # The parts that learn. (): all that the stage trains.
  # An earlier entry of the recipe, or the checkpoint folder of another run. '': fresh weights.
  init_from: str = ''
  # Fields of the model that may be others than those of the checkpoint that `init_from` names.
  init_may_differ: Sequence[str] = ()
  steps: int
  batch_size: int
  seq_len: int
  # Gradients are accumulated over this many. The numbers stay the same but for their last bits, and
  # for what the rule 'random' draws.
  micro_batches: int = 1
  data_seed: int = 0  # Entries with the same seed, batch size and length read the same batches.
  attention: str = ''  # '' means the stage's default, 'auto' the cheaper of 'sparse' and 'masked'.
  backbone_lr: float = 0.0
  indexer_lr: float = 0.0
  warmup_steps: int = 0  # The learning rates rise to their peaks in this many steps.
  # The shape of the learning rates: 'cosine', 'constant', 'wsd' (warm-up, stable, decay), or
  # 'MODULE:FUNCTION', a function of the step, the number of steps and the peak.
  schedule: str = 'cosine'
  end_share: float = 0.1  # Schedules that fall end at this share of the peak.
  decay_share: float = 0.1  # The share of the steps in which 'wsd' falls.

  def __post_init__(self):
    object.__setattr__(self, 'init_may_differ', tuple(self.init_may_differ))  # JSON has lists.
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    if unknown := [name for name in self.init_may_differ if name not in known]:
      raise ConfigError(f'init_may_differ names {unknown}; the fields of a model are {known}.')
    if self.stage not in STAGES:
      raise ConfigError(f'stage={self.stage!r} must be one of {tuple(STAGES)}.')
    possible = STAGES[self.stage].trains
    object.__setattr__(self, 'trains', tuple(self.trains) or possible)
    if set(self.trains) - set(possible) or len(set(self.trains)) < len(self.trains):
      raise ConfigError(f'trains={self.trains} of a {self.stage} stage must be of {possible}, each once.')
    for name in ('steps', 'batch_size', 'micro_batches'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.seq_len < 2:
      raise ConfigError(f'{self.seq_len=} must be at least 2: one token and its target.')
    if self.batch_size % self.micro_batches:
      raise ConfigError(f'{self.batch_size=} must be a multiple of {self.micro_batches=}.')
    for name in ('end_share', 'decay_share'):
      if not 0 <= getattr(self, name) <= 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be within 0 and 1.')
    if not 0 <= self.warmup_steps < self.steps:
      raise ConfigError(f'{self.warmup_steps=} must be within 0 and {self.steps=}.')
    if self.attention and self.attention not in STAGES[self.stage].attention:
      allowed = STAGES[self.stage].attention
      raise ConfigError(f'attention={self.attention!r} of a {self.stage} stage must be of {allowed}.')
    for part in self.trains:
      if not 0 < self.learning_rate(part) < float('inf'):
        raise ConfigError(f'the {self.stage} stage trains the {part}: {part}_lr must be above 0.')

  def learning_rate(self, part: str) -> float:
    return {'backbone': self.backbone_lr, 'indexer': self.indexer_lr}[part]

  def rates(self) -> dict[str, np.ndarray]:
    """Returns the learning rate of each trained part at every step."""
    schedule = ScheduleConfig(
        kind=self.schedule,
        warmup_steps=self.warmup_steps,
        steps=self.steps,
        end_share=self.end_share,
        decay_share=self.decay_share,
    )
    return {part: learning_rates(schedule, self.learning_rate(part)) for part in self.trains}

  @property
  def mode(self) -> str:
    """The mode of attention; 'auto' remains to be settled by whoever knows the backend."""
    return self.attention or STAGES[self.stage].attention[0]

  @property
  def tokens(self) -> int:
    return self.steps * self.batch_size * self.seq_len
