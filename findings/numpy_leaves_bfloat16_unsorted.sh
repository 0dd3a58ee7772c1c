#!/usr/bin/env bash
# numpy 2.4.6 with ml_dtypes 0.6.0, 2026-11-30: sorting numbers of which one is NaN. numpy promises to put
# NaN last, and does so in float16, float32 and float64. For bfloat16 and the FP8 dtypes of ml_dtypes, each
# comparison with NaN is simply false, and the NaN stops the sort: the *other* numbers come back in the wrong order.
# Whatever stands on sorting goes wrong with it, and none of it warns.
#
# Seen, of [3, NaN, 1, 2]:
#   float16    sort [1, 2, 3, NaN]
#   bfloat16, float8_e4m3fn, float8_e5m2
#              sort, argsort and unique change nothing: [3, NaN, 1, 2], with kind='stable', too
#   of 200 normal numbers and 3 NaN: `np.unique` repeats some, and `np.median` gives a number, not NaN
# `jnp.sort` of the same arrays is right.
#
# Here: nothing on the host sorts numbers of these dtypes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'numpy==2.4.6' 'ml_dtypes==0.6.0' 'jax==0.10.2' 'jaxlib==0.10.2'
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax.numpy as jnp
import ml_dtypes
import numpy as np

numbers = np.array([3, np.nan, 1, 2], np.float32)
half = np.sort(numbers.astype(np.float16)).tolist()
print('float16', half)
assert half[:3] == [1, 2, 3] and np.isnan(half[3])
for name in 'bfloat16', 'float8_e4m3fn', 'float8_e5m2':
  x = numbers.astype(getattr(ml_dtypes, name))
  results = [np.sort(x), np.sort(x, kind='stable'), np.unique(x), x[np.argsort(x)]]
  print(name, *(result.astype(float).tolist() for result in results))
  for result in results:
    np.testing.assert_array_equal(result.astype(np.float32), numbers)
  right = np.asarray(jnp.sort(jnp.asarray(x))).astype(float).tolist()
  assert right[:3] == [1, 2, 3] and np.isnan(right[3])

many = np.random.default_rng(0).standard_normal(200).astype(np.float32)
many[[3, 50, 120]] = np.nan
x = many.astype(ml_dtypes.bfloat16)
wide = x.astype(np.float32)
print('of 200:', np.unique(x).size, 'and', np.unique(wide).size, 'unique; medians', np.median(x), np.median(wide))
assert np.unique(x).size > np.unique(wide).size
assert not np.isnan(float(np.median(x))) and np.isnan(np.median(wide))
print('as described above')
PYTHON
