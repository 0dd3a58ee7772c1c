# SPDX-License-Identifier: Apache-2.0
"""A job of two processes: its numbers, a kill of one of them, and how one goes on alone."""

import calendar
import datetime
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
import zlib

import jax
import numpy as np
import pytest
import simulated

from configs import quickstart
from dsa_jax import train
from dsa_jax.config import ConfigError
from dsa_jax.data.pipeline import make_iterator
from dsa_jax.parallel import processes
from dsa_jax.reporting.meter import OF_THE_MACHINE
from dsa_jax.reporting.metrics import read_metrics
from dsa_jax.training.recipe import read_recipe

HEARTBEATS = 'another task died'  # jax says so where a collective waits for ever, and aborts.
ROOT = pathlib.Path(__file__).parents[2]
COMMAND = [
    sys.executable, '-m', 'dsa_jax.train', '--config=configs/quickstart.py:tiny',
    "--config.recipe=('dense',)", '--config.stages.dense.steps=40', '--config.save_every=3',
    '--config.measure_rows=2',
]  # fmt: skip


def start(workdir, *flags, **variables):
  env = os.environ | {'JAX_PLATFORMS': 'cpu'} | variables
  command = [*COMMAND, f'--config.workdir={workdir}', *flags]
  return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_two(workdir, *of_second):
  """Two processes of two devices each, which share sequences and tokens, and flags of the second one."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  job = {'JAX_COORDINATOR_ADDRESS': f'localhost:{port}', 'JAX_NUM_PROCESSES': '2'}
  job |= simulated.devices(2)
  mesh = '--config.mesh.fsdp=2', '--config.mesh.context=2'
  flags = mesh, (*mesh, *of_second)
  return [start(workdir, *flags[i], **job, JAX_PROCESS_ID=str(i)) for i in range(2)]


def numbers(workdir):
  """Returns what a run measured of its model; speed and memory differ from run to run."""
  rows = read_metrics(workdir / 'metrics.csv')
  return {
      (row.stage, row.step, row.name): row.value for row in rows if row.name not in OF_THE_MACHINE
  }


@pytest.mark.nightly
def test_one_goes_on_where_a_killed_job_of_two_ended(tmp_path):
  alone, together = tmp_path / 'alone', tmp_path / 'together'
  first, second = start_two(together)
  while not (together / 'checkpoints' / 'dense' / '6').exists():
    assert first.poll() is None and second.poll() is None, first.communicate()[0]
    time.sleep(0.05)
  second.kill()
  output, _ = first.communicate()
  second.communicate()
  assert second.returncode == -signal.SIGKILL
  endings = {1: processes.LOST, -signal.SIGABRT: HEARTBEATS}
  assert endings.get(first.returncode, 'no such ending') in output, output
  assert processes.TOGETHER % 2 in output, output
  for workdir in (alone, together):
    output, _ = (process := start(workdir)).communicate()
    assert process.returncode == 0, output
  assert 'continues after step' in output
  found, wanted = numbers(together), numbers(alone)
  assert found.keys() == wanted.keys() and ('dense', 40, 'lm_loss') in found
  for name in wanted:
    np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5, err_msg=str(name))


@pytest.mark.nightly
def test_processes_of_two_configs_are_refused_before_anything_is_written(tmp_path):
  workdir = tmp_path / 'run'
  for process in start_two(workdir, '--config.optim.b2=0.9'):
    output, _ = process.communicate()
    assert process.returncode == 1 and 'processes of this job differ in config.optim: start' in output, output
  assert not [path for path in workdir.rglob('*') if path.is_file()]


def of_processes(monkeypatch, others):
  """Makes this process the first of several, which gather what the others have."""
  gather = lambda x: np.stack([x, *others])
  monkeypatch.setattr(jax, 'process_count', lambda: 1 + len(others))
  monkeypatch.setattr(processes.multihost_utils, 'process_allgather', gather)


def test_what_processes_were_given_is_compared_part_by_part(monkeypatch):
  crc = lambda x: zlib.crc32(json.dumps(x, sort_keys=True).encode())
  given = {'seed': 1, 'data': {'a': 'b', 'c': [1, None]}}
  same = [crc(jax.__version__), crc(1), crc({'c': [1, None], 'a': 'b'})]
  of_processes(monkeypatch, [np.array(same, np.uint32)] * 2)
  processes.check_same(given)
  of_processes(monkeypatch, [np.array(x, np.uint32) for x in (same, [*same[:2], crc({})])])
  with pytest.raises(ConfigError, match='differ in data: start'):
    processes.check_same(given)


def test_the_moment_of_a_job_is_by_one_clock_and_zone(monkeypatch):
  morning = calendar.timegm((2026, 11, 30, 7, 5, 1))
  monkeypatch.setattr(processes, 'of_first', lambda _: morning)
  assert processes.moment_of_job(None) == datetime.datetime(2026, 11, 30, 7, 5, 1)
  assert processes.moment_of_job('2026-11-29T23:00:00') == datetime.datetime(2026, 11, 29, 23)
  monkeypatch.undo()
  assert abs(processes.moment_of_job(None) - datetime.datetime.now()) < datetime.timedelta(minutes=1)


def test_shares_make_up_the_batch(tmp_path):
  config = quickstart.get_config('tiny')
  config.workdir = str(tmp_path)
  rows = read_recipe(config).data.rows(64, 'train')
  whole = make_iterator(rows, 6, seed=3)
  shares = [make_iterator(rows, 6, seed=3, share=(i, 3)) for i in range(3)]
  for step in range(20):
    found = [next(share).tokens for share in shares]
    np.testing.assert_array_equal(np.concatenate(found), next(whole).tokens, err_msg=str(step))
  state = shares[1].get_state()
  want = next(shares[1]).tokens
  again = make_iterator(rows, 6, seed=3, share=(1, 3))
  again.set_state(state)
  np.testing.assert_array_equal(next(again).tokens, want)
  for share in ((0, 4), (3, 3)):
    with pytest.raises(ValueError, match='n must divide batch_size=6'):
      make_iterator(rows, 6, seed=3, share=share)


@pytest.mark.parametrize(
    'message, gone',
    [
        ('UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:4242', True),
        ('UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)', True),
        ('DEADLINE_EXCEEDED: Barrier timed out. Id: shutdown', True),
        ('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.', False),
        ('INTERNAL: RET_CHECK failure (xla/service/hlo_verifier.cc:42)', False),
    ],
)
def test_a_process_is_called_gone_only_where_it_is(message, gone, monkeypatch, capsys):
  def fail(_):
    raise jax.errors.JaxRuntimeError(message)

  codes = []
  monkeypatch.setattr(train, 'CONFIG', SimpleNamespace(value=None), raising=False)
  monkeypatch.setattr(train, 'join_job', lambda: None)
  monkeypatch.setattr(train, 'train_all', fail)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(processes.os, '_exit', codes.append)
  train.main(['train'])
  shown = capsys.readouterr().err
  assert 'Traceback' in shown and message in shown and codes == [1]
  assert (processes.LOST in shown) == gone


def test_half_a_job_is_refused(monkeypatch):
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'localhost:1')
  monkeypatch.delenv('JAX_PROCESS_ID', raising=False)
  monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
  with pytest.raises(ValueError, match=r"\['JAX_PROCESS_ID'\] must be set, too"):
    processes.join_job()


@pytest.mark.parametrize(
    'platforms, found', [(None, True), ('', True), ('tpu', True), ('tpu,cpu', True), ('cpu', False)]
)
def test_a_tpu_counts_unless_jax_may_not_use_it(platforms, found, monkeypatch):
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  if platforms is not None:
    monkeypatch.setenv('JAX_PLATFORMS', platforms)
  monkeypatch.setattr(processes.importlib.util, 'find_spec', lambda name: name)
  monkeypatch.setattr(processes.glob, 'glob', lambda pattern: [pattern])
  assert processes._has_tpu() == found
