# SPDX-License-Identifier: Apache-2.0
"""The range of seeds."""

from dsa_jax.config import ConfigError

N_SEEDS = 2**32  # jax would take a larger seed for a smaller one, or none.


def check_seed(seed: int):
  """Checks that a seed is in range.

  Raises:
    ConfigError: It is not.
  """
  if isinstance(seed, bool) or not isinstance(seed, int):
    raise ConfigError(f'{seed=} must be an integer.')
  if seed < 0:
    raise ConfigError(f'{seed=} must not be negative.')
  if seed >= N_SEEDS:
    raise ConfigError(f'{seed=} must be at most {N_SEEDS - 1}.')
