#!/usr/bin/env bash
# optax 0.2.8 with jax 0.10.2, 2026-11-30: the norm of gradients in bfloat16, by which `clip_by_global_norm` clips.
# Squares within one array are added in float32. The sums of the arrays are then added one after the other
# in their own dtype, and in bfloat16 that sum stops growing at 256 times a summand.
#
# Seen, of a thousand gradients of norm 1, whose norm together is 31.6:
#   float32, and float16  31.6
#   bfloat16              16.0, so `clip_by_global_norm(1.0)` leaves a norm of 1.98
#   bfloat16, one array of a thousand ones: 31.6
# A model whose layers are arrays of their own has about a thousand of them; stacked layers are safe.
#
# Here: gradients are float32, and layers are stacked.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'optax==0.2.8' 'jax==0.10.2' 'jaxlib==0.10.2'
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax.numpy as jnp
import numpy as np
import optax

clip = optax.clip_by_global_norm(1.0)
norms, clipped = {}, {}
for dtype in 'float32', 'float16', 'bfloat16':
  gradients = [jnp.ones(1, dtype) for _ in range(1000)]
  norms[dtype] = float(optax.global_norm(gradients))
  left, _ = clip.update(gradients, clip.init(gradients))
  clipped[dtype] = float(np.sqrt(sum(float(x[0]) ** 2 for x in left)))
  print(dtype, 'norm', norms[dtype], 'and clipped to 1:', round(clipped[dtype], 3))
together = float(optax.global_norm([jnp.ones(1000, jnp.bfloat16)]))
print('bfloat16, in one array:', together)
assert abs(norms['float32'] - 31.6) < 0.1 and abs(norms['float16'] - 31.6) < 0.1
assert norms['bfloat16'] == 16 and clipped['bfloat16'] > 1.9
assert abs(together - 31.6) < 0.1
print('as described above')
PYTHON
