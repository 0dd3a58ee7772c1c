# SPDX-License-Identifier: Apache-2.0
"""Runs the layers of a model: weights are cut into sections, and a scan runs each of them."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.config import ModelConfig
from dsa_jax.nn.layers import Kind, Section, fold, kind_of, plan


class Whole(NamedTuple):
  """A stack of which a section takes some layers, where they lie."""

  stack: Any
  first: int  # The number of its first layer in the stack.


def cut(
    cfg: ModelConfig, stack: Callable[[str], Any], *, copies: bool = True
) -> Iterator[tuple[Section, dict[str, Any]]]:
  """Yields the sections of a model, each with its weights out of every stack, as `scan` takes them.

  Args:
    cfg: The model.
    stack: A function that returns a stack by its name.
    copies: Whether a section gets a copy of its part of a stack that others have parts of, so that each
      gradient is as large as a part. Without, it takes its layers one by one out of the whole.
  """
  sections, pieces = plan(tuple(kind_of(cfg, i) for i in range(cfg.n_layers))), {}
  for section in sections:
    weights = {}
    for name in dict.fromkeys(kind.stack for kind in section.group):
      if name not in pieces:
        sizes = [x.repeats * x.n_of(name) for x in sections]
        pieces[name] = _split(stack(name), [size for size in sizes if size], copies)
      piece = next(pieces[name])
      is_whole = isinstance(piece, Whole)
      weights[name] = piece if is_whole else jax.tree.map(lambda x: fold(x, section.n_of(name)), piece)
    yield section, weights


def _split(blocks: Any, sizes: Sequence[int], copies: bool) -> Iterator[Any]:
  """Yields the part of a stack that each section takes, of those that take one."""
  cuts = np.cumsum(sizes)[:-1]
  if not len(cuts):
    return iter([blocks])
  if not copies:
    return (Whole(blocks, int(first)) for first in (0, *cuts))
  leaves, structure = jax.tree.flatten(blocks)
  parts = zip(*(jnp.split(x, cuts) for x in leaves))
  return (jax.tree.unflatten(structure, part) for part in parts)


def scan(
    section: Section, layer: Callable, carry: Any, weights: Mapping[str, Any], facts: Any
) -> tuple[Any, list[Any]]:
  """Runs a section; returns the carry, and the results [repeats, ...] of each layer of the group.

  `layer` takes the carry, a layer's weights and its facts, and returns the carry and a result.
  """
  wholes = {name: x for name, x in weights.items() if isinstance(x, Whole)}
  parts = {name: x for name, x in weights.items() if name not in wholes}
  turns = np.arange(section.repeats) if wholes else None

  def run_group(carry, inputs):
    (parts, facts, turn), results, seen = inputs, [], Counter[str]()
    for place, kind in enumerate(section.group):
      name, n = kind.stack, section.n_of(kind.stack)
      if name in wholes:
        block = _layer_of(wholes[name], turn * n + seen[name])
      else:
        block = _take(parts[name], seen[name], n)
      facts_of_layer = _take(facts, place, len(section.group))
      carry, result = layer(carry, of_kind(block, kind), facts_of_layer)
      results.append(result)
      seen[kind.stack] += 1
    return carry, results

  return jax.lax.scan(run_group, carry, (parts, facts, turns))


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


def _layer_of(whole: Whole, i: Any) -> Any:
  """Returns the i-th of the layers that a section takes out of a stack."""
  take = lambda x: jax.lax.dynamic_index_in_dim(x, whole.first + i, keepdims=False)
  return jax.tree.map(take, whole.stack)


def _take(tree: Any, i: int, n: int) -> Any:
  """Returns one of the n layers of a group."""
  return tree if n == 1 else jax.tree.map(lambda x: x[i], tree)
