# SPDX-License-Identifier: Apache-2.0
"""Experts: rows that go to them and come back have the gradients of the definition, whole or in blocks."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from dsa_jax.families import SIZES
from dsa_jax.nn import moe
from dsa_jax.nn.moe import MoE

pytestmark = pytest.mark.usefixtures('eager')

A, K, D = 6, 3, 4  # Tokens, choices, channels.


def test_rows_and_their_sums_have_the_gradients_of_the_definition():
  rng = np.random.default_rng(0)
  tokens, weight, gates = (
      jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((A, D), (A * K, D), (A, K))
  )
  order = jnp.asarray(rng.permutation(A * K), jnp.int32)
  places = jnp.argsort(order).reshape(A, K)

  def ours(tokens, gates):
    return moe._gated_sum(moe._spread(tokens, order, places) * weight, gates, order, places)

  def plain(tokens, gates):
    of_choice = (jnp.repeat(tokens, K, axis=0) * weight[places.reshape(-1)]).reshape(A, K, D)
    return jnp.sum(of_choice * gates[..., None], axis=1)

  (out, vjp), (want, want_vjp) = (jax.vjp(f, tokens, gates) for f in (ours, plain))
  laws.assert_close(out, want)
  laws.assert_close(vjp(jnp.cos(want)), want_vjp(jnp.cos(want)))


def test_blocks_of_tokens_change_no_number(monkeypatch):
  experts = laws.model_of(laws.weights()).block(laws.CFG.n_dense_layers).ffn
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 20, laws.CFG.dim)), jnp.float32)
  counted = jnp.ones((2, 20))

  def outcome():
    def loss(layer, x):
      out, load = layer(x, counted, 'xla')
      return jnp.sum(jnp.sin(out)), load

    assert isinstance(experts, MoE)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(experts, x)

  whole = outcome()
  monkeypatch.setattr(moe, '_tokens_at_once', lambda shape, cfg: 16)
  laws.assert_close(outcome(), whole)


@pytest.mark.parametrize(
    'n_owners, n_experts, most',
    [(1, 256, 2**17), (64, 4, 2**14 // 64), (1, 8, 2**14)],
    ids=['one device has all experts', 'a pod', 'few experts'],
)
def test_a_device_with_many_experts_takes_many_tokens_at_once(n_owners, n_experts, most, monkeypatch):
  monkeypatch.setattr(moe.collectives, 'axis_size', lambda *axes: n_owners)
  assert moe._tokens_at_once((n_experts, 7168, 2048), SIZES['v32']) == most
