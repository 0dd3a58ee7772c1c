# SPDX-License-Identifier: Apache-2.0
"""What does not change within a run: its recipe, model, devices and data."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import logging
import pathlib
import shutil
from typing import NamedTuple

from flax import nnx
from grain import DatasetIterator
import jax
from jax.sharding import Mesh
from jax.stages import Lowered
import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.data.batch import Batch
from dsa_jax.data.pipeline import first_batches, make_iterator
from dsa_jax.kernels.backend import default_backend, faster_attention, why_not_here
from dsa_jax.nn.attention.types import Mode
from dsa_jax.parallel.mesh import MeshConfig, make_mesh
from dsa_jax.parallel.processes import own_share, place_batch
from dsa_jax.training.checkpoint import restore_params, saved_steps
from dsa_jax.training.origin import Start, check_origins, find_starts
from dsa_jax.training.recipe import Recipe
from dsa_jax.training.state import (
    TrainState,
    abstract_params,
    abstract_state,
    init_params,
    model_graph,
    new_state,
)
from dsa_jax.training.step import make_train_step


class Data(NamedTuple):
  """All that a recipe reads."""

  train: dict[str, DatasetIterator]  # The batches of each entry.
  look: dict[str, Batch]  # The validation rows on which the selection of each entry is watched.
  report: list[Batch]  # The validation batches of the report.


class Run(NamedTuple):
  """A recipe with everything that it needs in order to start."""

  recipe: Recipe
  graph: nnx.GraphDef  # The model without its weights.
  backend: str  # The kernels that run, one of `kernels.backend.BACKENDS`.
  mesh: Mesh | None  # None: one device.
  data: Data
  starts: dict[pathlib.Path, Start] = {}  # The steps of other runs that entries start from, by the folders named.

  def mode(self, name: str) -> Mode:
    """Returns how an entry of the recipe attends while it trains."""
    recipe, entry = self.recipe, self.recipe.stages[name]
    attention = entry.mode
    if attention == 'auto':
      attention = faster_attention(self.backend, entry.seq_len, recipe.model.index_topk)
      logging.info('stage %s at %d tokens: %s attention', entry.stage, entry.seq_len, attention)
    return Mode(
        attention=attention,
        backend=self.backend,
        rule=recipe.selection,
        index_loss='indexer' in entry.trains,
        remat=recipe.remat,
    )

  def look_mode(self, name: str) -> Mode:
    """Returns how an entry is looked at; its selection is measured if its indexer learns."""
    rules = (self.recipe.selection,) if 'indexer' in self.recipe.stages[name].trains else ()
    return dataclasses.replace(self.mode(name), index_loss=False, remat='none', measure=rules)

  def train_step(self, name: str) -> Callable:
    """Returns the jitted step of an entry; see `make_train_step`."""
    entry = self.recipe.stages[name]
    return make_train_step(
        self.graph,
        entry.trains,
        self.mode(name),
        self.recipe.optim,
        micro_batches=entry.micro_batches,
    )

  def lower_step(self, name: str) -> Lowered:
    """Lowers the step of an entry, before its state is there."""
    entry = self.recipe.stages[name]
    shape = entry.batch_size, entry.seq_len
    batch = jax.tree.map(lambda x: np.zeros(shape, x.dtype), self.data.look[name])
    batch = place_batch(batch, entry.batch_size, self.mesh)
    rates = dict.fromkeys(entry.trains, np.float32(0))
    return self.train_step(name).lower(self.abstract_state(name), batch, rates)

  def abstract_state(self, name: str) -> TrainState:
    """Returns the shapes, dtypes and shardings of an entry's state."""
    recipe, entry = self.recipe, self.recipe.stages[name]
    return abstract_state(recipe.model, entry.trains, recipe.optim, mesh=self.mesh)

  def initial_state(self, name: str) -> TrainState:
    """Returns the state at step 0: fresh, or around the weights that `init_from` names."""
    recipe, entry = self.recipe, self.recipe.stages[name]
    if entry.init_from:
      params = self.params(recipe.init_folder(entry))
    else:
      params = init_params(recipe.model, seed=recipe.seed, mesh=self.mesh)
    return new_state(params, entry.trains, recipe.optim, seed=recipe.seed, mesh=self.mesh)


  def params(self, folder: pathlib.Path) -> nnx.State:
    """Returns the weights of one of its own entries, or of another run that it starts from."""
    like = abstract_params(self.recipe.model, mesh=self.mesh)
    if folder in self.starts:
      return self.starts[folder].params(like)
    own = folder.is_relative_to(self.recipe.workdir)
    return restore_params(folder, like, resumes=own)


def open_run(recipe: Recipe, before: Sequence[pathlib.Path] = ()) -> Run:
  """Finds the devices and opens the data, so that what will not do stops the run at once.

  Args:
    recipe: The recipe.
    before: Folders below which checkpoints may not exist yet, see `check_origins`.

  Raises:
    ConfigError: The devices, the backend or the data will not do. Nothing has been written.
  """
  mesh = make_mesh(**recipe.mesh.sizes) if recipe.mesh.n_devices > 1 else None
  _check_processes(recipe.mesh)
  check_origins(recipe, abstract_params(recipe.model, mesh=mesh), before)
  _check_disk(recipe)
  _check_fields_of_data(recipe)
  if recipe.backend and (reason := why_not_here(recipe.backend)):
    raise ConfigError(f'config.backend={recipe.backend!r}: {reason}')
  backend = recipe.backend or default_backend()
  starts = find_starts(recipe, before)
  return Run(recipe, model_graph(recipe.model), backend, mesh, _open_data(recipe, mesh), starts)


def _check_disk(recipe: Recipe):
  """Checks that there is room for the checkpoints: one of each entry to come, and the next one."""
  sizes = []
  for name, entry in recipe.stages.items():
    if not saved_steps(recipe.checkpoint_folder(name)):
      state = abstract_state(recipe.model, entry.trains, recipe.optim)
      sizes.append(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)))
  folder = next(p for p in (recipe.workdir, *recipe.workdir.absolute().parents) if p.exists())
  needed, free = sum(sizes) + max(sizes, default=0), shutil.disk_usage(folder).free
  if needed > free:
    raise ConfigError(
        f'workdir {recipe.workdir}: its disk has {free / 2**30:.1f} GiB left; the checkpoints of '
        f'{len(sizes)} entries need {needed / 2**30:.1f}.'
    )


def _check_fields_of_data(recipe: Recipe):
  """Checks that no field of the data is without effect; a run that has begun with one goes on."""
  if not (names := recipe.data.unused):
    return
  values = ', '.join(f'data.{name}={getattr(recipe.data, name)!r}' for name in names)
  message = f'{values} would change nothing: data.source={recipe.data.source!r} does not read it.'
  if not (recipe.workdir / 'config.json').exists():
    raise ConfigError(message)
  logging.warning(message)


def _check_processes(mesh: MeshConfig):
  if jax.process_count() > 1 and mesh.n_devices != jax.device_count():
    raise ConfigError(
        f'config.mesh {mesh.sizes} has {mesh.n_devices} devices; the {jax.process_count()} processes '
        f'of this job have {jax.device_count()}, and it must take them all.'
    )


def _open_data(recipe: Recipe, mesh: Mesh | None) -> Data:
  rows = functools.cache(recipe.data.rows)  # Files are read once for a length and a split.
  report, train, look = recipe.report, {}, {}
  for name, entry in recipe.stages.items():
    share = own_share(entry.batch_size, mesh)
    source = rows(entry.seq_len, 'train')
    with _rows_for(f'config.stages.{name}', entry.seq_len):
      train[name] = make_iterator(source, entry.batch_size, entry.data_seed, share)
    held_out = rows(entry.seq_len, 'validation')
    with _rows_for('config.measure_rows, of held-out data', entry.seq_len):
      [look[name]] = first_batches(held_out, recipe.measure_rows, 1, seed=0)
  held_out = rows(report.seq_len, 'validation')
  with _rows_for('config.report, of held-out data', report.seq_len):
    batches = first_batches(held_out, report.batch_size, report.batches, seed=0)
  return Data(train, look, batches)


@contextlib.contextmanager
def _rows_for(what: str, seq_len: int) -> Iterator[None]:
  """Adds to a ConfigError what asked for the rows."""
  try:
    yield
  except ConfigError as error:
    raise ConfigError(f'{what}, in rows of {seq_len} tokens: {error}') from error
