# SPDX-License-Identifier: Apache-2.0
"""The rules that select which tokens each query attends to.

A rule is one function in one file. To add one, write the file and name the function in `RULES`.
"""

import collections
import functools

import jax
import jax.numpy as jnp

from dsa_jax.config import ConfigError
from dsa_jax.selection import lightning, oracle, streaming, uniform
from dsa_jax.selection.candidates import Candidates, Rule


class Rules(collections.UserDict[str, Rule]):
  """The rules by name. A name may be given to another rule at any time, as a notebook does."""

  def __setitem__(self, name: str, rule: Rule):
    if self.get(name, rule) is not rule:
      jax.clear_caches()  # Programs that were compiled with the earlier rule go by its name.
    super().__setitem__(name, rule)

  def __delitem__(self, name: str):
    jax.clear_caches()
    super().__delitem__(name)


RULES = Rules({
    'indexer': lightning.indexer,
    'window_sinks': streaming.window_sinks,
    'random': uniform.random,
    'oracle': oracle.largest_mass,
})


def check_rule(name: str):
  """Raises ConfigError if there is no rule of that name."""
  if name not in RULES:
    raise ConfigError(f'selection rule {name!r} must be one of {tuple(RULES)}.')


def find_rule(name: str | tuple[str, ...]) -> Rule:
  """Returns the rule of that name or, of several names, a rule that runs the one `choice` numbers.

  A single compiled program thus serves several rules, and runs only one of them. Where each key head
  has a selection of its own, a rule that makes one for all of them gives it to each.
  """
  if isinstance(name, str):
    return lambda c: _for_each_key_head(RULES[name](c), c.n_selections)
  rules = [find_rule(n) for n in name]
  return lambda c: jax.lax.switch(c.choice, [functools.partial(rule, c) for rule in rules])


def _for_each_key_head(indices: jax.Array, n_selections: int) -> jax.Array:
  if n_selections == 1 or indices.ndim == 4:
    return indices
  b, t, k = indices.shape
  return jnp.broadcast_to(indices[:, :, None], (b, t, n_selections, k))
