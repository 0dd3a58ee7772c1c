# SPDX-License-Identifier: Apache-2.0
"""Compiles products with codes for the chip of the first argument, and prints their temporaries.

Run by test_codes.py in a process of its own, with the environment of the compiler.
"""

import json
import sys

import jax
import jax.numpy as jnp

from dsa_jax.compile.chips import lower_for
from dsa_jax.kernels import grouped_matmul
from dsa_jax.kernels.block_scaled import BlockScaled
from dsa_jax.nn.project import project

N_ROWS, N_GROUPS, INNER, COLUMNS = 64, 8, 1536, 2048


def main(chip: str):
  backend = 'gpu' if chip == 'h200' else 'tpu'
  of = jax.ShapeDtypeStruct
  for dtype in jnp.float8_e4m3fn, jnp.int8:
    blocks = of((N_GROUPS, INNER // 128, COLUMNS // 128), jnp.float32)
    codes = BlockScaled(of((N_GROUPS, INNER, COLUMNS), dtype), blocks, backend)
    rows = of((N_ROWS, INNER), jnp.bfloat16)
    grouped = lambda x, w, sizes: grouped_matmul(x, w, sizes, backend=backend)
    one = jax.tree.map(lambda x: of(x.shape[1:], x.dtype), codes)
    for args in (grouped, rows, codes, of((N_GROUPS,), jnp.int32)), (project, rows, one):
      compiled = lower_for(chip, *args).compile()
      temporaries = compiled.memory_analysis().temp_size_in_bytes
      print(json.dumps({'temporaries': temporaries, 'codes': args[2].codes.size}))


if __name__ == '__main__':
  main(sys.argv[1])
