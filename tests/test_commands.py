# SPDX-License-Identifier: Apache-2.0
"""What a command says when Ctrl-C stops it: whether it goes on."""

import logging
import sys

import pytest

from dsa_jax import evaluate, tokenize, train
from dsa_jax.convert import __main__ as convert

# A step of each command, its words, and what is said if it is stopped there.
STOPPED = {
    train: ('join_job', '', 'stopped; the same command goes on from the last checkpoint'),
    evaluate: ('join_job', 'CHECKPOINT OUT', 'stopped; the same command goes on'),
    tokenize: ('local_path', 'OUT', 'stopped; the same command goes on'),
    convert: ('check_direction', 'SOURCE TARGET', 'stopped; nothing was written to TARGET'),
}


@pytest.mark.parametrize('command', STOPPED, ids=lambda command: command.__name__)
def test_ctrl_c_ends_a_command_in_one_line(command, monkeypatch):
  step, words, says = STOPPED[command]

  def stop(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(command, step, stop)
  monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)
  levels = {name: logging.getLogger(name).level for name in ('absl', 'asyncio')}
  try:
    with pytest.raises(SystemExit) as stopped:
      command.main(['command', *words.split()])
  finally:
    for name, level in levels.items():
      logging.getLogger(name).setLevel(level)
  assert stopped.value.code == says
