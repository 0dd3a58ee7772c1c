# SPDX-License-Identifier: Apache-2.0
"""What a layer keeps for the backward pass, by name; the rest is computed again there."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from dsa_jax.config import ConfigError

_SELECTION = 'selection'
POLICIES = {
    'none': jax.checkpoint_policies.everything_saveable,
    'layer': jax.checkpoint_policies.nothing_saveable,  # But the layer's input.
    'selection': jax.checkpoint_policies.save_only_these_names(_SELECTION),  # Beside the input.
    'products': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # Those with weights.
}


def check_policy(name: str):
  if name not in POLICIES:
    raise ConfigError(f'remat={name!r} must be one of {tuple(POLICIES)}.')


def rematerialized(layer: Callable, policy: str) -> Callable:
  return layer if policy == 'none' else jax.checkpoint(layer, policy=POLICIES[policy])


def selected(indices: jax.Array) -> jax.Array:
  """Marks what a layer selected, which the policy `selection` keeps."""
  return checkpoint_name(indices, _SELECTION)
