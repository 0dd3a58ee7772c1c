# SPDX-License-Identifier: Apache-2.0
"""Keeps compiled programs on disk, so that a run that starts again only reads them."""

from collections.abc import Iterator
import contextlib
import logging
import os
import pathlib
import shutil
import tempfile

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from dsa_jax.config import ConfigError, local_path, user_cache

NOWHERE = 'off'
MIN_FREE_BYTES = 2**28  # Nothing is kept on a disk with less free space.
SETTINGS = {  # A variable of the same name in the environment takes precedence.
    'jax_compilation_cache_max_size': 2 * 2**30,  # The least recently used programs go first.
    'jax_persistent_cache_min_compile_time_secs': 0.0,  # The start of a run has many small programs.
}


@contextlib.contextmanager
def compilation_cache(folder: str) -> Iterator[None]:
  """Lets jax keep compiled programs, and read those that were kept, inside a `with` block.

  If jax already has a cache, from JAX_COMPILATION_CACHE_DIR or `jax.config`, that one is used. A
  folder that cannot be written causes a warning and nothing else.

  Args:
    folder: Where to keep them. '' means `dsa_jax/compiled` in the user's cache folder, 'off' nowhere.
  """
  if jax.config.jax_compilation_cache_dir or folder == NOWHERE:
    yield
    return
  try:
    path = local_path(folder, 'compilation_cache') if folder else user_cache('compiled')
    prepare(path)
  except (OSError, RuntimeError, ConfigError) as error:  # RuntimeError: there is no home, or are no locks.
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
  logging.getLogger('jax._src.compilation_cache').setLevel(logging.WARNING)  # It reports each reset.
  jax_cache.reset_cache()  # jax reads its settings only once.


def prepare(folder: pathlib.Path):
  """Makes the folder and removes programs that a killed process may have left half-written.

  jax first writes a program and then the time of its use. A program without a time may be incomplete.
  jax would neither replace it nor write any other program as long as it is there. Nor would it replace
  one that is empty, as those are that a machine wrote as its power failed.

  Raises:
    OSError: The folder cannot be written, or its disk is nearly full.
    RuntimeError: Its file system has no locks, without which jax would warn of each program.
  """
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  with tempfile.TemporaryFile(dir=folder):
    pass
  if (free := shutil.disk_usage(folder).free) < MIN_FREE_BYTES:
    raise OSError(f'the disk of {folder} has {free // 2**20} MiB left.')
  with contextlib.suppress(filelock.Timeout):  # Where many processes are busy, the next run cleans up.
    with filelock.FileLock(folder / '.lockfile', timeout=10):  # jax's own, while another process writes.
      for program in folder.glob('*-cache'):
        used = program.with_name(program.name.removesuffix('-cache') + '-atime')
        if not used.exists() or not program.stat().st_size:
          program.unlink()
