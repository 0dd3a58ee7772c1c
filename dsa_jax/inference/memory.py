# SPDX-License-Identifier: Apache-2.0
"""Whether a model and the cache of a text fit into memory, which is said before anything is loaded."""

import math
import os

import jax
from jax.sharding import Mesh

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.inference.cache import bytes_per_token
from dsa_jax.inference.shares import mesh_config
from dsa_jax.inference.weights import FORMATS, abstract_weights

GIB = 2**30
STEP = 1024  # Tokens, to whose multiples a capacity is rounded down that would fit.


def device_bytes() -> int:
  """Returns the memory of a device. On a CPU, devices share that of the machine."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit']
  of_machine = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return of_machine // jax.local_device_count()


def weight_bytes(cfg: ModelConfig, fmt: str, mesh: Mesh | None) -> int:
  """Returns the bytes of a device's share of the weights in a format."""
  leaves = jax.tree.leaves(abstract_weights(cfg, fmt, mesh=mesh))
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def check_memory(
    cfg: ModelConfig,
    *,
    weights: str,
    cache: str,
    capacity: int,
    n_texts: int,
    mesh: Mesh | None,
):
  """Raises a ConfigError if a device lacks room for its shares of the weights and of the cache.

  Args:
    cfg: The model.
    weights: The format of its weights, see `abstract_weights`.
    cache: The format of the cache, see `init_cache`.
    capacity: Tokens of a text.
    n_texts: Texts side by side; 0: the caches are left out.
    mesh: The devices; None: one.
  """
  has, sizes = device_bytes(), mesh_config(mesh)
  if n_texts < 0:
    raise ConfigError(f'{n_texts=} must be at least 0.')
  n_own = math.ceil(n_texts / (sizes.fsdp * sizes.expert))  # Texts of a device.
  n_heads = max(cfg.row_heads // sizes.tensor, 1)  # Of GQA, a device keeps the key heads of its heads.
  of_token = n_own * bytes_per_token(cfg, cache, n_heads) / sizes.context
  of_weights = weight_bytes(cfg, weights, mesh)
  needs = of_weights + capacity * of_token
  if needs <= has:
    return
  narrower = FORMATS[FORMATS.index(weights) + 1 :]
  needed = {fmt: weight_bytes(cfg, fmt, mesh) + capacity * of_token for fmt in narrower}
  options = [f'weights={fmt!r} ({size / GIB:.1f} GiB)' for fmt, size in needed.items() if size <= has]
  shorter = int((has - of_weights) / of_token) // STEP * STEP if of_token else 0
  options += [f'capacity={shorter}'] if shorter > 0 else []
  more = math.ceil(needs / has) * sizes.n_devices
  raise ConfigError(
      f'a device has {has / GIB:.1f} GiB and would need {needs / GIB:.1f}: {of_weights / GIB:.1f} for '
      f'weights in {weights}, and caches in {cache} for texts of {capacity} tokens, {n_own} on each device. '
      f'What may fit: {", ".join([*options, f"about {more} devices (mesh=...)"])}.'
  )
