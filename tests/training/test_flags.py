# SPDX-License-Identifier: Apache-2.0
"""A misspelt flag of a config is one line; a config with a mistake of its own keeps its traceback."""

from absl import app
import pytest

from dsa_jax.training.flags import parse_flags


def get_config():
  raise AttributeError('of a file')


def test_a_field_that_is_not_there(monkeypatch):
  def parse_flags_with_usage(argv):
    raise AttributeError(KeyError('"sed"\nDid you mean "seed" instead of "sed"?'))

  monkeypatch.setattr(app, 'parse_flags_with_usage', parse_flags_with_usage)
  with pytest.raises(SystemExit, match='^error: .*--config.sed=1.*Did you mean "seed"'):
    parse_flags(['train', '--config=a.py', '--config.sed=1'])


def test_a_mistake_in_a_file(monkeypatch):
  def parse_flags_with_usage(argv):
    get_config()

  monkeypatch.setattr(app, 'parse_flags_with_usage', parse_flags_with_usage)
  with pytest.raises(AttributeError, match='of a file'):
    parse_flags(['train', '--config=a.py'])
