# SPDX-License-Identifier: Apache-2.0
"""Shuffles the rows of a random-access source and batches them."""

from collections.abc import Sequence
import dataclasses

import grain
import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.data.batch import Batch
from dsa_jax.data.raw_rows import Picked, RawRows
from dsa_jax.data.seeds import check_seed
from dsa_jax.data.streaming import RowDataset, n_workers

FEWER = 'Give more data, or ask for fewer or shorter rows.'


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Sources whose rows are mixed: in any stretch, the share of each is that of its weight."""

  sources: Sequence[grain.sources.RandomAccessDataSource | RawRows]
  weights: Sequence[float]

  def __len__(self) -> int:
    """The rows of all sources, which an epoch need not take in equal measure."""
    return sum(len(source) for source in self.sources)

  @property
  def raw(self) -> list[RawRows]:
    """The sources that are tokenized while they are read, so their rows are not counted."""
    return [source for source in self.sources if isinstance(source, RawRows)]


def make_iterator(
    source: grain.sources.RandomAccessDataSource | Mixture,
    batch_size: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
  """Returns an endless iterator over `Batch`es of numpy arrays.

  Every epoch takes each row once, in an order of its own. The batch between two epochs holds rows
  of both, so no row is dropped.

  `get_state()` returns a dict, which survives JSON. `set_state()` continues from it exactly, on an
  iterator made with the same arguments (which it cannot check) but for `share`. The dict is of one
  number, which counts the batches already returned, unless a source is raw files that are tokenized
  while they are read; see `RowIterator`. Then every share reads and tokenizes the rows of all others,
  too, and `close()` ends the processes that do so.

  Args:
    source: Each row is a `Batch` of `[T]` arrays. Of a mixture, each source has epochs of its own.
    batch_size: Rows of a batch, over all its shares.
    seed: Determines the order.
    share: (i, n) returns the i-th of n equal shares of every batch.

  Raises:
    ConfigError: An argument is out of range.
  """
  _check(source, batch_size, seed)
  i, n = share
  if batch_size % n or not 0 <= i < n:
    raise ConfigError(f'{share=} must be (i, n) with i below n, and n must divide {batch_size=}.')
  if isinstance(source, Mixture) and source.raw:
    return iter(_endless_raw(source, batch_size, seed, share))
  # Without drop_remainder, grain's length of this endless dataset overflows at batch_size 1.
  rows = _endless(source, seed)
  batches = rows.batch(batch_size // n, drop_remainder=True, batch_fn=_stack)[i::n]
  # grain's default, 500 batches ahead, takes 650 MB at 8 rows of 8192 tokens.
  ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
  return iter(batches.to_iter_dataset(ahead))


def first_batches(
    source: grain.sources.RandomAccessDataSource | Mixture,
    batch_size: int,
    n_batches: int,
    seed: int,
) -> list[Batch]:
  """Returns `n_batches` fixed batches of rows drawn without repetition, for validation."""
  if n_batches < 1:
    raise ConfigError(f'{n_batches=} must be at least 1.')
  source = _with_length(source, n_batches * batch_size)
  _check(source, batch_size, seed)
  if n_batches * batch_size > len(source):
    raise ConfigError(
        f'{n_batches=} of {batch_size=} need {n_batches * batch_size} different rows, but the '
        f'source has {len(source)}. {FEWER}'
    )
  batches = _once(source, seed, n_batches * batch_size).batch(batch_size, batch_fn=_stack)
  return [batches[i] for i in range(n_batches)]


def first_rows(
    source: grain.sources.RandomAccessDataSource | Mixture, n_rows: int, seed: int
) -> list[tuple[grain.sources.RandomAccessDataSource, int]]:
  """Returns the rows of `first_batches` unread, each as what holds it and its number there."""
  source = _with_length(source, n_rows)
  members = source.sources if isinstance(source, Mixture) else [source]
  numbered = [_Numbers(x) for x in members]
  weights = source.weights if isinstance(source, Mixture) else [1.0]
  drawn = _once(Mixture(numbered, weights), seed, n_rows)
  rows = [drawn[i] for i in range(n_rows)]
  return [held.places[i] if isinstance(held, Picked) else (held, i) for held, i in rows]


def _with_length(source: grain.sources.RandomAccessDataSource | Mixture, n_rows: int):
  """Returns the source, with the first rows alone of what is tokenized while it is read."""
  if not isinstance(source, Mixture) or not source.raw:
    return source
  some = lambda x: x.first(n_rows) if isinstance(x, RawRows) else x
  return dataclasses.replace(source, sources=[some(x) for x in source.sources])


def _check(source: grain.sources.RandomAccessDataSource | Mixture, batch_size: int, seed: int) -> None:
  if batch_size < 1:
    raise ConfigError(f'{batch_size=} must be at least 1.')
  if (not isinstance(source, Mixture) or not source.raw) and batch_size > len(source):
    raise ConfigError(f'{batch_size=} must not exceed the {len(source)} rows of the source. {FEWER}')
  check_seed(seed)


def _endless(source: grain.sources.RandomAccessDataSource | Mixture, seed: int) -> grain.MapDataset:
  if not isinstance(source, Mixture):
    return _shuffled(source, seed).repeat()
  members = [_shuffled(x, seed + i).repeat() for i, x in enumerate(source.sources)]
  return members[0] if len(members) == 1 else grain.MapDataset.mix(members, source.weights)


def _endless_raw(
    source: Mixture, batch_size: int, seed: int, share: tuple[int, int]
) -> grain.IterDataset:
  """Returns the share of each batch of a mixture that has sources without a length."""
  workers, members = n_workers(source.raw), []
  for i, rows in enumerate(source.sources):
    if isinstance(rows, RawRows):
      members.append(RowDataset(rows, seed + i, workers))
    else:
      numbers = _shuffled(_Numbers(rows), seed + i).repeat()
      members.append(numbers.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
  mixed = members[0] if len(members) == 1 else grain.IterDataset.mix(members, source.weights)
  i, n = share
  own = slice(i * batch_size // n, (i + 1) * batch_size // n)
  fill = lambda places: _stack([rows[j] for rows, j in places[own]])
  return mixed.batch(batch_size, drop_remainder=True, batch_fn=fill)


class _Numbers:
  """A source of what holds rows and their numbers, so that only a share of them is read."""

  def __init__(self, rows: grain.sources.RandomAccessDataSource):
    self._rows = rows

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> tuple[grain.sources.RandomAccessDataSource, int]:
    return self._rows, i


def _once(
    source: grain.sources.RandomAccessDataSource | Mixture, seed: int, n_rows: int
) -> grain.MapDataset:
  """Returns at least so many different rows; see `first_batches`."""
  if not isinstance(source, Mixture):
    return _shuffled(source, seed)
  if len(source.sources) == 1:
    return _shuffled(source.sources[0], seed)
  members = [_shuffled(x, seed + i) for i, x in enumerate(source.sources)]
  rows = grain.MapDataset.mix(members, source.weights)
  if len(rows) < n_rows:
    raise ConfigError(
        f'{n_rows} rows of the mixture are needed, and its sources have {len(rows)} in these shares '
        f'before one is used up: they have {[len(x) for x in source.sources]} rows. {FEWER}'
    )
  return rows


def _shuffled(source: grain.sources.RandomAccessDataSource, seed: int) -> grain.MapDataset:
  # grain adds the epoch to the seed of shuffle(seed), so seed 0 in its second epoch would repeat
  # the order of seed 1 in its first. seed(seed) hashes it first.
  return grain.MapDataset.source(source).seed(seed).shuffle()


def _stack(rows: Sequence[Batch]) -> Batch:
  return Batch(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))
