#!/usr/bin/env bash
# numpy 2.4.6 with ml_dtypes 0.6.0 (bfloat16, FP8 and int4 of jax's arrays), 2026-11-30: the mean of a
# thousand ones. One would expect 1 in every dtype, as numpy gives for float16, for which it adds in float32.
# For the dtypes of ml_dtypes, `sum`, `mean`, `std` and `average` add one number after the other in the dtype
# itself, where a sum stops growing once the next number is below half of its last digit. No warning is given.
#
# Seen, of a thousand ones:
#   float16         mean 1.0
#   bfloat16        mean 0.255859 (the sum stops at 256), and a standard deviation of 0.503906
#   float8_e4m3fn   mean 0.015625 (the sum stops at 16)
#   float8_e5m2     mean 0.0078125 (the sum stops at 8)
#   int4            a hundred sevens have the mean 0 and the median -1: their sum wraps around
# `x @ x` adds in a wider dtype and is right; `x.dot(x)`, which others take for the same, is nan in float8_e4m3fn.
# Weights of checkpoints arrive as such arrays, and means are what one compares first.
#
# Here: whatever is added up on the host is float32 or wider.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'numpy==2.4.6' 'ml_dtypes==0.6.0'
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import ml_dtypes
import numpy as np

ones = {name: np.ones(1000, getattr(ml_dtypes, name, np.float16)) for name in
        ('float16', 'bfloat16', 'float8_e4m3fn', 'float8_e5m2')}
means = {name: float(x.mean()) for name, x in ones.items()}
print(means)
assert means == {'float16': 1, 'bfloat16': 0.255859375, 'float8_e4m3fn': 1 / 64, 'float8_e5m2': 1 / 128}
deviation = float(ones['bfloat16'].std())
print('standard deviation of a thousand ones in bfloat16:', deviation)
assert round(deviation, 6) == 0.503906
x = ones['float8_e4m3fn']
print('float8_e4m3fn: x @ x', float(x @ x), 'and x.dot(x)', float(x.dot(x)))
assert float(x @ x) == 1000 and np.isnan(float(x.dot(x)))
sevens = np.full(100, 7, ml_dtypes.int4)
print('a hundred sevens in int4: mean', int(sevens.mean()), 'median', int(np.median(sevens)))
assert (int(sevens.mean()), int(np.median(sevens))) == (0, -1)
print('as described above')
PYTHON
