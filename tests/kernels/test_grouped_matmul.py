# SPDX-License-Identifier: Apache-2.0
"""Products by group against a loop over the groups, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.kernels.grouped_matmul.op import grouped_matmul

SIZES = {
    'even': (128, 128, 128, 128),
    'groups_meet_within_tiles': (100, 200, 13, 199),
    'an_empty_group_at_each_end': (0, 300, 0, 0, 212, 0),
    'all_of_one': (0, 512, 0),
    'fewer_rows_than_a_tile': (3, 0, 4),
    'rows_behind_the_last_group': (70, 200, 30),
    'no_rows_at_all': (0, 0),
}


def by_loop(rows, weights, sizes):
  out, first = jnp.zeros((len(rows), weights.shape[2])), 0
  for weight, size in zip(weights, sizes):
    own = slice(first, first + size)
    out, first = out.at[own].set(jnp.dot(rows[own], weight, precision='highest')), first + size
  return out


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
def test_is_a_loop_over_groups(sizes):
  rng = np.random.default_rng(0)
  n = max(sum(sizes), 1) if sum(sizes) != 300 else 512
  rows, cotangent = rng.normal(size=(n, 8)), rng.normal(size=(n, 6))
  weights = rng.normal(size=(len(sizes), 8, 6))
  rows, cotangent, weights = (jnp.asarray(x, jnp.float32) for x in (rows, cotangent, weights))

  @jax.jit
  def ours(rows, weights, sizes):
    out, vjp = jax.vjp(lambda *x: grouped_matmul(*x, sizes), rows, weights)
    return out, *vjp(cotangent)

  want, vjp = jax.vjp(lambda *x: by_loop(*x, sizes), rows, weights)
  want = want, *vjp(cotangent)
  for ours, theirs in zip(ours(rows, weights, jnp.asarray(sizes, jnp.int32)), want):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rows_of_no_group_may_hold_anything():
  rows = jnp.full((200, 4), jnp.nan).at[:150].set(1.0)
  out = grouped_matmul(rows, jnp.ones((2, 4, 3)), jnp.asarray([100, 50]))
  np.testing.assert_array_equal(out, np.repeat([4.0, 0.0], [150, 50])[:, None] * np.ones(3))


def test_keeps_the_dtype_of_its_rows():
  rows, weights = jnp.ones((5, 4), jnp.bfloat16), jnp.ones((2, 4, 3), jnp.bfloat16)
  out, vjp = jax.vjp(lambda *x: grouped_matmul(*x, jnp.asarray([2, 3])), rows, weights)
  assert out.dtype == jnp.bfloat16
  assert {x.dtype for x in vjp(out)} == {jnp.dtype('bfloat16')}


def test_costs_the_rows_not_the_groups():
  """Twice the groups, the same rows: a few tiles more."""
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)

  def flops(n_groups):
    sizes = jax.ShapeDtypeStruct((n_groups,), jnp.int32)
    lowered = jax.jit(grouped_matmul).lower(shape(4096, 64), shape(n_groups, 64, 32), sizes)
    return lowered.cost_analysis()['flops']

  exact = 2 * 4096 * 64 * 32
  assert flops(4) < 1.3 * exact
  assert flops(8) < 1.5 * exact
