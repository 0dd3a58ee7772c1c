# SPDX-License-Identifier: Apache-2.0
"""Every notebook runs from top to bottom, and is stored without outputs."""

import configparser
import os
import pathlib
import re
import subprocess
import sys

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
each = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
REPOSITORY = "repository = '{}'"

# Runs a cell as a notebook does, then looks for what was fetched.
IPYTHON = """
import sys
from IPython.core.interactiveshell import InteractiveShell
sys.path.insert(0, '')
shell = InteractiveShell.instance()
shell.register_magic_function(lambda line: print('pip', line), magic_name='pip')
shell.run_cell(sys.stdin.read()).raise_error()
import configs, dsa_jax
print('at', dsa_jax.__file__)
"""


def first_cell(path: pathlib.Path) -> str:
  return next(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code')


def run_elsewhere(cell: str, folder: pathlib.Path) -> subprocess.CompletedProcess:
  """Runs a cell in an empty folder, but for pip."""
  folder.mkdir()
  env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  return subprocess.run(
      [sys.executable, '-c', IPYTHON], input=cell, cwd=folder, env=env, capture_output=True, text=True
  )


@each
def test_there_is_one_address(path):
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  assert first_cell(path).splitlines()[0].startswith(REPOSITORY.format(config['metadata']['url']))


@pytest.mark.nightly
@each
def test_first_cell_fetches_the_repository(path, tmp_path):
  cell = first_cell(path).replace("if 'dsa_jax' not in", "if True or 'dsa_jax' not in")
  at = lambda address: re.sub("repository = '.*?'", REPOSITORY.format(address), cell)
  done = run_elsewhere(at(ROOT), tmp_path / 'fresh')
  assert f'at {tmp_path}/fresh/dsa_jax/dsa_jax/__init__.py' in done.stdout, done.stdout + done.stderr
  assert 'pip install -q -e .' in done.stdout and 'restart the runtime' in done.stdout, done.stdout
  done = run_elsewhere(at(''), tmp_path / 'unset')
  assert done.returncode and 'set `repository`' in done.stderr, done.stderr
  done = run_elsewhere(at(tmp_path / 'nothing'), tmp_path / 'wrong')
  assert done.returncode and 'git could not clone' in done.stderr, done.stderr
  assert 'does not exist' in done.stdout + done.stderr


@pytest.mark.nightly
@each
def test_notebook_runs(path, tmp_path):
  notebook = nbformat.read(path, as_version=4)
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert code and not any(cell.outputs or cell.execution_count for cell in code)
  changes = {
      "quickstart.get_config('short')": f"quickstart.get_config('tiny'); config.workdir = '{tmp_path}/run'",
      'recall.get_config()': f"recall.get_config('tiny'); needle.workdir = '{tmp_path}/recall'",
      '--longest 8192': '--longest 4096',
  }
  for cell in code:
    for full, tiny in changes.items():
      cell.source = cell.source.replace(full, tiny)
  assert any(str(tmp_path) in cell.source for cell in code)
  resources = {'metadata': {'path': str(path.parent)}}
  nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
  assert any('image/png' in out.get('data', {}) for cell in code for out in cell.outputs)
