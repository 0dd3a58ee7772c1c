# SPDX-License-Identifier: Apache-2.0
"""Compiles a training step of a released model for a pod, on a machine that has none.

python experiments/pod_plan/plan.py --stage=sparse    # four minutes on two cores
python experiments/pod_plan/plan.py --stage=warmup
python experiments/pod_plan/plan.py --stage=warmup --model=glm5 --chip=tpu7x

The compiler is the TPU's own: pip install -e '.[compile]'. The script prints the devices, the mesh,
the memory of each device and what it sends in collectives, from the compiler's report and program,
and the days of the published training by arithmetic. It fails where a device would need more memory
than it has.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from flax import nnx
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from configs import deepseek_v32  # noqa: E402
from dsa_jax.chips import DEVICES  # noqa: E402
from dsa_jax.compile.chips import environment  # noqa: E402
from dsa_jax.compile.hlo import collectives, total_bytes  # noqa: E402
from dsa_jax.config import ModelConfig  # noqa: E402
from dsa_jax.cost.work import token_work  # noqa: E402
from dsa_jax.data.batch import Batch  # noqa: E402
from dsa_jax.families import SIZES  # noqa: E402
from dsa_jax.nn.attention.types import Mode  # noqa: E402
from dsa_jax.nn.transformer import Transformer  # noqa: E402
from dsa_jax.parallel.mesh import ALL_TOKENS, MESH_AXES, MeshConfig, shardings_of  # noqa: E402
from dsa_jax.training.optim import OptimConfig  # noqa: E402
from dsa_jax.training.stages import STAGES, StageConfig  # noqa: E402
from dsa_jax.training.state import model_graph, new_state, split_parts  # noqa: E402
from dsa_jax.training.step import make_train_step  # noqa: E402

MODELS = {name: SIZES[name] for name in ('v32', 'glm5')}
SMALL, LARGE = (MeshConfig(fsdp=n, context=8, expert=4, tensor=16) for n in (4, 8))
PODS = {  # Topology and mesh, by stage and chip.
    ('warmup', 'v5p'): ('v5p:8x16x16', SMALL),
    ('sparse', 'v5p'): ('v5p:16x16x16', LARGE),
    ('warmup', 'tpu7x'): ('tpu7x:8x8x16', SMALL),  # Each chip of it is two devices.
    ('sparse', 'tpu7x'): ('tpu7x:8x16x16', LARGE),
}
HBM_GIB = {chip: DEVICES[chip].granted for _, chip in PODS}
TOKENS = {'warmup': 2.1e9, 'sparse': 943.7e9}  # Tokens of the published training.
UTILISATION = 0.3  # The share of the chip's peak in bfloat16, which is assumed.


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--stage', choices=('warmup', 'sparse'), required=True)
  parser.add_argument('--model', choices=MODELS, default='v32')
  parser.add_argument('--chip', choices=HBM_GIB, default='v5p')
  parser.add_argument('--json', type=pathlib.Path, help='also write the report there')
  parser.add_argument('--compile', action='store_true', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if not options.compile:  # The compiler reads its environment once.
    command = [sys.executable, *sys.argv, '--compile']
    sys.exit(subprocess.run(command, env=os.environ | environment(options.chip)).returncode)
  report = plan(options.stage, options.model, options.chip)
  text = json.dumps(report, indent=1) + '\n'
  print(text)
  if options.json:
    options.json.write_text(text)
  used, granted = report['gib']['total'], HBM_GIB[options.chip]
  if used > granted:
    sys.exit(f'a device would need {used:.1f} GiB of {granted}.')


def plan(stage: str, model: str, chip: str) -> dict:
  """Compiles a stage of the published recipe; each micro-batch fills the mesh."""
  cfg, (topology, pod) = MODELS[model], PODS[stage, chip]
  entry = StageConfig(**deepseek_v32.get_config().stages[stage])
  micro_batches = math.ceil(entry.batch_size / (pod.fsdp * pod.expert))
  mesh = pod_mesh(topology, pod)
  began = time.monotonic()
  compiled, state = compile_step(cfg, entry, mesh, micro_batches)
  seconds = time.monotonic() - began
  flops = flops_per_token(cfg, stage, entry.seq_len)
  days = TOKENS[stage] * flops / (mesh.size * DEVICES[chip].bf16 * UTILISATION) / 86_400
  return {
      'stage': stage,
      'model': model,
      'topology': topology,
      'devices': mesh.size,
      'mesh': pod.sizes,
      'sequences': entry.batch_size,
      'context': entry.seq_len,
      'micro_batches': micro_batches,
      'gib': memory_gib(compiled, state, entry.trains),
      'collective_gib': collective_gib(compiled, mesh),
      'tflops_per_token': round(flops / 1e12, 3),
      'days': round(days, 2),
      'compile_seconds': round(seconds),
  }


def pod_mesh(topology: str, pod: MeshConfig) -> Mesh:
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  shape = tuple(pod.sizes.values())
  devices = np.array(devices[: pod.n_devices]).reshape(shape)
  return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def compile_step(cfg: ModelConfig, entry: StageConfig, mesh: Mesh, micro_batches: int):
  """Returns a stage's compiled step, and the shapes of the state it takes."""
  pod = MeshConfig(**mesh.shape)
  pod.check_model(cfg)
  pod.check_rows(entry.batch_size // micro_batches, entry.seq_len)
  mode = Mode(
      attention=entry.mode, backend='tpu', index_loss='indexer' in entry.trains, remat='layer'
  )
  with jax.set_mesh(mesh):
    step = make_train_step(
        model_graph(cfg), entry.trains, mode, OptimConfig(), micro_batches=micro_batches
    )
    state = abstract_state(cfg, entry.stage, mesh)
    rates = dict.fromkeys(entry.trains, 1e-5)
    return step.lower(state, abstract_batch(entry, mesh), rates).compile(), state


def memory_gib(
    compiled: jax.stages.Compiled, state: Any, trains: tuple[str, ...]
) -> dict[str, float]:
  """Returns the memory of one device: weights, moments and gradients by shape, the rest compiled.

  Gradients are among the temporaries, and once more in the sum of several micro-batches.
  """
  memory = compiled.memory_analysis()
  parts, _ = split_parts(state.params, trains)
  gib = {
      'weights': share_bytes(state.params),
      'moments': share_bytes(state.opt_state),
      'arguments': memory.argument_size_in_bytes,
      'temporaries': memory.temp_size_in_bytes,
      'gradients, of these': share_bytes(parts),
      'total': memory.argument_size_in_bytes + memory.temp_size_in_bytes,
  }
  return {name: round(value / 2**30, 2) for name, value in gib.items()}


def share_bytes(tree: Any) -> int:
  """Returns the bytes of a tree on one device."""
  return sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def collective_gib(compiled: jax.stages.Compiled, mesh: Mesh) -> dict[str, float]:
  """Returns GiB in collectives of one device and step: arrays as gathered, or before the sum."""
  totals = total_bytes(collectives(compiled.as_text(), dict(mesh.shape)))
  return {name: round(value / 2**30, 2) for name, value in totals.items() if value > 2**20}


def flops_per_token(cfg: ModelConfig, stage: str, context: int) -> float:
  """Returns FLOPs per token, averaged over a causal context.

  They are those of two forward passes, and twice the products of what is trained for its gradients.
  The divergence's own products are left out.
  """
  sparse = stage == 'sparse'
  works = token_work(cfg, context // 2, sparse=True, form='mqa')
  works = {work.part: work.flops for work in works}
  if not sparse:
    dense = token_work(cfg, context // 2, sparse=False, form='mha')
    works |= {work.part: work.flops for work in dense}
  trained = {'index projections', 'index scores'} if not sparse else set(works) - {'index scores'}
  return 2 * sum(works.values()) + 2 * sum(works[part] for part in trained)


def abstract_state(cfg: ModelConfig, stage: str, mesh: Mesh | AbstractMesh):
  fresh = lambda: nnx.state(Transformer(cfg, rngs=nnx.Rngs(0)))
  make = lambda: new_state(fresh(), STAGES[stage].trains, OptimConfig(), seed=0)
  shapes = jax.eval_shape(make)
  return jax.tree.map(_placed, shapes, shardings_of(shapes, mesh))


def abstract_batch(entry: StageConfig, mesh: Mesh) -> Batch:
  place, shape = NamedSharding(mesh, ALL_TOKENS), (entry.batch_size, entry.seq_len)
  dtypes = Batch(jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
  return Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype in dtypes))


def _placed(x, place):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


if __name__ == '__main__':
  main()
