# SPDX-License-Identifier: Apache-2.0
"""The usual cheap rule: it selects the latest tokens, and the first few as attention sinks."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from dsa_jax.selection.candidates import Candidates

MAX_SINKS = 4


def window_sinks(c: Candidates) -> Int[Array, 'B T K']:
  """Selects the first `min(4, K / 4)` visible tokens and the latest ones up to K.

  Source:
    Xiao et al., Efficient Streaming Language Models with Attention Sinks (2309.17453): 4 sinks.
  """
  n_sinks = min(MAX_SINKS, c.topk // 4)
  slot = jnp.arange(c.topk, dtype=jnp.int32)
  start, end = c.start[..., None], c.end[..., None]
  overflow = jnp.maximum(end - start - c.topk, 0)
  position = start + slot + jnp.where(slot < n_sinks, 0, overflow)
  return jnp.where(position < end, position, -1)
