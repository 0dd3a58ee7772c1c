# SPDX-License-Identifier: Apache-2.0
"""Many devices give the numbers of one; meshes that do not fit are refused by name."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import simulated

from configs import quickstart
from dsa_jax.config import ModelConfig
from dsa_jax.parallel.mesh import MeshConfig, make_mesh
from dsa_jax.parallel.zigzag import unzigzag, zigzag
from dsa_jax.training.recipe import read_recipe

HERE = pathlib.Path(__file__).parent
TESTS, ROOT = HERE.parents[0], HERE.parents[1]


@pytest.fixture(scope='module', params=['few', pytest.param('all', marks=pytest.mark.nightly)])
def rows(request):
  return found_by('mesh_script.py', *(['--few'] if request.param == 'few' else []))


def found_by(script: str, *flags: str) -> list[dict]:
  """What a script finds on eight simulated devices."""
  env = os.environ | simulated.devices(8) | {'PYTHONPATH': f'{TESTS}:{ROOT}'}
  command = [sys.executable, str(HERE / script), *flags]
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return [json.loads(line) for line in done.stdout.splitlines()]


def test_meshes_change_no_number(rows):
  counts = tuple(sum(name in row for row in rows) for name in ('state', 'layer', 'bytes'))
  assert counts in [(1, 3, 1), (17, 9, 2)]
  for row in rows:
    if 'bytes' in row:
      continue
    assert all(row[name] < 1e-5 for name in ('metrics', 'layer') if name in row) and row['same'], row
    # The gradient of a stream's scale is a sum over all tokens and channels that nearly cancels: the
    # order of its terms changes it by 1.3e-5 with jax 0.12. That of a query's scale changes by 1.9e-5.
    assert row.get('state', 0) < (3e-5 if row.get('nearly_cancels') else 1e-5), row


def test_a_layer_gathers_its_latents_and_index_keys_and_no_more(rows):
  for row in [row for row in rows if 'bytes' in row]:
    for kind in ('all-gather', 'reduce-scatter'):  # Forward, and their gradients backward.
      bytes = {name: n for name, n in row['bytes'].items() if name.startswith(kind)}
      assert bytes == {f'{kind} over context': row['arithmetic']}, row


def test_every_row_reaches_the_owner_of_its_group_and_comes_back():
  rows = found_by('ragged_script.py')
  assert len(rows) == 2
  for row in rows:
    assert row.pop('case') and all(row.values()), row


@pytest.mark.parametrize('n', [1, 2, 4])
def test_zigzag_shares_the_work(n):
  x = jnp.arange(2 * 3 * 16).reshape(2, 16, 3)
  turned = zigzag(x, n)
  np.testing.assert_array_equal(unzigzag(turned, n), x)
  visible = zigzag(jnp.arange(1, 17)[None], n).reshape(n, -1).sum(axis=1)  # Causal, by share.
  assert len(set(visible.tolist())) == 1


@pytest.mark.parametrize(
    'mesh, message',
    [
        ({'tensor': 3}, 'model: tensor=3 must divide n_heads='),
        ({'expert': 3}, 'model: expert=3 times tensor=1 must divide n_routed_experts='),
        ({'fsdp': 5}, 'model: fsdp=5 must divide dim='),
        ({'fsdp': 4}, 'fsdp=4 times expert=1 must divide the 2 sequences'),
        ({'context': 64}, 'twice context=64 times tensor=1 must divide 64 tokens'),
        ({'context': 0}, 'config.mesh: context=0 must be at least 1'),
        ({'pipeline': 2}, "mesh has no field 'pipeline'"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(mesh, message, tmp_path):
  config = quickstart.get_config('tiny')
  config.workdir, config.measure_rows = str(tmp_path / 'run'), 2
  with config.unlocked():
    config.mesh.update(mesh)
  with pytest.raises(ValueError, match=message):
    read_recipe(config)
  assert not (tmp_path / 'run').exists()


def test_a_sequence_on_one_device_has_any_length():
  for mesh in MeshConfig(), MeshConfig(fsdp=2, expert=2):
    mesh.check_rows(4, 31)
  for axis in 'context', 'tensor':
    mesh = MeshConfig(**{axis: 2})
    mesh.check_rows(4, 32)
    with pytest.raises(ValueError, match='must divide 31 tokens'):
      mesh.check_rows(4, 31)
    with pytest.raises(ValueError, match='must divide 30 tokens'):
      mesh.check_rows(4, 30)


def test_more_devices_than_there_are():
  with pytest.raises(ValueError, match='needs 64 devices; there'):
    make_mesh(fsdp=64)


def test_a_layer_with_an_mlp_counts_wherever_it_stands():
  cfg = ModelConfig(n_layers=3, n_dense_layers=0, inter_dim=18_434)
  MeshConfig(tensor=4).check_model(cfg)
  with pytest.raises(ValueError, match='tensor=4 must divide inter_dim=18434'):
    MeshConfig(tensor=4).check_model(dataclasses.replace(cfg, mlp_layers=(1,)))


def test_the_released_model_fits_a_pod():
  MeshConfig(fsdp=64, context=4, expert=8, tensor=8).check_model(ModelConfig())
