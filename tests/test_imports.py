# SPDX-License-Identifier: Apache-2.0
"""Imports point down: from room to room of the package (a folder, or a file at its top), by RANKS."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1] / 'dsa_jax'
RANKS = [
    {
        'config', 'command_line', 'claims', 'checkpoint_paths', 'chips', 'json_files', 'shapes', 'params',
        'versions', 'data',
    },
    {'families', 'kernels', 'cost'},
    {'parallel', 'selection'},
    {'nn'},
    {'training'},
    {'inference', 'reporting'},
    {'convert', 'compile', 'evaluation'},
    {'train', 'sample', 'load', 'compare', 'tokenize', 'evaluate', 'lm_eval'},
]
# The first rank that may use each library.
OUTSIDE = {'flax': 0, 'optax': 4, 'orbax': 4, 'ml_collections': 4, 'grain': 0}


def rank_of(room: str) -> int:
  return next(rank for rank, rooms in enumerate(RANKS) if room in rooms)


def room_of(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).parts[0].removesuffix('.py')


def imports(path: pathlib.Path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


FILES = [p for p in ROOT.rglob('*.py') if p != ROOT / '__init__.py']


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
  room = room_of(path)
  rank = len(RANKS) if path.name == '__main__.py' else rank_of(room)  # That is a command.
  for name in imports(path):
    first, *rest = name.split('.')
    if first == 'dsa_jax' and rest[0] != room:
      assert rank_of(rest[0]) <= rank, f'{room} must not import {name}'
    assert rank >= OUTSIDE.get(first, 0), f'{room} must not import {name}'
    assert first not in ('configs', 'experiments', 'tests'), f'{room} must not import {name}'
  if room == 'kernels':
    assert not any(name.split('.')[0] == 'flax' for name in imports(path)), 'kernels know no flax'


def test_no_two_rooms_import_each_other():
  arrows = set()
  for path in FILES:
    for first, *rest in (name.split('.') for name in imports(path)):
      if first == 'dsa_jax' and rest[0] != room_of(path):
        arrows.add((room_of(path), rest[0]))
  assert not {(a, b) for a, b in arrows if (b, a) in arrows}


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_of_a_platform_are_loaded_by_its_ops_alone(path):
  """So that whoever lacks one platform's compiler can use all the others."""
  parts = path.relative_to(ROOT).parts
  for name in imports(path):
    for platform in 'tpu', 'gpu':
      if name.startswith(f'dsa_jax.kernels.{platform}.'):
        inside = parts[0] == 'kernels' and any(platform in part or 'hopper' in part for part in parts[1:])
        assert inside or parts[0] == 'compile', f'{path} must not import {name}'


def test_the_package_is_light_and_its_names_are_lazy():
  script = """
import sys
import dsa_jax
assert not {'jax', 'flax', 'numpy'} & sys.modules.keys()
from dsa_jax import ConfigError, ModelConfig
assert issubclass(ConfigError, ValueError) and 'jax' not in sys.modules
from dsa_jax import Sampler, load_checkpoint, load_model, make_mesh
import dsa_jax.load
assert dsa_jax.load.load_model is load_model
assert {'Sampler', 'ModelConfig', 'load_model', '__version__'} <= set(dir(dsa_jax))
try:
  dsa_jax.nonsense
except AttributeError as error:
  assert "'nonsense'" in str(error)
else:
  raise AssertionError
"""
  subprocess.run([sys.executable, '-c', script], check=True, cwd=ROOT.parent)
