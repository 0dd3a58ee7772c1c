# SPDX-License-Identifier: Apache-2.0
"""Blocks of rows, and rows picked by position, at the lengths that fit no block."""

import cases
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.kernels.visibility import selected_keys, visible_keys
from dsa_jax.kernels.xla.rows import gather_rows, map_rows, scan_rows, scatter_rows

INDICES = [[[0, 4, 2], [-1, 5, 2**30], [4, -7, -1]], [[1, -1, 3], [3, 2, 1], [-(2**31), -1, 6]]]


@pytest.mark.parametrize('block', [1, 5, 7, 1000])
def test_map_rows_is_the_map(block):
  x, y = cases.normal(0, (2, 7, 3), (2, 7))
  rows = {'x': x, 'none': None, 'pair': (y, jnp.arange(14, dtype=jnp.int32).reshape(2, 7))}

  def f(rows):
    y, i = rows['pair']
    assert rows['none'] is None and rows['x'].shape[1] == min(block, 7)
    return rows['x'] * y[..., None], {'i': i + 1}

  out, extra = map_rows(f, rows, block)
  np.testing.assert_array_equal(out, x * y[..., None])
  np.testing.assert_array_equal(extra['i'], np.arange(14).reshape(2, 7) + 1)


@pytest.mark.parametrize('block, n_blocks', [(1, 7), (4, 2), (1000, 1)])
def test_scan_rows_goes_over_every_row_once_in_order(block, n_blocks):
  x = jnp.arange(1, 15, dtype=jnp.float32).reshape(2, 7)

  def step(carry, rows):
    total, steps = carry
    total = total + rows.sum(axis=1)
    return (total, steps + 1), jnp.broadcast_to(total[:, None], rows.shape)

  (total, steps), out = scan_rows(step, (jnp.zeros(2), 0), x, block)
  np.testing.assert_array_equal(total, x.sum(axis=1))
  assert steps == n_blocks and out.shape == x.shape
  ends = np.minimum(np.arange(7) // block * block + block, 7) - 1
  np.testing.assert_array_equal(out, np.cumsum(x, axis=1)[:, ends])


def test_the_last_block_is_filled_with_rows_that_see_nothing():
  x, i = jnp.ones((1, 3, 2)), jnp.ones((1, 3), jnp.int32)
  fills, _ = scan_rows(lambda _, rows: (rows, None), (x[:, :2], i[:, :2]), (x, i), 2)
  np.testing.assert_array_equal(fills[0], [[[1, 1], [0, 0]]])
  np.testing.assert_array_equal(fills[1], [[1, -1]])


def test_gather_rows_gives_zeros_where_there_is_no_position():
  x = cases.normal(0, (2, 5, 2, 3))[0].at[0, 1].set(jnp.nan).at[0, 3].set(jnp.nan)
  indices = jnp.array(INDICES, jnp.int32)
  want = np.zeros((2, 3, 3, 2, 3), np.float32)
  for i in np.ndindex(2, 3, 3):
    if 0 <= INDICES[i[0]][i[1]][i[2]] < 5:
      want[i] = x[i[0], INDICES[i[0]][i[1]][i[2]]]
  np.testing.assert_array_equal(gather_rows(x, indices), want)


def test_scatter_rows_adds_nothing_where_there_is_no_position():
  x, rows = cases.normal(0, (2, 5, 3), (2, 3, 3, 3))
  indices = jnp.array(INDICES, jnp.int32)
  rows = jnp.where(((indices < 0) | (indices >= 5))[..., None], jnp.nan, rows)
  want = np.array(x)
  for i in np.ndindex(2, 3, 3):
    if 0 <= INDICES[i[0]][i[1]][i[2]] < 5:
      want[i[0], INDICES[i[0]][i[1]][i[2]]] += rows[i]
  np.testing.assert_allclose(scatter_rows(x, indices, rows), want, rtol=1e-6)


def test_selected_keys():
  got = np.asarray(selected_keys(jnp.array(INDICES, jnp.int32), 5))
  want = [[[i in row for i in range(5)] for row in rows] for rows in INDICES]
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('visibility', cases.VISIBILITY)
def test_visible_keys(visibility):
  start, end = cases.intervals(visibility)
  got = visible_keys(start, end, jnp.arange(cases.S))
  np.testing.assert_array_equal(got, cases.seen(start, end))
