# SPDX-License-Identifier: Apache-2.0
"""Finds and opens files, wherever they lie and however they are compressed."""

from collections.abc import Sequence
import dataclasses
import glob
import gzip
import os
import pathlib
from typing import Any
import zlib

import fsspec

from dsa_jax.config import ConfigError, local_path

COMPRESSED = ('.gz', '.zst')
END = 2**16  # Bytes at each end of a file, by which it is known again.
BLOCKS, BLOCK = 64, 2**14  # How many blocks between its ends are looked at as well, and their bytes.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
  """Which files a source reads."""

  files: str | Sequence[str]  # A glob, a path, or a list of them.

  def __post_init__(self):
    names = [self.files] if isinstance(self.files, str) else self.files
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(x, str) for x in names):
      raise ConfigError(f'files={self.files!r} must be a string, or a list of at least one string.')


def expand(files: str | Sequence[str], suffixes: Sequence[str] = ()) -> list[str]:
  """Returns the files that globs match, each once and in order.

  Args:
    files: A glob, the path of a file or of a folder, which stands for all files below it but hidden
      ones, or a list of them. `~` and a recursive `**` are expanded. An address such as
      `gs://bucket/*.jsonl` goes through fsspec, which needs the package of that file system.
    suffixes: If given, a folder stands for the files with one of these endings, compressed or not.

  Raises:
    ConfigError: A glob matches no file that holds anything.
  """
  names = dict[str, None]()
  for pattern in [files] if isinstance(files, str) else files:
    sizes = _remote(pattern) if '://' in pattern else _local(pattern)
    of_folder = bool(suffixes) and _is_folder(pattern)
    if of_folder:
      sizes = {name: size for name, size in sizes.items() if plain_suffix(name) in suffixes}
    if not any(size != 0 for size in sizes.values()):
      endings = f' of its files that end in {", ".join(suffixes)}' if of_folder else ''
      raise ConfigError(
          f'files={pattern!r} matches no file that holds anything{endings}. Give the path of a file, a '
          'folder, or a glob such as ~/texts/**/*.txt; a [ that belongs to a name is written [[].'
      )
    names |= dict.fromkeys(sorted(sizes))
  return list(names)


def expand_local(files: str | Sequence[str], ending: str = '') -> list[str]:
  """Returns the files and folders of this machine that globs match, each once and in order.

  Args:
    files: A glob or a path, or a list of them.
    ending: What their names end with beyond what is given and returned.

  Raises:
    ConfigError: A glob matches nothing, or is an address.
  """
  names = dict[str, None]()
  for pattern in [files] if isinstance(files, str) else files:
    path = os.fspath(local_path(pattern, 'files')) + ending
    matched = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not pattern or not matched:
      raise ConfigError(f'files={pattern!r} matches nothing on this machine: no {pattern}{ending} is there.')
    names |= dict.fromkeys(os.path.abspath(name).removesuffix(ending) for name in matched)
  return list(names)


def plain_suffix(name: str) -> str:
  """Returns the ending of a file's name, without that of a compression."""
  path = pathlib.PurePosixPath(name)
  return pathlib.PurePosixPath(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _is_folder(pattern: str) -> bool:
  if '://' not in pattern:
    return os.path.isdir(os.path.expanduser(pattern))
  system, path = fsspec.core.url_to_fs(pattern)
  return system.isdir(path)


def _local(pattern: str) -> dict[str, int]:
  """Returns the sizes of files."""
  path = os.path.expanduser(pattern)
  if os.path.isdir(path):
    inside = [os.path.join(folder, name) for folder, _, some in os.walk(path) for name in some]
    names = [name for name in inside if not _is_hidden(os.path.relpath(name, path))]
  elif os.path.isfile(path):
    names = [path]
  else:
    names = glob.glob(path, recursive=True)
  return {os.path.abspath(name): os.path.getsize(name) for name in names if os.path.isfile(name)}


def _remote(pattern: str) -> dict[str, int | None]:
  """Returns the sizes of files, None where they are not known."""
  try:
    system, path = fsspec.core.url_to_fs(pattern)
    is_folder = system.isdir(path)
    about = system.find(path, detail=True) if is_folder else system.glob(path, detail=True)
  except Exception as error:  # Each file system has errors of its own.
    raise ConfigError(f'files={pattern!r}: {type(error).__name__} {error}') from error
  if is_folder:
    about = {name: info for name, info in about.items() if not _is_hidden(name.removeprefix(path))}
  files = {name: info['size'] for name, info in about.items() if info['type'] == 'file'}
  return {system.unstrip_protocol(name): size for name, size in files.items()}


def _is_hidden(path: str) -> bool:
  """Returns whether globs pass over a file, as over those that git and downloads keep."""
  return any(part.startswith('.') for part in path.split('/'))


def size_of(name: str) -> int:
  """Returns the bytes of a file as it lies there."""
  if '://' not in name:
    return os.path.getsize(name)
  system, path = fsspec.core.url_to_fs(name)
  return system.size(path)


def state_of(name: str) -> str:
  """Returns what tells a file from a changed one without reading it."""
  if '://' not in name:
    about = os.stat(name)
    return f'{about.st_size} {about.st_mtime_ns}'
  system, path = fsspec.core.url_to_fs(name)
  about = system.info(path)
  return ' '.join(str(about.get(key, '')) for key in ('size', 'etag', 'mtime', 'updated'))


def ends_of(name: str) -> str:
  """Returns what tells a file from a changed one, wherever they lie, by its size and its two ends."""
  if '://' in name:
    return state_of(name)
  size = size_of(name)
  with open(name, 'rb') as file:
    first = file.read(END)
    file.seek(max(size - END, 0))
    return f'{size} {zlib.crc32(first):08x} {zlib.crc32(file.read(END)):08x}'


def middle_of(name: str) -> str:
  """Returns what tells a file from one of the same ends, by blocks that are spread over what lies between.

  A file of a little more than a megabyte is read whole. In one of a gigabyte, a change of less than
  16 MB may lie between two blocks. What `ends_of` returns of an address tells what can be told.
  """
  size = 0 if '://' in name else size_of(name)
  if size <= 2 * END:
    return ''
  last, checksum = max(size - END - BLOCK, END), 0
  with open(name, 'rb') as file:
    for i in range(BLOCKS):
      file.seek(END + (last - END) * i // (BLOCKS - 1))
      checksum = zlib.crc32(file.read(BLOCK), checksum)
  return f'{checksum:08x}'


def is_compressed(name: str) -> bool:
  return name.endswith(COMPRESSED)


def open_file(name: str) -> Any:
  """Opens a file to read it as it lies there."""
  return open(name, 'rb') if '://' not in name else fsspec.open(name, 'rb').open()


def open_plain(name: str) -> Any:
  """Opens a file to read it from its start, unpacked. A file that is cut short raises OSError."""
  if is_compressed(name) and size_of(name) == 0:
    raise OSError('it has 0 bytes, which no compressed file has')
  file = open_file(name)
  if name.endswith('.gz'):
    return gzip.GzipFile(fileobj=file)
  if name.endswith('.zst'):
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode='r'), 'zstd')
  return file
