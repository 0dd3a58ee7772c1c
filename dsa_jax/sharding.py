# SPDX-License-Identifier: Apache-2.0
"""Where every weight lies on a mesh of devices: one table from its axes to the mesh's."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ('fsdp', 'context', 'expert', 'tensor')

# Axis of a weight -> axis of the mesh that splits it; None keeps it whole.
RULES = {
    'embed': 'fsdp',
    'vocab': 'tensor',
    'heads': 'tensor',
    'ffn': 'tensor',
    'expert': 'expert',
    'expert_ffn': 'tensor',
    'q_lora': None,
    'index_heads': None,  # Every device must select the same tokens.
}


def make_mesh(*, fsdp: int = 1, context: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
  """Returns a mesh of that many devices along each axis.

  Raises:
    ValueError: There are not as many devices.
  """
  shape = fsdp, context, expert, tensor
  needed = fsdp * context * expert * tensor
  if min(shape) < 1 or needed > jax.device_count():
    sizes = dict(zip(MESH_AXES, shape))
    raise ValueError(f'mesh {sizes} needs {needed} devices; there are {jax.device_count()}.')
  return jax.make_mesh(shape, MESH_AXES, devices=jax.devices()[:needed])


def weight_sharding(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> NamedSharding:
  """Returns where a weight lies; the leading dimension of a stack of layers, unnamed, stays whole.

  Raises:
    ValueError: An axis cannot be split evenly.
  """
  named = [None] * (len(shape) - len(axes)) + list(axes)
  spec = [None if name is None else RULES[name] for name in named]
  for size, name, axis in zip(shape, named, spec):
    if axis is not None and size % mesh.shape[axis]:
      raise ValueError(f'axis {name!r} of {size} cannot be split over {axis}={mesh.shape[axis]}.')
  return NamedSharding(mesh, PartitionSpec(*spec))
