# SPDX-License-Identifier: Apache-2.0
"""Runs the layers of a model: weights are cut into sections, and a scan runs each of them."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.config import ModelConfig
from dsa_jax.nn.layers import Kind, Section, fold, kind_of, plan


def cut(cfg: ModelConfig, stack: Callable[[str], Any]) -> Iterator[tuple[Section, dict[str, Any]]]:
  """Yields the sections of a model, each with its weights out of every stack, as `scan` takes them.

  `stack` is a function that returns a stack by its name.
  """
  sections, pieces = plan(tuple(kind_of(cfg, i) for i in range(cfg.n_layers))), {}
  for section in sections:
    weights = {}
    for name in dict.fromkeys(kind.stack for kind in section.group):
      if name not in pieces:
        pieces[name] = _split(stack(name), [x.repeats * x.n_of(name) for x in sections])
      weights[name] = jax.tree.map(lambda x: fold(x, section.n_of(name)), next(pieces[name]))
    yield section, weights


def _split(blocks: Any, sizes: Sequence[int]) -> Iterator[Any]:
  """Yields the part of a stack that each section takes, of those that take one.

  Where several do, the parts are copies, and their gradients are put together again.
  """
  leaves, structure = jax.tree.flatten(blocks)
  cuts = np.cumsum([size for size in sizes if size])[:-1]
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
    for place, kind in enumerate(section.group):
      block = _take(weights[kind.stack], seen[kind.stack], section.n_of(kind.stack))
      facts_of_layer = _take(facts, place, len(section.group))
      carry, result = layer(carry, of_kind(block, kind), facts_of_layer)
      results.append(result)
      seen[kind.stack] += 1
    return carry, results

  return jax.lax.scan(run_group, carry, (weights, facts))


def of_kind(block: Any, kind: Kind) -> Any:
  """Returns a layer that attends as its kind does. One with a window has no indexer."""
  if kind == Kind(kind.stack):
    return block
  block = jax.tree.map(lambda x: x, block)  # A new module; the given one stays as it is.
  block.attn.reads, block.attn.keeps = kind.reads, kind.keeps
  if kind.window:
    block.attn.indexer, block.attn.window = None, kind.window
  return block


def in_order(results: Sequence[Any]) -> Any:
  """Returns the results of `scan` in the order of the section's layers, [L, ...]."""
  n, stack = len(results), lambda *x: jnp.stack(x, axis=1)
  whole = lambda *x: x[0] if n == 1 else stack(*x).reshape(n * len(x[0]), *x[0].shape[1:])
  return jax.tree.map(whole, *results)


def _take(tree: Any, i: int, n: int) -> Any:
  """Returns one of the n layers of a group."""
  return tree if n == 1 else jax.tree.map(lambda x: x[i], tree)
