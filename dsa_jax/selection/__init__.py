# SPDX-License-Identifier: Apache-2.0
"""The rules that select which tokens each query attends to.

A rule is one function in one file. To add one, write the file and name the function in `RULES`.
"""

import functools

import jax

from dsa_jax.selection import lightning, oracle, streaming, uniform
from dsa_jax.selection.candidates import Candidates, Rule

RULES: dict[str, Rule] = {
    'indexer': lightning.indexer,
    'window_sinks': streaming.window_sinks,
    'random': uniform.random,
    'oracle': oracle.largest_mass,
}


def find_rule(name: str | tuple[str, ...]) -> Rule:
  """Returns the rule of that name or, of several names, a rule that runs the one `choice` numbers.

  A single compiled program thus serves several rules, and runs only one of them.
  """
  if isinstance(name, str):
    return RULES[name]
  return lambda c: jax.lax.switch(c.choice, [functools.partial(RULES[n], c) for n in name])
