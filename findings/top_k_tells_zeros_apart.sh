#!/usr/bin/env bash
# jax and jaxlib 0.10.2 on a CPU, 2026-11-30: `jax.lax.top_k` says that of equal elements the first comes
# first. -0.0 and 0.0 are equal, and jnp.argmax and jnp.argsort treat them so. top_k (and
# `approx_max_k`) ranks -0.0 below 0.0.
#
# Seen, of [-0.0, 0.0, -0.0, 0.0, -1.0]:
#   argmax 0; argsort from the largest 0 1 2 3 4; top_k 1 3 0; approx_max_k 1 3 0
#
# The scores of a lightning indexer are full of both: a head's weight times relu(0) has the sign of the
# weight. So two programs that select the same k scores can select other tokens, and one sorted by
# argsort does not agree with one by top_k. Here: the definition and all kernels of `index_topk` count
# the two zeros as equal (`tests/kernels/test_index_topk.py`).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

x = jnp.array([-0.0, 0.0, -0.0, 0.0, -1.0])
seen = {
    'argmax': [int(jnp.argmax(x))],
    'argsort from the largest': jnp.argsort(x, descending=True, stable=True).tolist(),
    'top_k': jax.lax.top_k(x, 3)[1].tolist(),
    'approx_max_k': jax.lax.approx_max_k(x, 3)[1].tolist(),
}
for name, indices in seen.items():
  print(f'{name}: {indices}')
assert list(seen.values()) == [[0], [0, 1, 2, 3, 4], [1, 3, 0], [1, 3, 0]]
PYTHON
