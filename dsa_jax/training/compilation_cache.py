# SPDX-License-Identifier: Apache-2.0
"""Compiled programs, kept on disk: what was compiled once is only read when a run starts again."""

from collections.abc import Iterator
import contextlib
import logging
import os
import pathlib
import shutil
import tempfile

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

NOWHERE = 'off'
MIN_FREE_BYTES = 2**28  # A disk with less is left alone.
SETTINGS = {  # A variable of the same name in the environment wins.
    'jax_compilation_cache_max_size': 2 * 2**30,  # What was not used for longest goes first.
    'jax_persistent_cache_min_compile_time_secs': 0.0,  # A start has many small programs.
}


@contextlib.contextmanager
def compilation_cache(folder: str) -> Iterator[None]:
  """Keeps the programs that are compiled meanwhile, and reads those that were kept before.

  If jax has a cache already, by JAX_COMPILATION_CACHE_DIR or by `jax.config`, that one is used. A
  folder that cannot be written costs a warning and nothing else.

  Args:
    folder: Where to keep them; '': `dsa_jax/compiled` in the user's cache folder; 'off': nowhere.
  """
  if jax.config.jax_compilation_cache_dir or folder == NOWHERE:
    yield
    return
  try:
    path = pathlib.Path(folder).expanduser() if folder else user_folder()
    prepare(path)
  except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder.
    logging.warning('Compiled programs are not kept: %s', error)
    yield
    return
  ours = {name: value for name, value in SETTINGS.items() if name.upper() not in os.environ}
  ours['jax_compilation_cache_dir'] = str(path)
  before = {name: getattr(jax.config, name) for name in ours}
  try:
    _configure(ours)
    yield
  finally:
    _configure(before)


def _configure(settings: dict[str, int | float | str | None]):
  for name, value in settings.items():
    jax.config.update(name, value)
  logging.getLogger('jax._src.compilation_cache').setLevel(logging.WARNING)  # It tells of each reset.
  jax_cache.reset_cache()  # jax looks at them once only.


def user_folder() -> pathlib.Path:
  cache = os.environ.get('XDG_CACHE_HOME')
  return (pathlib.Path(cache) if cache else pathlib.Path.home() / '.cache') / 'dsa_jax' / 'compiled'


def prepare(folder: pathlib.Path):
  """Makes the folder, and removes programs that a killed process left half-written.

  jax writes a program first and the time of its use second. Where the second is missing, the first
  may not be whole, jax would never replace it, and it would not write any other.

  Raises:
    OSError: Nothing can be written there.
  """
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  with tempfile.TemporaryFile(dir=folder):
    pass
  if (free := shutil.disk_usage(folder).free) < MIN_FREE_BYTES:
    raise OSError(f'the disk of {folder} has {free // 2**20} MiB left.')
  for program in folder.glob('*-cache'):
    if not program.with_name(program.name.removesuffix('-cache') + '-atime').exists():
      program.unlink(missing_ok=True)
