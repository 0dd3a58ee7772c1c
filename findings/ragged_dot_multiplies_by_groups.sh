#!/usr/bin/env bash
# jax 0.10.2, CPU: `jax.lax.ragged_dot(rows [N, D], weights [X, D, F], sizes)` is documented as a
# product of each row with the matrix of its own group, N * D * F multiplications. XLA for CPUs
# widens the rows to [N, X, D], zero outside of their group, and multiplies all of that. By XLA's own
# count, 64 groups take 64 times the work of one, and 72 times the temporaries.
#
# Seen on 2026-11-28 (also with jax 0.12.0.1):
#   groups 1: 1.0 x the work, 2 MiB of temporaries
#   groups 64: 64.5 x the work, 144 MiB of temporaries
#
# Here: dsa_jax/kernels/grouped_matmul/ multiplies tiles of rows on a CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

rows, width = 2048, 256


def compiled(groups):
  shapes = [((rows, width), jnp.float32), ((groups, width, width), jnp.float32), ((groups,), jnp.int32)]
  return jax.jit(jax.lax.ragged_dot).lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).compile()


work = {}
for groups in (1, 64):
  program = compiled(groups)
  work[groups] = program.cost_analysis()['flops'] / (2 * rows * width * width)
  temporaries = program.memory_analysis().temp_size_in_bytes / 2**20
  print(f'groups {groups}: {work[groups]:.1f} x the work, {temporaries:.0f} MiB of temporaries')
assert 0.9 < work[1] < 1.1 and 60 < work[64] < 70, work
PYTHON
