# SPDX-License-Identifier: Apache-2.0
"""Progress of training steps and of bytes, as bars on a terminal and as lines elsewhere."""

import datetime
import time

import rich.console
import rich.progress

PLAIN_LINE_SECONDS = 10.0


class StepProgress:
  """Shows a bar per stage on a terminal, and elsewhere a line every ten seconds and at the end."""

  def __init__(self, console: rich.console.Console | None = None, *, quiet: bool = False):
    self.console = console or rich.console.Console(quiet=quiet)
    self._bars = _bars(self.console) if self.console.is_terminal else None
    self._pending = ''

  def __enter__(self) -> 'StepProgress':
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
    """Shows that `step` steps are done, and `text`, such as the loss, beside them; a speed of 0 is not shown."""
    speed = f'{tokens_per_second:,.0f} tokens/s' if tokens_per_second else ''
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
    """Prints a line, above the bars if there are any."""
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
  """Shows bytes done, speed and time left, as a bar or as a line every ten seconds."""

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
    line = f'{self._name} {self._done:,}/{self._total:,} bytes, {self._done / max(seconds, 1e-9) / 1e6:,.0f} MB/s'
    if 100 * self._done >= self._total:  # What the first bytes took says little.
      line += f', {datetime.timedelta(seconds=round(seconds * (self._total / max(self._done, 1) - 1)))} left'
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
