# SPDX-License-Identifier: Apache-2.0
"""What a corpus of files held when a run began, and what has changed since."""

from collections.abc import Mapping, Sequence
import os
import pathlib
import zlib

NAMED = 3  # Files that a message names; it counts the others.


def describe_files(files: Sequence[pathlib.Path]) -> dict[str, str]:
  """Returns the size and the CRC-32 of each file, by its path below the common folder."""
  root = os.path.commonpath([file.parent for file in files])
  descriptions = {}
  for file in files:
    content = file.read_bytes()
    name = file.relative_to(root).as_posix()
    descriptions[name] = f'{len(content)} bytes, {zlib.crc32(content):08x}'
  return descriptions


def changes(before: Mapping[str, str], now: Mapping[str, str], what: str = 'file') -> str:
  """Says in words what has changed between two descriptions; '' if nothing has.

  Args:
    before: A description of each file, or of each source.
    now: The same of today.
    what: 'file' or 'source'.
  """
  both = before.keys() & now.keys()
  parts = {
      'gone': sorted(before.keys() - now.keys()),
      'new': sorted(now.keys() - before.keys()),
      # An earlier version may have said less of a source.
      'different': sorted(name for name in both if not now[name].startswith(before[name])),
  }
  return '; '.join(_say(names, what, kind) for kind, names in parts.items() if names)


def _say(names: list[str], what: str, kind: str) -> str:
  shown = ', '.join(names[:NAMED]) + (', ...' if len(names) > NAMED else '')
  return f'{len(names)} {what}{" is" if len(names) == 1 else "s are"} {kind} ({shown})'
