# SPDX-License-Identifier: Apache-2.0
"""Multi-query associative recall: a synthetic task that only long-range retrieval solves."""

import dataclasses

import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.data.batch import Batch

N_NOISE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
  """Rows of key-value pairs lost in noise, then queries: a random-access source.

  A row is a context and then `n_queries` queries. A pair is one token, a key with its value, so
  that a single attention step can retrieve it; the context holds `n_pairs` of them, every
  placement being equally likely, and noise between them. A query is the token of a key alone, and
  its target is the value. Only queries weigh in the loss, so the best guess without retrieval is
  right once in `n_values`. With more queries than pairs, keys repeat.

  Row i depends on (seed, i) alone: for validation rows take another seed.

  Token ids: keys from 0, then values, then pairs (key by key), then `N_NOISE` noise tokens.

  Attributes:
    n_keys: size of the key vocabulary; the keys of a row are distinct.
    n_values: size of the value vocabulary; values may repeat within a row.
    n_rows: how many rows to offer. They are made on demand, so a large number costs nothing.
  """

  seq_len: int
  n_keys: int
  n_values: int
  n_pairs: int
  n_queries: int
  n_rows: int
  seed: int

  def __post_init__(self):
    for name in ('n_keys', 'n_values', 'n_pairs', 'n_queries', 'n_rows'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 1')
    if self.seed < 0:
      raise ConfigError(f'{self.seed=} must not be negative')
    if self.n_pairs > self.n_keys:
      raise ConfigError(
          f'{self.n_pairs=} must not exceed {self.n_keys=}: the keys of a row are distinct'
      )
    needed = self.n_pairs + self.n_queries
    if needed > self.seq_len:
      raise ConfigError(
          f'{self.n_pairs=} and {self.n_queries=} take {needed} tokens, which must not'
          f' exceed {self.seq_len=}'
      )

  @property
  def vocab_size(self) -> int:
    return self.n_keys + self.n_values + self.n_keys * self.n_values + N_NOISE

  def __len__(self) -> int:
    return self.n_rows

  def __getitem__(self, i: int) -> Batch:
    if not 0 <= i < self.n_rows:
      raise IndexError(f'row {i} of {self.n_rows}')
    rng = np.random.default_rng((self.seed, i))
    context_len = self.seq_len - self.n_queries
    keys = rng.choice(self.n_keys, self.n_pairs, replace=False)
    values = rng.integers(self.n_values, size=self.n_pairs)
    queried = rng.choice(self.n_pairs, self.n_queries, replace=self.n_queries > self.n_pairs)
    pair_at = rng.choice(context_len, self.n_pairs, replace=False)

    first_value = self.n_keys
    first_pair = first_value + self.n_values
    first_noise = first_pair + self.n_keys * self.n_values
    tokens = first_noise + rng.integers(N_NOISE, size=self.seq_len)
    tokens[pair_at] = first_pair + keys * self.n_values + values
    tokens[context_len:] = keys[queried]
    targets = np.append(tokens[1:], first_noise)
    targets[context_len:] = first_value + values[queried]
    position = np.arange(self.seq_len, dtype=np.int32)
    return Batch(
        tokens=tokens.astype(np.int32),
        targets=targets.astype(np.int32),
        weights=(position >= context_len).astype(np.float32),
        start=np.zeros_like(position),
        end=position + 1,
    )
