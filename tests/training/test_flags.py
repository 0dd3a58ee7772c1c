# SPDX-License-Identifier: Apache-2.0
"""A misspelt flag of a config is one line; a config with a mistake of its own keeps its traceback."""

import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags
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


@pytest.mark.parametrize('flag, reason', [('sed=1', 'Did you mean "seed"'), ('recipe[0]=x', '0 is not a valid index')])
def test_flags_of_a_real_config(monkeypatch, flag, reason):
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values)
  quickstart = pathlib.Path(__file__).parents[2] / 'configs' / 'quickstart.py'
  argv = ['train', f'--config={quickstart}:tiny', f'--config.{flag}']
  monkeypatch.setattr(app, 'FLAGS', values)
  monkeypatch.setattr(sys, 'argv', argv)  # Config flags read it.
  with pytest.raises(SystemExit, match=f'^error: the config has no such field, .*{reason}'):
    parse_flags(argv)


def test_a_mistake_in_a_file(monkeypatch):
  def parse_flags_with_usage(argv):
    get_config()

  monkeypatch.setattr(app, 'parse_flags_with_usage', parse_flags_with_usage)
  with pytest.raises(AttributeError, match='of a file'):
    parse_flags(['train', '--config=a.py'])
