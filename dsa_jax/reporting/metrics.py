# SPDX-License-Identifier: Apache-2.0
"""Scalars written while training, to `metrics.csv` and TensorBoard, and the progress bar."""

from collections.abc import Mapping, Sequence
import datetime
import os
import pathlib
import re
import time
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.progress
import tensorboardX

HEADER = 'stage,step,name,value'
PLAIN_LINE_SECONDS = 10.0


class Row(NamedTuple):
  """One line of `metrics.csv`."""

  stage: str
  step: int
  name: str
  value: float


class MetricsWriter:
  """The open `metrics.csv` and TensorBoard folders of one workdir.

  The file survives a kill at any moment: a line cut short is removed on opening. Whoever resumes
  calls `rewind` for the stage of the checkpoint and for every later one, so that steps taken after
  the checkpoint are not recorded twice.
  """

  def __init__(self, workdir: pathlib.Path):
    workdir.mkdir(parents=True, exist_ok=True)
    self.path = workdir / 'metrics.csv'
    self._tensorboard_dir = workdir / 'tensorboard'
    self._tensorboard: dict[str, tensorboardX.SummaryWriter] = {}
    self._purge_steps: dict[str, int] = {}
    whole = _whole_lines(self.path) if self.path.exists() else []
    text = '\n'.join(whole or [HEADER]) + '\n'
    if not self.path.exists() or self.path.read_text() != text:
      _replace_text(self.path, text)
    self._file = self.path.open('a', newline='\n')

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def close(self) -> None:
    self._file.close()
    for writer in self._tensorboard.values():
      writer.close()
    self._tensorboard.clear()

  def write(self, stage: str, step: int, scalars: Mapping[str, Any]) -> None:
    """Records numbers by name; a sequence or array is one number per layer, `name/layer_<i>`."""
    _check_word('stage', stage, r'[\w.-]+')
    flat = {}
    for name, value in scalars.items():
      _check_word('metric', name, r'[\w./-]+')
      if np.ndim(value) > 1:
        raise ValueError(f'{name} has shape {np.shape(value)}; expected a number or one per layer')
      if np.ndim(value) == 1:
        flat |= {f'{name}/layer_{i}': float(v) for i, v in enumerate(value)}
      else:
        flat[name] = float(value)
    self._file.write(''.join(f'{stage},{step},{n},{v!r}\n' for n, v in flat.items()))
    self._file.flush()
    writer = self._tensorboard_writer(stage)
    for name, value in flat.items():
      writer.add_scalar(name, value, step)
    writer.flush()

  def rewind(self, stage: str, step: int) -> None:
    """Forgets what `stage` wrote after `step`; a step of -1 forgets all of it."""
    self._file.close()
    lines = _whole_lines(self.path)
    kept = [line for line in lines[1:] if not _is_after(_parse(line), stage, step)]
    _replace_text(self.path, '\n'.join([HEADER, *kept]) + '\n')
    self._file = self.path.open('a', newline='\n')
    if stage in self._tensorboard:
      self._tensorboard.pop(stage).close()
    # TensorBoard hides the purge step itself, too.
    self._purge_steps[stage] = min(step + 1, self._purge_steps.get(stage, step + 1))

  def _tensorboard_writer(self, stage: str) -> tensorboardX.SummaryWriter:
    if stage not in self._tensorboard:
      # Files are named by the second: a quick restart must not overwrite its predecessor's.
      self._tensorboard[stage] = tensorboardX.SummaryWriter(
          str(self._tensorboard_dir / stage),
          purge_step=self._purge_steps.pop(stage, None),
          filename_suffix=f'.{time.time_ns()}',
      )
    return self._tensorboard[stage]


class SilentWriter(MetricsWriter):
  """Writes nothing: for the processes of a job beside the one that writes."""

  def __init__(self):
    pass

  def close(self) -> None:
    pass

  def write(self, stage: str, step: int, scalars: Mapping[str, Any]) -> None:
    pass

  def rewind(self, stage: str, step: int) -> None:
    pass


def read_metrics(path: pathlib.Path) -> list[Row]:
  """Reads a `metrics.csv`, also of a run that is still writing or was killed."""
  return [_parse(line) for line in _whole_lines(path)[1:]]


def series(rows: Sequence[Row], stage: str, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Picks one metric of one stage: its steps and its values."""
  picked = [row for row in rows if row.stage == stage and row.name == name]
  return np.array([r.step for r in picked], int), np.array([r.value for r in picked], float)


class Progress:
  """A bar per stage on a terminal; elsewhere a line every ten seconds and when a stage ends."""

  def __init__(self, console: rich.console.Console | None = None, *, quiet: bool = False):
    self.console = console or rich.console.Console(quiet=quiet)
    self._bars = _bars(self.console) if self.console.is_terminal else None
    self._pending = ''

  def __enter__(self) -> 'Progress':
    if self._bars:
      self._bars.start()
    return self

  def __exit__(self, *exc_info: object) -> None:
    self._print_pending()
    if self._bars:
      self._bars.stop()

  def start_stage(self, name: str, total_steps: int, done_steps: int = 0) -> None:
    self._print_pending()
    self._stage, self._total, self._first = name, total_steps, None
    self._printed_at = time.monotonic()
    if self._bars:
      self._task = self._bars.add_task(
          name, total=total_steps, completed=done_steps, speed='', text=''
      )
    else:
      start = f', continues after step {done_steps}' if done_steps else ''
      self.print(f'{name}: {total_steps} steps{start}')

  def update(self, step: int, tokens_per_second: float, text: str = '') -> None:
    """Shows that `step` steps are done; `text` is what else to show, such as the loss."""
    speed = f'{tokens_per_second:,.0f} tokens/s'
    if self._bars:
      self._bars.update(self._task, completed=step, speed=speed, text=text)
      return
    now = time.monotonic()
    self._first = self._first or (step, now)
    parts = [f'{self._stage} {step}/{self._total}', speed, text, self._time_left(step, now)]
    self._pending = ', '.join(part for part in parts if part)
    if step >= self._total or now - self._printed_at >= PLAIN_LINE_SECONDS:
      self._print_pending()

  def print(self, text: str) -> None:
    """Prints a line, above the bars where there are bars."""
    self.console.print(text, markup=False, highlight=False, soft_wrap=True)

  def _time_left(self, step: int, now: float) -> str:
    first_step, first_time = self._first
    if not first_step < step < self._total:
      return ''
    seconds = (self._total - step) * (now - first_time) / (step - first_step)
    return f'{datetime.timedelta(seconds=round(seconds))} left'

  def _print_pending(self) -> None:
    if self._pending:
      self.print(self._pending)
      self._pending = ''
      self._printed_at = time.monotonic()


class ByteProgress:
  """A bar of bytes done, speed and time left on a terminal; elsewhere a line every ten seconds."""

  def __init__(self, name: str, total: int, console: rich.console.Console | None = None):
    self._name, self._total, self._done = name, total, 0
    self._console = console or rich.console.Console()
    self._began = self._printed_at = time.monotonic()
    self._bar = rich.progress.Progress(
        rich.progress.TextColumn('{task.description}'),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=self._console,
        disable=not self._console.is_terminal,
    )

  def __enter__(self) -> 'ByteProgress':
    self._bar.start()
    self._task = self._bar.add_task(self._name, total=self._total)
    return self

  def __exit__(self, *exc_info: object) -> None:
    self._bar.stop()

  def advance(self, nbytes: int) -> None:
    self._done += nbytes
    self._bar.update(self._task, completed=self._done)
    now = time.monotonic()
    finished = self._done >= self._total
    if self._console.is_terminal or not (finished or now - self._printed_at >= PLAIN_LINE_SECONDS):
      return
    self._printed_at, seconds = now, now - self._began
    left = datetime.timedelta(seconds=round(seconds * (self._total / max(self._done, 1) - 1)))
    speed = self._done / max(seconds, 1e-9) / 1e6
    line = f'{self._name} {self._done:,}/{self._total:,} bytes, {speed:,.0f} MB/s, {left} left'
    self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _bars(console: rich.console.Console) -> rich.progress.Progress:
  text = rich.progress.TextColumn
  return rich.progress.Progress(
      text('{task.description}', markup=False),
      rich.progress.BarColumn(bar_width=None),
      rich.progress.MofNCompleteColumn(),
      text('{task.fields[speed]}', markup=False),
      text('{task.fields[text]}', markup=False),
      rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
      console=console,
  )


def _whole_lines(path: pathlib.Path) -> list[str]:
  """Reads the lines that end in a newline: what a kill cut short is not a measurement."""
  lines = path.read_text().split('\n')[:-1]
  if lines and lines[0] != HEADER:
    raise ValueError(f'{path} starts with {lines[0]!r}, not {HEADER!r}: use another workdir')
  return lines


def _parse(line: str) -> Row:
  try:
    stage, step, name, value = line.split(',')
    return Row(stage, int(step), name, float(value))
  except ValueError as error:
    raise ValueError(f'metrics.csv has the line {line!r}; expected {HEADER}') from error


def _is_after(row: Row, stage: str, step: int) -> bool:
  return row.stage == stage and row.step > step


def _check_word(kind: str, word: str, pattern: str) -> None:
  if not re.fullmatch(pattern, word):
    raise ValueError(f'{kind} name {word!r} must match {pattern}')


def _replace_text(path: pathlib.Path, text: str) -> None:
  temporary = path.with_name(f'.{path.name}.tmp')
  temporary.write_text(text, newline='\n')
  os.replace(temporary, path)
