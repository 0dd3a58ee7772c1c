#!/usr/bin/env bash
# jax 0.10.2 (the same rule stands in 0.12.0.1), 2026-11-30: offsets of a Pallas kernel for a GPU, into a large array.
# Pallas' Triton takes offsets of 64 bits if an array has more than 2^32 bytes, else of 32. But offsets are
# signed, and count elements. An array of one byte an element, such as codes in int8 or FP8, needs 64 bits from
# 2^31 elements on, and gets them from 2^32 on.
#
# Seen, of arrays of 3 * 2^30 elements, as `debug=True` prints the module (it is lowered, and run nowhere):
#   int8, float8_e4m3fn   tensor<128xi32>
#   bfloat16              tensor<128xi64>
# All 256 experts of a layer of DeepSeek-V3.2, 7168 x 2048 in FP8, are 3.5 * 2^30 elements.
#
# Here: the one kernel that reads such codes refuses these sizes by name (`grouped_matmul/gpu.py`).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2'
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import io
import re

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp


def kernel(codes, out):
  own = pl.ds(pl.program_id(0) * 128, 128)
  out[own] = triton.load(codes.at[own]).astype(jnp.float32)


def module_of(n: int, dtype: str) -> str:
  whole = pl.BlockSpec(memory_space=pl.ANY)
  read = pl.pallas_call(
      kernel, out_shape=jax.ShapeDtypeStruct((256,), jnp.float32), grid=(2,), in_specs=[whole],
      out_specs=whole, compiler_params=triton.CompilerParams(), debug=True,
  )
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    jax.jit(read).trace(jax.ShapeDtypeStruct((n,), dtype)).lower(lowering_platforms=('cuda',))
  return printed.getvalue()


seen = {}
for dtype in 'int8', 'float8_e4m3fn', 'bfloat16':
  for name, n in ('2^31', 2**31), ('3 * 2^30', 3 * 2**30), ('2^32 + 128', 2**32 + 128):
    codes = re.search(r'tt\.addptr .*', module_of(n, dtype)).group()
    seen[dtype, name] = re.search(r'tensor<128x(i\d\d)>', codes).group(1)
    print(f'{dtype}, {name} elements: offsets are {seen[dtype, name]}')
for dtype in 'int8', 'float8_e4m3fn':
  assert [seen[dtype, name] for name in ('2^31', '3 * 2^30', '2^32 + 128')] == ['i32', 'i32', 'i64']
assert seen['bfloat16', '3 * 2^30'] == 'i64'
print('as described above')
PYTHON
