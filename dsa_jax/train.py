# SPDX-License-Identifier: Apache-2.0
"""Runs a recipe: python -m dsa_jax.train --config=configs/quickstart.py"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import logging
import os
import sys
import time
from typing import Any, NamedTuple

from absl import app, flags
from flax import nnx
from grain import DatasetIterator
import jax
from jax.sharding import Mesh
from jax.stages import Lowered
from ml_collections import ConfigDict, config_flags
import numpy as np

from dsa_jax.data.batch import Batch
from dsa_jax.data.pipeline import first_batches, make_iterator
from dsa_jax.kernels.backend import default_backend, faster_attention
from dsa_jax.nn.attention.mla import Mode
from dsa_jax.parallel.mesh import MeshConfig, make_mesh
from dsa_jax.parallel.processes import (
    LOST,
    is_first,
    join_job,
    own_share,
    place_batch,
    wait_for_all,
)
from dsa_jax.reporting.evaluate import measure, measure_batch
from dsa_jax.reporting.metrics import MetricsWriter, Progress as ProgressBar, SilentWriter
from dsa_jax.reporting.report import write_report
from dsa_jax.reporting.results import evaluate_recipe, report_programs
from dsa_jax.training.ahead import Ahead
from dsa_jax.training.checkpoint import Checkpoints, Progress, restore_params
from dsa_jax.training.compilation_cache import compilation_cache
from dsa_jax.training.recipe import Recipe, claim_workdir, read_recipe
from dsa_jax.training.stages import StageConfig
from dsa_jax.training.state import (
    TrainState,
    abstract_params,
    abstract_state,
    init_params,
    model_graph,
    new_state,
)  # fmt: skip
from dsa_jax.training.step import make_train_step


def train(config: ConfigDict) -> dict[str, Any]:
  """Runs the stages of a recipe one after another, each from where it stands; then reports.

  Returns:
    What `report.json` holds.

  Raises:
    ValueError: The config, the data or the workdir will not do; nothing has been written.
    FloatingPointError: A loss or a gradient stopped being finite.
  """
  recipe = read_recipe(config)
  with compilation_cache(recipe.compilation_cache):
    return run_recipe(config, recipe)


def run_recipe(config: ConfigDict, recipe: Recipe) -> dict[str, Any]:
  mesh = make_mesh(**recipe.mesh.sizes) if recipe.mesh.n_devices > 1 else None
  check_processes(recipe.mesh)
  data = open_data(recipe, mesh)
  backend = recipe.backend or default_backend()
  if is_first():
    claim_workdir(config, recipe.workdir)
  wait_for_all('workdir')
  claim_workdir(config, recipe.workdir)  # It is there now; all say alike whether it fits.
  graph = model_graph(recipe.model)
  ahead = Ahead(all_programs(recipe, graph, backend, mesh, data), mesh)
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext(), ahead:
    writer = MetricsWriter(recipe.workdir) if is_first() else SilentWriter()
    with writer, ProgressBar(quiet=not is_first()) as bar:
      for name in recipe.stages:
        run_stage(recipe, name, graph, backend, mesh, data, writer, bar, ahead)
    ahead.wait()
    results = evaluate_recipe(recipe, graph, backend, mesh, data.report)
  if is_first():
    write_report(recipe.workdir, results)
  return results


def check_processes(mesh: MeshConfig):
  if jax.process_count() > 1 and mesh.n_devices != jax.device_count():
    raise ValueError(
        f'config.mesh {mesh.sizes} has {mesh.n_devices} devices; the {jax.process_count()} processes '
        f'of this job have {jax.device_count()}, and it must take them all.'
    )


class Data(NamedTuple):
  """All that a recipe reads."""

  train: dict[str, DatasetIterator]  # By entry.
  look: dict[str, Batch]  # By entry: the validation rows on which its selection is watched.
  report: list[Batch]


def open_data(recipe: Recipe, mesh: Mesh | None) -> Data:
  """Opens every source before anything is written, so that bad data stops the run at once."""
  lengths = {entry.seq_len for entry in recipe.stages.values()}
  rows = {n: recipe.data.rows(n, 'train') for n in lengths}
  held_out = {n: recipe.data.rows(n, 'validation') for n in lengths | {recipe.report.seq_len}}
  report, train, look = recipe.report, {}, {}
  for name, entry in recipe.stages.items():
    share = own_share(entry.batch_size, mesh)
    train[name] = make_iterator(rows[entry.seq_len], entry.batch_size, entry.data_seed, share)
    [look[name]] = first_batches(held_out[entry.seq_len], recipe.measure_rows, 1, seed=0)
  batches = first_batches(held_out[report.seq_len], report.batch_size, report.batches, seed=0)
  return Data(train, look, batches)


def run_stage(
    recipe: Recipe,
    name: str,
    graph: nnx.GraphDef,
    backend: str,
    mesh: Mesh | None,
    data: Data,
    writer: MetricsWriter,
    bar: ProgressBar,
    ahead: Ahead,
):
  """Runs one entry of the recipe to its last step, from its last checkpoint if it has one."""
  entry = recipe.stages[name]
  began, batch_tokens = time.monotonic(), entry.batch_size * entry.seq_len
  rates = entry.rates()
  mode = stage_mode(recipe, entry, backend)
  train_step = stage_step(recipe, entry, graph, mode)
  batches = data.train[name]
  with Checkpoints(recipe.checkpoint_folder(name)) as checkpoints:
    first_step = checkpoints.latest_step or 0
    writer.rewind(name, first_step)
    bar.start_stage(name, entry.steps, first_step)
    if first_step == entry.steps:
      return
    state = initial_state(recipe, entry, mesh)
    seconds_before = 0.0
    if first_step:
      state, progress = checkpoints.restore(state)
      batches.set_state(progress.data)
      seconds_before = progress.seconds

    ahead.wait(f'{name}/step')
    pending, text, loop_began = None, '', time.monotonic()
    for step in range(first_step + 1, entry.steps + 1):
      batch = place_batch(next(batches), entry.batch_size, mesh)
      now = {part: of_step[step - 1] for part, of_step in rates.items()}
      state, metrics = train_step(state, batch, now)
      ahead.begin(f'{name}/step')  # From now on the device is busy, and the host is not.
      if pending is not None:  # The step before this one; the device is already at work.
        text = record(*pending, name, checkpoints, writer, recipe.log_every)
      pending = step, metrics
      save = step % recipe.save_every == 0 or step == entry.steps
      look = step % recipe.measure_every == 0 or step == entry.steps
      if save or look:
        text = record(*pending, name, checkpoints, writer, recipe.log_every)
        pending = None
      if look and 'indexer' in entry.trains:
        ahead.wait(f'{name}/look')
        seen = look_at_selection(recipe, mode, graph, state, data.look[name])
        writer.write(name, step, seen)
      if save:
        seconds = seconds_before + time.monotonic() - began
        checkpoints.save(step, state, Progress(batches.get_state(), seconds))
      speed = batch_tokens * (step - first_step) / (time.monotonic() - loop_began)
      bar.update(step, speed, text)


def record(
    step: int,
    metrics: dict[str, jax.Array],
    name: str,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    log_every: int,
) -> str:
  """Stops a run that is no longer finite; writes the metrics of every `log_every`-th step.

  Returns:
    The losses, for the progress bar.
  """
  values = jax.tree.map(np.asarray, metrics)
  if not all(np.isfinite(v).all() for v in values.values()):
    raise FloatingPointError(nonfinite_message(name, step, values, checkpoints))
  if step % log_every == 0:
    writer.write(name, step, {k: v.tolist() for k, v in values.items()})
  kl = f'  KL {values["index_kl"].mean():.3f}' if 'index_kl' in values else ''
  return f'loss {values["lm_loss"]:.3f}{kl}'


def nonfinite_message(
    name: str, step: int, values: dict[str, np.ndarray], checkpoints: Checkpoints
) -> str:
  """Says what stopped being finite, from which layer on, and where to go back to."""
  wrong = [k for k, v in values.items() if not np.isfinite(v).all()]
  layers = lambda k: np.flatnonzero(~np.isfinite(values[k]))
  forward = [layers(k)[0] for k in ('residual_rms', 'index_kl') if k in wrong]
  backward = [layers(k)[-1] for k in wrong if k.startswith('layer_grad_norm')]
  if forward:
    where = f'layer {min(forward)}, in the forward pass'
  elif backward:
    where = f'layer {max(backward)}, in the backward pass'
  else:
    where = 'the head'
  last = checkpoints.latest_step
  good = f'{checkpoints.folder / str(last)}' if last else 'none of this stage'
  return (
      f'{wrong} not finite at step {step} of stage {name}, first in {where}. Last good checkpoint: '
      f'{good}. Try a lower learning rate, or more warmup_steps, in a new workdir.'
  )


def stage_mode(recipe: Recipe, entry: StageConfig, backend: str) -> Mode:
  attention = entry.mode
  if attention == 'auto':
    attention = faster_attention(backend, entry.seq_len, recipe.model.index_topk)
    logging.info('stage %s at %d tokens: %s attention', entry.stage, entry.seq_len, attention)
  return Mode(
      attention=attention,
      backend=backend,
      rule=recipe.selection,
      index_loss='indexer' in entry.trains,
      remat=recipe.remat,
  )


def stage_step(recipe: Recipe, entry: StageConfig, graph: nnx.GraphDef, mode: Mode) -> Callable:
  return make_train_step(
      graph, entry.trains, mode, recipe.optim, micro_batches=entry.micro_batches
  )


def all_programs(
    recipe: Recipe, graph: nnx.GraphDef, backend: str, mesh: Mesh | None, data: Data
) -> dict[str, Callable[[], Lowered]]:
  """Returns what lowers each program of the stages and of the report, in the order of their use."""
  programs = {}
  for name in recipe.stages:
    inputs = recipe, name, graph, backend, mesh, data
    programs[f'{name}/step'] = functools.partial(lower_step, *inputs)
    if 'indexer' in recipe.stages[name].trains:
      programs[f'{name}/look'] = functools.partial(lower_look, *inputs)
  return programs | report_programs(recipe, graph, backend, mesh, data.report)


def lower_step(
    recipe: Recipe, name: str, graph: nnx.GraphDef, backend: str, mesh: Mesh | None, data: Data
) -> Lowered:
  entry = recipe.stages[name]
  state = abstract_state(recipe.model, entry.trains, recipe.optim, mesh=mesh)
  shape = entry.batch_size, entry.seq_len
  batch = jax.tree.map(lambda x: np.zeros(shape, x.dtype), data.look[name])
  batch = place_batch(batch, entry.batch_size, mesh)
  step = stage_step(recipe, entry, graph, stage_mode(recipe, entry, backend))
  return step.lower(state, batch, dict.fromkeys(entry.trains, np.float32(0)))


def lower_look(
    recipe: Recipe, name: str, graph: nnx.GraphDef, backend: str, mesh: Mesh | None, data: Data
) -> Lowered:
  mode = look_mode(recipe, stage_mode(recipe, recipe.stages[name], backend))
  params = abstract_params(recipe.model, mesh=mesh)
  return measure_batch.lower(graph, params, data.look[name], mode, (0,))


def initial_state(recipe: Recipe, entry: StageConfig, mesh: Mesh | None) -> TrainState:
  """Returns the state at step 0: fresh, or around the weights that `init_from` names."""
  if entry.init_from:
    params = restore_params(recipe.init_folder(entry), abstract_params(recipe.model, mesh=mesh))
  else:
    params = init_params(recipe.model, seed=recipe.seed, mesh=mesh)
  return new_state(params, entry.trains, recipe.optim, seed=recipe.seed, mesh=mesh)


def look_at_selection(
    recipe: Recipe, mode: Mode, graph: nnx.GraphDef, state: TrainState, batch: Batch
) -> dict[str, list[float]]:
  """Measures the selection on a few validation rows: per layer, what no loss shows."""
  [measured] = measure(graph, state.params, [batch], look_mode(recipe, mode))
  return {name: values.tolist() for name, values in measured[recipe.selection].items()}


def look_mode(recipe: Recipe, mode: Mode) -> Mode:
  return dataclasses.replace(mode, index_loss=False, remat='none', measure=(recipe.selection,))


def main(_):
  logging.getLogger('absl').setLevel(logging.ERROR)  # orbax and grain think aloud.
  try:
    join_job()
    train(CONFIG.value)
  except (ValueError, FloatingPointError) as error:
    sys.exit(f'error: {error}')
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    print(f'error: {str(error).splitlines()[0]}\n{LOST}', file=sys.stderr, flush=True)
    os._exit(1)  # jax's own way out waits for the process that has gone, then aborts.


if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file('config', help_string='A file of configs/.')
  flags.mark_flag_as_required('config')
  app.run(main)
