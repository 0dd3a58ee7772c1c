# SPDX-License-Identifier: Apache-2.0
"""Reads the path of a checkpoint, however it is spelled, and says which paths hold none."""

from collections.abc import Iterator
import os
import pathlib
from typing import NamedTuple

from dsa_jax.config import ConfigError

UNREADABLE = frozenset('\\')  # TensorStore takes it for the end of a folder's name.


class CheckpointPath(NamedTuple):
  """One reading of a path."""

  folder: pathlib.Path  # The folder of a converted checkpoint, or RUN/checkpoints/ENTRY.
  step: pathlib.Path | None  # The step below it that the path names. None: it names none.
  homes: tuple[pathlib.Path, ...]  # The folders whose config.json may be its own: `folder`, and RUN.


def readings(path: pathlib.Path) -> Iterator[CheckpointPath]:
  """Yields what a path may mean: a converted checkpoint, RUN/checkpoints/ENTRY, or a step of either.

  The path may be relative, hold `..`, or lead over links.
  """
  for spelled in _spellings(path):
    step = spelled if is_step(spelled) else None
    folder = spelled if step is None else spelled.parent
    run = (folder.parent.parent,) if folder.parent.name == 'checkpoints' else ()
    yield CheckpointPath(folder, step, (folder, *run))


def check_readable(path: pathlib.Path, what: str, unusable: frozenset[str] = UNREADABLE):
  """Raises a ConfigError if a path leads to a name that checkpoints could not be read from."""
  real = os.path.realpath(path)
  if wrong := sorted(unusable & {*real}):
    raise ConfigError(
        f'{what} {path} must have no {" and no ".join(wrong)} in its path, {real}: its checkpoints '
        'could not be read.'
    )


def is_step(folder: pathlib.Path) -> bool:
  """Returns whether a folder holds one step of a checkpoint."""
  return is_step_name(folder.name) and (folder / 'state').is_dir()


def is_step_name(name: str) -> bool:
  """Returns whether orbax gives a step this name: digits, without zeros in front."""
  return name.isdecimal() and str(int(name)) == name


def _spellings(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the absolute path, where each link leads in turn, and where all links lead.

  An entry may be a link to another disk, and a link may lead to an entry.
  """
  real = pathlib.Path(os.path.realpath(path))  # It follows a link before `..`; `abspath` does not.
  path, links = pathlib.Path(os.path.abspath(path)), set()
  while path.is_symlink() and path not in links:
    yield path
    links.add(path)
    path = pathlib.Path(os.path.abspath(path.parent / path.readlink()))
  yield path
  yield real
