# SPDX-License-Identifier: Apache-2.0
"""Policies that name what a layer keeps for the backward pass, which computes the rest again."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from dsa_jax.config import ConfigError

_SELECTION = 'selection'
POLICIES = {
    'none': jax.checkpoint_policies.everything_saveable,
    'layer': jax.checkpoint_policies.nothing_saveable,  # All but the layer's input.
    'selection': jax.checkpoint_policies.save_only_these_names(_SELECTION),  # The input, too.
    'products': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # Products with weights.
}


def check_policy(name: str):
  if name not in POLICIES:
    raise ConfigError(f'remat={name!r} must be one of {tuple(POLICIES)}.')


def rematerialized(layer: Callable, policy: str) -> Callable:
  return layer if policy == 'none' else jax.checkpoint(layer, policy=POLICIES[policy])


def selected(indices: jax.Array) -> jax.Array:
  """Marks a layer's selection, which the policy `selection` keeps."""
  return checkpoint_name(indices, _SELECTION)
