# SPDX-License-Identifier: Apache-2.0
"""Which tokens each query attends to. A rule is one function in one file; to add one, add it here."""

from dsa_jax.selection.candidates import Candidates, Rule
from dsa_jax.selection.indexer import indexer
from dsa_jax.selection.oracle import oracle
from dsa_jax.selection.random import random
from dsa_jax.selection.window_sinks import window_sinks

RULES: dict[str, Rule] = {
    'indexer': indexer,
    'window_sinks': window_sinks,
    'random': random,
    'oracle': oracle,
}
