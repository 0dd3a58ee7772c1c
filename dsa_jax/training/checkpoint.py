# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, which appear whole or not at all and are written while training goes on."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

from flax import nnx
import jax
import orbax.checkpoint as ocp

from dsa_jax.checkpoint_paths import check_readable, is_step, is_step_name
from dsa_jax.config import ConfigError
from dsa_jax.parallel.processes import any_process, is_first, of_first, wait_for_all
from dsa_jax.training.state import TrainState
from dsa_jax.training.stored_arrays import (
    StoredArray,
    as_json,
    digest_of_weights,
    open_tree,
    read_array,
    state_checksums,
)


class Progress(NamedTuple):
  """What is saved beside the arrays."""

  data: dict  # The state of the data iterator.
  seconds: float  # The time spent in this stage so far.
  stage: str = ''  # What trained it, a key of `STAGES`. Earlier versions did not record it.


class DamagedCheckpoint(ConfigError):
  """A checkpoint is there and cannot be read."""


@contextlib.contextmanager
def reading(folder: pathlib.Path, *, resumes: bool = False) -> Iterator[None]:
  """Names a checkpoint that cannot be read in one line, with the older one that may take its place.

  TensorStore and JSON report what is damaged as a ValueError. Errors of other kinds are ours.
  """
  try:
    yield
  except ConfigError:
    raise
  except (OSError, ValueError) as error:
    older = [step for step in saved_steps(folder.parent) if step < int(folder.name)]
    goes_on = ', from which --config.resume=last_good goes on' if resumes else ''
    hint = f' The one before it is {folder.parent / str(older[-1])}{goes_on}.' if older else ''
    raise DamagedCheckpoint(f'checkpoint {folder} is damaged: {_reason(error)}.{hint}') from error


def _system_code(error: Exception) -> int | None:
  """Returns the number of the error with which the operating system refused something, if it did.

  TensorStore reports that as a ValueError, and safetensors as an error of its own; both messages
  contain the number.
  """
  if isinstance(error, OSError):
    return error.errno or 0
  code = re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", str(error))
  return int(code[1] or code[2]) if code else None


def is_from_the_system(error: Exception) -> bool:
  """Returns whether the operating system refused something."""
  return _system_code(error) is not None


def _reason(error: Exception) -> str:
  """Says in a few words what an error of orbax or of TensorStore is about."""
  if code := _system_code(error):
    return os.strerror(code)
  return f'{type(error).__name__}: {error}'.splitlines()[0].split(' [tensorstore_spec')[0][:300]


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
    with self._writing(), contextlib.suppress(*([Exception] if error else [])):
      self._manager.close()  # This waits until everything is written.

  @property
  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, progress: Progress):
    """Takes checksums, and saves in the background. The folder of a step appears once it is complete.

    Raises:
      ConfigError: The system refuses to write this checkpoint or the one before.
    """
    tree = nnx.as_pure(state._asdict())
    items = {
        'state': ocp.args.StandardSave(tree),
        'progress': ocp.args.JsonSave(progress._asdict()),
        'checksums': ocp.args.JsonSave({'state': as_json(state_checksums(_by_path(tree)[0]))}),
    }
    with self._writing():
      self._manager.save(step, args=ocp.args.Composite(**items))

  @contextlib.contextmanager
  def _writing(self):
    try:
      yield
    except Exception as error:
      if not is_from_the_system(error):
        raise
      steps = saved_steps(self.folder)
      kept = f'the run resumes from step {steps[-1]}' if steps else 'the run starts anew'
      raise ConfigError(
          f'a checkpoint in {self.folder} could not be written: {_reason(error)}. Make room, and '
          f'start the same command again: {kept}.'
      ) from error

  def restore(self, step: int, like: TrainState) -> tuple[TrainState, Progress]:
    """Returns a step, with the structure, dtypes and shardings of `like`.

    Raises:
      DamagedCheckpoint: It cannot be read, by this process or by another one.
      ConfigError: It is of another model, or of another optimiser.
    """
    folder = self.folder.absolute() / str(step)
    targets, treedef = _by_path(_shapes(like._asdict()))
    damage = None
    try:
      progress = _progress(folder)
      with reading(folder, resumes=True):
        stores = open_tree(folder / 'state')
        _check_shapes(stores, targets, folder)
        arrays = _read_all(stores, targets)
    except DamagedCheckpoint as error:  # Each process reads its own shards, and all go on from one step.
      damage = error
    if any_process(damage is not None):
      raise damage or DamagedCheckpoint(f'checkpoint {folder} is damaged: another process cannot read it.')
    state = TrainState(**_with_structure(jax.tree.unflatten(treedef, arrays), like._asdict()))
    return state, progress

  def set_aside(self, step: int):
    """Renames the folder of a step, so that the step before it becomes the latest."""
    if is_first():
      (self.folder / str(step)).rename(self.folder / f'{step}.damaged')
    wait_for_all(f'step {step} is set aside')
    self._manager.reload()

  def progress(self) -> Progress:
    """Returns what the latest step has beside its arrays."""
    return _progress(self.folder / str(self.latest_step))


def _progress(folder: pathlib.Path) -> Progress:
  with reading(folder, resumes=True):
    values = json.loads((folder / 'progress' / 'metadata').read_text())
    required = {*Progress._fields} - Progress._field_defaults.keys()
    if not isinstance(values, dict) or not required <= values.keys() <= {*Progress._fields}:
      raise ValueError(f'its progress must have {Progress._fields}')
    return Progress(**values)


def saved_stage(folder: pathlib.Path) -> str:
  """Returns the stage that wrote a step, or the latest one in a folder; '' if nothing says which.

  Raises:
    DamagedCheckpoint: What says so cannot be read.
  """
  steps = [folder] if is_step(folder) else [folder / str(step) for step in saved_steps(folder)]
  if not steps or not (steps[-1] / 'progress').is_dir():  # Converted checkpoints have none.
    return ''
  return _progress(steps[-1]).stage


def latest_checkpoint(folder: pathlib.Path) -> pathlib.Path:
  """Returns the latest step in a stage's folder, or the folder itself if it is a step.

  Raises:
    ConfigError: There is none, or none could be read from this path.
  """
  check_readable(folder, 'checkpoint')
  folder = folder.resolve()  # Orbax and tensorstore refuse paths with `..`.
  if is_step(folder):
    return folder
  if not folder.is_dir():
    raise ConfigError(f'there is no checkpoint folder {folder}.')
  if not (steps := saved_steps(folder)):
    raise ConfigError(f'{folder} holds no checkpoint.')
  return folder / str(steps[-1])


def latest_of_job(folder: pathlib.Path) -> pathlib.Path:
  """Returns what `latest_checkpoint` is to the first process of the job; all of them call it.

  On a disk that hosts see at different times, they would otherwise read parts of different steps.
  """
  latest = latest_checkpoint(folder)
  return latest.with_name(str(of_first(int(latest.name))))


def weights_of(step: pathlib.Path) -> str | None:
  """Returns a digest of a step's weights; None if an earlier version, without checksums, saved it.

  Raises:
    DamagedCheckpoint: Its checksums cannot be read.
  """
  with reading(step):
    return digest_of_weights(step)


def restore_params(folder: pathlib.Path, like: nnx.State, *, resumes: bool = False) -> nnx.State:
  """Returns the parameters of a step, or of the latest one in a stage's folder; all processes call it.

  Args:
    folder: The folder of the step, or of the stage.
    like: Their shapes, dtypes and shardings.
    resumes: Whether the checkpoint is of the run that asks, which may go on from the one before it.

  Raises:
    ConfigError: There is no checkpoint, or it is of a model with other shapes.
  """
  checkpoint = latest_of_job(folder)
  stores = _open_params(checkpoint, like, resumes=resumes)
  check_wide(stores, folder)
  targets, treedef = _by_path(nnx.as_pure(like))
  with reading(checkpoint, resumes=resumes):
    arrays = _read_all(stores, targets)
  return _with_structure(jax.tree.unflatten(treedef, arrays), like)


def check_params(folder: pathlib.Path, like: nnx.State) -> dict[tuple[str, ...], StoredArray]:
  """Opens the parameters of the latest step in a stage's folder and compares their shapes.

  Raises:
    ConfigError: There is no checkpoint, or it is of a model with other shapes.
  """
  return _open_params(latest_checkpoint(folder), like)


def _open_params(
    checkpoint: pathlib.Path, like: nnx.State, *, resumes: bool = False
) -> dict[tuple[str, ...], StoredArray]:
  with reading(checkpoint, resumes=resumes):
    stores = open_tree(checkpoint / 'state')
  stores = {path[1:]: store for path, store in stores.items() if path[0] == 'params'}
  _check_shapes(stores, _by_path(nnx.as_pure(like))[0], checkpoint)
  return stores


def check_wide(stores: dict[tuple[str, ...], StoredArray], folder: pathlib.Path):
  """Raises a ConfigError if some parameters are kept as codes, which nothing trains."""
  if codes := ['.'.join(path) for path, store in stores.items() if store.has_codes]:
    raise ConfigError(
        f'{folder} keeps {len(codes)} of its arrays in FP8, such as {codes[0]}. It is for sampling and '
        'evaluation; to train, convert the release again with --dtype=bfloat16.'
    )


def saved_steps(folder: pathlib.Path) -> list[int]:
  """Returns the steps that a stage's folder holds, in ascending order, without opening them."""
  if not folder.is_dir():
    return []
  return sorted(int(path.name) for path in folder.iterdir() if is_step_name(path.name) and path.is_dir())


def _by_path(tree: Any) -> tuple[dict[tuple[str, ...], Any], Any]:
  """Returns the leaves of a tree by their paths in a checkpoint, in order, and its structure."""
  leaves, treedef = jax.tree.flatten_with_path(tree)
  return {_names(path): leaf for path, leaf in leaves}, treedef


def _names(path: tuple) -> tuple[str, ...]:
  attributes = ('key', 'idx', 'name')
  return tuple(str(next(getattr(k, a) for a in attributes if hasattr(k, a))) for k in path)


def _read_all(stores: dict, targets: dict) -> list[jax.Array]:
  """Reads arrays, the shards of each device only, one shard of one array after another."""
  return [read_array(stores[path], target) for path, target in targets.items()]


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
