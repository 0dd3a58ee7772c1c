# SPDX-License-Identifier: Apache-2.0
"""Compiles one training step of the whole model for a pod that is not there.

python experiments/pod_plan/plan.py --chip v5p --stage sparse
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
import jax.numpy as jnp
import numpy as np

from configs import deepseek_v32
from dsa_jax.config import ModelConfig
from dsa_jax.data.batch import Batch
from dsa_jax.nn.mla import Mode
from dsa_jax.optim import OptimConfig
from dsa_jax.sharding import ALL_TOKENS, MESH_AXES, MeshConfig, shardings_of
from dsa_jax.stages import STAGES
from dsa_jax.state import abstract_params, model_graph, new_state
from dsa_jax.targets import environment
from dsa_jax.train_step import make_train_step

def main():
  p = argparse.ArgumentParser()
  p.add_argument('--chip', default='v5p'); p.add_argument('--topology', default='v5p:8x16x16')
  p.add_argument('--mesh', type=json.loads, default={'fsdp': 4, 'context': 8, 'expert': 4, 'tensor': 16})
  p.add_argument('--stage', default='sparse'); p.add_argument('--seq', type=int, default=131072)
  p.add_argument('--batch', type=int, default=16); p.add_argument('--micro', type=int, default=1)
  p.add_argument('--layers', type=int, default=61)
  p.add_argument('--worker', action='store_true')
  a = p.parse_args()
  if not a.worker:
    sys.exit(subprocess.run([sys.executable, __file__, *sys.argv[1:], '--worker'], env=os.environ | environment(a.chip)).returncode)
  cfg = dataclasses.replace(ModelConfig(), n_layers=a.layers)
  sizes = MeshConfig(**a.mesh)
  devices = topologies.get_topology_desc(platform='tpu', topology_name=a.topology).devices
  print(len(devices), sizes.n_devices)
  mesh = Mesh(np.array(devices[:sizes.n_devices]).reshape(tuple(sizes.sizes.values())), MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
  trains = STAGES[a.stage].trains
  mode = Mode(attention=STAGES[a.stage].attention[0], backend='tpu', index_loss='indexer' in trains, remat=True)
  with jax.set_mesh(mesh):
    def make():
      from dsa_jax.nn.transformer import Transformer
      from flax import nnx
      return new_state(nnx.state(Transformer(cfg, rngs=nnx.Rngs(0))), trains, OptimConfig(), seed=0)
    shapes = jax.eval_shape(make)
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    state = jax.tree.map(put, shapes, shardings_of(shapes, mesh))
    ints = jax.ShapeDtypeStruct((a.batch, a.seq), jnp.int32, sharding=NamedSharding(mesh, ALL_TOKENS))
    batch = Batch(ints, ints, put(jax.ShapeDtypeStruct(ints.shape, jnp.float32), ints.sharding), ints, ints)
    step = make_train_step(model_graph(cfg), trains, mode, OptimConfig(), micro_batches=a.micro)
    t = time.time()
    lowered = step.lower(state, batch, dict.fromkeys(trains, 1e-3)); print('lowered', time.time() - t)
    c = lowered.compile(); print('compiled', time.time() - t)
    m = c.memory_analysis()
    print({k: round(getattr(m, k) / 2**30, 2) for k in ('argument_size_in_bytes', 'output_size_in_bytes', 'alias_size_in_bytes', 'temp_size_in_bytes')})
    open('/tmp/pod_hlo.txt', 'w').write(c.as_text())

main()
