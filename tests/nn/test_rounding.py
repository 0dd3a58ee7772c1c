# SPDX-License-Identifier: Apache-2.0
"""Models in bfloat16 sum in float32: over the places of a word, and over all tokens."""

import dataclasses

import jax
from jax.extend.core import jaxprs_in_params
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from dsa_jax.nn.attention.gqa import _project
from dsa_jax.nn.attention.types import Mode

N = 4096  # A bfloat16 sum of as many ones is 256.


def positive(*shape: int) -> jax.Array:
  """Gradients that do not cancel, so that every one of them counts."""
  values = np.random.default_rng(0).normal(1.0, 0.3, shape)
  return jnp.asarray(values, jnp.bfloat16)


def test_gradient_of_an_embedding_counts_all_places_of_its_word():
  cfg = dataclasses.replace(laws.CFG, dtype='bfloat16')
  tokens, cotangent = jnp.asarray(np.arange(N)[None] % 2), positive(1, N, cfg.dim)
  embedded = lambda table: laws.model_of(laws.weights() | {'embed': table}, cfg).embedded(tokens)
  x, transposed = jax.vjp(embedded, laws.weights()['embed'])
  assert x.dtype == jnp.bfloat16
  [gradient] = transposed(cotangent)
  want = np.asarray(cotangent, np.float64)[0].reshape(N // 2, 2, -1).sum(axis=0)
  np.testing.assert_allclose(gradient[...][:2], want, rtol=1e-5)


def test_gradient_of_a_bias_counts_all_tokens():
  cotangent, bias = positive(1, N, 2, 4), jnp.zeros((2, 4))
  x, weight = jnp.zeros((1, N, 8), jnp.bfloat16), jnp.zeros((8, 2, 4))
  _, transposed = jax.vjp(lambda bias: _project(x, weight, bias), bias)
  want = np.asarray(cotangent, np.float64).sum(axis=(0, 1))
  np.testing.assert_allclose(transposed(cotangent)[0], want, rtol=1e-5)


@pytest.mark.parametrize('rank', [8, 40])
def test_latents_are_rescaled_by_an_exact_factor(rank):
  """And rounded once: sqrt(10) itself is 0.2 % off in bfloat16."""
  cfg = dataclasses.replace(laws.CFG, dim=80, latent_rescale=True)
  attn = laws.model_of(laws.weights(cfg), cfg).block(0).attn
  latent = jnp.asarray(np.random.default_rng(0).normal(size=(N, rank)), jnp.bfloat16)
  got = np.asarray(attn._rescaled(latent), np.float64)
  exact = np.asarray(latent, np.float64) * (80 / rank) ** 0.5
  np.testing.assert_allclose((got * exact).sum() / (exact**2).sum(), 1, atol=2e-4)


@pytest.mark.parametrize('cfg', [laws.CFG, laws.SINKS], ids=['experts', 'streams'])
def test_products_in_float32_are_so_on_every_device(cfg):
  """A TPU rounds float32 operands to bfloat16 unless a product asks for more."""
  cfg = dataclasses.replace(cfg, dtype='bfloat16')
  batch, mode = laws.make_batch(laws.LENGTHS), Mode(attention='sparse', backend='xla')
  loss = lambda params: jnp.sum(laws.forward(params, batch, mode, cfg).hidden.astype(jnp.float32))
  found = set(float32_products(jax.make_jaxpr(jax.grad(loss))(laws.weights(cfg)).jaxpr))
  assert found == {(jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)}


def float32_products(jaxpr):
  """Yields the precisions of products of float32 arrays. Kernels, whose operands are mixed, have none."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      if all(x.aval.dtype == jnp.float32 for x in equation.invars):
        yield equation.params['precision']
    for inner in jaxprs_in_params(equation.params):
      yield from float32_products(inner)
