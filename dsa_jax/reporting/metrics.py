# SPDX-License-Identifier: Apache-2.0
"""Scalars written while training, to `metrics.csv` and TensorBoard."""

from collections.abc import Mapping, Sequence
import os
import pathlib
import re
import time
from typing import Any, NamedTuple

import numpy as np
import tensorboardX

from dsa_jax.config import ConfigError

HEADER = 'stage,step,name,value'


class Row(NamedTuple):
  """One line of `metrics.csv`."""

  stage: str
  step: int
  name: str
  value: float


class MetricsWriter:
  """Writes `metrics.csv` and the TensorBoard folders of one workdir.

  The file survives a kill at any moment, because a line that was cut short is removed on opening.
  A run that resumes calls `rewind` for the stage of the checkpoint and for every later one, so that
  no step is recorded twice.
  """

  def __init__(self, workdir: pathlib.Path):
    workdir.mkdir(parents=True, exist_ok=True)
    self.path = workdir / 'metrics.csv'
    self._tensorboard_dir = workdir / 'tensorboard'
    self._tensorboard: dict[str, tensorboardX.SummaryWriter] = {}
    self._purge_steps: dict[str, int] = {}
    whole = _whole_lines(self.path) if self.path.exists() else []
    text = '\n'.join(whole or [HEADER]) + '\n'
    if not self.path.exists() or self.path.read_text(errors='replace') != text:
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
    """Records numbers by name.

    A sequence or array holds one number per layer, named `name/layer_<i>`. None stands for a layer
    that has no such number, and is not written.
    """
    _check_word('stage', stage, r'[\w.-]+')
    flat = {}
    for name, value in scalars.items():
      _check_word('metric', name, r'[\w./-]+')
      if np.ndim(value) > 1:
        raise ConfigError(f'{name} has shape {np.shape(value)}; expected a number or one per layer')
      if np.ndim(value) == 1:
        of_layers = {f'{name}/layer_{i}': v for i, v in enumerate(value)}
        flat |= {layer: float(v) for layer, v in of_layers.items() if v is not None}
      else:
        flat[name] = float(value)
    self._file.write(''.join(f'{stage},{step},{n},{v!r}\n' for n, v in flat.items()))
    self._file.flush()
    writer = self._tensorboard_writer(stage)
    for name, value in flat.items():
      writer.add_scalar(name, value, step)
    writer.flush()

  def rewind(self, stage: str, step: int) -> None:
    """Removes what `stage` wrote after `step`, or everything if `step` is -1."""
    self._file.close()
    lines = _whole_lines(self.path)
    kept = [line for line in lines[1:] if not _is_after(_parse(line), stage, step)]
    _replace_text(self.path, '\n'.join([HEADER, *kept]) + '\n')
    self._file = self.path.open('a', newline='\n')
    if stage in self._tensorboard:
      self._tensorboard.pop(stage).close()
    # TensorBoard also hides the purge step itself.
    self._purge_steps[stage] = min(step + 1, self._purge_steps.get(stage, step + 1))

  def _tensorboard_writer(self, stage: str) -> tensorboardX.SummaryWriter:
    if stage not in self._tensorboard:
      # Files are named by the second, and a quick restart must not overwrite an earlier file.
      self._tensorboard[stage] = tensorboardX.SummaryWriter(
          str(self._tensorboard_dir / stage),
          purge_step=self._purge_steps.pop(stage, None),
          filename_suffix=f'.{time.time_ns()}',
      )
    return self._tensorboard[stage]


class SilentWriter(MetricsWriter):
  """Writes nothing. All processes of a job but one have it."""

  def __init__(self):
    pass

  def close(self) -> None:
    pass

  def write(self, stage: str, step: int, scalars: Mapping[str, Any]) -> None:
    pass

  def rewind(self, stage: str, step: int) -> None:
    pass


def read_metrics(path: pathlib.Path) -> list[Row]:
  """Reads a `metrics.csv`, even while a run writes it or after one was killed."""
  return [_parse(line) for line in _whole_lines(path)[1:]]


def series(rows: Sequence[Row], stage: str, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the steps and the values of one metric of one stage."""
  picked = [row for row in rows if row.stage == stage and row.name == name]
  return np.array([r.step for r in picked], int), np.array([r.value for r in picked], float)


def of_selecting(values: Sequence[float | None], windows: Sequence[int]) -> list[float | None]:
  """Returns the numbers of the layers that select: all but those with a window.

  A window is not a selection, so these layers are in no mean over layers.
  """
  return [x for i, x in enumerate(values) if i not in windows]


def _whole_lines(path: pathlib.Path) -> list[str]:
  """Reads the lines that end in a newline. A line that a kill cut short is no measurement."""
  lines = path.read_text(errors='replace').split('\n')[:-1]
  if lines and lines[0] != HEADER:
    raise ConfigError(
        f'{path} begins with {lines[0][:40]!a} and must begin with {HEADER!r}: move it away, and the run '
        'goes on with a new one.'
    )
  return lines


def _parse(line: str) -> Row:
  try:
    stage, step, name, value = line.split(',')
    return Row(stage, int(step), name, float(value))
  except ValueError as error:
    raise ConfigError(
        f'metrics.csv has the line {line[:40]!a}; it must be of the form {HEADER}. Delete that line.'
    ) from error


def _is_after(row: Row, stage: str, step: int) -> bool:
  return row.stage == stage and row.step > step


def _check_word(kind: str, word: str, pattern: str) -> None:
  if not re.fullmatch(pattern, word):
    raise ConfigError(f'{kind} name {word!r} must match {pattern}')


def _replace_text(path: pathlib.Path, text: str) -> None:
  temporary = path.with_name(f'.{path.name}.tmp')
  temporary.write_text(text, newline='\n')
  os.replace(temporary, path)
