# SPDX-License-Identifier: Apache-2.0
"""The mesh of devices, and one table from the axes of weights to the axes of the mesh."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from flax import nnx
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P

from dsa_jax.config import ConfigError, ModelConfig

MESH_AXES = ('fsdp', 'context', 'expert', 'tensor')
SEQUENCES = ('fsdp', 'expert')  # Devices along these axes share the sequences of a batch.
TOKENS = ('context', 'tensor')  # Devices along these axes share the tokens of a sequence.
BATCH = P(SEQUENCES, TOKENS)  # The sharding of [B, T, ...] between layers.
ALL_TOKENS = P(SEQUENCES, 'context')  # The same where `tensor` splits widths instead of tokens.
OWNERS = ('expert', 'tensor')  # Devices along these axes own different experts.
HEAD = P('fsdp', 'tensor')  # The sharding of the head's weight, [D, W].
LOGITS = P(SEQUENCES, 'context', 'tensor')  # The sharding of [B, T, W].

# The axes of the mesh that split each axis of a weight. None keeps it whole.
RULES = {
    'embed': 'fsdp',
    'vocab': 'tensor',
    'heads': 'tensor',
    'ffn': 'tensor',
    'expert': OWNERS,
    'q_lora': None,
    'index_heads': None,  # Every device scores with all index heads, so all select the same tokens.
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """The number of devices along each axis of the mesh. All ones is a single device."""

  fsdp: int = 1  # These devices share weights and sequences.
  context: int = 1  # These share the tokens of a sequence.
  expert: int = 1  # These share experts and sequences.
  tensor: int = 1  # These share heads, widths and experts, and between layers the tokens.

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
    """Raises a ConfigError if an axis of a weight cannot be split evenly."""
    divided = {('tensor',): ['n_heads', 'window_n_heads', 'vocab_size'], ('fsdp',): ['dim'], OWNERS: []}
    if cfg.row_heads > 1 and cfg.row_heads % self.tensor and self.tensor % cfg.row_heads:
      raise ConfigError(
          f'tensor={self.tensor} must divide n_kv_heads={cfg.row_heads}, or be a multiple of it.'
      )
    if cfg.dense_layers:
      divided['tensor',] += ['inter_dim']
    if cfg.n_dense_layers < cfg.n_layers:
      divided['tensor',] += ['moe_inter_dim', 'shared_inter_dim']
      divided[OWNERS] += ['n_routed_experts']
    for axes, names in divided.items():
      split = ' times '.join(f'{axis}={self.sizes[axis]}' for axis in axes)
      for name in names:
        if getattr(cfg, name) % math.prod(self.sizes[axis] for axis in axes):
          raise ConfigError(f'{split} must divide {name}={getattr(cfg, name)}.')

  def check_rows(self, batch_size: int, seq_len: int):
    """Raises a ConfigError if the sequences or tokens of a (micro-)batch cannot be shared evenly."""
    if batch_size % (self.fsdp * self.expert):
      raise ConfigError(
          f'fsdp={self.fsdp} times expert={self.expert} must divide the {batch_size} sequences of a '
          'micro-batch.'
      )
    shares_tokens = self.context * self.tensor > 1
    if shares_tokens and seq_len % (2 * self.context * self.tensor):
      raise ConfigError(
          f'twice context={self.context} times tensor={self.tensor} must divide {seq_len} tokens: '
          'every device takes an early and a late piece of each sequence.'
      )


def make_mesh(*, fsdp: int = 1, context: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
  """Returns a mesh of that many devices along each axis.

  Raises:
    ConfigError: There are not as many devices.
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
  """Returns the sharding of a weight. Leading dimensions without a name, as of a stack, stay whole.

  Raises:
    ConfigError: An axis cannot be split evenly.
  """
  named = [None] * (len(shape) - len(axes)) + list(axes)
  spec = split_by(named)
  for size, name, split in zip(shape, named, spec):
    axes = (split,) if isinstance(split, str) else split or ()
    if size % math.prod(sizes := [mesh.shape[axis] for axis in axes]):
      raise ConfigError(f'axis {name!r} of {size} cannot be split over {axes} of {sizes}.')
  return NamedSharding(mesh, spec)


def shardings_of(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
  """Returns the sharding of each array: that of weights, and moments like them, by their axes."""

  def place(leaf):
    if not isinstance(leaf, nnx.Variable):
      return NamedSharding(mesh, P())
    axes = leaf.get_metadata()['axes']
    return leaf.replace(
        jax.tree.map(lambda x: weight_sharding(x.shape, axes, mesh), leaf.get_value())
    )

  return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
