# SPDX-License-Identifier: Apache-2.0
"""A wheel has all of the package and nothing else, and is imported far from the repository."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PLATFORMS = 'tpu', 'gpu', 'hopper'  # Modules of these names need a platform's own compiler.

IMPORT = f"""
import importlib, pathlib, pkgutil, sys
import dsa_jax
home = pathlib.Path(dsa_jax.__file__).parent
assert sys.prefix in str(home), home
assert (home / 'py.typed').is_file()
for module in pkgutil.walk_packages([str(home)], 'dsa_jax.'):
  parts = module.name.split('.')
  if parts[-1] != '__main__' and not any(part.startswith({PLATFORMS}) for part in parts):
    print(importlib.import_module(module.name).__name__)
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> pathlib.Path:
  """Builds a wheel of a copy, for setuptools writes into the folder that it builds from."""
  folder = tmp_path_factory.mktemp('wheel')
  for name in ('dsa_jax', 'configs', 'tests'):
    shutil.copytree(ROOT / name, folder / 'copy' / name)
  for name in ('pyproject.toml', 'setup.cfg', 'README.md'):
    shutil.copy(ROOT / name, folder / 'copy')
  run_pip('wheel', '--no-deps', *isolation(), f'--wheel-dir={folder}', folder / 'copy')
  [path] = folder.glob('*.whl')
  return path


def isolation() -> tuple[str, ...]:
  """Returns the option that builds with the installed setuptools, if it is as new as we ask for."""
  try:
    newest = int(importlib.metadata.version('setuptools').split('.')[0]) >= 77
  except importlib.metadata.PackageNotFoundError:
    newest = False
  return ('--no-build-isolation',) if newest else ()


def run_pip(*arguments):
  command = [sys.executable, '-m', 'pip', '--disable-pip-version-check', *arguments]
  env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.nightly
def test_the_wheel_has_the_package_and_nothing_else(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  package = (*(ROOT / 'dsa_jax').rglob('*.py'), ROOT / 'dsa_jax' / 'py.typed')
  assert {str(path.relative_to(ROOT)) for path in package} <= names
  folders = {name.split('/')[0] for name in names}
  assert all(folder.startswith('dsa_jax') for folder in folders), folders
  assert len(folders) == 2  # The package, and what pip notes down about it.


@pytest.mark.nightly
def test_the_installed_wheel_is_imported_in_an_empty_folder(wheel, tmp_path):
  """Its environment borrows the libraries of this one, so that nothing is downloaded."""
  environment, empty = tmp_path / 'environment', tmp_path / 'empty'
  empty.mkdir()
  venv.create(environment)
  python = environment / 'bin' / 'python'
  run_pip('--python', python, 'install', '--no-deps', '--no-index', wheel)
  [installed] = environment.glob('lib/python*/site-packages')
  libraries = dict.fromkeys(sysconfig.get_path(name) for name in ('purelib', 'platlib'))
  (installed / 'libraries.pth').write_text('\n'.join(libraries))
  done = subprocess.run([python, '-I', '-c', IMPORT], cwd=empty, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  imported = set(done.stdout.split())
  for name in ('config', 'families', 'kernels.sparse_attention.op', 'nn.transformer', 'train'):
    assert f'dsa_jax.{name}' in imported
