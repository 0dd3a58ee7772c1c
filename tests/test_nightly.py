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
  parts = [name for part in nightly.PARTS.values() if not part.command for name in part.tests]
  assert len(parts) == len(set(parts))
  assert set(parts) >= files, files - set(parts)


def test_parts_depend_on_files_that_there_are(nightly):
  for part in nightly.PARTS.values():
    for name in part.files:
      assert (ROOT / name).exists(), name


@pytest.mark.skipif(not shutil.which('git'), reason='makes a git repository')
def test_each_part_runs_once_in_five_runs_and_where_its_files_change(nightly, tmp_path, monkeypatch):
  """A repository of its own, in which each part has one file."""
  parts = {name: nightly.Part((f'{name}.py',), ()) for name in 'abcdefg'}
  run_git = lambda *x: subprocess.run(['git', *x], cwd=tmp_path, check=True, capture_output=True)
  ran = []

  def pass_test(part):
    ran[-1].add(part.tests[0][0])
    return part.tests[0][0] != 'g' or len(ran) > 1  # The first time, g fails.

  def change(name):
    (tmp_path / f'{name}.py').write_text(str(len(ran)))
    run_git('add', '.')
    run_git('-c', 'user.name=x', '-c', 'user.email=x', 'commit', '-m', name)

  def run_nightly():
    ran.append(set())
    nightly.main()

  run_git('init')
  for name in parts:
    change(name)
  monkeypatch.setattr(nightly, 'ROOT', tmp_path)
  monkeypatch.setattr(nightly, 'PARTS', parts)
  monkeypatch.setattr(nightly, 'run', pass_test)
  monkeypatch.setattr(nightly.sys, 'argv', ['nightly'])
  with pytest.raises(SystemExit, match='nightly: failed: g'):
    run_nightly()
  assert ran[0] == set(parts)  # None was ever seen to pass.
  run_nightly()
  assert 'g' in ran[1] and len(ran[1]) == 2  # What failed is not forgotten; a fifth, rounded up, runs.
  change('c')
  run_nightly()
  assert 'c' in ran[2]
  for _ in range(12):
    run_nightly()
  for first in range(len(ran) - 4):
    assert set().union(*ran[first : first + 5]) == set(parts), (first, ran)
  assert max(map(len, ran[3:])) <= 3
