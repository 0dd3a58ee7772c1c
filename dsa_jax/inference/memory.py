# SPDX-License-Identifier: Apache-2.0
"""Whether a model and texts fit into memory, which is said before anything is loaded."""

from collections.abc import Callable, Iterator
import dataclasses
import math
import os
from typing import Any

import jax
from jax.sharding import NamedSharding

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.inference.cache import init_cache
from dsa_jax.inference.shares import AnyMesh, mesh_config, shares_of_texts
from dsa_jax.inference.slots import free_slots
from dsa_jax.inference.weights import FORMATS, abstract_weights
from dsa_jax.kernels.backend import default_backend

GIB = 2**30
STEP = 1024  # Tokens, to whose multiples a capacity is rounded down that would fit.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
  """What is held of texts side by side: caches, logits, and maybe what drafts them."""

  n: int  # How many texts there are.
  capacity: int  # How many tokens each of them may have.
  drafts: bool = False  # Whether the MTP layer guesses tokens, and has a cache of its own.
  is_running: bool = False  # Whether the next prompt is read beside them, with a cache of its own.

  def __post_init__(self):
    if self.n < 0:
      raise ConfigError(f'n_texts={self.n} must be at least 0.')


def device_bytes() -> int:
  """Returns the memory of a device. On a CPU, devices share that of the machine."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit']
  of_machine = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return of_machine // jax.local_device_count()


def weight_bytes(cfg: ModelConfig, fmt: str, mesh: AnyMesh | None) -> int:
  """Returns the bytes of a device's share of the weights in a format."""
  leaves = jax.tree.leaves(abstract_weights(cfg, fmt, mesh=mesh))
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def text_bytes(cfg: ModelConfig, texts: Texts, cache: str, mesh: AnyMesh | None) -> int:
  """Returns the bytes of a device's share of what is held of texts, with this format of the cache."""
  of_texts = _slot_bytes(cfg, texts.n, texts, cache, mesh) if texts.n else 0
  return of_texts + (_slot_bytes(cfg, 1, texts, cache, mesh) if texts.is_running else 0)


def _slot_bytes(cfg: ModelConfig, n: int, texts: Texts, cache: str, mesh: AnyMesh | None) -> int:
  shares, whole_lines = shares_of_texts(cfg, mesh), default_backend() == 'tpu'
  n_heads = 0 if shares is None else shares.row_heads(cfg)
  sizes = mesh_config(mesh)
  n = n if n == 1 else n + -n % (sizes.fsdp * sizes.expert)  # Shares are even.

  def slots():
    empty = init_cache(
        cfg, n, texts.capacity, fmt=cache, whole_lines=whole_lines, n_heads=n_heads
    )
    return free_slots(empty, cfg, drafts=texts.drafts)

  held = jax.eval_shape(slots)
  if shares is None:
    return _nbytes(held)
  split = lambda x, spec: x.update(shape=NamedSharding(mesh, spec).shard_shape(x.shape))
  return _nbytes(jax.tree.map(split, held, shares.specs(held, n)))


def _nbytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def check_memory(
    cfg: ModelConfig, texts: Texts, *, weights: str | int, cache: str, mesh: AnyMesh | None
):
  """Raises a ConfigError if a device lacks room for its shares of the weights and of texts.

  Args:
    cfg: The model.
    texts: What is held of texts.
    weights: The format of the weights, see `abstract_weights`. If they are loaded, the bytes of a
      device's share of them.
    cache: The format of the cache, see `init_cache`.
    mesh: The devices; None: one.
  """
  has, is_loaded = device_bytes(), isinstance(weights, int)
  of_weights = weights if is_loaded else weight_bytes(cfg, weights, mesh)
  of_texts = text_bytes(cfg, texts, cache, mesh)
  if (needs := of_weights + of_texts) <= has:
    return
  options = [] if is_loaded else list(_narrower(cfg, weights, mesh, has - of_texts))
  options += _fewer(cfg, texts, cache, mesh, has - of_weights)
  more = math.ceil(needs / has) * mesh_config(mesh).n_devices
  kind = f'{texts.n} {"slots" if texts.is_running else "texts"} of {texts.capacity} tokens'
  held = f"a device's share of {kind}" if mesh is not None else kind
  options.append(f'about {more} devices (mesh=...)')
  raise ConfigError(
      f'a device has {has / GIB:.1f} GiB and would need {needs / GIB:.1f}: {of_weights / GIB:.1f} for '
      f'weights{"" if is_loaded else f" in {weights}"}, and {of_texts / GIB:.1f} for {held}, '
      f'with a cache in {cache}. What may fit: {", ".join(options)}.'
  )


def _narrower(cfg: ModelConfig, weights: str, mesh: AnyMesh | None, room: int) -> Iterator[str]:
  """Yields the narrower formats in which weights fit into so many bytes."""
  for fmt in FORMATS[FORMATS.index(weights) + 1 :]:
    if (size := weight_bytes(cfg, fmt, mesh)) <= room:
      yield f'weights={fmt!r} ({size / GIB:.1f} GiB)'


def _fewer(
    cfg: ModelConfig, texts: Texts, cache: str, mesh: AnyMesh | None, room: int
) -> Iterator[str]:
  """Yields how long texts may be, and how many, to fit into so many bytes."""
  size = lambda **fields: text_bytes(cfg, dataclasses.replace(texts, **fields), cache, mesh)
  sizes = mesh_config(mesh)
  together, least = sizes.fsdp * sizes.expert, sizes.context
  if texts.n and texts.capacity > least:
    shorter = _most(lambda n: size(capacity=n), least, texts.capacity, room) // STEP * STEP
    if shorter > 0:
      yield f'texts of {shorter} tokens' if texts.is_running else f'capacity={shorter}'
  if texts.n > together:
    fewer = _most(lambda n: size(n=n), together, 2 * together, room) // together * together
    if fewer > 0:
      yield f'slots={fewer}' if texts.is_running else f'n_texts={fewer}'


def _most(size: Callable[[int], int], low: int, high: int, room: int) -> int:
  """Returns the largest number whose size fits, where sizes grow by as much from each to the next."""
  of_one = (size(high) - size(low)) / (high - low)
  return low + math.floor((room - size(low)) / of_one)
