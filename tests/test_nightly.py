# SPDX-License-Identifier: Apache-2.0
"""Every nightly test has its turn: the parts of .ci/nightly.py name all that there are."""

import importlib.util
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def nightly(tmp_path, monkeypatch):
  spec = importlib.util.spec_from_file_location('nightly', ROOT / '.ci' / 'nightly.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  monkeypatch.setattr(module, 'SEEN', tmp_path / 'seen.json')
  return module


def test_every_nightly_test_is_in_one_part(nightly):
  marked = re.compile(r'mark\.nightly|NIGHTLY')
  files = {
      str(path.relative_to(ROOT))
      for path in (ROOT / 'tests').rglob('test_*.py')
      if marked.search(path.read_text()) and path.name != 'test_nightly.py'
  }
  simulated = re.compile(r"""(?s)parametrize\(\s*'[^']*\bbackend\b.*?\n(def|class)""")  # See conftest.py.
  is_simulated = lambda text: any(re.search("'tpu'|BACKENDS", x[0]) for x in simulated.finditer(text))
  files |= {
      str(path.relative_to(ROOT))
      for path in (ROOT / 'tests' / 'kernels').glob('test_*.py')
      if is_simulated(path.read_text()) and path.name not in ('test_hostile.py', 'test_visibility.py')
  }
  parts = [name for part in nightly.PARTS.values() if not part.command for name in part.tests]
  assert len(parts) == len(set(parts))
  assert set(parts) >= files, files - set(parts)


def test_parts_depend_on_files_that_there_are(nightly):
  for part in nightly.PARTS.values():
    for name in part.files:
      assert (ROOT / name).exists(), name


def test_parts_depend_on_what_their_tests_are_made_of(nightly):
  assert {'tests/laws.py', 'tests/test_laws.py', 'dsa_jax/nn'} <= set(nightly.PARTS['laws'].files)
  assert 'tests/parallel/mesh_script.py' in nightly.PARTS['meshes'].files
  assert 'tests/kernels/cases.py' in nightly.PARTS['selection'].files
  assert 'tests/laws.py' not in nightly.PARTS['wheel'].files


class Repository:
  """A repository of its own, in which each part has one file; `ran` has the parts of each run."""

  def __init__(self, nightly, folder, monkeypatch, names: str):
    self.nightly, self.folder, self.ran = nightly, folder, []
    self.seconds, self.fails = 0, ''  # What each part takes; those that fail.
    monkeypatch.setattr(nightly, 'ROOT', folder)
    monkeypatch.setattr(nightly, 'PARTS', {name: nightly.Part((f'{name}.py',), ()) for name in names})
    monkeypatch.setattr(nightly, 'run', self._pass_test)
    monkeypatch.setattr(nightly.time, 'monotonic', lambda: self._clock)
    monkeypatch.setattr(nightly.time, 'time', lambda: 0.0)  # The hour at which a first run begins at the first part.
    self._clock, self._monkeypatch = 0, monkeypatch
    self._git('init')
    for name in names:
      self.change(name)

  def change(self, name: str):
    (self.folder / f'{name}.py').write_text(str(len(self.ran)))
    self._git('add', '.')
    self._git('-c', 'user.name=x', '-c', 'user.email=x', 'commit', '-m', name)

  def run(self, *arguments: str) -> str:
    self.ran.append('')
    self._monkeypatch.setattr(self.nightly.sys, 'argv', ['nightly', *arguments])
    self.nightly.main()
    return self.ran[-1]

  def _pass_test(self, part):
    name = part.tests[0][0]
    self.ran[-1] += name
    self._clock += self.seconds
    return name not in self.fails

  def _git(self, *arguments: str):
    subprocess.run(['git', *arguments], cwd=self.folder, check=True, capture_output=True)


needs_git = pytest.mark.skipif(not shutil.which('git'), reason='makes a git repository')


@needs_git
def test_each_part_runs_once_in_five_runs_and_where_its_files_change(nightly, tmp_path, monkeypatch):
  repository = Repository(nightly, tmp_path, monkeypatch, 'abcdefg')
  repository.fails = 'g'
  with pytest.raises(SystemExit, match='nightly: failed: g'):
    repository.run()
  assert set(repository.ran[0]) == set('abcdefg')  # None was ever seen to pass.
  repository.fails = ''
  ran = repository.run()
  assert 'g' in ran and len(ran) == 2  # What failed is not forgotten; a fifth, rounded up, runs.
  repository.change('c')
  assert 'c' in repository.run()
  for _ in range(12):
    repository.run()
  for first in range(len(repository.ran) - 4):
    assert set(''.join(repository.ran[first : first + 5])) == set('abcdefg'), (first, repository.ran)
  assert max(map(len, repository.ran[3:])) <= 3


@needs_git
def test_new_machines_begin_with_other_parts(nightly, tmp_path, monkeypatch):
  repository = Repository(nightly, tmp_path, monkeypatch, 'abcdefg')
  repository.seconds = 120
  for hour in range(7):
    monkeypatch.setattr(nightly.time, 'time', lambda hour=hour: 3600.0 * hour)
    nightly.SEEN.unlink(missing_ok=True)
    repository.run('--minutes=7')  # Nothing is known of others, so one alone is sure to fit.
  assert sorted(x[0] for x in repository.ran) == sorted('abcdefg')


@needs_git
def test_what_does_not_fit_into_the_minutes_comes_first_next_time(nightly, tmp_path, monkeypatch, capsys):
  repository = Repository(nightly, tmp_path, monkeypatch, 'abcdefg')
  repository.seconds = 120
  repository.run()
  for name in 'abcdefg':
    repository.change(name)
  assert repository.run('--minutes=7') == 'abc'  # Each takes 2 minutes, so a fourth would end too late.
  assert 'nightly: d: waits for the next run' in capsys.readouterr().out
  repository.change('a')
  assert repository.run('--minutes=4') == 'de'
  assert repository.run('--minutes=1') == 'f'  # One runs, however long it takes.
  assert repository.run('--minutes=7') == 'ga'
