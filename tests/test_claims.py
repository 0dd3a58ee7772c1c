# SPDX-License-Identifier: Apache-2.0
"""A folder has one writer at a time, whatever ends it."""

import errno
import fcntl
import os
import subprocess
import sys
from unittest import mock

import pytest

from configs import quickstart
from dsa_jax.claims import claimed
from dsa_jax.config import ConfigError
from dsa_jax.convert.building import building
from dsa_jax.train import train

HOLD = """
import pathlib, sys, time
from dsa_jax.claims import claimed
with claimed(pathlib.Path(sys.argv[1])):
  print('claimed', flush=True)
  time.sleep(600)
"""


@pytest.fixture
def holder():
  """Starts processes that hold a folder until they are killed."""
  processes = []

  def hold(folder):
    command = [sys.executable, '-c', HOLD, str(folder)]
    processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    assert processes[-1].stdout.readline() == 'claimed\n'
    return processes[-1]

  yield hold
  for process in processes:
    process.kill()
    process.wait()


def test_a_killed_process_leaves_nothing_behind(tmp_path, holder):
  folder = tmp_path / 'a' / 'b'
  process = holder(folder)
  with pytest.raises(ConfigError, match='another process is writing to .*b: wait until it ends'):
    with claimed(folder):
      pass
  process.kill()
  process.wait()
  with claimed(folder):
    assert not [*folder.iterdir()]


def test_training_and_conversion_keep_out_of_what_another_process_writes(tmp_path, holder):
  config = quickstart.get_config('tiny')
  config.workdir = str(tmp_path / 'run')
  config.compilation_cache = 'off'
  holder(tmp_path / 'run')
  with pytest.raises(ConfigError, match='another process is writing to .*run'):
    train(config)
  assert not [*(tmp_path / 'run').iterdir()]

  holder(tmp_path / 'target.partial')
  (tmp_path / 'target.partial' / 'half').write_text('written')
  with pytest.raises(ConfigError, match='another process is writing to .*target.partial'):
    with building(tmp_path / 'target', needs=0):
      pass
  assert (tmp_path / 'target.partial' / 'half').read_text() == 'written'


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path, holder, monkeypatch):
  holder(tmp_path)
  monkeypatch.setattr(fcntl, 'flock', mock.Mock(side_effect=OSError(errno.ENOTSUP, 'no locks')))
  with claimed(tmp_path):
    pass


def test_a_file_beside_is_locked_where_folders_cannot_be(tmp_path, monkeypatch):
  """As NFS does, which locks nothing that is open for reading alone."""
  flock = fcntl.flock

  def of_nfs(handle, how):
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
      raise OSError(errno.EBADF, 'not open for writing')
    flock(handle, how)

  monkeypatch.setattr(fcntl, 'flock', of_nfs)
  with claimed(tmp_path / 'run'):
    with pytest.raises(ConfigError, match='another process is writing to .*run: wait'):
      with claimed(tmp_path / 'run'):
        pass
    with claimed(tmp_path / 'other'):
      assert not [*(tmp_path / 'run').iterdir()]
  with claimed(tmp_path / 'run'):
    pass
