# SPDX-License-Identifier: Apache-2.0
"""What both directions share: a target that appears whole or not at all."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
from typing import Any, NamedTuple

from dsa_jax.claims import claimed
from dsa_jax.config import ConfigError
from dsa_jax.training.checkpoint import is_from_the_system

MARK = '.dsa_jax'  # A file that says that a conversion was at work in a folder.
KEPT_FILES = (  # Copied as they are.
    'tokenizer.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'added_tokens.json',
    'vocab.json',
    'merges.txt',
    'tokenizer.model',
    'tiktoken.model',
    'tekken.json',
    'tokenizer.model.v3',
    'vocab.txt',
    'chat_template.jinja',
    'chat_template.json',
    'generation_config.json',
)


class Summary(NamedTuple):
  """What was converted."""

  family: str
  n_layers: int
  n_parameters: int
  nbytes: int  # The size of all arrays, before any compression.
  n_fresh: int = 0  # Of the parameters, those of indexers that the checkpoint did not have.

  def __str__(self) -> str:
    fresh = f' and {self.n_fresh:,} of new indexers, which know nothing yet' if self.n_fresh else ''
    return (
        f'{self.family}: {self.n_layers} layers, {self.n_parameters - self.n_fresh:,} parameters{fresh}, '
        f'{self.nbytes:,} bytes'
    )


@contextlib.contextmanager
def building(target: pathlib.Path, *, needs: int) -> Iterator[pathlib.Path]:
  """Yields a folder to build in, which becomes `target` at the end or is removed.

  A process that is killed leaves the folder behind, with the suffix .partial and a mark in it; the next
  run empties it. Of two at the same time, the second is refused. An error of the program itself passes
  through as it is.

  Args:
    target: A path that must not exist. Where it is a link to nothing, the link's end is built.
    needs: The bytes that the disk must have free.

  Raises:
    ConfigError: `target` exists, is a link that leads nowhere, or is being built by another process; or
      the folder to build in holds something else.
    OSError: The disk is full, or the system refuses to read or write for another reason.
  """
  if target.exists():
    raise ConfigError(f'{target} exists; choose another target, or delete it.')
  place = pathlib.Path(os.path.realpath(target))
  if place.is_symlink():
    raise ConfigError(f'{target} is a link that leads back to itself; delete it.')
  partial = place.with_name(place.name + '.partial')
  with claimed(partial):
    done = False
    _check_ours(partial)
    try:
      _make_empty(partial)
      free = shutil.disk_usage(partial).free
      if free < needs:
        raise OSError(f'it needs about {needs:,} bytes and its disk has {free:,} left')
      yield partial
      (partial / MARK).unlink()
      partial.rename(place)
      done = True
    except Exception as error:
      if not is_from_the_system(error):
        raise
      raise OSError(f'{target} could not be written: {error}. Nothing was left there.') from error
    finally:
      if not done:
        shutil.rmtree(partial, ignore_errors=True)


def _check_ours(folder: pathlib.Path):
  """Raises a ConfigError if a folder holds anything that no conversion has left there."""
  if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
    raise ConfigError(
        f'{folder}, where the target would be built, holds something else: move it away, or choose another '
        'target.'
    )


def _make_empty(folder: pathlib.Path):
  """Makes a folder with the mark of a conversion, or empties it of what a killed one has left."""
  folder.mkdir(parents=True, exist_ok=not folder.is_symlink())
  (folder / MARK).touch()
  for path in folder.iterdir():
    if path.name != MARK:
      shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def kept_names(source: pathlib.Path) -> list[str]:
  """Returns the names of the files that are kept as they are.

  Those are a tokenizer's, and the code that `auto_map` of a config may name, which nothing here runs.
  """
  code = source.glob('*.py') if source.is_dir() else ()
  return [name for name in KEPT_FILES if (source / name).is_file()] + sorted(path.name for path in code)


def copy_kept(source: pathlib.Path, target: pathlib.Path):
  for name in kept_names(source):
    shutil.copyfile(source / name, target / name)


def nested(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
  """Turns {('a', 'b'): x} into {'a': {'b': x}}."""
  tree: dict[str, Any] = {}
  for path, x in flat.items():
    branch = tree
    for name in path[:-1]:
      branch = branch.setdefault(name, {})
    branch[path[-1]] = x
  return tree
