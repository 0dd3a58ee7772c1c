# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or not at all, written while training goes on."""

import pathlib
from typing import Any, NamedTuple

from flax import nnx
import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from dsa_jax.config import ConfigError
from dsa_jax.training.state import TrainState

CACHE_BYTES = 64 * 2**20  # Of what was just read, for the next piece out of the same file.


class Progress(NamedTuple):
  """What is saved beside the arrays."""

  data: dict  # State of the data iterator.
  seconds: float  # Spent in this stage so far.


class Checkpoints:
  """The checkpoints of one stage, in one folder.

  They hold bare arrays: to read them takes orbax, but neither flax nor this package.
  """

  def __init__(self, folder: pathlib.Path, *, keep: int = 2):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
    self.folder = folder

  def __enter__(self):
    return self

  def __exit__(self, error: type | None, *_):
    if jax.process_count() > 1 and error and issubclass(error, jax.errors.JaxRuntimeError):
      return  # Another process has gone: what it was to write will never be there.
    self._manager.close()  # Waits for what is still being written.

  @property
  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, progress: Progress):
    """Saves in the background; the folder of a step appears when it is whole."""
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
    found = self._manager.restore(self.latest_step, args=ocp.args.Composite(**items))
    state = TrainState(**_with_structure(found['state'], like._asdict()))
    return state, Progress(**found['progress'])

  def seconds(self) -> float:
    """Returns how long the stage had taken at its latest step."""
    args = ocp.args.Composite(progress=ocp.args.JsonRestore())
    return self._manager.restore(self.latest_step, args=args)['progress']['seconds']


def latest_checkpoint(folder: pathlib.Path) -> pathlib.Path:
  """Returns the latest step in a stage's folder.

  Raises:
    ConfigError: There is none.
  """
  if not folder.is_dir():
    raise ConfigError(f'there is no checkpoint folder {folder}.')
  with Checkpoints(folder) as checkpoints:
    step = checkpoints.latest_step
  if step is None:
    raise ConfigError(f'{folder} holds no checkpoint.')
  return folder.absolute() / str(step)


def restore_params(folder: pathlib.Path, like: nnx.State) -> nnx.State:
  """Returns the parameters of the latest step in a stage's folder; optimiser and step stay behind.

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
  """Reads one array: every device's own share, one share after another."""
  shares = []
  for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
    share = store[index].read().result().astype(target.dtype, copy=False)
    shares.append(jax.block_until_ready(jax.device_put(share, device)))
  return jax.make_array_from_single_device_arrays(target.shape, target.sharding, shares)


def open_tree(folder: pathlib.Path) -> dict[tuple[str, ...], ts.TensorStore]:
  """Opens the arrays of an orbax checkpoint without reading them.

  Returns:
    By path, what has `shape`, `dtype`, and `store[index].read().result()`.
  """
  folder = folder.absolute()
  with ocp.PyTreeCheckpointer() as checkpointer:
    tree = checkpointer.metadata(folder).item_metadata.tree
  packed = (folder / 'manifest.ocdbt').exists()  # As a run saves; a conversion leaves plain files.
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
    rows = [
        f'  {".".join(p)}: {theirs.get(p, "absent")} there, {ours.get(p, "absent")} here' for p in wrong
    ]
    raise ConfigError(f'{folder} holds another model:\n' + '\n'.join(rows))


def _shapes(tree: Any) -> Any:
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return jax.tree.map(shape, nnx.as_pure(tree))


def _with_structure(found: Any, like: Any) -> Any:
  return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(found))
