# SPDX-License-Identifier: Apache-2.0
"""Which tokens each query attends to. A rule is one function in one file; to add one, add it here."""

import functools

import jax

from dsa_jax.selection.candidates import Candidates, Rule
from dsa_jax.selection.lightning import indexer
from dsa_jax.selection.oracle import oracle
from dsa_jax.selection.uniform import random
from dsa_jax.selection.window_sinks import window_sinks

RULES: dict[str, Rule] = {
    'indexer': indexer,
    'window_sinks': window_sinks,
    'random': random,
    'oracle': oracle,
}


def find_rule(name: str | tuple[str, ...]) -> Rule:
  """Returns the rule of that name; of several names, a rule that does as number `choice` does.

  Only that one runs, so that a single compiled program serves them all.
  """
  if isinstance(name, str):
    return RULES[name]
  return lambda c: jax.lax.switch(c.choice, [functools.partial(RULES[n], c) for n in name])
