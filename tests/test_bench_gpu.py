# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the GPU kernels runs, interpreted at toy sizes, and refuses wrong kernels."""

import json
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / 'experiments' / 'kernel_speed'
TOY = '--backend=gpu --interpret --small --sizes 32 --queries 8 '
TOY += '--decode 2 --decode_sizes 32 --seconds 0 --buffers 1'


@pytest.mark.nightly
def test_measures_what_is_right(tmp_path):
  path = tmp_path / 'measured.json'
  command = [sys.executable, FOLDER / 'bench.py', *TOY.split(), f'--json={path}']
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  results = json.loads(path.read_text())
  measured = [(row['program'], row.get('sequences')) for row in results['rows']]
  assert measured == [
      ('index_topk', None), ('sparse_forward', None), ('sparse_forward_backward', None),
      ('index_kl_selected_grad', None), ('index_kl_dense_grad', None),
      ('dense_forward', None), ('dense_forward_backward', None),
      ('index_topk', 2), ('sparse_forward', 2), ('dense_decode', 2),
  ]  # fmt: skip
  assert results['interpreted'] and all(row['tflops'] is None for row in results['rows'])
  assert '| sparse_forward, decoding | 32 | 2 |' in path.with_suffix('.md').read_text()


@pytest.mark.nightly
def test_refuses_a_wrong_kernel():
  wrong = 'import bench_gpu, jax.numpy as jnp; attend = bench_gpu.attend; '
  wrong += 'bench_gpu.attend = lambda d, backend, x: [1.1 * y if backend == "gpu" else y '
  wrong += 'for y in attend(d, backend, x)]; bench_gpu.main("%s".split())' % TOY.split(' ', 1)[1]
  done = subprocess.run([sys.executable, '-c', wrong], capture_output=True, text=True, cwd=FOLDER)
  assert done.returncode == 1
  assert 'sparse_forward is wrong: off by' in done.stderr
  assert 'index_topk is wrong' not in done.stderr
