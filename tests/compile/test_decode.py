# SPDX-License-Identifier: Apache-2.0
"""The compiler of TPUs writes new tokens into the cache where it lies."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dsa_jax.compile.chips import environment

HERE = pathlib.Path(__file__).parent


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason="needs the extra 'compile'")
def test_a_decoded_token_copies_no_cache():
  command = [sys.executable, str(HERE / 'decode_script.py')]
  env = os.environ | environment('v5p') | {'PYTHONPATH': str(HERE.parents[1])}
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  sizes = json.loads(done.stdout)
  assert sizes['temporaries'] < sizes['rows'] / 4, sizes  # Rows of one of four layers would be a quarter.
