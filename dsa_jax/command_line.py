# SPDX-License-Identifier: Apache-2.0
"""What commands do before they read their flags, or as soon as they have."""

from collections.abc import Sequence
import pathlib
import sys
from typing import NoReturn

from dsa_jax.config import ConfigError


def check_no_words(argv: Sequence[str]):
  """Checks that a command line has flags only, such as `--name=value`; the first word is the program."""
  if argv[1:]:
    raise ConfigError(
        f'{" ".join(argv[1:])!r} are words that no flag takes: a flag is --name=value, and a value with spaces '
        'needs quotes.'
    )


def end_stopped(says: str) -> NoReturn:
  """Says in a line what a command does that Ctrl-C has stopped, in place of a traceback.

  The process ends by the signal all the same, so that a shell's loop over commands ends with it.
  """
  print(says, file=sys.stderr, flush=True)
  sys.excepthook = lambda *_: None
  raise KeyboardInterrupt


def find_configs():
  """Lets a config import the checkout's `configs`, which lie beside the package, from any folder."""
  checkout = pathlib.Path(__file__).parents[1]
  if (checkout / 'configs').is_dir() and str(checkout) not in sys.path:
    sys.path.append(str(checkout))
