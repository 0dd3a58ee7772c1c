# SPDX-License-Identifier: Apache-2.0
"""experiments/cost_claim/measure.py runs on a mesh of simulated devices, with both kinds of attention."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / 'experiments' / 'cost_claim' / 'measure.py'


def run(*flags: str) -> subprocess.CompletedProcess:
  command = [sys.executable, str(SCRIPT), *flags]
  env = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'} | {'JAX_PLATFORMS': 'cpu'}
  return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.nightly
def test_it_measures_on_a_mesh(tmp_path):
  done = run(
      '--longest=4096', '--attention=mla,gqa', '--mesh.context=2', f'--out={tmp_path}', '--name=mesh'
  )
  assert done.returncode == 0, done.stderr
  for name, kind in ('mesh', 'mla'), ('mesh_gqa', 'gqa'):
    report = json.loads((tmp_path / f'{name}.json').read_text())
    assert report['model']['attention'] == kind and report['contexts'] == [4096]
    assert report['mesh']['context'] == report['devices'] == 2 and report['simulated']
    for side in 'measured', 'predicted':
      times = [x for kinds in report[side].values() for values in kinds.values() for x in values]
      assert len(times) == 5 and min(times) > 0
    assert '2 simulated devices' in (tmp_path / f'{name}.md').read_text()


@pytest.mark.nightly
@pytest.mark.parametrize(
    'flag, message',
    [
        ('--attention=mha', "--attention=['mha'] must be of"),
        ('--longest=100', '--longest 100 must be at least 4096'),
        ('--mesh.tensor=3', 'tensor=3 must divide n_heads=16'),
    ],
)
def test_what_will_not_do_is_said_before_anything_is_written(tmp_path, flag, message):
  done = run(flag, f'--out={tmp_path / "out"}')
  assert done.returncode != 0 and message in done.stderr and 'Traceback' not in done.stderr
  assert not (tmp_path / 'out').exists()
