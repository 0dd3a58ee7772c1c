#!/usr/bin/env bash
# jax 0.10.2, libtpu 0.0.42.1, compiling for v6e: a program whose arguments alone exceed the memory is
# refused for its "HLO temporaries", of which it has none. The number in the message is that of all that
# the program holds, arguments included. One would expect the message to name them, since the remedies
# differ: temporaries are an affair of the program, arguments of the mesh and of the formats.
#
# Seen on 2026-11-29, for a sum of one number of each of four arrays:
#   30 GiB of arguments: compiled, 0.00 GiB of temporaries
#   40 GiB of arguments: refused, "the total memory required for HLO temporaries (40.00G) exceeds
#     available HBM (31.25G)"
#
# Here: a decode step that lacked 0.1 GiB for its weights and caches seemed to make copies of them
# (experiments/serving_plan). `Sampler.load` adds them up before it loads anything.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2' 'libtpu==0.0.42.1'
cat >"$folder/arguments.py" <<'PYTHON'
import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np

GIB = 2**30
device = topologies.get_topology_desc(platform='tpu', topology_name='v6e:2x2').devices[:1]
place = jax.NamedSharding(jax.sharding.Mesh(np.array(device), ('x',)), jax.P())
program = jax.jit(lambda *arrays: sum(x[0, 0] for x in arrays), in_shardings=(place,) * 4)
for gib in 30, 40:
  arrays = [jax.ShapeDtypeStruct((gib * GIB // 2**14, 1024), jnp.float32)] * 4
  try:
    memory = program.lower(*arrays).compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    print(f'{gib} GiB of arguments: refused, {error}')
    assert gib == 40 and 'HLO temporaries (40.00G)' in str(error), error
  else:
    temporaries = memory.temp_size_in_bytes / GIB
    print(f'{gib} GiB of arguments: compiled, {temporaries:.2f} GiB of temporaries')
    assert gib == 30 and memory.argument_size_in_bytes == 30 * GIB and temporaries < 0.01
PYTHON
TPU_ACCELERATOR_TYPE=v6e-4 TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost JAX_PLATFORMS=cpu \
  "$folder/venv/bin/python" "$folder/arguments.py"
