# SPDX-License-Identifier: Apache-2.0
"""Two tiers, compiled programs that are kept, and a limit on what a test may cost: see README.md."""

import functools
import gc
import importlib.metadata
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tarfile
import time

import pytest

# Tests run programs once or twice, so LLVM's optimisations never pay. What was compiled is kept for
# the next run and for processes that tests start; jax's key holds its version and these flags.
FLAGS = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
if importlib.metadata.version('jaxlib').startswith('0.10.'):  # jaxlib 0.12 ends at a flag it lacks.
  FLAGS += ' --xla_cpu_use_fusion_emitters=false'  # They take three times as long to compile.
CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'dsa_jax' / 'tests'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE))
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
if FLAGS not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

# Traces are many objects and few cycles. By Python's usual numbers, a tenth of the time would go into
# looking for cycles among them.
gc.set_threshold(20_000, 25, 25)

LONGEST = (
    'test_laws', 'test_extend', 'test_meshes', 'test_sampler_meshes', 'test_sample', 'test_train', 'test_parity',
    'test_convert', 'test_hostile', 'test_index_topk', 'test_own_tokens', 'test_index_kl',
)  # fmt: skip
KERNELS = pathlib.Path(__file__).parent / 'kernels'
OLD_RUN = pathlib.Path(__file__).with_name('run_of_2026_11.tar.xz')


def pytest_addoption(parser):
  help = 'processor seconds that a test of the default tier may take; 0: any'
  parser.addoption('--most-seconds', type=float, default=10.0, help=help)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Puts simulated TPU kernels into the nightly tier, and the longest files first.

  A long file that comes last would be left alone with one worker.
  """
  for item in items:
    backend = getattr(item, 'callspec', None) and item.callspec.params.get('backend')
    is_simulated = backend == 'tpu' and KERNELS in item.path.parents
    if is_simulated and not item.get_closest_marker('hostile'):
      item.add_marker(pytest.mark.nightly)
  items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture
def old_run(tmp_path):
  """A run of this package as of November 2026, whose warm-up was stopped at step 2 of 4."""
  with tarfile.open(OLD_RUN) as archive:
    archive.extractall(tmp_path, filter='data')
  return tmp_path


@pytest.fixture(scope='module', autouse=True)
def _forget_programs():
  """Frees what other files have compiled; a worker would otherwise grow to several gigabytes."""
  if jax := sys.modules.get('jax'):
    jax.clear_caches()


@pytest.fixture(scope='module')
def eager():
  """Runs models operation by operation, so that patches are seen and nothing is compiled."""
  import laws

  with laws.eager():
    yield


# What each test takes by itself: neither what fixtures do for several, nor the compilation of what is
# kept, which the next run does not repeat.


def pytest_configure(config):
  config.option.loadscopereorder = False  # pytest-xdist would take the files with most tests first.
  if config.getoption('numprocesses', None) and not hasattr(config, 'workerinput'):
    return  # The workers run the tests.
  import jax

  jax.monitoring.register_event_listener(_kept.on_event)
  jax.monitoring.register_event_duration_secs_listener(_kept.on_duration)


class _Kept:
  """Seconds of compiling programs that went into the cache."""

  def __init__(self):
    self.seconds, self._is_new = 0.0, False

  def on_event(self, event: str, **_):
    self._is_new |= event == '/jax/compilation_cache/cache_misses'

  def on_duration(self, event: str, seconds: float, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      self.seconds += seconds * self._is_new
      self._is_new = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
  _slowness()  # Once, before a test is measured.
  began, kept = _processor_seconds(), _kept.seconds
  try:
    return (yield)
  finally:
    own = _processor_seconds() - began - (_kept.seconds - kept)
    item.user_properties.append((_SECONDS, max(own, 0.0) / _slowness()))


def pytest_runtest_logreport(report):
  seconds = dict(report.user_properties).get(_SECONDS)
  if report.when == 'call' and seconds is not None:
    _taken.append((seconds, report.nodeid, 'nightly' in report.keywords))


def pytest_terminal_summary(terminalreporter, config):
  total, most = sum(seconds for seconds, *_ in _taken), config.getoption('most_seconds')
  terminalreporter.write_line(
      f'{total:.0f} seconds of processor time in tests, besides fixtures and what compilers do once; most:'
  )
  for seconds, name, _ in sorted(_taken, reverse=True)[:5]:
    terminalreporter.write_line(f'  {seconds:6.1f} {name}')
  for seconds, name in _too_dear(most):
    terminalreporter.write_line(
        f'{name} took {seconds:.1f} seconds of processor time; a test of the default tier may take '
        f'{most:g} by itself. Make it smaller, or mark it nightly.',
        red=True,
    )


def pytest_sessionfinish(session, exitstatus):
  """Fails a run of too dear tests. What took too long beside other tests is first measured by itself."""
  most = session.config.getoption('most_seconds')
  dear = _too_dear(most)
  if exitstatus != pytest.ExitCode.OK or not dear:
    return
  if session.config.getoption('numprocesses', None):
    again = [sys.executable, '-m', 'pytest', '-n0', '-q', f'--most-seconds={most}', *(name for _, name in dear)]
    if subprocess.run(again, cwd=session.config.rootpath).returncode == 0:
      return
  session.exitstatus = pytest.ExitCode.TESTS_FAILED


_kept, _SECONDS = _Kept(), 'processor_seconds'
_taken: list[tuple[float, str, bool]] = []  # Seconds, test, whether it is of the nightly tier.


def _too_dear(most: float) -> list[tuple[float, str]]:
  return [(s, name) for s, name, nightly in _taken if most and s > most and not nightly]


@functools.cache
def _slowness() -> float:
  """How many times as long this core takes, with what runs beside it, as one of 60 ms for a million squares.

  Two workers on one core with two threads take some 1.6 times the processor time of two on two cores.
  """
  seconds = []
  for _ in range(9):
    began = time.process_time()
    sum(i * i for i in range(1_000_000))
    seconds.append(time.process_time() - began)
  return max(statistics.median(seconds) / 0.06, 1.0)


def _processor_seconds() -> float:
  """Of this process and of those that it started and that have ended."""
  usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
  return sum(usage.ru_utime + usage.ru_stime for usage in usages)
