# SPDX-License-Identifier: Apache-2.0
"""Says how a text is continued."""

import dataclasses

import numpy as np

from dsa_jax.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """The rule by which tokens are drawn, and when to stop."""

  max_new_tokens: int = 128  # A sequence ends after as many.
  temperature: float = 0.0  # Divides the logits. 0 always takes the likeliest token.
  top_k: int = 0  # Tokens are drawn from as many of the likeliest. 0 draws from all.
  top_p: float = 1.0  # Tokens are drawn from the likeliest that hold this much probability.
  # Ids that end a sequence, and are not returned. None stands for those of the tokenizer where text is
  # written, and for none where ids are: `generate` and `steps`.
  stop: tuple[int, ...] | None = None
  stop_texts: tuple[str, ...] = ()  # What ends a text where it is written. It is not returned.
  seed: int = 0  # The draws depend on it, on a text's place among the prompts, and on its sample.

  def __post_init__(self):
    for name in ('max_new_tokens', 'top_k', 'seed'):
      value = np.asarray(getattr(self, name))
      if value.ndim or not are_whole(value):
        raise ConfigError(f'{name}={getattr(self, name)!r} must be a whole number.')
      object.__setattr__(self, name, int(value))
    if self.stop is not None:
      ids = np.atleast_1d(np.asarray(self.stop))  # One id may come alone.
      if ids.ndim > 1 or not are_whole(ids):
        raise ConfigError(f'{self.stop=} must be ids; texts that end a text belong into stop_texts.')
      object.__setattr__(self, 'stop', tuple(ids.astype(int).tolist()))
    if self.max_new_tokens < 1:
      raise ConfigError(f'{self.max_new_tokens=} must be at least 1.')
    if not self.temperature >= 0:
      raise ConfigError(f'{self.temperature=} must be 0 or more.')
    if self.top_k < 0:
      raise ConfigError(f'{self.top_k=} must be 0 or more.')
    if not 0 < self.top_p <= 1:
      raise ConfigError(f'{self.top_p=} must be above 0 and at most 1.')
    if isinstance(self.stop_texts, str) or '' in self.stop_texts:
      raise ConfigError(f'{self.stop_texts=} must be texts, none of them empty.')
    if not 0 <= self.seed < 2**32:
      raise ConfigError(f'{self.seed=} must be within 0 and {2**32 - 1}.')


def are_whole(numbers: np.ndarray) -> bool:
  """Returns whether all are whole numbers, of whatever type, as those of a table of text are floats."""
  if numbers.dtype.kind == 'f':
    return bool(np.all(np.isfinite(numbers) & (numbers == np.floor(numbers))))
  return numbers.dtype.kind in 'biu'


def padded(stop: tuple[int, ...] | None) -> np.ndarray:
  """Returns the ids and as many -1 as make a multiple of eight: one program serves most numbers."""
  stop = stop or ()
  ids = np.full(max(-(-len(stop) // 8), 1) * 8, -1, np.int32)
  ids[: len(stop)] = stop
  return ids
