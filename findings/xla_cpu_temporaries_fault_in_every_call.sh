#!/usr/bin/env bash
# jax and jaxlib 0.10.2 on a CPU, glibc 2.36: a compiled program allocates its temporaries anew in every
# call, with malloc. Those of more than 32 MiB, the largest threshold that glibc takes, are mapped and
# unmapped each time, so the kernel clears every page of them in every call. One would expect a program
# that runs in a loop to reuse its memory. Below 32 MiB glibc keeps the block, and it does.
#
# Seen on 2026-11-30, page faults of 4 KiB in each call:
#   24 MiB of temporaries: 0
#   48 MiB of temporaries: 12,288, one for each page
#   48 MiB, with MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1073741824: 0
#
# Here: a step of the quickstart has 90 MB of temporaries and 22,000 faults. They take 50 of its 250
# milliseconds of processor time. With those three variables a loop of steps alone was 11 to 19 percent
# faster, but a whole run, which compiles beside it, was slower, so we do not set them. Kernels keep
# blocks below the limit where they can (`few_block_s` of `dsa_jax/kernels/index_topk/xla.py`).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2'
cat >"$folder/faults.py" <<'PYTHON'
import resource
import sys

import jax
import jax.numpy as jnp

mib, per_call = int(sys.argv[1]), int(sys.argv[2])
x, w = jnp.ones((mib * 256, 8)), jnp.ones((8, 1024))
program = jax.jit(lambda x, w: jax.nn.logsumexp(x @ w)).lower(x, w).compile()
assert program.memory_analysis().temp_size_in_bytes // 2**20 == mib, program.memory_analysis()
for _ in range(50):  # glibc raises its threshold as it sees blocks freed.
  jax.block_until_ready(program(x, w))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
  jax.block_until_ready(program(x, w))
faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20
print(f'{mib} MiB of temporaries: {faults:,.0f} page faults in each call')
assert abs(faults - per_call) < 600, faults
PYTHON
export JAX_PLATFORMS=cpu
"$folder/venv/bin/python" "$folder/faults.py" 24 0
"$folder/venv/bin/python" "$folder/faults.py" 48 12288
MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1073741824 "$folder/venv/bin/python" "$folder/faults.py" 48 0
