#!/usr/bin/env bash
# jax and jaxlib 0.10.2 on a CPU, 2026-11-30: `jax.nn.dot_product_attention`, a query that its mask allows
# no key, as padding of packed documents does, or a sequence whose `key_value_seq_lengths` is 0. One would
# expect zeros, or NaN. It gives the mean of all values, those that the mask forbids, and their gradients
# are not zero: what no query may see is read and is trained.
#
# Seen: the output of the empty row is the mean of the six values, with a mask and with a length of 0, and
# each value has a gradient of 1/6. A row of -inf in `bias` gives NaN instead.
#
# Here: such a row is zero, its log-sum-exp is -inf, and no gradient comes from it, in every op and on
# every backend (tests/kernels).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

keys = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (1, n, 2, 8)) for key, n in zip(keys, (4, 6, 6)))
attend = jax.nn.dot_product_attention
allowed = jnp.ones((1, 1, 4, 6), bool).at[0, 0, 1].set(False)  # Query 1 sees nothing.
mean = v[0].mean(axis=0)
for name, out in {
    'mask': attend(q, k, v, mask=allowed)[0, 1],
    'key_value_seq_lengths=[0]': attend(q, k, v, key_value_seq_lengths=jnp.array([0]))[0, 1],
}.items():
  off = float(jnp.abs(out - mean).max())
  print(f'{name}: an empty row is the mean of all values, to {off:.0e}; its norm is {jnp.linalg.norm(out):.2f}')
  assert off < 1e-6
gradient = jax.grad(lambda v: attend(q, k, v, mask=allowed)[0, 1, 0, 0])(v)[0, :, 0, 0]
print('gradients of the values that it may not see:', gradient.round(4).tolist())
assert jnp.allclose(gradient, 1 / 6)
never = jnp.zeros((1, 1, 4, 6)).at[0, 0, 1].set(-jnp.inf)
assert jnp.isnan(attend(q, k, v, bias=never)[0, 1]).all()
print('the same by a bias of -inf: NaN')
PYTHON
