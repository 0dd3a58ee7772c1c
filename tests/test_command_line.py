# SPDX-License-Identifier: Apache-2.0
"""No word of a command is lost, and configs are found."""

import pathlib
import sys

import pytest

import dsa_jax
from dsa_jax.command_line import check_no_words, find_configs
from dsa_jax.config import ConfigError

PACKAGE = pathlib.Path(dsa_jax.__file__).parent


def test_a_word_that_no_flag_takes_is_refused():
  check_no_words(['sample'])
  with pytest.raises(ConfigError, match="'is the sky' are words that no flag takes"):
    check_no_words(['sample', 'is', 'the', 'sky'])


def test_no_command_drops_words():
  commands = [text for path in PACKAGE.rglob('*.py') if 'app.run(main' in (text := path.read_text())]
  assert len(commands) >= 7
  assert all('check_no_words(argv)' in text or 'argv[1:]' in text or 'len(argv) != ' in text for text in commands)


def test_configs_are_found_from_any_folder(monkeypatch):
  """An editable install puts the package on the path, and not the configs beside it."""
  root = str(PACKAGE.parent)
  monkeypatch.setattr(sys, 'path', [entry for entry in sys.path if entry not in ('', root)])
  for _ in range(2):
    find_configs()
  assert sys.path.count(root) == 1


def test_commands_of_configs_can_be_pasted():
  """Their docstrings are raw: one backslash ends a line that goes on."""
  configs = [*PACKAGE.with_name('configs').glob('*.py')]
  assert len(configs) > 8 and not [path for path in configs if '\\\\\n' in path.read_text()]
