# SPDX-License-Identifier: Apache-2.0
"""What a reader may rely on: short functions, plain names, and a README whose claims are counted."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'dsa_jax'
FILES = sorted(PACKAGE.rglob('*.py'))
# Those of environments that lie in the checkout are not ours.
PAGES = sorted(
    p for p in ROOT.rglob('*.md')
    if not any(part.startswith('.') or part == 'site-packages' for part in p.parts[1:])
)
LONGEST = 60  # Lines of a function, outside kernels.


def functions(path: pathlib.Path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.FunctionDef):
      yield node


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_are_short(path):
  if path.relative_to(PACKAGE).parts[0] == 'kernels':
    return
  long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(path)}
  assert not {name: n for name, n in long.items() if n > LONGEST}


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_names_say_what_they_hold(path):
  """A dictionary of arguments is named for what it holds, and a result for what it is."""
  names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
  assert not names & {'how', 'found'}


def test_the_reading_order_is_as_long_as_the_readme_says():
  readme = (ROOT / 'README.md').read_text()
  section = readme.split('## Read the code')[1].split('\n| room')[0]
  [stated] = re.findall(r'about ([\d,]+) lines long', section)
  paths = re.findall(r'`([\w/]+\.py)`', section)
  lines = sum(len((PACKAGE / path).read_text().splitlines()) for path in paths)
  assert len(paths) == len(set(paths)) > 10
  assert abs(lines / int(stated.replace(',', '')) - 1) < 0.05, lines


def test_the_readme_names_every_room():
  readme = (ROOT / 'README.md').read_text()
  rooms = {p.name for p in PACKAGE.iterdir() if (p / '__init__.py').exists()}
  assert set(re.findall(r'(?m)^\| `(\w+)/` \|', readme)) == rooms


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
  text = page.read_text()
  headings = {
      re.sub(r'[^\w\- ]', '', line.lstrip('# ').lower()).replace(' ', '-')
      for line in text.splitlines()
      if line.startswith('#')
  }
  for target in re.findall(r'\]\(([^)\s]+)\)', text):
    if target.startswith('#'):
      assert target[1:] in headings, target
    elif '://' not in target:
      assert (page.parent / target.split('#')[0]).exists(), target
