# SPDX-License-Identifier: Apache-2.0
"""Heads that lie on several devices, and the tokens that they exchange."""

from typing import NamedTuple

import jax

from dsa_jax.parallel import collectives


class HeadLayout(NamedTuple):
  """Whether the devices along the mesh axis `tensor` share out the heads of a layer.

  Between layers they share out tokens. Where heads are split, each device attends with its own heads
  for the tokens of all, and afterwards takes back its own tokens. Where they are not, every method
  returns its argument.
  """

  is_split: bool

  def all_tokens(self, x: jax.Array) -> jax.Array:
    """All-gathers [B, T, ...] over tokens."""
    return collectives.all_gather(x, 'tensor', dim=1) if self.is_split else x

  def own_tokens(self, x: jax.Array) -> jax.Array:
    """Adds up [B, T, ...] over the heads of all devices and scatters the tokens."""
    return collectives.psum_scatter(x, 'tensor', dim=1) if self.is_split else x

  def all_heads(self, x: jax.Array) -> jax.Array:
    """Exchanges [B, T, H, ...]: all tokens of some heads for all heads of some tokens."""
    return collectives.all_to_all(x, 'tensor', split=1, join=2) if self.is_split else x
