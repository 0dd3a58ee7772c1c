# SPDX-License-Identifier: Apache-2.0
"""Programs are kept where they should be, and no folder, however bad, stops a run."""

import logging
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import quickstart
from dsa_jax import train
from dsa_jax.config import ConfigError, user_cache
from dsa_jax.training import compilation_cache as module
from dsa_jax.training.compilation_cache import compilation_cache
from dsa_jax.training.recipe import read_recipe
from dsa_jax.training.workdir import check_workdir, write_config


@pytest.fixture(autouse=True)
def no_cache_yet(monkeypatch):
  """As in a process of a user: conftest.py gives tests a cache."""
  monkeypatch.delenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', raising=False)
  before = jax.config.jax_compilation_cache_dir
  module._configure({'jax_compilation_cache_dir': None})
  yield
  module._configure({'jax_compilation_cache_dir': before})


def compile_something(seed: int):
  """Runs a program that is like that of no other seed; returns whether it had to be compiled."""
  events = []
  listen = lambda name, **_: events.append(name)
  jax.monitoring.register_event_listener(listen)
  out = jax.jit(lambda x: 3 * x + seed)(np.ones(seed, np.float32))
  jax.monitoring.unregister_event_listener(listen)
  np.testing.assert_array_equal(out, np.full(seed, 3 + seed, np.float32))
  return '/jax/compilation_cache/cache_hits' not in events


def programs(folder):
  return sorted(path.name for path in folder.rglob('*-cache'))


def test_what_was_compiled_once_is_read(tmp_path):
  with compilation_cache(str(tmp_path)):
    assert compile_something(2)
    assert len(programs(tmp_path)) == 1
    assert not compile_something(2)
  assert jax.config.jax_compilation_cache_dir is None
  assert compile_something(2), 'the cache is in use only within'
  with compilation_cache(str(tmp_path)):
    assert not compile_something(2)


def test_by_default_it_is_in_the_users_cache_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  with compilation_cache(''):
    compile_something(3)
  assert len(programs(tmp_path / '.cache' / 'dsa_jax' / 'compiled')) == 1
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
  with compilation_cache(''):
    compile_something(3)
  assert len(programs(tmp_path / 'xdg' / 'dsa_jax' / 'compiled')) == 1


def test_off_keeps_nothing(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  with compilation_cache('off'):
    compile_something(4)
  assert not list(tmp_path.iterdir())


def test_a_cache_that_jax_already_has_wins(tmp_path):
  theirs, ours = tmp_path / 'theirs', tmp_path / 'ours'
  module._configure({'jax_compilation_cache_dir': str(theirs)})
  with compilation_cache(str(ours)):
    assert jax.config.jax_compilation_cache_dir == str(theirs)
  assert not ours.exists()


def test_jax_reads_its_variable_and_wins(tmp_path):
  script = (
      'import jax\nfrom dsa_jax.training.compilation_cache import compilation_cache\n'
      "with compilation_cache('ours'): print(jax.config.jax_compilation_cache_dir)\n"
      "print(jax.config.jax_compilation_cache_max_size)"
  )
  environment = os.environ | {
      'JAX_COMPILATION_CACHE_DIR': 'theirs', 'PYTHONPATH': str(pathlib.Path(__file__).parents[2])
  }
  run = subprocess.run(
      [sys.executable, '-c', script], cwd=tmp_path, env=environment, capture_output=True, text=True
  )
  assert run.stdout.split() == ['theirs', '-1'], run.stderr
  assert not list(tmp_path.iterdir())


def test_settings_in_the_environment_win(tmp_path, monkeypatch):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_MAX_SIZE', '-1')
  with compilation_cache(str(tmp_path)):
    assert jax.config.jax_compilation_cache_max_size == -1
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_it_stays_within_its_size(tmp_path, monkeypatch):
  with compilation_cache(str(tmp_path)):
    compile_something(5)
  [program] = tmp_path.glob('*-cache')
  monkeypatch.setitem(module.SETTINGS, 'jax_compilation_cache_max_size', 3 * program.stat().st_size)
  with compilation_cache(str(tmp_path)):
    for seed in range(6, 12):
      compile_something(seed)
    assert 1 <= len(programs(tmp_path)) <= 3
    assert not compile_something(11), 'the latest stays'


@pytest.mark.parametrize('folder', ['file', 'gs://bucket/programs'])
def test_a_folder_that_is_none(folder, tmp_path, caplog, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').write_text('')
  with compilation_cache(folder):
    compile_something(12)
  [warning] = [r for r in caplog.records if r.levelno >= logging.WARNING]
  assert 'not kept' in warning.getMessage() and not (tmp_path / 'gs:').exists()


def test_a_folder_that_cannot_be_written(tmp_path, caplog, monkeypatch):
  def refuse(**_):
    raise PermissionError('read-only')

  monkeypatch.setattr(module.tempfile, 'TemporaryFile', refuse)  # To root, no folder is read-only.
  with compilation_cache(str(tmp_path)):
    compile_something(13)
  assert 'read-only' in caplog.text and not list(tmp_path.iterdir())


def test_a_disk_that_is_full(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(module, 'MIN_FREE_BYTES', 2**62)
  with compilation_cache(str(tmp_path)):
    compile_something(14)
  assert 'MiB left' in caplog.text and not list(tmp_path.iterdir())


@pytest.mark.filterwarnings('ignore:Error writing persistent compilation cache')
def test_a_disk_that_fills_up_meanwhile(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(28, 'No space left on device')

  with compilation_cache(str(tmp_path)):
    monkeypatch.setattr(pathlib.Path, 'write_bytes', refuse)
    assert compile_something(15)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
  with compilation_cache(str(tmp_path)):
    compile_something(16)
  [program] = tmp_path.glob('*-cache')
  [used] = tmp_path.glob('*-atime')
  program.write_bytes(program.read_bytes()[:100])
  used.unlink()
  with compilation_cache(str(tmp_path)):
    assert compile_something(16)
    assert not compile_something(16)


def test_what_a_power_failure_left_empty_is_compiled_once_more(tmp_path):
  with compilation_cache(str(tmp_path)):
    compile_something(17)
  [program] = tmp_path.glob('*-cache')
  program.write_bytes(b'')
  with compilation_cache(str(tmp_path)):
    assert compile_something(17)
    assert not compile_something(17)


def test_a_user_without_a_home(caplog, monkeypatch):
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)  # As for one without an account.
  with compilation_cache(''):
    compile_something(18)
  assert 'not kept: there is no home folder' in caplog.text
  with pytest.raises(ConfigError, match='no home folder for tokens.*XDG_CACHE_HOME'):
    user_cache('tokens')


def config_of(workdir, **changes):
  config = quickstart.get_config('tiny')
  config.update(workdir=str(workdir), **changes)
  return config


def test_a_workdir_does_not_mind_another_cache(tmp_path):
  """Nor do those that were begun before there was one."""
  for folder in ('', 'off', str(tmp_path / 'cache')):
    config = config_of(tmp_path / 'run', compilation_cache=folder)
    check_workdir(config, tmp_path / 'run')
    write_config(config, tmp_path / 'run')
  assert 'compilation_cache' not in (tmp_path / 'run' / 'config.json').read_text()


def test_a_config_without_the_field_is_read():
  config = config_of('run')
  del config.compilation_cache
  assert read_recipe(config).compilation_cache == ''


def test_a_run_uses_the_folder_of_its_config(tmp_path, monkeypatch):
  in_use = lambda *_: {'folder': jax.config.jax_compilation_cache_dir}
  monkeypatch.setattr(train, 'run_recipe', in_use)
  for given, want in ((str(tmp_path / 'cache'), str(tmp_path / 'cache')), ('off', None)):
    config = config_of(tmp_path / 'run', compilation_cache=given)
    assert train.train(config) == {'folder': want}
