# SPDX-License-Identifier: Apache-2.0
"""The plan of a model's layers: the stack that holds each one's weights, and sections for scans.

A section is a repeating group of layers that may be of unlike kinds, and one scan runs it. Leading
layers with an MLP and then layers with experts are two sections. Layers that take turns are one.
"""

from collections.abc import Iterator
import functools
from typing import Any, NamedTuple

import jax

from dsa_jax.config import ModelConfig

# Layers with an MLP, layers with experts, MTP; and the first two kinds once more for layers with a
# window and for layers that rotate nothing, where these have sizes of their own, and for layers that
# read another's latents: all layers of a stack have weights of the same shapes.
STACKS = (
    'dense_blocks', 'moe_blocks', 'mtp', 'dense_window_blocks', 'moe_window_blocks',
    'dense_nope_blocks', 'moe_nope_blocks', 'dense_reading_blocks', 'moe_reading_blocks',
    'dense_nope_reading_blocks', 'moe_nope_reading_blocks',
)  # fmt: skip
OF_EXPERTS = tuple(name for name in STACKS if name.startswith('moe'))  # Stacks of layers with experts.


class Kind(NamedTuple):
  """What a program must know of a layer."""

  stack: str  # It holds the weights of the layer, behind those of the layers before it.
  window: int = 0  # The layer attends to the latest so many tokens. 0: it selects among all.
  reads: int = -1  # The slot of the rows that it reads. -1: it makes its own.
  keeps: int = -1  # The slot in which it keeps its rows for later layers. -1: none needs them.


class Section(NamedTuple):
  """Successive layers that one scan runs."""

  first: int  # The number of the first layer.
  group: tuple[Kind, ...]  # The kinds of its layers, as far as they repeat.
  repeats: int  # The group comes so many times.

  @property
  def layers(self) -> range:
    return range(self.first, self.first + self.repeats * len(self.group))

  def n_of(self, stack: str) -> int:
    """Returns how many layers of the group have their weights in a stack."""
    return sum(kind.stack == stack for kind in self.group)

  def facts(self, of_layers: Any) -> Any:
    """Returns this section's part of arrays that have an entry for each layer of the model."""
    start, stop = self.layers.start, self.layers.stop
    return jax.tree.map(lambda x: fold(x[start:stop], len(self.group)), of_layers)


def layers_of_stacks(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the numbers of the layers whose weights each stack holds, in order."""
  stacks: dict[str, tuple[int, ...]] = {name: () for name in STACKS if name != 'mtp'}
  for i in range(cfg.n_layers):
    stacks[kind_of(cfg, i).stack] += (i,)
  return stacks


def kind_of(cfg: ModelConfig, layer: int) -> Kind:
  """Returns the kind of a layer, by its number."""
  window = cfg.sliding_window if layer in cfg.window_layers else 0
  sizes = '_window' if window and cfg.has_window_sizes else ''
  sizes = '_nope' if layer in cfg.nope_layers and cfg.nope_layers_expand else sizes
  sizes += '_reading' if cfg.reads_rows(layer) else ''
  stack = f'{"dense" if layer in cfg.dense_layers else "moe"}{sizes}_blocks'
  if not cfg.n_readers:
    return Kind(stack, window)
  slots, source = row_slots(cfg)[0], cfg.kv_sources[layer]
  return Kind(stack, window, *((-1, slots[layer]) if source == layer else (slots[source], -1)))


@functools.cache
def row_slots(cfg: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns where the rows are kept that later layers read.

  Rows leave their slot after their last reader, so that layers which take turns are of few kinds.

  Returns:
    The slot of each layer, -1 where no later one reads its rows; and the width of each slot's rows.
  """
  slots, widths, busy = [-1] * cfg.n_layers, list[int](), dict[int, int]()  # Slots, until which layer.
  for i in range(cfg.n_layers if cfg.n_readers else 0):
    readers = [j for j in range(i + 1, cfg.n_layers) if cfg.kv_sources[j] == i]
    if not readers:
      continue
    width = cfg.of_layer(i).row_dim
    free = [slot for slot, last in busy.items() if last < i and widths[slot] == width]
    slots[i] = free[0] if free else len(widths)
    widths += [] if free else [width]
    busy[slots[i]] = readers[-1]
  return tuple(slots), tuple(widths)


@functools.cache
def plan(kinds: tuple[Kind, ...]) -> tuple[Section, ...]:
  """Returns sections with the fewest layers in their groups, each of which is compiled once.

  Of several such plans, it has the fewest sections, and long ones first.
  """
  best: dict[int, tuple[int, int, tuple[Section, ...]]] = {len(kinds): (0, 0, ())}
  for first in reversed(range(len(kinds))):
    options = []
    for section in _sections_at(first, kinds):
      n_compiled, n_sections, rest = best[section.layers.stop]
      options.append((n_compiled + len(section.group), n_sections + 1, (section, *rest)))
    best[first] = min(options, key=lambda option: (*option[:2], -len(option[2][0].layers)))
  return best[0][2]


def _sections_at(first: int, kinds: tuple[Kind, ...]) -> Iterator[Section]:
  """Yields the sections that may begin with a layer. A group of several comes twice or more."""
  for width in range(1, len(kinds) - first + 1):
    group, repeats = kinds[first : first + width], 1
    while kinds[first + repeats * width :][:width] == group:
      repeats += 1
    yield from (Section(first, group, n) for n in range(repeats, min(width - 1, 1), -1))


def fold(x: Any, n: int) -> Any:
  """Gives an axis of its own to the n layers of a group, unless it has one layer."""
  return x if n == 1 else x.reshape(-1, n, *x.shape[1:])
