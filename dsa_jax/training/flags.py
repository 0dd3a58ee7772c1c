# SPDX-License-Identifier: Apache-2.0
"""Reads the flags of commands that take a config."""

import sys
import traceback

from absl import app

from dsa_jax.command_line import find_configs


def parse_flags(argv: list[str]) -> list[str]:
  """Returns what is no flag; a `--config.FIELD` that the config does not have ends in one line.

  An error in a file of configs keeps its traceback.
  """
  find_configs()
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, IndexError, KeyError, TypeError) as error:
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.name in ('get_config', '<module>') for frame in frames[_first_of_parsing(frames) :]):
      raise
    while error.args and isinstance(error.args[0], Exception):
      error = error.args[0]
    reason = ' '.join(str(x) for x in error.args)
    given = [flag for flag in argv if flag.startswith(('--config.', '-config.'))]
    sys.exit(f'error: the config has no such field, by one of {given}: {" ".join(reason.split())}')


def _first_of_parsing(frames: traceback.StackSummary) -> int:
  """Returns the number of the frame that parses flags; those before it are of the command."""
  names = [frame.name for frame in frames]
  return names.index('parse_flags_with_usage')
