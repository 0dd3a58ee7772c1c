# SPDX-License-Identifier: Apache-2.0
"""A list of all that is wrong with a checkpoint, which stays short where much is."""

MOST = 10  # Lines of one kind that are told.


class Problems:
  """Lines by their kind. Of each kind the first ten are told, and how many more there are."""

  def __init__(self):
    self._kinds: dict[str, list[str]] = {}

  def __bool__(self) -> bool:
    return bool(self._kinds)

  def add(self, line: str, kind: str = ''):
    """Adds a line. Without a kind it is always told."""
    self._kinds.setdefault(kind or line, []).append(line)

  def lines(self) -> list[str]:
    return [line for kind in self._kinds.values() for line in first_ten(kind)]


def first_ten(lines: list[str]) -> list[str]:
  """Returns the first ten lines, and one that counts the others."""
  rest = len(lines) - MOST
  return lines[:MOST] + ([f'... and {rest:,} more like these.'] if rest > 0 else [])
