# SPDX-License-Identifier: Apache-2.0
"""Shards of keys in VMEM: which fit, and that each selected key is met once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.kernels.sparse_attention.tpu import BlockSizes
from dsa_jax.kernels.tpu import layout
from dsa_jax.kernels.tpu.shards import Shards, expected_tiles, fit_shards
from dsa_jax.kernels.tpu.slots import locate, sort_slots, split

SHARDS = [Shards(1, 64, 0), Shards(4, 16, 0), Shards(2, 32, 16), Shards(4, 16, 8), Shards(8, 8, 4)]
N_KEYS, K, LINE, TILE = 61, 24, 4, 8


def selections(seed: int) -> np.ndarray:
  """Ascending keys, then -1: full rows, partial ones, an empty one, and a crowd at one place."""
  rng = np.random.default_rng(seed)
  slots = np.full((2, 9, K), -1, np.int32)
  for i, row in enumerate(slots.reshape(-1, K)):
    n = (K, K, K, 7, 1, 0)[i % 6]
    row[:n] = np.sort(rng.permutation(N_KEYS)[:n])
  slots[0, 0] = np.arange(20, 20 + K)
  return slots


@pytest.mark.parametrize('shards', SHARDS)
def test_each_selected_key_is_met_in_one_shard(shards):
  slots = selections(0)
  keys = np.arange(N_KEYS, dtype=np.float32)[None, :, None] + np.zeros((2, 1, 1), np.float32)
  packed = np.asarray(layout.pack(jnp.asarray(keys), shards))
  met = [[[] for _ in range(9)] for _ in range(2)]
  for i in range(shards.n):
    ascending = sort_slots(jnp.asarray(slots), N_KEYS)
    part = [split(ascending, jnp.int32(i + n), shards, (LINE, TILE)) for n in (0, 1)]
    located = locate(ascending, jnp.int32(i), part, shards, LINE, TILE)
    spans, rows = map(np.asarray, located)
    assert (spans[..., 0] % LINE == 0).all() and (spans[..., 1] >= 0).all()
    for b, t in np.ndindex(2, 9):
      first, n = spans[b, t]
      met[b][t] += packed[b, i, rows[b, t, first : first + n], 0].tolist()
      others = np.delete(rows[b, t], np.s_[first : first + n])
      assert (packed[b, i, others] == 0).all() and (others >= shards.size).all()
  for b, t in np.ndindex(2, 9):
    assert met[b][t] == slots[b, t][slots[b, t] >= 0].tolist(), (b, t)


def test_tiles_are_whole_where_reach_allows():
  even = np.linspace(0, 63, K).astype(np.int32)
  early = np.arange(K, dtype=np.int32)  # No multiple of 8 lies at the border: one of 4 does.
  slots = jnp.stack([even, np.where(even < 32, even - 1, even), 2 * early, early + 10])[None]
  slots = jnp.maximum(slots, 0)
  shards = Shards(2, 32, 4)
  n = np.asarray(split(slots, jnp.int32(1), shards, (LINE, TILE)))[0]
  within = [[int((row < border).sum()) for border in (28, 36)] for row in np.asarray(slots[0])]
  for n_before, (least, most) in zip(n, within):
    assert least <= n_before <= most
    for unit in (TILE, LINE):
      if most // unit * unit >= least:
        assert n_before % unit == 0
        break
    else:
      assert n_before == least
  assert {int(x) % TILE for x in n} > {0}, 'rows of both kinds'


@pytest.mark.parametrize('n_shards, tile', [(14, 32), (29, 16), (7, 48), (15, 8), (1, 48)])
def test_expected_tiles_are_those_of_random_selections(n_shards, tile):
  n_slots, step_t, n_steps = 256, 8, 4000
  counts = np.random.default_rng(0).binomial(n_slots, 1 / n_shards, (n_steps, step_t))
  tiles = -(-counts.max(axis=1) // tile)
  assert expected_tiles(n_slots, n_shards, tile, step_t) == pytest.approx(tiles.mean(), rel=0.02)


@pytest.mark.parametrize('shards', SHARDS)
def test_sums_of_keys_in_two_shards_are_added(shards):
  rows = jax.random.normal(jax.random.key(0), (2, shards.n, shards.stored, 128))
  total = layout.unpack_sums(rows.reshape(2, shards.n, -1, 128), shards, n_keys=N_KEYS, width=100)
  expected = np.zeros((2, 200, 128))
  for i in range(shards.n):
    begin = shards.begin(i)
    expected[:, begin : begin + shards.size] += rows[:, i, : shards.size]
  np.testing.assert_allclose(total, expected[:, :N_KEYS, :100], rtol=1e-6)


@pytest.mark.parametrize('vmem', [64, 128])
@pytest.mark.parametrize('n_keys', [37, 4096, 30000, 131072, 1 << 20])
@pytest.mark.parametrize('bytes_per_key', [512, 1536, 4096])
def test_what_is_chosen_fits(vmem, n_keys, bytes_per_key):
  blocks = BlockSizes()
  sizes = n_keys, 2048, bytes_per_key, vmem * 2**20
  shards, tile = fit_shards(*sizes, blocks)
  assert shards.stored * bytes_per_key <= blocks.vmem_share * vmem * 2**20
  assert shards.begin(shards.n - 1) + shards.size >= n_keys
  assert tile <= blocks.tile and tile % blocks.line == 0
  assert 2 * shards.reach <= shards.share


def test_whole_tiles_are_chosen_where_they_fit():
  """V3.2 at 128K on a v6e: nothing is to spare."""
  for bytes_per_key in (1536, 4096):
    shards, tile = fit_shards(131072, 2048, bytes_per_key, 128 * 2**20, BlockSizes())
    assert shards.reach and shards.n * tile == 2048
