#!/usr/bin/env bash
# safetensors 0.8.0, NumPy 2.4.6, ml_dtypes 0.6.0, 2026-11-30: two kinds of NumPy arrays that
# `safetensors.numpy.save` takes without a word and `load` does not give back. One would expect equal
# values, or a refusal.
#
# 1. An array whose axes are turned in memory (x.T, or a Fortran-ordered one), or one that skips entries,
#    comes back with the numbers of its memory in the shape of the view. 0.7.0 gave the right ones; so
#    jax's kernels [in, out], written as torch's [out, in] by a bare `.T`, are scrambled since 0.8.0. The
#    project knows it as issue 825. torch's own `save_file` refuses such tensors.
# 2. FP8 (`ml_dtypes.float8_e4m3fn`) is written and cannot be read: `load` raises KeyError: 'F8_E4M3', and
#    `load_file` AttributeError. `safetensors.flax` reads by way of NumPy and fails alike.
#
# Here: files are written by `safetensors.serialize_file` from contiguous copies, and read by offsets.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 0.7.0 0.8.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "safetensors==$version" 'numpy==2.4.6' 'ml_dtypes==0.6.0'
  "$folder/$version/bin/python" - <<'PYTHON'
import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import load, save

x = np.arange(6, dtype=np.float32).reshape(2, 3)
is_new = safetensors.__version__ == '0.8.0'
for name, view in {'x.T': x.T, 'x in Fortran order': np.asfortranarray(x), 'x[:, ::2]': x[:, ::2]}.items():
  back = load(save({'x': view}))['x']
  print(f'safetensors {safetensors.__version__}, {name}: saved {view.tolist()}, loaded {back.tolist()}')
  assert np.array_equal(view, back) != is_new
if is_new:
  content = save({'x': x.astype(ml_dtypes.float8_e4m3fn)})
  try:
    load(content)
  except KeyError as error:
    print(f'FP8: {len(content)} bytes saved; loading them: KeyError {error}')
  else:
    raise SystemExit('FP8 was loaded')
PYTHON
done
