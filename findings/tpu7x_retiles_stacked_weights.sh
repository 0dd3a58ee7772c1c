#!/usr/bin/env bash
# jax 0.10.2, libtpu 0.0.42.1, compiling for TPU7x: a program that scans over stacked bfloat16 weights
# begins by copying all of them into another tiling, T(16,128) in place of the T(8,128) in which its
# arguments come. So a step needs the memory of its weights twice, however few rows they multiply. One
# would expect next to no temporaries, as on v5p and v6e. Letting the compiler choose the argument's
# layout (`Layout.AUTO`) changes nothing: it chooses T(8,128) and copies. Asking for the tiling does.
#
# Seen on 2026-11-29 (also with jax 0.12.0.1 and libtpu 0.0.52), for 256 MiB of weights and one row:
#   v5p, as it comes: 0 MiB of temporaries
#   tpu7x, as it comes: 256 MiB of temporaries
#   tpu7x, Layout.AUTO: 256 MiB of temporaries
#   tpu7x, tiled (16, 128): 0 MiB of temporaries
#
# Here: a decode step of 128 texts that fits 64 v5p does not fit 32 TPU7x (experiments/serving_plan).
# Weights are not placed in that tiling yet.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2' 'libtpu==0.0.42.1'
cat >"$folder/scan.py" <<'PYTHON'
import sys

import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
import jax.numpy as jnp
import numpy as np

name, topology, *expected = sys.argv[1:]
device = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[:1]
place = jax.NamedSharding(jax.sharding.Mesh(np.array(device), ('x',)), jax.P())
weights = jax.ShapeDtypeStruct((8, 4096, 4096), jnp.bfloat16)
row = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16)
layouts = {
    'as it comes': place,
    'Layout.AUTO': Format(Layout.AUTO, place),
    'tiled (16, 128)': Format(Layout((0, 1, 2), tiling=((16, 128), (2, 1))), place),
}


def layers(weights, x):
  return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, weights)[0]


for (how, layout), wanted in zip(layouts.items(), expected):
  program = jax.jit(layers, in_shardings=(layout, place)).lower(weights, row).compile()
  mib = round(program.memory_analysis().temp_size_in_bytes / 2**20)
  print(f'{name}, {how}: {mib} MiB of temporaries')
  assert mib == int(wanted), (mib, wanted)
PYTHON
compile_for() {
  TPU_ACCELERATOR_TYPE=$1 TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost JAX_PLATFORMS=cpu \
    "$folder/venv/bin/python" "$folder/scan.py" "${@:2}"
}
compile_for v5p-8 v5p v5p:2x2x1 0
compile_for tpu7x-8 tpu7x tpu7x:2x2x1 256 256 0
