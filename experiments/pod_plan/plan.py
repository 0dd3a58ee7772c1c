# SPDX-License-Identifier: Apache-2.0
"""Compiles a training step of the released model for a pod, on a machine that has none.

python experiments/pod_plan/plan.py --stage=sparse    # ten minutes on two cores
python experiments/pod_plan/plan.py --stage=warmup

The compiler is the TPU's own: pip install -e '.[compile]'. Prints the devices, the mesh, and GiB for
each device from the compiler's report; fails where they are more than a v5p has.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import time

from flax import nnx
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from configs import deepseek_v32  # noqa: E402
from dsa_jax.config import ModelConfig  # noqa: E402
from dsa_jax.data.batch import Batch  # noqa: E402
from dsa_jax.nn.mla import Mode  # noqa: E402
from dsa_jax.nn.transformer import Transformer  # noqa: E402
from dsa_jax.optim import OptimConfig  # noqa: E402
from dsa_jax.sharding import ALL_TOKENS, MESH_AXES, MeshConfig, shardings_of  # noqa: E402
from dsa_jax.stages import STAGES, StageConfig  # noqa: E402
from dsa_jax.state import model_graph, new_state  # noqa: E402
from dsa_jax.targets import environment  # noqa: E402
from dsa_jax.train_step import make_train_step  # noqa: E402

PODS = {  # By stage.
    'warmup': ('v5p:8x16x16', MeshConfig(fsdp=4, context=8, expert=4, tensor=16)),
    'sparse': ('v5p:16x16x16', MeshConfig(fsdp=8, context=8, expert=4, tensor=16)),
}
HBM_GIB = 95.74  # What the compiler grants a program on a v5p.


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--stage', choices=('warmup', 'sparse'), required=True)
  parser.add_argument('--json', type=pathlib.Path, help='also write the report there')
  parser.add_argument('--compile', action='store_true', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if not options.compile:  # The compiler reads its environment once.
    command = [sys.executable, *sys.argv, '--compile']
    sys.exit(subprocess.run(command, env=os.environ | environment('v5p')).returncode)
  report = plan(options.stage, ModelConfig(), deepseek_v32.get_config().stages[options.stage])
  text = json.dumps(report, indent=1) + '\n'
  print(text)
  if options.json:
    options.json.write_text(text)
  used = report['gib']['arguments'] + report['gib']['temporaries']
  if used > HBM_GIB:
    sys.exit(f'a device would need {used:.1f} GiB of {HBM_GIB}.')


def plan(stage: str, cfg: ModelConfig, config) -> dict:
  """Compiles the step of a stage as its config has it, with as many sequences at a time as the mesh takes."""
  entry, (topology, pod) = StageConfig(**config), PODS[stage]
  micro_batches = math.ceil(entry.batch_size / (pod.fsdp * pod.expert))
  pod.check_model(cfg)
  pod.check_rows(entry.batch_size // micro_batches, entry.seq_len)
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  shape = tuple(pod.sizes.values())
  mesh = Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
  mode = Mode(attention=entry.mode, backend='tpu', index_loss='indexer' in entry.trains, remat=True)
  with jax.set_mesh(mesh):
    step = make_train_step(
        model_graph(cfg), entry.trains, mode, OptimConfig(), micro_batches=micro_batches
    )
    began = time.monotonic()
    lowered = step.lower(
        abstract_state(cfg, stage, mesh), abstract_batch(entry, mesh), dict.fromkeys(entry.trains, 1e-5)
    )
    compiled = lowered.compile()
  memory = compiled.memory_analysis()
  gib = {
      'arguments': memory.argument_size_in_bytes / 2**30,
      'temporaries': memory.temp_size_in_bytes / 2**30,
  }
  return {
      'stage': stage,
      'topology': topology,
      'devices': len(devices),
      'mesh': pod.sizes,
      'sequences': entry.batch_size,
      'context': entry.seq_len,
      'micro_batches': micro_batches,
      'gib': {name: round(value, 2) for name, value in gib.items()},
      'compile_seconds': round(time.monotonic() - began),
  }


def abstract_state(cfg: ModelConfig, stage: str, mesh: Mesh):
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
