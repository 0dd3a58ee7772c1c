# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or not at all, written while training goes on."""

import pathlib
from typing import Any, NamedTuple

from flax import nnx
import jax
import orbax.checkpoint as ocp

from dsa_jax.state import TrainState


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

  def __exit__(self, *_):
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
    ValueError: There is none.
  """
  if not folder.is_dir():
    raise ValueError(f'there is no checkpoint folder {folder}.')
  with Checkpoints(folder) as checkpoints:
    step = checkpoints.latest_step
  if step is None:
    raise ValueError(f'{folder} holds no checkpoint.')
  return folder.absolute() / str(step)


def restore_params(folder: pathlib.Path, like: nnx.State) -> nnx.State:
  """Returns the parameters of the latest step in a stage's folder; optimiser and step stay behind.

  Raises:
    ValueError: There is no checkpoint, or it is of a model with other shapes.
  """
  path = latest_checkpoint(folder) / 'state'
  with ocp.PyTreeCheckpointer() as checkpointer:
    stored = checkpointer.metadata(path).item_metadata.tree['params']
    _check_shapes(stored, nnx.as_pure(like), folder)
    target = {'params': _shapes(like)}
    args = ocp.checkpoint_utils.construct_restore_args(target)
    found = checkpointer.restore(path, item=target, restore_args=args, partial_restore=True)
  return _with_structure(found['params'], like)


def _check_shapes(stored: Any, like: Any, folder: pathlib.Path):
  names = lambda tree: {jax.tree_util.keystr(p): x.shape for p, x in jax.tree.leaves_with_path(tree)}
  ours, theirs = names(like), names(stored)
  wrong = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
  if wrong:
    rows = [f'  {n}: {theirs.get(n, "absent")} there, {ours.get(n, "absent")} here' for n in wrong]
    raise ValueError(f'{folder} holds another model:\n' + '\n'.join(rows))


def _shapes(tree: Any) -> Any:
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return jax.tree.map(shape, nnx.as_pure(tree))


def _with_structure(found: Any, like: Any) -> Any:
  return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(found))
