# SPDX-License-Identifier: Apache-2.0
"""Goes through the rows of raw files, which workers of grain tokenize."""

import collections
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import logging
import os
import tempfile
from typing import Any
import uuid
import weakref

from absl import flags
import grain

from dsa_jax.data.corpora import tokenizing
from dsa_jax.data.packing import Rows
from dsa_jax.data.raw_rows import LEFT_OUT, Place, RawRows, Window

MOST_WORKERS = 8  # Processes that tokenize one mixture.


class RowDataset(grain.IterDataset):
  """An endless dataset of rows, each as what holds it and its number there."""

  def __init__(self, raw: RawRows, order: int, workers: int):
    super().__init__()
    self._arguments = raw, order, workers

  def __iter__(self) -> 'RowIterator':
    return RowIterator(*self._arguments)


class RowIterator(grain.DatasetIterator):
  """Reads windows, in other processes, and goes through their rows.

  Its state is a dictionary of numbers, which does not depend on the number of processes: the place of
  the window, how many of its rows were returned, and what was counted up to its end.
  """

  def __init__(self, raw: RawRows, order: int, workers: int):
    super().__init__()
    self._raw, self._order, self._workers = raw, order, workers
    self._windows: grain.DatasetIterator | None = None
    self._end = lambda: None  # Ends the processes.
    self._go_to(Place(0, 0, 0), 0, {})

  def _go_to(self, place: Place, row: int, counts: dict[str, int]):
    self._end()
    self._window: Window | None = None
    self._place, self._row, self._counts = place, row, collections.Counter(counts)
    self._last_epoch = place.epoch  # That had rows.

  def __next__(self) -> tuple[Rows, int]:
    if self._window is None:
      self._begin()
    while self._row >= len(self._window.order):
      self._row = 0
      self._turn_to(next(self._windows))
    self._row += 1
    return self._window.rows, int(self._window.order[self._row - 1])

  def _begin(self):
    """Goes on in the window of its place."""
    self._end()
    raw = dataclasses.replace(self._raw)  # Processes need nothing that this one has kept.
    end = os.path.join(tempfile.gettempdir(), f'dsa_jax-{uuid.uuid4().hex}')
    windows = _Windows(raw, self._order, self._place, end)
    options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=1)
    if not flags.FLAGS.is_parsed():  # Notebooks parse none, and grain reads its own.
      flags.FLAGS.mark_as_parsed()
    self._windows = iter(windows.mp_prefetch(options, _prepare))
    self._end = weakref.finalize(self, _close, self._windows, end)
    with tokenizing.no_main():  # Processes begin with the first window.
      window = next(self._windows)
    if window.place == self._place and self._counts.total():
      self._window = window
    else:
      self._row = 0
      self._turn_to(window)

  def _turn_to(self, window: Window):
    if window.place.epoch > self._place.epoch:
      logging.info(f'{self._raw.source.files}: epoch {window.place.epoch} begins.')
    self._place, self._window = window.place, window
    if len(window.order):
      self._last_epoch = window.place.epoch
    elif window.place.epoch > self._last_epoch + 1:
      raise self._raw.error
    before = self._counts['damaged']
    self._counts += window.counts
    now = self._counts['damaged']
    if window.damaged and (not before or len(str(now)) > len(str(before))):  # Again at 10, 100, ...
      where, reason = window.damaged
      logging.warning(f'damaged documents left out so far: {now:,}, such as {where}: {reason}')

  def get_state(self) -> dict[str, Any]:
    counts = {name: self._counts[name] for name in ('documents', *LEFT_OUT)}
    return self._place._asdict() | {'row': self._row, 'counts': counts}

  def set_state(self, state: dict[str, Any]):
    place = Place(*(state[name] for name in Place._fields))
    self._go_to(place, state['row'], state['counts'])

  def close(self):
    self._end()
    super().close()


def left_out(states: Sequence[Mapping[str, Any]], i: int) -> dict[str, int]:
  """Returns how many documents the i-th source of a mixture has left out, by reason.

  Args:
    states: Those of iterators over the mixture.
    i: The number of a source that is tokenized while it is read.
  """
  counts = [state.get('parents', [state])[i]['counts'] for state in states]
  return {name: sum(of_one[name] for of_one in counts) for name in LEFT_OUT}


def _prepare(i: int, n: int):
  """Prepares a worker of grain."""
  tokenizing.begin_process()


def _close(windows: grain.DatasetIterator, end: str):
  """Ends workers. Each must get rid of its windows, or grain would wait for it half a minute."""
  with contextlib.suppress(OSError):
    os.mkdir(end)
    for _ in range(16 * MOST_WORKERS):
      try:
        next(windows)
      except StopIteration:
        break
      except Exception:  # It was raised before, or comes too late.
        pass
  windows.close()
  with contextlib.suppress(OSError):
    os.rmdir(end)


def n_workers(streams: Sequence[RawRows]) -> int:
  """Returns how many processes tokenize for each of several sources; 0 means this one does."""
  if sum(raw.n_windows for raw in streams) <= 2:  # They would take longer to begin.
    return 0
  return max(1, min(MOST_WORKERS, os.cpu_count() or 1) // len(streams))


class _Windows(grain.IterDataset):
  """The windows from a place on, of which each of grain's workers makes its share."""

  def __init__(self, raw: RawRows, order: int, begin: Place, end: str):
    super().__init__()
    self._raw, self._order, self._begin = raw, order, begin
    self._end = end  # A path. Once there is something, there are no more windows.
    self._part = 0, 1

  def set_slice(self, part: slice, sequential_slice: bool = False):
    """Leaves windows to other workers; grain calls this in each."""
    self._part = part.start, part.step

  def __iter__(self) -> grain.DatasetIterator:
    windows = self._raw.windows(self._order, self._begin, self._part)
    return _WindowIterator(windows, self._end)


class _WindowIterator(grain.DatasetIterator):
  """What grain asks of an iterator. `RowIterator` has the state."""

  def __init__(self, windows: Iterator[Window], end: str):
    super().__init__()
    self._windows, self._end = windows, end

  def __next__(self) -> Window:
    if os.path.exists(self._end):
      raise StopIteration
    return next(self._windows)

  def get_state(self) -> dict[str, Any]:
    return {}

  def set_state(self, state: dict[str, Any]):
    pass
