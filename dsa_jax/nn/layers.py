# SPDX-License-Identifier: Apache-2.0
"""The plan of a model's layers: the stack that holds each one's weights, and the scans that run them.

A stack holds the weights of all layers of one kind, in their order. A section is a repeating group of
layers that may be of unlike kinds, and one scan runs it. Leading layers with an MLP and then layers
with experts are two sections. Layers that take turns are one section.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.config import ModelConfig

STACKS = ('dense_blocks', 'moe_blocks', 'mtp')  # Layers with an MLP, layers with experts, MTP.


class Section(NamedTuple):
  """Successive layers that one scan runs."""

  first: int  # The number of the first layer.
  group: tuple[str, ...]  # The stack of each layer of the group.
  repeats: int  # The group comes so many times.

  @property
  def layers(self) -> range:
    return range(self.first, self.first + self.repeats * len(self.group))

  def facts(self, of_layers: Any) -> Any:
    """Returns this section's part of arrays that have an entry for each layer of the model."""
    start, stop = self.layers.start, self.layers.stop
    return jax.tree.map(lambda x: _fold(x[start:stop], len(self.group)), of_layers)


def layers_of_stacks(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the numbers of the layers whose weights each stack holds, in order."""
  experts = tuple(i for i in range(cfg.n_layers) if i not in cfg.dense_layers)
  return dict(zip(STACKS, (cfg.dense_layers, experts)))


@functools.cache
def plan(stacks: tuple[str, ...]) -> tuple[Section, ...]:
  """Returns the sections of layers with these stacks.

  Of all plans, it has the fewest layers in its groups, because each of them is compiled once, and of
  those the fewest sections.
  """
  best: dict[int, tuple[int, int, tuple[Section, ...]]] = {len(stacks): (0, 0, ())}
  for first in reversed(range(len(stacks))):
    options = []
    for section in _sections_at(first, stacks):
      n_compiled, n_sections, rest = best[section.layers.stop]
      options.append((n_compiled + len(section.group), n_sections + 1, (section, *rest)))
    best[first] = min(options, key=lambda option: option[:2])
  return best[0][2]


def _sections_at(first: int, stacks: tuple[str, ...]) -> Iterator[Section]:
  """Yields the sections that may begin with a layer. A group of several layers comes twice or more."""
  for width in range(1, len(stacks) - first + 1):
    group, repeats = stacks[first : first + width], 1
    while stacks[first + repeats * width :][:width] == group:
      repeats += 1
    yield from (Section(first, group, n) for n in range(repeats, min(width - 1, 1), -1))


def cut(cfg: ModelConfig, stack: Callable[[str], Any]) -> Iterator[tuple[Section, dict[str, Any]]]:
  """Yields the sections of a model, each with its weights out of every stack, as `scan` takes them.

  `stack` is a function that returns a stack by its name.
  """
  names = {i: name for name, layers in layers_of_stacks(cfg).items() for i in layers}
  sections, pieces = plan(tuple(names[i] for i in range(cfg.n_layers))), {}
  for section in sections:
    weights = {}
    for name in dict.fromkeys(section.group):
      if name not in pieces:
        pieces[name] = _split(stack(name), [x.repeats * x.group.count(name) for x in sections])
      part, n = next(pieces[name]), section.group.count(name)
      weights[name] = jax.tree.map(lambda x: _fold(x, n), part)
    yield section, weights


def _split(blocks: Any, sizes: Sequence[int]) -> Iterator[Any]:
  """Yields the part of a stack that each section takes, of those that take one."""
  sizes = [size for size in sizes if size]
  leaves, structure = jax.tree.flatten(blocks)
  cuts = np.cumsum(sizes)[:-1]
  parts = zip(*(jnp.split(x, cuts) for x in leaves)) if len(cuts) else [leaves]
  return (jax.tree.unflatten(structure, part) for part in parts)


def scan(
    section: Section, layer: Callable, carry: Any, weights: Mapping[str, Any], facts: Any
) -> tuple[Any, list[Any]]:
  """Runs a section; returns the carry, and the results [repeats, ...] of each layer of the group.

  `layer` takes the carry, a layer's weights and its facts, and returns the carry and a result.
  """

  def run_group(carry, inputs):
    (weights, facts), results, seen = inputs, [], Counter[str]()
    for place, name in enumerate(section.group):
      block = _take(weights[name], seen[name], section.group.count(name))
      carry, result = layer(carry, block, _take(facts, place, len(section.group)))
      results.append(result)
      seen[name] += 1
    return carry, results

  return jax.lax.scan(run_group, carry, (weights, facts))


def in_order(results: Sequence[Any]) -> Any:
  """Returns the results of `scan` in the order of the section's layers, [L, ...]."""
  n, stack = len(results), lambda *x: jnp.stack(x, axis=1)
  whole = lambda *x: x[0] if n == 1 else stack(*x).reshape(n * len(x[0]), *x[0].shape[1:])
  return jax.tree.map(whole, *results)


def _fold(x, n: int):
  """Gives an axis of its own to the n layers of a group."""
  return x if n == 1 else x.reshape(-1, n, *x.shape[1:])


def _take(tree: Any, i: int, n: int) -> Any:
  """Returns one of the n layers of a group."""
  return tree if n == 1 else jax.tree.map(lambda x: x[i], tree)
