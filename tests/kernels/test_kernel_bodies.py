# SPDX-License-Identifier: Apache-2.0
"""Kernels get few loose refs: what belongs together comes as a NamedTuple of refs."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2] / 'dsa_jax' / 'kernels'
CALLS = {'pallas_call', 'call', '_call', 'kernel'}  # Functions whose first argument is a kernel.
MOST = 8


def kernels(tree: ast.Module):
  """Yields the name of each kernel that is called, and how many arguments are bound before."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and name_of(node.func) in CALLS and node.args:
      first = node.args[0]
      if isinstance(first, ast.Call) and name_of(first.func) == 'partial':
        yield name_of(first.args[0]), len(first.args) - 1
      else:
        yield name_of(first), 0


def name_of(node: ast.expr) -> str:
  return getattr(node, 'attr', None) or getattr(node, 'id', '')


def loose(function: ast.FunctionDef) -> list[str]:
  names = [arg.arg for arg in function.args.args if arg.arg != 'self']
  return names + ['*'] * MOST * (function.args.vararg is not None)


def too_many(source: str) -> list[str]:
  tree = ast.parse(source)
  functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
  called = dict(kernels(tree))
  return [
      f'{function.name} has {loose(function)}'
      for function in functions
      if function.name in called and len(loose(function)) - called[function.name] > MOST
  ]


@pytest.mark.parametrize('path', sorted(ROOT.rglob('*.py')), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_kernel_gets_more_than_eight_refs(path):
  assert not too_many(path.read_text())


def test_kernels_are_recognised():
  nine = ', '.join('abcdefghi')
  for call in 'pl.pallas_call(body, grid=1)', 'self.call(self.body, x)', 'triton.call(body, 1)':
    assert too_many(f'def body({nine}): pass\n{call}')
    assert too_many(f'def body(a, *refs): pass\n{call}')
    assert not too_many(f'def body(self, {nine[3:]}): pass\n{call}')
  assert not too_many(f'def body({nine}): pass\npl.pallas_call(functools.partial(body, 1), x)')
  names = {name for path in ROOT.rglob('*.py') for name, _ in kernels(ast.parse(path.read_text()))}
  assert {'_diverge_backward', '_attend_backward', 'sparse_attention_weights', 'kernel'} <= names
