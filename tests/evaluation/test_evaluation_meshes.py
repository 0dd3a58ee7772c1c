# SPDX-License-Identifier: Apache-2.0
"""Evaluations on meshes of simulated devices have the figures of one device, and go on there."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import laws
import numpy as np
import pytest
import simulated
from saved_run import save_run

from dsa_jax import evaluate
from dsa_jax.config import ConfigError
from dsa_jax.data.text import VOCAB_SIZE
from dsa_jax.evaluation.harness import Harness
from dsa_jax.evaluation.settings import Settings
from dsa_jax.lm_eval import mesh_of
from dsa_jax.parallel.mesh import MeshConfig

HERE = pathlib.Path(__file__).parent
TESTS, ROOT = HERE.parents[0], HERE.parents[1]
SIZES = {'n_layers': 1, 'n_dense_layers': 1, 'vocab_size': VOCAB_SIZE}
CFG = dataclasses.replace(laws.CFG, n_heads=4, max_seq_len=48, index_topk=16, **SIZES)
GQA = dataclasses.replace(laws.GQA_EACH, n_heads=8, max_seq_len=1024, index_topk=16, nope_layers=(), **SIZES)
FEW = CFG, {'context': 48, 'rules': ('random',)}, {'expert': 2, 'context': 2}
TASKS = {'tasks': ('single',), 'lengths': (701,), 'examples': 3}  # 701 is no multiple of `context`.
EVERY_RULE = ('indexer', 'window_sinks', 'random', 'oracle')
ALL = GQA, {'context': 64, 'rules': EVERY_RULE} | TASKS, {'fsdp': 2, 'context': 2, 'tensor': 2}


def save_run_and_text(folder: pathlib.Path, cfg) -> pathlib.Path:
  entry = save_run(folder, cfg)
  rng = np.random.default_rng(0)
  words = [bytes(rng.integers(97, 123, 5, dtype=np.uint8)).decode() for _ in range(600)]
  lines = [f'Line {i} has the words {" ".join(words[i : i + 4])}.' for i in range(0, 600, 4)]
  (folder / 'text.txt').write_text('\n'.join(lines))
  return entry


def start(command: list[str], cache: pathlib.Path, n_devices: int = 8, **env: str) -> subprocess.Popen:
  own = simulated.devices(n_devices) | {'PYTHONPATH': f'{TESTS}:{ROOT}', 'XDG_CACHE_HOME': str(cache)} | env
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  return subprocess.Popen([sys.executable, *command], env=os.environ | own, **pipes)


def run(command: list[str], cache: pathlib.Path) -> str:
  process = start(command, cache)
  output, errors = process.communicate()
  assert process.returncode == 0, errors
  return output


def flags_of(fields: dict) -> list[str]:
  """The flags that the command takes for fields of Settings."""
  text = lambda x: ','.join(map(str, x)) if isinstance(x, tuple) else x
  return [f'--{name}={text(x)}' for name, x in fields.items()]


@pytest.fixture(
    scope='module',
    params=[pytest.param(FEW, id='few'), pytest.param(ALL, marks=pytest.mark.nightly, id='all')],
)
def evaluated(request, tmp_path_factory):
  """What the command has written on a mesh, what one device finds, and what asks for the latter."""
  cfg, fields, mesh = request.param
  folder = tmp_path_factory.mktemp('run')
  checkpoint = save_run_and_text(folder, cfg)
  fields |= {'files': (str(folder / 'text.txt'),), 'rows': 4, 'batch_size': 2}
  if 'tasks' in fields:
    fields |= {'haystack': str(folder / 'text.txt')}
  axes = [f'--mesh.{axis}={n}' for axis, n in mesh.items()]
  run(['-m', 'dsa_jax.evaluate', str(checkpoint), str(folder / 'mesh'), *flags_of(fields), *axes], folder / 'cache')
  one = Settings(checkpoint=str(checkpoint), out=folder / 'one', **fields)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XDG_CACHE_HOME', str(folder / 'cache'))
    return folder / 'mesh', evaluate.evaluate(one), one


def assert_same_figures(results: dict, wanted: dict):
  for name, arm in wanted['arms'].items():
    of_mesh = results['arms'][name]
    for key in arm.keys() - {'seconds', 'rule', 'index_topk'}:
      assert of_mesh[key] == pytest.approx(arm[key], rel=1e-5), (name, key)
  for key in 'bits_by_visible', 'bits_by_position':
    for name, bits in wanted[key].items():
      np.testing.assert_allclose(np.array(results[key][name], float), bits, rtol=1e-4, err_msg=name)
  for k, of_budget in wanted['measures'].items():
    for rule, means in of_budget['everywhere'].items():
      for name, values in means.items():
        given = np.array(results['measures'][k]['everywhere'][rule][name], float)
        np.testing.assert_allclose(given, np.array(values, float), rtol=1e-4, err_msg=f'{rule} {name}')
  assert results['tasks']['scores'] == wanted['tasks']['scores']


def test_a_mesh_has_the_figures_of_one_device(evaluated):
  folder, wanted, settings = evaluated
  results = json.loads((folder / 'evaluate.json').read_text())
  assert_same_figures(results, wanted)
  sizes = results['settings']['mesh']
  assert sum(n > 1 for n in sizes.values()) > 1 and f'context={sizes["context"]}' in (folder / 'evaluate.md').read_text()
  for path in folder.glob('answers/*/*.json'):
    own = settings.out / path.relative_to(folder)
    assert json.loads(path.read_text())['texts'] == json.loads(own.read_text())['texts']
  assert len(list(folder.glob('answers/*/*.json'))) == len(settings.tasks) * len(results['arms'])


def test_what_a_mesh_has_begun_goes_on_elsewhere(evaluated, monkeypatch):
  folder, wanted, settings = evaluated
  monkeypatch.setenv('XDG_CACHE_HOME', str(folder.parent / 'cache'))
  (folder / 'scores' / 'random@16.npz').unlink()
  kept = (folder / 'scores' / 'dense.npz').stat().st_mtime_ns
  results = evaluate.evaluate(dataclasses.replace(settings, out=folder))
  assert_same_figures(results, wanted)
  assert (folder / 'scores' / 'dense.npz').stat().st_mtime_ns == kept


@pytest.mark.nightly
def test_two_processes_evaluate_what_one_does(tmp_path, monkeypatch):
  """Each has two of the four devices; the first one writes."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  checkpoint, text = save_run_and_text(tmp_path, GQA), str(tmp_path / 'text.txt')
  fields = {'context': 64, 'rules': ('oracle',), 'rows': 4, 'batch_size': 2, 'haystack': text} | TASKS
  wanted = evaluate.evaluate(
      Settings(checkpoint=str(checkpoint), out=tmp_path / 'one', files=(text,), **fields)
  )
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  command = ['-m', 'dsa_jax.evaluate', str(checkpoint), str(tmp_path / 'two'), f'--files={text}']
  command += [*flags_of(fields), '--mesh.fsdp=2', '--mesh.context=2']
  job = {'JAX_COORDINATOR_ADDRESS': f'localhost:{port}', 'JAX_NUM_PROCESSES': '2'}
  both = [start(command, tmp_path / 'cache', 2, **job, JAX_PROCESS_ID=str(i)) for i in range(2)]
  outputs = [process.communicate() for process in both]
  assert [process.returncode for process in both] == [0, 0], outputs
  assert_same_figures(json.loads((tmp_path / 'two' / 'evaluate.json').read_text()), wanted)
  assert 'Dense and sparse' in outputs[0][0] and 'Dense and sparse' not in outputs[1][0]


@pytest.mark.nightly
def test_the_adapter_answers_alike(tmp_path):
  checkpoint = save_run_and_text(tmp_path, CFG)
  answers = json.loads(run([str(HERE / 'harness_script.py'), str(checkpoint)], tmp_path))
  for name, (*of_meshes, wanted) in answers.items():
    assert len(of_meshes) == 2
    for given in of_meshes:
      if name == 'continuations':
        assert given == wanted
      else:
        np.testing.assert_allclose(given, wanted, rtol=1e-4, err_msg=name)


def test_meshes_that_do_not_fit_are_refused(tmp_path):
  checkpoint = save_run_and_text(tmp_path, CFG)
  fields = {'checkpoint': str(checkpoint), 'files': (str(tmp_path / 'text.txt'),), 'rows': 4, 'batch_size': 2}
  for changes, mesh, message in (
      ({}, {'tensor': 3}, 'tensor=3 must divide n_heads=4'),
      ({}, {'expert': 4}, 'expert=4 must divide the 2 sequences'),
      ({'context': 42}, {'context': 2}, 'context=2 times tensor=1 must divide 42 tokens'),
      ({'context': 40, 'tasks': ('single',), 'lengths': (48,)}, {'context': 5}, 'context=5 must divide capacity=48'),
  ):
    with pytest.raises(ConfigError, match=message):
      evaluate.evaluate(Settings(out=tmp_path / 'out', mesh=MeshConfig(**mesh), **fields, **changes))
    assert not (tmp_path / 'out').exists()
  with pytest.raises(ConfigError, match='expert=2 must divide the 3 sequences'):
    Harness(checkpoint, batch_size=3, mesh=MeshConfig(expert=2))


def test_the_adapter_takes_the_axes_of_a_mesh():
  given = {'mesh.expert': 4, 'mesh.context': 2, 'rule': 'oracle'}
  assert mesh_of(given) == MeshConfig(expert=4, context=2) and given == {'rule': 'oracle'}
  for wrong in {'mesh.rows': 2}, {'mesh.expert': 'x'}:
    with pytest.raises(ConfigError, match='must give numbers of devices along axes'):
      mesh_of(wrong)
