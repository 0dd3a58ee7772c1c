# SPDX-License-Identifier: Apache-2.0
"""Multi-query associative recall, a synthetic task that only long-range retrieval solves."""

import dataclasses

import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.data.batch import Batch

N_NOISE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
  """A random-access source of rows that hold key-value pairs among noise, then queries.

  A row is a context and then `n_queries` queries. A pair is one token that stands for a key and its
  value, so that a single attention step can retrieve it. The context holds `n_pairs` of them among
  noise, and every placement is equally likely. A query is the token of a key alone, and its target
  is the value. Only queries weigh in the loss, so the best guess without retrieval is right once in
  `n_values`. With more queries than pairs, keys repeat.

  Row i depends on (seed, i) alone, so validation rows need another seed.

  Token ids are those of keys from 0, then of values, then of pairs (key by key), then `N_NOISE` of
  noise.
  """

  seq_len: int  # Tokens of a row.
  n_keys: int  # Size of the key vocabulary. The keys of a row are distinct.
  n_values: int  # Size of the value vocabulary. Values may repeat within a row.
  n_pairs: int  # Pairs in a row.
  n_queries: int  # Queries at the end of a row.
  n_rows: int  # Rows on offer. They are made on demand, so a large number costs nothing.
  seed: int  # Determines all rows.

  def __post_init__(self):
    for name in ('n_keys', 'n_values', 'n_pairs', 'n_queries', 'n_rows'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.seed < 0:
      raise ConfigError(f'{self.seed=} must not be negative.')
    if self.n_pairs > self.n_keys:
      raise ConfigError(
          f'{self.n_pairs=} must not exceed {self.n_keys=}: the keys of a row are distinct.'
      )
    if self.vocab_size > 2**31 - 1:
      raise ConfigError(
          f'{self.n_keys=} and {self.n_values=} make {self.vocab_size} tokens; there may be at '
          f'most {2**31 - 1}.'
      )
    needed = self.n_pairs + self.n_queries
    if needed > self.seq_len:
      raise ConfigError(
          f'{self.n_pairs=} and {self.n_queries=} take {needed} tokens, which must not '
          f'exceed {self.seq_len=}.'
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
