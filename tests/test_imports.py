# SPDX-License-Identifier: Apache-2.0
"""Imports point one way: see RANKS."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / 'dsa_jax'
RANKS = [
    {'config', 'shapes', 'versions'},
    {'kernels'},
    {'selection'},
    {'nn', 'sharding', 'spmd', 'ragged'},
    {'losses', 'optim', 'data', 'metrics', 'report', 'plots', 'tokenizer', 'compilation_cache'},
    {'stages', 'state', 'recipe', 'checkpoint', 'train_step', 'evaluate', 'results', 'cost'}
    | {'distributed', 'targets', 'collectives', 'schedule', 'ptxas', 'compile_cases', 'gpu_cases'}
    | {'ahead', 'tpu_cases', 'programs'},
    {'train', 'load', 'convert', 'sample', 'compile_report'},
]
OUTSIDE = {'flax': 3, 'optax': 4, 'orbax': 5, 'ml_collections': 5, 'grain': 4}  # From this rank on.


def rank_of(module: str) -> int:
  return next(rank for rank, modules in enumerate(RANKS) if module in modules)


def imports(path: pathlib.Path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


FILES = [p for p in ROOT.rglob('*.py') if p != ROOT / '__init__.py']


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_up(path):
  module = path.relative_to(ROOT).parts[0].removesuffix('.py')
  rank = rank_of(module)
  for name in imports(path):
    first, *rest = name.split('.')
    if first == 'dsa_jax' and rest[0] != module:
      assert rank_of(rest[0]) <= rank, f'{module} must not import {name}'
    assert rank >= OUTSIDE.get(first, 0), f'{module} must not import {name}'
    assert first not in ('configs', 'experiments', 'tests'), f'{module} must not import {name}'
