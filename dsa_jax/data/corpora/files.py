# SPDX-License-Identifier: Apache-2.0
"""Finds and opens files, wherever they lie and however they are compressed."""

from collections.abc import Sequence
import glob
import gzip
import os
import pathlib
from typing import Any

import fsspec

from dsa_jax.config import ConfigError

COMPRESSED = ('.gz', '.zst')


def expand(files: str | Sequence[str], suffixes: Sequence[str] = ()) -> list[str]:
  """Returns the files that globs match, without those that are empty, each once and in order.

  Args:
    files: A glob, the path of a file or of a folder, which stands for all files below it, or a list
      of them. `~` and a recursive `**` are expanded. An address such as `gs://bucket/*.jsonl` goes
      through fsspec, which needs the package of that file system.
    suffixes: If given, a folder stands for the files with one of these endings, compressed or not.

  Raises:
    ConfigError: A glob matches no file that holds anything.
  """
  names = dict[str, None]()
  for pattern in [files] if isinstance(files, str) else files:
    matched = _remote(pattern) if '://' in pattern else _local(pattern)
    if suffixes and _is_folder(pattern):
      matched = [name for name in matched if plain_suffix(name) in suffixes]
    if not matched:
      raise ConfigError(
          f'files={pattern!r} matches no file that holds anything. Give the path of a file, a folder, '
          'or a glob such as ~/texts/**/*.txt; a [ that belongs to a name is written [[].'
      )
    names |= dict.fromkeys(sorted(matched))
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


def _local(pattern: str) -> list[str]:
  path = os.path.expanduser(pattern)
  if os.path.isdir(path):
    names = [os.path.join(folder, name) for folder, _, some in os.walk(path) for name in some]
  elif os.path.isfile(path):
    names = [path]
  else:
    names = glob.glob(path, recursive=True)
  return [os.path.abspath(name) for name in names if os.path.isfile(name) and os.path.getsize(name)]


def _remote(pattern: str) -> list[str]:
  try:
    system, path = fsspec.core.url_to_fs(pattern)
  except (ImportError, ValueError) as error:
    raise ConfigError(f'files={pattern!r}: {error}') from error
  about = system.find(path, detail=True) if system.isdir(path) else system.glob(path, detail=True)
  files = [name for name, info in about.items() if info['type'] == 'file' and info['size']]
  return [system.unstrip_protocol(name) for name in files]


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


def is_compressed(name: str) -> bool:
  return name.endswith(COMPRESSED)


def open_file(name: str) -> Any:
  """Opens a file to read it as it lies there."""
  return open(name, 'rb') if '://' not in name else fsspec.open(name, 'rb').open()


def open_plain(name: str) -> Any:
  """Opens a file to read it from its start, unpacked. A file that is cut short raises OSError."""
  file = open_file(name)
  if name.endswith('.gz'):
    return gzip.GzipFile(fileobj=file)
  if name.endswith('.zst'):
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode='r'), 'zstd')
  return file
