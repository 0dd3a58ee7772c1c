# SPDX-License-Identifier: Apache-2.0
"""The sources of rows, by name."""

import dataclasses

from dsa_jax.config import ConfigError
from dsa_jax.data.corpus import describe_files
from dsa_jax.data.recall import Recall
from dsa_jax.data.seeds import check_seed
from dsa_jax.data.text import VOCAB_SIZE, PackedText, find_files, split_files

SPLITS = ('train', 'validation')
Source = PackedText | Recall


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where tokens come from. Some fields belong to one source only."""

  source: str = 'text'  # 'text' reads bytes of local files, 'recall' is synthetic retrieval.
  seed: int = 0  # Determines the split and the packing; each stage shuffles by its own seed.

  files: str = ''  # text: A glob. '' stands for the sources of Python's standard library.
  validation_share: float = 0.05  # text: The share of the files that validation reads.

  n_keys: int = 128  # recall: Size of the key vocabulary.
  n_values: int = 16  # recall: Size of the value vocabulary.
  tokens_per_pair: int = 4  # recall: Tokens of a row for each key-value pair.
  tokens_per_query: int = 8  # recall: Tokens of a row for each query.

  def __post_init__(self):
    if self.source not in ('text', 'recall'):
      raise ConfigError(f"data.source={self.source!r} must be 'text' or 'recall'.")
    check_seed(self.seed)
    for name in ('tokens_per_pair', 'tokens_per_query'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 1.')

  @property
  def vocab_size(self) -> int:
    if self.source == 'text':
      return VOCAB_SIZE
    return self._recall(seq_len=2 * self.tokens_per_query, split='train').vocab_size

  @property
  def unit(self) -> str:
    """What one target is, for a count of bits in each."""
    return {'text': 'byte', 'recall': 'answer'}[self.source]

  def rows(self, seq_len: int, split: str) -> Source:
    """Returns a random-access source of rows of `seq_len` tokens."""
    if self.source == 'recall':
      return self._recall(seq_len, split)
    train, validation = split_files(find_files(self.files), self.validation_share, self.seed)
    files = {'train': train, 'validation': validation}[split]
    return PackedText.from_files(files, seq_len, self.seed)

  def describe(self) -> dict[str, str]:
    """Returns a description of every file that is read; see `corpus.describe_files`."""
    return {} if self.source == 'recall' else describe_files(find_files(self.files))

  def _recall(self, seq_len: int, split: str) -> Recall:
    return Recall(
        seq_len=seq_len,
        n_keys=self.n_keys,
        n_values=self.n_values,
        n_pairs=seq_len // self.tokens_per_pair,
        n_queries=seq_len // self.tokens_per_query,
        n_rows=1 << 30,
        seed=2 * self.seed + SPLITS.index(split),
    )
