#!/usr/bin/env bash
# jax 0.10.2 with numpy 2.4.6 and ml_dtypes 0.6.0, 2026-11-30 (jax 0.12.0.1 with numpy 2.5.5 does the same): sums of
# arrays in int4 and int2, the dtypes of quantised weights. `jnp.sum` and `jnp.prod` promise to add small integers
# in a wider dtype, as they do with int8. They ask numpy how wide the dtype is, and numpy does not know it.
#
# Seen:
#   jnp.sum and jnp.prod of int4, uint4, int2, uint2: ValueError "Invalid integer data type 'V'."
#   jnp.mean of int4 and uint4 is right; of four ones in int2 it is -1, without a warning
#   jnp.argmax of int2 stops within the compiler: "INTERNAL: RET_CHECK failure"
# `x.astype(jnp.int32)` before the sum helps.
#
# Here: integers narrower than int8 are not used; codes of int8 are widened before they are added.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'numpy==2.4.6' 'ml_dtypes==0.6.0' 'jax==0.10.2' 'jaxlib==0.10.2'
cd "$folder"
JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import jax.numpy as jnp

assert int(jnp.sum(jnp.full(1000, 127, jnp.int8))) == 127_000
for name in 'int4', 'uint4', 'int2', 'uint2':
  x = jnp.ones(4, getattr(jnp, name))
  for reduce in jnp.sum, jnp.prod:
    try:
      raise SystemExit(f'{reduce.__name__} of {name} gives {reduce(x)} now')
    except ValueError as error:
      print(name, reduce.__name__, error)
      assert "Invalid integer data type 'V'" in str(error)
  assert int(jnp.sum(x.astype(jnp.int32))) == 4

means = {name: int(jnp.mean(jnp.ones(4, getattr(jnp, name)))) for name in ('int8', 'int4', 'int2')}
print('means of four ones:', means)
assert means == {'int8': 1, 'int4': 1, 'int2': -1}
try:
  raise SystemExit(f'argmax of int2 gives {jnp.argmax(jnp.ones(4, jnp.int2))} now')
except RuntimeError as error:
  print('argmax of int2:', str(error)[:28])
  assert 'RET_CHECK failure' in str(error)
print('as described above')
PYTHON
