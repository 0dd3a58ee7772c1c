# SPDX-License-Identifier: Apache-2.0
"""Memory: of a conversion, and of a load onto a mesh. Each in a process of its own, on checkpoints
whose size dwarfs what the interpreter takes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import released

from dsa_jax.training.stored_arrays import CACHE_BYTES

# A third of a gigabyte, nearly all of it in one stack of experts.
BIG = released.V32 | {
    'hidden_size': 1024, 'num_hidden_layers': 4, 'n_routed_experts': 16, 'n_group': 2,
    'moe_intermediate_size': 1024, 'num_nextn_predict_layers': 0, 'intermediate_size': 256,
}  # fmt: skip

PEAK = """
import json, pathlib, re, sys
def status(name):
  text = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(name + r':\\s+(\\d+)', text)[1]) * 1024
def growth(work):
  'Bytes by which memory grew at its highest while `work` ran.'
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # The peak starts from here.
  before = status('VmRSS')
  work()
  return status('VmHWM') - before
"""

CONVERT = PEAK + """
from dsa_jax.convert.importer import import_checkpoint, open_source
from dsa_jax.convert.exporter import export_checkpoint, open_checkpoint
small, big, target, out = map(pathlib.Path, sys.argv[1:])
def bring_in(source, target):
  return growth(lambda: import_checkpoint(open_source(source), target, advance=lambda n: None))
def bring_out():
  export_checkpoint(open_checkpoint(target), out, shard_bytes=2**24)
bring_in(small, target.with_name('small'))  # All libraries are used once.
print(json.dumps([bring_in(big, target), growth(bring_out)]))
"""

LOAD = PEAK + """
import jax
from dsa_jax.inference.load import load_checkpoint
from dsa_jax.parallel.mesh import make_mesh
small, big, dtype = sys.argv[1:]
mesh = make_mesh(fsdp=2, expert=2, tensor=2)
load_checkpoint(small, mesh=mesh, dtype=dtype)
models = []
grown = growth(lambda: models.append(load_checkpoint(big, mesh=mesh, dtype=dtype)))
held, [model] = {}, models
for x in jax.tree.leaves(model):
  for shard in x.addressable_shards:
    held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
total = sum(x.nbytes for x in jax.tree.leaves(model))
kinds = {str(w.dtype) for w in (model.embed, model.moe_blocks.ffn.w1, model.norm.scale)}
print(json.dumps([grown, sorted(held.values()), total, sorted(kinds)]))
"""


def run(code: str, *arguments, devices: int = 1):
  flags = {
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
      'JAX_PLATFORMS': 'cpu',
      'MALLOC_MMAP_THRESHOLD_': '65536',  # Freed memory goes back, so that we count what is used.
  }
  command = [sys.executable, '-c', code, *map(str, arguments)]
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ | flags)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('scale')
  released.write(folder / 'tiny', released.V32, released.random_tensors(released.V32))
  released.write(folder / 'big', BIG, released.random_tensors(BIG), shards=8)
  paths = [folder / name for name in ('tiny', 'big', 'ours', 'out')]
  (folder / 'figures').write_text(json.dumps(run(CONVERT, *paths)))
  return folder


@pytest.mark.nightly
def test_conversion_streams(folder: pathlib.Path):
  """Neither direction holds much more than a tensor, or a file, at a time."""
  importing, exporting = json.loads((folder / 'figures').read_text())
  stack = 3 * 16 * 1024 * 1024 * 2  # The largest array: 100 MB; a tensor is 2 MB.
  assert importing < 0.4 * stack, importing / 2**20
  assert exporting < CACHE_BYTES + 0.5 * stack, exporting / 2**20
  assert released.read(folder / 'out') == released.read(folder / 'big')


@pytest.mark.nightly
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_sharded_load(folder: pathlib.Path, dtype):
  """Each of eight devices reads its own share; the host, which plays all eight, little beside."""
  grown, held, total, kinds = run(LOAD, folder / 'small', folder / 'ours', dtype, devices=8)
  assert len(held) == 8
  assert max(held) < 1.25 * total / 8, (held, total)
  on_devices = sum(held)
  assert on_devices < grown < on_devices + CACHE_BYTES + 0.2 * total, (grown, on_devices, total)
  assert kinds == sorted({dtype, 'float32'})
