# SPDX-License-Identifier: Apache-2.0
"""Where every array lies on a mesh of devices: one table from its axes to the mesh's."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from flax import nnx
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P

from dsa_jax.config import ConfigError, ModelConfig

MESH_AXES = ('fsdp', 'context', 'expert', 'tensor')
SEQUENCES = ('fsdp', 'expert')  # They share the sequences of a batch,
TOKENS = ('context', 'tensor')  # and these the tokens of each.
BATCH = P(SEQUENCES, TOKENS)  # [B, T, ...] as it flows from layer to layer.
ALL_TOKENS = P(SEQUENCES, 'context')  # [B, T, ...] where devices share widths, not tokens.
OWNERS = ('expert', 'tensor')  # Their devices own different experts.
LOGITS = P(SEQUENCES, 'context', 'tensor')

# Axis of a weight -> axes of the mesh that split it; None keeps it whole.
RULES = {
    'embed': 'fsdp',
    'vocab': 'tensor',
    'heads': 'tensor',
    'ffn': 'tensor',
    'expert': OWNERS,
    'q_lora': None,
    'index_heads': None,  # Every device must select the same tokens.
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How many devices share what; all ones is a single device."""

  fsdp: int = 1  # Weights and sequences.
  context: int = 1  # The tokens of a sequence.
  expert: int = 1  # Experts, and sequences.
  tensor: int = 1  # Heads, widths and experts of one layer, and between layers the tokens.

  def __post_init__(self):
    for name, size in self.sizes.items():
      if size < 1:
        raise ConfigError(f'{name}={size} must be at least 1.')

  @property
  def sizes(self) -> dict[str, int]:
    return dataclasses.asdict(self)

  @property
  def n_devices(self) -> int:
    return self.fsdp * self.context * self.expert * self.tensor

  def check_model(self, cfg: ModelConfig):
    """Raises a ValueError if an axis of a weight cannot be split evenly."""
    divided = {('tensor',): ['n_heads', 'vocab_size'], ('fsdp',): ['dim'], OWNERS: []}
    if cfg.n_dense_layers:
      divided['tensor',] += ['inter_dim']
    if cfg.n_dense_layers < cfg.n_layers:
      divided['tensor',] += ['moe_inter_dim']
      divided[OWNERS] += ['n_routed_experts']
    for axes, names in divided.items():
      split = ' times '.join(f'{axis}={self.sizes[axis]}' for axis in axes)
      for name in names:
        if getattr(cfg, name) % math.prod(self.sizes[axis] for axis in axes):
          raise ConfigError(f'{split} must divide {name}={getattr(cfg, name)}.')

  def check_rows(self, batch_size: int, seq_len: int):
    """Raises a ValueError if the sequences or tokens of a (micro-)batch cannot be shared evenly."""
    if batch_size % (self.fsdp * self.expert):
      raise ConfigError(
          f'fsdp={self.fsdp} times expert={self.expert} must divide the {batch_size} sequences of a '
          'micro-batch.'
      )
    if seq_len % (2 * self.context * self.tensor):
      raise ConfigError(
          f'twice context={self.context} times tensor={self.tensor} must divide {seq_len} tokens: '
          'every device takes an early and a late piece of each sequence.'
      )


def make_mesh(*, fsdp: int = 1, context: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
  """Returns a mesh of that many devices along each axis.

  Raises:
    ValueError: There are not as many devices.
  """
  cfg = MeshConfig(fsdp=fsdp, context=context, expert=expert, tensor=tensor)
  if cfg.n_devices > jax.device_count():
    raise ConfigError(
        f'mesh {cfg.sizes} needs {cfg.n_devices} devices; there are {jax.device_count()}.'
    )
  axis_types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
  devices = jax.devices()[: cfg.n_devices]
  return jax.make_mesh(tuple(cfg.sizes.values()), MESH_AXES, axis_types, devices=devices)


def split_by(axes: Sequence[str | None]) -> P:
  """Returns the axes of the mesh that split a weight with these axes."""
  return P(*(None if name is None else RULES[name] for name in axes))


def weight_sharding(
    shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh
) -> NamedSharding:
  """Returns where a weight lies; the leading dimension of a stack of layers, unnamed, stays whole.

  Raises:
    ValueError: An axis cannot be split evenly.
  """
  named = [None] * (len(shape) - len(axes)) + list(axes)
  spec = split_by(named)
  for size, name, split in zip(shape, named, spec):
    axes = (split,) if isinstance(split, str) else split or ()
    if size % math.prod(sizes := [mesh.shape[axis] for axis in axes]):
      raise ConfigError(f'axis {name!r} of {size} cannot be split over {axes} of {sizes}.')
  return NamedSharding(mesh, spec)


def shardings_of(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
  """Returns where each array of a tree lies: weights, and moments like them, by their axes."""

  def place(leaf):
    if not isinstance(leaf, nnx.Variable):
      return NamedSharding(mesh, P())
    return leaf.replace(weight_sharding(leaf.shape, leaf.get_metadata()['axes'], mesh))

  return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
