# SPDX-License-Identifier: Apache-2.0
"""Compiles what serves a released model on many TPUs or GPUs, on a machine that has none.

python experiments/serving_plan/plan.py --chip=v5p --phase=decode --batch=32
python experiments/serving_plan/plan.py --chip=tpu7x --phase=prefill --model=glm52
python experiments/serving_plan/plan.py --chip=h200 --devices=8 --weights=fp8

The compilers are those of the chips: pip install -e '.[compile,compile-gpu]'. A decode step writes a token of every text,
which sees 128K tokens; a prefill step reads 4096 tokens of a prompt. The script prints the memory of
each device and what it sends in collectives, from the compiler's report and program, and the tokens
per second and dollars by the roofline of `dsa_jax.cost`. It fails where a device would need more
memory than it has.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from flax import nnx
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from dsa_jax import cost  # noqa: E402
from dsa_jax.chips import DEVICES  # noqa: E402
from dsa_jax.compile.chips import GPUS, environment  # noqa: E402
from dsa_jax.compile.hlo import collectives, total_bytes  # noqa: E402
from dsa_jax.config import ModelConfig  # noqa: E402
from dsa_jax.families import SIZES  # noqa: E402
from dsa_jax.inference.cache import init_cache  # noqa: E402
from dsa_jax.inference.programs import Reader, make_reader, read_chunk, widened_by  # noqa: E402
from dsa_jax.inference.shares import shares_of  # noqa: E402
from dsa_jax.inference.slots import Slots, write  # noqa: E402
from dsa_jax.inference.weights import abstract_weights  # noqa: E402
from dsa_jax.parallel.mesh import MESH_AXES, MeshConfig  # noqa: E402
from dsa_jax.training.state import model_graph  # noqa: E402

MODELS = 'v32', 'glm52'
CONTEXT, CHUNK = 131_072, 4096
# 64 chips of v5p and v6e, 32 of tpu7x, each of which is two devices, and two hosts of eight H200.
TOPOLOGIES = {
    'v5p': {64: 'v5p:4x4x4'},
    'v6e': {64: 'v6e:8x8'},
    'tpu7x': {64: 'tpu7x:2x4x4'},
    'h200': {16: '1x2x8', 8: '1x1x8'},
}
# From so many texts on. More devices share out more texts, and then have more of attention's weights.
MESHES = {1: MeshConfig(expert=16, tensor=4), 128: MeshConfig(expert=32, tensor=2)}
SMALL_MESHES = {1: MESHES[1], 32: MESHES[128]}  # Of chips with little memory.
GPU_MESHES = {
    16: {1: MeshConfig(expert=8, tensor=2), 32: MeshConfig(expert=16)},
    8: {1: MeshConfig(expert=4, tensor=2), 32: MeshConfig(expert=8)},
}
DOLLARS = 2.0  # Per chip and hour, as `dsa_jax.cost` assumes.


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--chip', choices=TOPOLOGIES, default='v5p')
  parser.add_argument('--model', choices=MODELS, default='v32')
  parser.add_argument('--phase', choices=('decode', 'prefill'), default='decode')
  parser.add_argument('--batch', type=int, default=32, help='texts that are written side by side')
  parser.add_argument('--cache', choices=('bfloat16', 'fp8'), default='bfloat16')
  parser.add_argument('--weights', choices=('bfloat16', 'fp8', 'int8'), default='bfloat16')
  parser.add_argument('--devices', type=int, help='of the chip; 8 or 16 of h200')
  parser.add_argument('--folder', type=pathlib.Path, help='also write the report there')
  parser.add_argument('--compile', action='store_true', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if not options.compile:  # The compiler reads its environment once.
    command = [sys.executable, *sys.argv, '--compile']
    with tempfile.TemporaryDirectory() as folder:
      needed = environment(options.chip, pathlib.Path(folder) if options.chip in GPUS else None)
      sys.exit(subprocess.run(command, env=os.environ | needed).returncode)
  batch = 1 if options.phase == 'prefill' else options.batch
  n_devices = options.devices or max(TOPOLOGIES[options.chip])
  if n_devices not in TOPOLOGIES[options.chip]:
    parser.error(f'--devices of {options.chip} must be one of {tuple(TOPOLOGIES[options.chip])}.')
  report = plan(
      options.model, options.chip, n_devices, options.phase, batch, options.cache, options.weights
  )
  text = json.dumps(report, indent=1) + '\n'
  print(text)
  if options.folder:
    name = (
        f'{options.model}_{options.chip}_{n_devices}_{options.phase}_{batch}_'
        f'weights_{options.weights}_cache_{options.cache}.json'
    )
    (options.folder / name).write_text(text)
  used, granted = report['gib']['total'], granted_gib(options.chip)
  if used > granted:
    sys.exit(f'a device would need {used:.1f} GiB of {granted:.1f}.')


def plan(
    model: str, chip: str, n_devices: int, phase: str, batch: int, fmt: str, weight_format: str
) -> dict:
  """Compiles a step, and returns what it takes."""
  cfg = SIZES[model]
  meshes = SMALL_MESHES if chip == 'v6e' else MESHES
  meshes = GPU_MESHES[n_devices] if chip in GPUS else meshes
  sizes = meshes[max(n for n in meshes if n <= batch)]
  shape = tuple(sizes.sizes.values())
  topology = TOPOLOGIES[chip][n_devices]
  devices = np.array(devices_of(chip, topology)).reshape(shape)
  mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
  sizes.check_model(cfg)
  weights, reader = abstract_model(cfg, mesh, 'gpu' if chip in GPUS else 'tpu', weight_format)
  began = time.monotonic()
  with jax.set_mesh(mesh):
    lower = lower_decode if phase == 'decode' else lower_prefill
    compiled = lower(cfg, weights, reader, batch, fmt).compile()
  seconds = time.monotonic() - began
  memory = compiled.memory_analysis()
  gib = {
      'weights': share_bytes(weights),
      'cache': share_bytes(abstract_cache(cfg, reader, batch, fmt)),
      'arguments': memory.argument_size_in_bytes,
      'temporaries': memory.temp_size_in_bytes,
      'total': memory.argument_size_in_bytes
      + memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes,
  }
  sent = total_bytes(collectives(compiled.as_text(), dict(mesh.shape)))
  return {
      'model': model,
      'topology': topology,
      'devices': mesh.size,
      'mesh': sizes.sizes,
      'phase': phase,
      'batch': batch,
      'context': CONTEXT,
      'cache': fmt,
      'weights': weight_format,
      'gib': {name: round(value / 2**30, 2) for name, value in gib.items()},
      'collective_mib': {name: round(x / 2**20, 2) for name, x in sent.items() if x > 2**16},
      'by_roofline': roofline(cfg, chip, phase, batch, fmt, sizes),
      'compile_seconds': round(seconds),
  }


def devices_of(chip: str, topology: str) -> list:
  if chip not in GPUS:
    return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  return topologies.get_topology_desc(
      platform='cuda', topology_name='', topology=topology, target_config=GPUS[chip].config
  ).devices


def abstract_model(cfg: ModelConfig, mesh: Mesh, backend: str, fmt: str) -> tuple[list, Reader]:
  """Returns the shapes and shardings of a model's weights, and what reads with them."""
  params = abstract_weights(cfg, fmt, mesh=mesh)
  model = widened_by(nnx.merge(model_graph(cfg), params), backend)
  weights, structure = jax.tree.flatten((model, None))
  return weights, make_reader(structure, 'sparse', backend, 'indexer', False, shares_of(model, mesh))


def abstract_cache(cfg: ModelConfig, reader: Reader, batch: int, fmt: str):
  """Returns the shapes and shardings of a cache that has room for the context."""
  on_tpu = reader.backend == 'tpu'
  make = lambda: init_cache(cfg, batch, CONTEXT, fmt=fmt, whole_lines=on_tpu)
  return placed(jax.eval_shape(make), reader, batch)


def placed(tree: Any, reader: Reader, batch: int) -> Any:
  specs = reader.shares.specs(tree, batch)
  place = lambda x, spec: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(reader.shares.mesh, spec)
  )
  return jax.tree.map(place, tree, specs)


def lower_decode(cfg: ModelConfig, weights: list, reader: Reader, batch: int, fmt: str):
  """Lowers a step that draws a token of every text and reads it."""
  of = lambda dtype, *shape: jax.ShapeDtypeStruct((batch, *shape), dtype)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
  rest = of(jnp.float32, cfg.vocab_size), keys, of(jnp.int32)
  slots = Slots(abstract_cache(cfg, reader, batch, fmt), *placed(rest, reader, batch), None)
  kept, stop = np.ones(batch, bool), np.zeros(1, np.int32)
  return write.lower(
      weights, slots, kept, np.float32(1), np.float32(1), stop, top_k=0, reader=reader
  )


def lower_prefill(cfg: ModelConfig, weights: list, reader: Reader, batch: int, fmt: str):
  """Lowers a step that reads a chunk of a prompt, behind any number of tokens."""
  tokens, n_new = np.zeros((batch, CHUNK), np.int32), np.full(batch, CHUNK, np.int32)
  logits = placed(jax.ShapeDtypeStruct((batch, cfg.vocab_size), jnp.float32), reader, batch)
  cache = abstract_cache(cfg, reader, batch, fmt)
  return read_chunk.lower(weights, cache, tokens, n_new, logits, reader=reader, visible=0)


def share_bytes(tree: Any) -> int:
  """Returns the bytes of a tree on one device."""
  shards = ((x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree))
  return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards)


def granted_gib(chip: str) -> float:
  return DEVICES[chip].granted or DEVICES[chip].memory / 2**30


def roofline(
    cfg: ModelConfig, chip: str, phase: str, batch: int, fmt: str, mesh: MeshConfig
) -> dict:
  """Returns tokens per second and dollars per million by `dsa_jax.cost`, without collectives.

  The devices that share a text, those along `tensor`, count as one large chip; a single text, and a
  prompt, is on all of them.
  """
  n_chips = mesh.n_devices // DEVICES[chip].per_chip
  n_groups = 1 if batch == 1 else mesh.expert
  one, n = cost.CHIPS[chip], n_chips / n_groups
  group = dataclasses.replace(one, bf16=n * one.bf16, fp8=n * one.fp8, bandwidth=n * one.bandwidth)
  serving = cost.Serving(
      chip=group, cache={'bfloat16': 'bf16'}.get(fmt, fmt), expert_chips=n_groups, queries=1,
      batch=max(batch // n_groups, 1), chunk=CHUNK,
  )  # fmt: skip
  seconds = cost.token_seconds(cfg, CONTEXT, phase, sparse=True, serving=serving) / n_groups
  return {
      'tokens_per_second': round(1 / seconds),
      'dollars_per_million': round(cost.dollars_per_million(seconds * n_chips, DOLLARS), 3),
  }


if __name__ == '__main__':
  main()
