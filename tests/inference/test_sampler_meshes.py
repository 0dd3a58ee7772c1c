# SPDX-License-Identifier: Apache-2.0
"""Samplers on many devices write what one writes; what does not fit is refused before it is loaded."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import laws
import pytest
import simulated
from saved_run import save_run

from dsa_jax.config import ConfigError
from dsa_jax.data.text import VOCAB_SIZE
from dsa_jax.inference import sampler, shares
from dsa_jax.inference.sampler import Sampler
from dsa_jax.parallel.mesh import MeshConfig

HERE = pathlib.Path(__file__).parent
TESTS, ROOT = HERE.parents[0], HERE.parents[1]
CFG = dataclasses.replace(laws.CFG, n_heads=4, vocab_size=VOCAB_SIZE, max_seq_len=64)


def environment(n_devices: int, **variables: str) -> dict[str, str]:
  return os.environ | simulated.devices(n_devices) | {'PYTHONPATH': f'{TESTS}:{ROOT}'} | variables


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  return save_run(tmp_path_factory.mktemp('run'), CFG)


def start(checkpoint, *flags: str, env: dict[str, str]) -> subprocess.Popen:
  command = [sys.executable, '-m', 'dsa_jax.sample', f'--checkpoint={checkpoint}', *flags]
  return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# One process for all cases was ended by a fault within libgcc (jax 0.10.2).
PARTS = 5
NIGHTLY = [pytest.param((i, PARTS), marks=pytest.mark.nightly, id=f'part {i}') for i in range(PARTS)]


@pytest.fixture(scope='module', params=[pytest.param(('--few',), id='few'), *NIGHTLY])
def rows(request):
  command = [sys.executable, str(HERE / 'mesh_script.py'), *map(str, request.param)]
  done = subprocess.run(command, env=environment(8), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return [json.loads(line) for line in done.stdout.splitlines()]


def test_meshes_change_neither_selections_nor_logits_nor_texts(rows):
  counts = tuple(sum(name in row for row in rows) for name in ('logits', 'same'))
  assert counts in [(1, 3), (7, 10), (7, 9), (6, 10)]  # Few; the first parts; the third and fourth; the last.
  for row in rows:
    assert row.get('same', True) and row.get('logits', 0) < 1e-4, row


def test_a_step_does_not_gather_the_cache(rows):
  """What is exchanged does not grow with the cache, of which it is a small part."""
  for row in [row for row in rows if 'size' in row]:
    assert row['long'] == row['short'] and 0 < sum(row['long'].values()) < row['size'] / 20, row


# Refusals.


@pytest.mark.parametrize(
    'mesh, message',
    [
        ({'tensor': 3}, 'tensor=3 must divide n_heads=4'),
        ({'expert': 3}, 'expert=3 times tensor=1 must divide n_routed_experts=8'),
        ({'context': 6}, 'context=6 must divide capacity=64, which is split over it: 60 would do'),
    ],
)
def test_meshes_that_do_not_fit_are_refused(mesh, message):
  with pytest.raises(ConfigError, match=message):
    shares.check_mesh(MeshConfig(**mesh), CFG, capacity=64)


def test_texts_that_cannot_be_split_are_refused():
  mesh = MeshConfig(fsdp=2, expert=2, context=2)
  for n in 1, 4, 8:
    shares.check_texts(mesh, 'slots', n)
  with pytest.raises(ConfigError, match='fsdp=2 times expert=2 must divide slots=6, .* 8 would do'):
    shares.check_texts(mesh, 'slots', 6)
  shares.check_texts(MeshConfig(tensor=8), 'slots', 5)


def test_nothing_is_loaded_where_a_mesh_does_not_fit(checkpoint, monkeypatch):
  monkeypatch.setattr(sampler, 'load_checkpoint', None)
  mesh = jax.make_mesh((1,), ('x',), (jax.sharding.AxisType.Auto,))
  with pytest.raises(ConfigError, match=r"the mesh has the axes \('x',\); they must be"):
    Sampler.load(checkpoint, mesh=mesh)
  with pytest.raises(ConfigError, match='capacity=65 must be within 0 and the cfg.max_seq_len=64'):
    Sampler.load(checkpoint, capacity=65)
  done = start(
      checkpoint, '--prompts=x', '--out=y', '--slots=3', '--mesh.expert=2', env=environment(2)
  )
  assert 'error: fsdp=1 times expert=2 must divide --slots=3' in done.communicate()[1]


# The command.


def start_two(checkpoint, *flags: str) -> list[subprocess.Popen]:
  """Two processes of two devices each."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  job = {'JAX_COORDINATOR_ADDRESS': f'localhost:{port}', 'JAX_NUM_PROCESSES': '2'}
  envs = [environment(2, **job, JAX_PROCESS_ID=str(i)) for i in range(2)]
  return [start(checkpoint, *flags, env=env) for env in envs]


def answers_in(path: pathlib.Path) -> dict[tuple[int, int], list[int]]:
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  answers = {(line['prompt'], line['sample']): line['ids'] for line in lines}
  assert len(answers) == len(lines)  # None is there twice.
  return answers


def shown(output: str) -> list[str]:
  """The lines that the command has written; its collectives write others."""
  return [line for line in output.splitlines() if not line.startswith('[Gloo]')]


@pytest.mark.nightly
def test_two_processes_write_what_one_writes(checkpoint, tmp_path):
  prompts = tmp_path / 'prompts.jsonl'
  prompts.write_text('\n'.join(json.dumps({'prompt': text}) for text in ('one', 'and two', 'three', 'x')))
  flags = '--max_new_tokens=10', '--temperature=1'
  files = f'--prompts={prompts}', '--samples=2', '--slots=4'
  mesh = '--mesh.expert=2', '--mesh.context=2'
  outs = [tmp_path / f'{name}.jsonl' for name in ('one', 'two')]
  alone = start(checkpoint, *flags, *files, f'--out={outs[0]}', env=environment(1))
  assert alone.wait() == 0, alone.stderr.read()
  jobs = {}
  for name, given in {'file': (*files, f'--out={outs[1]}'), 'prompt': ('--prompt=hello',)}.items():
    both = start_two(checkpoint, *flags, *mesh, *given)
    jobs[name] = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], jobs[name]
  assert answers_in(outs[1]) == answers_in(outs[0]) and len(answers_in(outs[1])) == 8
  wanted, _ = start(checkpoint, *flags, '--prompt=hello', env=environment(1)).communicate()
  (first, report), (second, silence) = jobs['prompt']
  assert shown(first) == shown(wanted) != [] and shown(second) == []
  assert 'GiB of memory on this host]' in report and 'memory on this host' not in silence
