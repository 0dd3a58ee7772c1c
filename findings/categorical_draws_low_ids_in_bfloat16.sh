#!/usr/bin/env bash
# jax 0.10.2, 2026-11-30 (0.12.0.1 does the same): draws from 4096 tokens that are all as likely as each other, by
# `jax.random.categorical` on logits in bfloat16, the dtype in which models give them. Noise is added to
# each logit and the largest sum is drawn. The noise has the logits' dtype: in bfloat16 it takes so few values,
# none above 4.84, that dozens of tokens share the largest, and of these the lowest id is drawn.
#
# Seen, of 20,000 draws:
#   float32               50 % in the lower half of the ids, 10 % in the first tenth
#   float16               88 % and 34 %
#   bfloat16              100 % and 96 %; five of six tokens are never drawn
#   bfloat16, mode='high' 53 % and 10 %
# For the same reason, a million normal numbers in bfloat16 have 128 values, none above 2.52.
# A model that samples so prefers the ids that its tokenizer gave first, without any sign of it in its texts.
#
# Here: logits are float32 (`nn/transformer.py`), and draws are made from them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2'
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

N = 4096
shares = {}
for dtype, mode in ('float32', None), ('float16', None), ('bfloat16', None), ('bfloat16', 'high'):
  draws = jax.random.categorical(jax.random.key(0), jnp.zeros(N, dtype), shape=(20_000,), mode=mode)
  draws = np.asarray(draws)
  shares[dtype, mode] = [round(float(np.mean(draws < N // part)), 3) for part in (2, 10)]
  print(dtype, mode, shares[dtype, mode], np.unique(draws).size, 'tokens are drawn at all')
noise = jax.random.gumbel(jax.random.key(0), (100_000,), jnp.bfloat16)
print('largest noise in bfloat16:', float(noise.max()))
normal = np.asarray(jax.random.normal(jax.random.key(0), (1_000_000,), jnp.bfloat16)).astype(float)
print('a million normal numbers in bfloat16:', np.unique(normal).size, 'values, the largest', normal.max())
assert np.unique(normal).size == 128 and normal.max() < 2.52
assert abs(shares['float32', None][0] - 0.5) < 0.02
assert shares['float16', None][0] > 0.85
assert shares['bfloat16', None][0] > 0.99 and shares['bfloat16', None][1] > 0.95
assert shares['bfloat16', 'high'][0] < 0.56
print('as described above')
PYTHON
