# SPDX-License-Identifier: Apache-2.0
"""What the layers are told of new tokens, and of what the cache holds."""

import functools
import typing
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.inference.split_selection import FEW
from dsa_jax.inference.storage import Span, Store
from dsa_jax.kernels.backend import packs_all_keys
from dsa_jax.nn.attention.types import Attention
from dsa_jax.parallel import collectives
from dsa_jax.parallel.mesh import SEQUENCES, TOKENS
from dsa_jax.selection import check_rule

SHORT = 2  # Times K. Beyond as many tokens, gathering selected rows takes less than a mask.


class Piece(NamedTuple):
  """What all layers are told of the new tokens and of how to attend."""

  length: Int[Array, 'B']  # How many tokens each sequence has with the new ones.
  counted: Bool[Array, 'B T']  # Which tokens are no padding and have room.
  at: Int[Array, 'B T']  # Their positions; -1 elsewhere.
  end: Int[Array, 'B T']  # One past the last key that each sees.
  cfg: ModelConfig
  capacity: int  # Rows of each sequence on this device.
  attention: str
  backend: str
  rule: str
  shared: tuple[str, ...]  # Axes of the mesh along which devices have the same new tokens.
  spread: tuple[str, ...]  # Axes along which each has a share of those that it was given.
  short: int  # 'sparse' attends to the first so many keys under a mask. 0: it gathers.

  def own(self, x: Shaped[Array, 'B T *any']) -> Shaped[Array, 'B T2 *any']:
    """Returns this device's share of what was given of the new tokens."""
    return _own(x, self.spread)

  def all(self, x: Shaped[Array, 'B T *any']) -> Shaped[Array, 'B T2 *any']:
    """Returns what all devices that share new tokens have of them."""
    return collectives.all_gather(x, *self.spread, dim=1)

  @property
  def row(self) -> Int[Array, 'B']:
    """Returns the numbers that the sequences of this device have in the batch."""
    axes = [axis for axis in SEQUENCES if axis not in self.shared + self.spread]
    n = len(self.length)
    return collectives.axis_index(*axes) * n + jnp.arange(n, dtype=jnp.int32)

  @property
  def sees_all(self) -> bool:
    """Whether the indexer has nothing to choose, because no query sees more than its budget."""
    return 0 < self.short <= self.cfg.index_topk and self.rule == 'indexer'

  @property
  def is_one_op(self) -> bool:
    """Whether one op selects and attends."""
    topk, n_tokens = self.cfg.index_topk, self.at.shape[1]
    packs = packs_all_keys(self.backend, n_tokens, topk, self.capacity)
    learned = self.attention == 'sparse' and self.rule == 'indexer'
    learned &= collectives.axis_size(*TOKENS) == 1
    return learned and packs and not (self.cfg.shares_indexers or self.cfg.attention_sinks)


class Held(NamedTuple):
  """What the cache of this device holds of a layer, the new tokens included."""

  kv: Store
  span: Span  # The rows of the layer in `kv`.
  index_key: Store
  index_span: Span  # Those in `index_key`.
  n_heads: int  # The key heads of a row.


def piece_of(
    length: Int[Array, 'B'],
    n_new: Int[Array, 'B'],
    width: int,
    *,
    visible: int,
    shared: tuple[str, ...],
    **sizes,
) -> Piece:
  """Returns what layers are told of new tokens behind `length` others; see `extend` for the arguments.

  Devices along axes of SEQUENCES that have the same tokens share them out, if these are many.
  """
  _check(sizes['attention'], sizes['rule'])
  position = length[:, None] + jnp.arange(width, dtype=jnp.int32)
  capacity = sizes['capacity'] * collectives.axis_size('context')
  counted = (jnp.arange(width) < n_new[:, None]) & (position < capacity)
  most = short_context(width, sizes['cfg'].index_topk, sizes['backend'])
  spread = tuple(axis for axis in shared if axis not in TOKENS)
  if width <= FEW or width % collectives.axis_size(*spread):
    spread = ()
  own = functools.partial(_own, spread=spread)
  return Piece(
      length=length + jnp.sum(counted, axis=1, dtype=jnp.int32),
      counted=own(counted),
      at=own(jnp.where(counted, position, -1)),
      end=own(jnp.where(counted, position + 1, 0)),
      short=visible if sizes['attention'] == 'sparse' and visible <= most else 0,
      shared=TOKENS if spread else shared,
      spread=spread,
      **sizes,
  )


def _own(x, spread):
  return collectives.own_shard(x, *spread, dim=1)


def _check(attention: str, rule: str):
  check_rule(rule)
  if attention not in typing.get_args(Attention):
    raise ConfigError(f'{attention=} must be one of {typing.get_args(Attention)}.')


def short_context(n_tokens: int, topk: int, backend: str) -> int:
  """Returns up to how many visible keys 'sparse' attends under a mask; 0: never.

  Few queries would not pay for the keys and values of all heads.
  """
  return SHORT * topk if backend == 'xla' and n_tokens > FEW else 0
