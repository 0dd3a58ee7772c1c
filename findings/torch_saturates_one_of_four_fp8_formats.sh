#!/usr/bin/env bash
# torch 2.13.0 on a CPU, ml_dtypes 0.6.0 (the types of jax, TensorStore and safetensors for NumPy),
# NumPy 2.4.6, 2026-11-30: a number beyond the range of an FP8 format. One would expect two libraries that
# both write `float8_e4m3fn` to agree, and one library to treat its own formats alike. Instead torch
# saturates in E4M3FN, infinity too, and in no other format; ml_dtypes saturates nowhere. E8M0, the format
# of scales that are powers of two, differs as well: torch drops the sign, and takes 0 for 2^-127.
#
# Seen, of torch and of ml_dtypes:
#   600 in float8_e4m3fn: 448, nan          inf in float8_e4m3fn: 448, nan
#   600 in float8_e4m3fnuz: nan, nan        65536 in float8_e5m2: inf, inf
#   0 in float8_e8m0fnu: 5.9e-39, nan       -2 in float8_e8m0fnu: 2, nan
# Of 300,001 numbers between -448 and 448, all have the same codes in E4M3FN.
#
# So a weight that overflows in FP8 is a NaN that shows at once where jax has converted it, and a quietly
# clipped weight where torch has. Here: numbers are divided by the scale of their block before they become
# codes, and an export clips what rounding may have left beyond 448. Scales are float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'ml_dtypes==0.6.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PYTHON'
import ml_dtypes
import numpy as np
import torch


def codes(numbers, name):
  numbers = np.asarray(numbers, np.float32)
  ours = numbers.astype(getattr(ml_dtypes, name))
  theirs = torch.tensor(numbers).to(getattr(torch, name))
  return theirs, ours


def both(number, name):
  theirs, ours = codes([number], name)
  return float(theirs.float()[0]), float(ours.astype(np.float32)[0])


SEEN = [
    (600, 'float8_e4m3fn', 448, np.nan),
    (np.inf, 'float8_e4m3fn', 448, np.nan),
    (600, 'float8_e4m3fnuz', np.nan, np.nan),
    (65536, 'float8_e5m2', np.inf, np.inf),
    (0, 'float8_e8m0fnu', 2.0**-127, np.nan),
    (-2, 'float8_e8m0fnu', 2, np.nan),
]
for number, name, *expected in SEEN:
  seen = both(number, name)
  print(f'{number} in {name}: torch {seen[0]:.3g}, ml_dtypes {seen[1]:.3g}')
  np.testing.assert_array_equal(seen, expected)
theirs, ours = codes(np.linspace(-448, 448, 300_001), 'float8_e4m3fn')
assert np.array_equal(theirs.view(torch.uint8).numpy(), ours.view(np.uint8))
print('within the range of float8_e4m3fn, all codes are the same')
PYTHON
