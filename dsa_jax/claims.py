# SPDX-License-Identifier: Apache-2.0
"""One writer at a time: a folder that a process writes to is closed to others."""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import os
import pathlib

from dsa_jax.config import ConfigError


@contextlib.contextmanager
def claimed(folder: pathlib.Path) -> Iterator[None]:
  """Makes a folder if need be, and keeps other processes that would claim it out of it meanwhile.

  The system's lock is on the folder itself and ends with the process, whatever ends it, so nothing has
  to be cleaned up. NFS locks only what is open for writing, which no folder can be: there the lock is on
  an empty file beside it, which stays. Nobody is kept out where the file system knows no locks. A folder
  that cannot be made is left to the caller, whose own error says what it wants to write.

  Raises:
    ConfigError: Another process is at work there.
  """
  with contextlib.ExitStack() as opened:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      try:
        _lock(opened, folder, os.O_RDONLY)
      except OSError as error:
        if error.errno != errno.EBADF:
          raise
        folder = folder.resolve()
        _lock(opened, folder.with_name(f'.{folder.name}.lock'), os.O_RDWR | os.O_CREAT)
    except BlockingIOError:
      raise ConfigError(
          f'another process is writing to {folder}: wait until it ends, or choose another folder.'
      ) from None
    except OSError:
      pass
    yield


def _lock(opened: contextlib.ExitStack, path: pathlib.Path, flags: int):
  handle = os.open(path, flags, 0o666)
  opened.callback(os.close, handle)
  fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
