#!/usr/bin/env bash
# jax 0.10.2, Pallas for Triton: a masked load from an FP8 array with `other=0` runs in interpret mode,
# with the right numbers, and cannot be lowered for a GPU: NotImplementedError, 'cannot cast ... tensor<
# 64xi32> ... tensor<64xf8E4M3FN>'. With `other=0.0` it lowers, and so does `other=0` from arrays of bfloat16
# and of int8. One would expect that a Python 0 takes the dtype of the array, as in jax.numpy, or that the
# interpreter refuses what the compiler does. So a test of interpreted kernels passes, and nothing is
# seen before there is a GPU, or before one lowers for one, as here.
#
# Seen on 2026-11-29:
#   float8_e4m3fn, other=0: interpreted, not lowered
#   float8_e4m3fn, other=0.0: interpreted, lowered
#   float8_e5m2, other=0: interpreted, not lowered
#   bfloat16, other=0: interpreted, lowered
#   int8, other=0: interpreted, lowered
#
# Here: `dsa_jax/kernels/gpu/triton.py` passes a float for FP8.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2'
cat >"$folder/load.py" <<'PYTHON'
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp
import numpy as np

WANTED = [
    ('float8_e4m3fn', 0, 'interpreted, not lowered'),
    ('float8_e4m3fn', 0.0, 'interpreted, lowered'),
    ('float8_e5m2', 0, 'interpreted, not lowered'),
    ('bfloat16', 0, 'interpreted, lowered'),
    ('int8', 0, 'interpreted, lowered'),
]


def kernel(x, out, *, other):
  at = jnp.arange(64)
  values = triton.load(x.at[at], mask=at < 50, other=other)
  triton.store(out.at[at], values.astype(jnp.float32))


for dtype, other, wanted in WANTED:
  x = (jnp.arange(50) % 8).astype(dtype)
  call = functools.partial(
      pl.pallas_call, functools.partial(kernel, other=other),
      out_shape=jax.ShapeDtypeStruct((64,), jnp.float32), grid=(1,),
  )
  got = call(interpret=True)(x)
  np.testing.assert_array_equal(got, np.append(np.arange(50) % 8, np.zeros(14)))
  seen = 'interpreted, '
  try:
    jax.jit(call(compiler_params=triton.CompilerParams())).trace(x).lower(lowering_platforms=('cuda',))
    seen += 'lowered'
  except NotImplementedError as error:
    assert 'cannot cast' in str(error), error
    seen += 'not lowered'
  print(f'{dtype}, other={other}: {seen}')
  assert seen == wanted, (seen, wanted)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/load.py"
