# SPDX-License-Identifier: Apache-2.0
"""Products by group on every backend against a loop over the groups, gradients included."""

import cases
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from dsa_jax.kernels import grouped_matmul
from dsa_jax.kernels.block_scaled import BlockScaled, block_sizes, quantize
from dsa_jax.kernels.grouped_matmul import gpu, turns

SIZES = {
    'even': (128, 128, 128, 128),
    'groups_meet_within_tiles': (100, 200, 13, 199),
    'an_empty_group_at_each_end': (0, 300, 0, 0, 212, 0),
    'all_of_one': (0, 512, 0),
    'fewer_rows_than_a_tile': (3, 0, 4),
    'more_groups_than_rows': (0, 1, 0, 0, 2, 0, 0, 0, 1),
    'rows_behind_the_last_group': (70, 200, 30),
    'no_rows_at_all': (0, 0),
}
BEHIND = {'rows_behind_the_last_group': 212, 'no_rows_at_all': 1}
BACKENDS = 'reference', 'xla', 'tpu', 'gpu'  # On a CPU, the TPU's is jax's own.
WIDTHS = {'narrow': (8, 6), 'of_no_whole_tiles': (150, 300)}


@pytest.mark.parametrize('n_groups, n_calls', [(128, 1), (256, 2), (384, 1)])
def test_codes_whose_offsets_would_overflow_on_a_gpu_are_halved(n_groups, n_calls):
  """Pallas takes int64 above 4 GiB, but offsets are signed and count elements, of one byte here."""
  of = jax.ShapeDtypeStruct
  codes = of((n_groups, 7168, 2048), jnp.float8_e4m3fn)
  weights = BlockScaled(codes, of((n_groups, 56, 16), jnp.float32), 'gpu')
  product = lambda rows, weights, sizes: grouped_matmul(rows, weights, sizes, backend='gpu')
  program = jax.make_jaxpr(product)(of((8, 7168), jnp.bfloat16), weights, of((n_groups,), jnp.int32))
  assert str(program).count('pallas_call') == n_calls
  assert program.out_avals[0].shape == (8, 2048)


@pytest.mark.parametrize('sizes', [(7, 0, 40, 13, 9), (0, 0, 0, 69, 0), (69, 0, 0, 0, 0), (0, 0, 0, 0, 0)], ids=str)
def test_halves_make_up_the_whole(sizes, monkeypatch):
  rows, weights, _ = draw(80, len(sizes), (64, 32))
  codes = quantize(weights, block_sizes(weights.shape, ('expert', None, None)), 'float8_e4m3fn')
  rows = rows.at[sum(sizes) :].set(jnp.nan)
  monkeypatch.setattr(gpu, 'MOST_CODES', weights.size // 2)
  with cases.interpreted('gpu'):
    out = grouped_matmul(rows, codes, jnp.asarray(sizes, jnp.int32), backend='gpu')
  with laws.eager():
    want = by_loop(rows, codes.astype(jnp.float32), sizes)
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def by_loop(rows, weights, sizes):
  out, first = jnp.zeros((len(rows), weights.shape[2])), 0
  for weight, size in zip(weights, sizes):
    own = slice(first, first + size)
    out, first = out.at[own].set(jnp.dot(rows[own], weight, precision='highest')), first + size
  return out


def draw(n, n_groups, widths, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shapes = (n, widths[0]), (n_groups, *widths), (n, widths[1])
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def run(backend, rows, weights, dout, sizes):
  """Returns the products, and the gradients of rows and of matrices."""

  @jax.jit
  def products(rows, weights, sizes):
    out, vjp = jax.vjp(lambda *x: grouped_matmul(*x, sizes, backend=backend), rows, weights)
    return out, *vjp(dout)

  with cases.interpreted(backend):
    return products(rows, weights, jnp.asarray(sizes, jnp.int32))


@pytest.mark.parametrize('widths', WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize('case', SIZES)
@pytest.mark.parametrize('backend', BACKENDS)
def test_is_a_loop_over_groups(backend, case, widths):
  sizes = SIZES[case]
  n = sum(sizes) + BEHIND.get(case, 0)
  rows, weights, dout = draw(n, len(sizes), widths)
  with laws.eager():
    want, vjp = jax.vjp(lambda *x: by_loop(*x, sizes), rows, weights)
    want = want, *vjp(dout)
  for ours, theirs in zip(run(backend, rows, weights, dout, sizes), want, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('backend', BACKENDS)
def test_rows_of_no_group_may_hold_anything(backend):
  rows = jnp.full((200, 4), jnp.nan).at[:150].set(1.0)
  dout = jnp.full((200, 3), jnp.nan).at[:150].set(1.0)
  out, drows, dweights = run(backend, rows, jnp.ones((2, 4, 3)), dout, (100, 50))
  behind = np.repeat([1.0, 0.0], [150, 50])[:, None]
  np.testing.assert_array_equal(out, 4 * behind * np.ones(3))
  np.testing.assert_array_equal(drows, 3 * behind * np.ones(4))
  np.testing.assert_array_equal(dweights, np.array([100.0, 50.0])[:, None, None] * np.ones((4, 3)))


@pytest.mark.parametrize('backend', BACKENDS)
def test_keeps_the_dtype_of_its_rows(backend):
  rows, weights, dout = draw(5, 2, (4, 3), jnp.bfloat16)
  results = run(backend, rows, weights, dout, (2, 3))
  assert {x.dtype for x in results} == {jnp.dtype('bfloat16')}
  exact = run('reference', *(x.astype(jnp.float32) for x in (rows, weights, dout)), (2, 3))
  for ours, theirs in zip(results, exact, strict=True):
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('backend', ['xla', 'gpu'])
def test_repeats_its_bits(backend):
  inputs = draw(512, 4, (64, 48))
  first, again = (run(backend, *inputs, SIZES['groups_meet_within_tiles']) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize('n_rows, n_groups', [(0, 3), (4, 0)])
def test_there_may_be_neither_rows_nor_groups(n_rows, n_groups):
  rows, weights, dout = draw(n_rows, n_groups, (8, 6))
  results = run('xla', rows, weights, dout, (0,) * n_groups)
  for ours, like in zip(results, (dout, rows, weights), strict=True):
    np.testing.assert_array_equal(ours, jnp.zeros_like(like))


def test_costs_the_rows_not_the_groups():
  """Tiles of rows are counted as they are when groups are even or one has all rows."""
  for n_groups in 4, 64, 256:
    for sizes in np.full(n_groups, 65536 // n_groups), np.eye(n_groups, dtype=int)[1] * 65536:
      tiles = turns.cut(jnp.asarray(sizes, jnp.int32), 65536, 256)
      assert tiles.used == 256


@pytest.mark.parametrize('n_groups', [8, 256])
def test_memory_is_a_tiles(n_groups):
  shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
  args = shape(8192, 64), shape(n_groups, 64, 32), shape(8192, 32)

  def gradients(rows, weights, dout, sizes):
    product = lambda *x: grouped_matmul(*x, sizes, backend='xla')
    return jax.vjp(product, rows, weights)[1](dout)

  sizes = jax.ShapeDtypeStruct((n_groups,), jnp.int32)
  memory = jax.jit(gradients).lower(*args, sizes).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 0.1 * memory.argument_size_in_bytes


@pytest.mark.parametrize(
    'rows, weights, sizes, message',
    [
        ((5, 4), (2, 3, 3), jnp.zeros(2, jnp.int32), r'must be rows \[N, D\]'),
        ((5, 4), (2, 4, 3), jnp.zeros(3, jnp.int32), r'sizes must be int32 \(2,\)'),
        ((5, 4), (2, 4, 3), jnp.zeros(2), 'sizes must be int32'),
    ],
)
def test_what_does_not_fit_is_refused(rows, weights, sizes, message):
  with cases.unchecked(), pytest.raises(ValueError, match=message):
    grouped_matmul(jnp.zeros(rows), jnp.zeros(weights), sizes, backend='xla')
  sizes = jnp.zeros(2, jnp.int32)
  with pytest.raises(ValueError, match='must share a dtype'):
    grouped_matmul(jnp.zeros((5, 4)), jnp.zeros((2, 4, 3), jnp.bfloat16), sizes, backend='xla')


CODES = [('float8_e4m3fn', (256, 300)), ('int8', (256, 300)), ('float8_e4m3fn', (24, 40))]


@pytest.mark.hostile
@pytest.mark.parametrize('dtype, widths', CODES, ids=['fp8', 'int8', 'small blocks'])
@pytest.mark.parametrize('backend', BACKENDS)
def test_widens_codes(backend, dtype, widths):
  sizes = (100, 0, 150, 13)
  rows, weights, dout = draw(300, len(sizes), widths)
  weights *= jnp.geomspace(1e-3, 1e3, widths[0])[:, None]  # Blocks of unlike scales.
  codes = quantize(weights, block_sizes(weights.shape, ('expert', None, None)), dtype)
  want, vjp = jax.vjp(lambda rows: by_loop(rows, codes.astype(jnp.float32), sizes), rows)

  @jax.jit
  def products(rows, codes, sizes):
    out, vjp = jax.vjp(lambda rows: grouped_matmul(rows, codes, sizes, backend=backend), rows)
    return out, *vjp(dout)

  with cases.interpreted(backend):
    results = products(rows, codes, jnp.asarray(sizes, jnp.int32))
  for ours, theirs in zip(results, (want, *vjp(dout)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
