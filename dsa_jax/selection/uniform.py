# SPDX-License-Identifier: Apache-2.0
"""The rule that every other should beat: it draws keys at random."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsa_jax.kernels.select_topk import select_topk
from dsa_jax.kernels.xla.rows import map_rows
from dsa_jax.selection.candidates import Candidates


def random(c: Candidates) -> Int[Array, 'B T K']:
  """Selects visible keys uniformly.

  `c.key`, the row of the batch and the positions of query and key determine which, so a text may be
  read whole or in pieces, on one device or on several. In another row it selects others.
  """
  keys = jnp.arange(c.k.shape[1], dtype=jnp.uint32)
  row = jnp.arange(len(c.start)) if c.row is None else c.row
  row = row.astype(jnp.uint32)[:, None, None]
  salt = jax.random.bits(c.key, dtype=jnp.uint32)

  def select(rows):
    start, end = rows
    seed = _mix(_mix(salt + row) + (end[..., None] - 1).astype(jnp.uint32))
    lots = _mix(seed + keys) >> 8  # 24 bits are exact in float32.
    return select_topk(lots.astype(jnp.float32), start, end, topk=c.topk)

  return map_rows(select, (c.start, c.end), block=64)


def _mix(x):
  """Hashes 32 bits by the finalizer of MurmurHash3."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
