# SPDX-License-Identifier: Apache-2.0
"""Products with codes that kernels widen, against the numbers that the codes stand for."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.kernels.block_scaled import block_sizes, quantize
from dsa_jax.nn.project import project

SHAPES = {  # The axes of matrices, and how many of them are summed over.
    'one matrix': ((256, 96), ('embed', 'ffn'), 1),
    'to heads of no whole blocks': ((128, 3, 192), ('q_lora', 'heads', None), 1),
    'from heads': ((3, 32, 80), ('heads', None, 'embed'), 2),
}


@pytest.mark.parametrize('case', SHAPES)
@pytest.mark.parametrize('backend', ['', 'tpu', 'gpu'])
def test_is_the_product_with_wide_weights(backend, case):
  shape, axes, n_axes = SHAPES[case]
  rng = np.random.default_rng(0)
  weights = quantize(jnp.asarray(rng.normal(size=shape), 'float32'), block_sizes(shape, axes), 'float8_e4m3fn')
  x = jnp.asarray(rng.normal(size=(2, 5, *shape[:n_axes])), 'float32')
  want = np.tensordot(x, weights.astype('float32'), n_axes)
  with cases.interpreted(backend):
    out = jax.jit(project, static_argnums=2)(x, dataclasses.replace(weights, backend=backend), n_axes)
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
