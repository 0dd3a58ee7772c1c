#!/usr/bin/env bash
# flax 0.12.8 with jax 0.10.2, 2026-11-30: the gradient of an embedding whose layer computes in bfloat16, as in
# nearly every recipe of mixed precision, with float32 parameters.
# `Embed` casts the table before it looks words up, so the gradients of all places of a word are added up in a
# bfloat16 table, one after the other. Such a sum of equal terms stops at 256 of them; only then it is cast back.
#
# Seen, of 4,096 places of one word with a gradient of 1 each (`nnx.Embed` and `linen.Embed` alike):
#   dtype=float32   4096
#   dtype=bfloat16   256, in a gradient whose dtype is float32
#   dtype=bfloat16, looked up first and then cast: 4096
# A layer's bias, which as many tokens share, has the right gradient (4096): its sum is a reduction.
# So gradients of frequent words are too short, by how much depends on the size of a micro-batch and on the
# mesh, and norms and clipping see it. (Adam divides much of it out.)
#
# Here: `Transformer.embedded` casts what it has read, as of the same day; it had the same fault.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'flax==0.12.8' 'jax==0.10.2' 'jaxlib==0.10.2'
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
from flax import linen, nnx
import jax
import jax.numpy as jnp

words = jnp.zeros((1, 4096), jnp.int32)
total = lambda x: x.astype(jnp.float32).sum()
seen = {}
for dtype in 'float32', 'bfloat16':
  layer = nnx.Embed(16, 8, dtype=dtype, param_dtype='float32', rngs=nnx.Rngs(0))
  [gradient] = jax.tree.leaves(nnx.grad(lambda layer: total(layer(words)))(layer))
  older = linen.Embed(16, 8, dtype=dtype, param_dtype='float32')
  params = older.init(jax.random.key(0), words)
  [older_gradient] = jax.tree.leaves(jax.grad(lambda p: total(older.apply(p, words)))(params))
  table = layer.embedding[...]
  late = jax.grad(lambda table: total(table[words].astype(dtype)))(table)
  dense = nnx.Linear(8, 8, dtype=dtype, param_dtype='float32', rngs=nnx.Rngs(0))
  bias = nnx.grad(lambda dense: total(dense(jnp.ones((4096, 8), dtype))))(dense)['bias'][...]
  assert gradient.dtype == older_gradient.dtype == jnp.float32
  seen[dtype] = [float(x.reshape(-1)[0]) for x in (gradient, older_gradient, late, bias)]
  print(dtype, dict(zip(('nnx.Embed', 'linen.Embed', 'looked up, then cast', 'a bias'), seen[dtype])))
assert seen['float32'] == [4096] * 4
assert seen['bfloat16'] == [256, 256, 4096, 4096]
print('as described above')
PYTHON
