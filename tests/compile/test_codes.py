# SPDX-License-Identifier: Apache-2.0
"""The compilers of chips widen codes within products: no wide copy of a matrix exists."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dsa_jax.compile.chips import environment

HERE = pathlib.Path(__file__).parent
NEEDED = {'v5p': 'libtpu', 'v6e': 'libtpu', 'tpu7x': 'libtpu', 'h200': 'jax_cuda13_plugin'}


@pytest.mark.nightly
@pytest.mark.parametrize('chip', NEEDED)
def test_products_with_codes_need_little_more_than_the_scales(chip, tmp_path):
  if importlib.util.find_spec(NEEDED[chip]) is None:
    pytest.skip("needs the extras 'compile' and 'compile-gpu'")
  command = [sys.executable, str(HERE / 'codes_script.py'), chip]
  needed = environment(chip, tmp_path if chip == 'h200' else None)
  env = os.environ | needed | {'PYTHONPATH': str(HERE.parents[1])}
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(rows) == 4
  for row in rows:  # A wide copy would be twice the codes.
    assert row['temporaries'] < row['codes'] / 2, row
