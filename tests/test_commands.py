# SPDX-License-Identifier: Apache-2.0
"""What a command says when Ctrl-C stops it: whether it goes on."""

import logging
import signal
import subprocess
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
def test_ctrl_c_ends_a_command_in_one_line(command, monkeypatch, capsys):
  step, words, says = STOPPED[command]

  def stop(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(command, step, stop)
  for name in 'unraisablehook', 'excepthook':
    monkeypatch.setattr(sys, name, getattr(sys, name))
  levels = {name: logging.getLogger(name).level for name in ('absl', 'asyncio')}
  try:
    with pytest.raises(KeyboardInterrupt):
      command.main(['command', *words.split()])
  finally:
    for name, level in levels.items():
      logging.getLogger(name).setLevel(level)
  assert capsys.readouterr().err == f'{says}\n'


def test_a_command_ends_by_the_signal():
  """So that a loop of a shell ends, too."""
  script = 'from dsa_jax.command_line import end_stopped; end_stopped("stopped")'
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
  assert done.returncode == -signal.SIGINT and done.stderr == 'stopped\n'
