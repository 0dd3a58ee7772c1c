# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, which appear whole or not at all and are written while training goes on."""

import contextlib
import pathlib
from typing import Any, NamedTuple

from flax import nnx
import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from dsa_jax.config import ConfigError
from dsa_jax.training.state import TrainState

CACHE_BYTES = 64 * 2**20  # Tensorstore keeps this much of a file for the next piece out of it.


class Progress(NamedTuple):
  """What is saved beside the arrays."""

  data: dict  # The state of the data iterator.
  seconds: float  # The time spent in this stage so far.


class Checkpoints:
  """The checkpoints of one stage, in one folder.

  They hold bare arrays, so reading them takes orbax but neither flax nor this package.
  """

  def __init__(self, folder: pathlib.Path, *, keep: int = 2):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
    self.folder = folder

  def __enter__(self):
    return self

  def __exit__(self, error: type | None, *_):
    if jax.process_count() > 1 and error and issubclass(error, jax.errors.JaxRuntimeError):
      return  # If another process has gone, its part of a checkpoint will never be written.
    self._manager.close()  # This waits until everything is written.

  @property
  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, progress: Progress):
    """Saves in the background. The folder of a step appears once it is complete."""
    items = {
        'state': ocp.args.StandardSave(nnx.as_pure(state._asdict())),
        'progress': ocp.args.JsonSave(progress._asdict()),
    }
    self._manager.save(step, args=ocp.args.Composite(**items))

  def restore(self, like: TrainState) -> tuple[TrainState, Progress]:
    """Returns the latest step, with the structure, dtypes and shardings of `like`."""
    items = {
        'state': ocp.args.StandardRestore(_shapes(like._asdict())),
        'progress': ocp.args.JsonRestore(),
    }
    restored = self._manager.restore(self.latest_step, args=ocp.args.Composite(**items))
    state = TrainState(**_with_structure(restored['state'], like._asdict()))
    return state, Progress(**restored['progress'])

  def seconds(self) -> float:
    """Returns the seconds that the stage had taken up to its latest step."""
    args = ocp.args.Composite(progress=ocp.args.JsonRestore())
    return self._manager.restore(self.latest_step, args=args)['progress']['seconds']


def latest_checkpoint(folder: pathlib.Path) -> pathlib.Path:
  """Returns the latest step in a stage's folder, or the folder itself if it is a step.

  Raises:
    ConfigError: There is none.
  """
  folder = folder.resolve()  # Orbax and tensorstore refuse paths with `..`.
  if folder.name.isdigit() and (folder / 'state').is_dir():
    return folder
  if not folder.is_dir():
    raise ConfigError(f'there is no checkpoint folder {folder}.')
  with Checkpoints(folder) as checkpoints:
    step = checkpoints.latest_step
  if step is None:
    raise ConfigError(f'{folder} holds no checkpoint.')
  return folder / str(step)


def restore_params(folder: pathlib.Path, like: nnx.State) -> nnx.State:
  """Returns the parameters of a step, or of the latest one in a stage's folder.

  Raises:
    ConfigError: There is no checkpoint, or it is of a model with other shapes.
  """
  stores = open_tree(latest_checkpoint(folder) / 'state')
  stores = {path[1:]: store for path, store in stores.items() if path[0] == 'params'}
  targets, treedef = jax.tree.flatten_with_path(nnx.as_pure(like))
  targets = {tuple(key.key for key in path): target for path, target in targets}
  _check_shapes(stores, targets, folder)
  arrays = [_read(stores[path], target) for path, target in targets.items()]
  return _with_structure(jax.tree.unflatten(treedef, arrays), like)


def _read(store: ts.TensorStore, target: jax.ShapeDtypeStruct) -> jax.Array:
  """Reads one array, one device's shard after another."""
  shards, places = [], target.sharding.addressable_devices_indices_map(target.shape)
  for device, index in places.items():
    shard = store[index].read().result().astype(target.dtype, copy=False)
    shards.append(jax.block_until_ready(jax.device_put(shard, device)))
  return jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards)


def open_tree(folder: pathlib.Path) -> dict[tuple[str, ...], ts.TensorStore]:
  """Opens the arrays of an orbax checkpoint without reading them.

  Returns:
    A tensorstore for each path in the tree.
  """
  folder = folder.absolute()
  # A PyTreeCheckpointer would look for metadata of a whole step here, and warn that there is none.
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    tree = handler.metadata(folder).tree
  packed = (folder / 'manifest.ocdbt').exists()  # Runs save in this format; conversions write plain files.
  context = ts.Context({'cache_pool': {'total_bytes_limit': CACHE_BYTES}})
  stores = {}
  for keys, _ in jax.tree.leaves_with_path(tree):
    path = tuple(str(getattr(key, 'key', getattr(key, 'idx', key))) for key in keys)
    kvstore = {'driver': 'file', 'path': f'{folder}/{".".join(path)}/'}
    if packed:
      kvstore = {'driver': 'ocdbt', 'base': f'file://{folder}/', 'path': f'{".".join(path)}/'}
    spec = {'driver': 'zarr', 'kvstore': kvstore, 'recheck_cached_data': False}
    stores[path] = ts.open(spec, open=True, read=True, context=context).result()
  return stores


def _check_shapes(stores: dict, targets: dict, folder: pathlib.Path):
  ours, theirs = ({p: x.shape for p, x in tree.items()} for tree in (targets, stores))
  wrong = sorted(p for p in ours.keys() | theirs.keys() if ours.get(p) != theirs.get(p))
  if wrong:
    shape = lambda shapes, p: shapes.get(p, 'absent')
    rows = [f'  {".".join(p)}: {shape(theirs, p)} there, {shape(ours, p)} here' for p in wrong]
    raise ConfigError(f'{folder} holds another model:\n' + '\n'.join(rows))


def _shapes(tree: Any) -> Any:
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return jax.tree.map(shape, nnx.as_pure(tree))


def _with_structure(tree: Any, like: Any) -> Any:
  return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))
