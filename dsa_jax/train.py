# SPDX-License-Identifier: Apache-2.0
"""Runs a recipe: python -m dsa_jax.train --config=configs/quickstart.py"""

from collections.abc import Callable, Sequence
import contextlib
import errno
import functools
import logging
import math
import os
import pathlib
import sys
import time
from typing import Any

from absl import app, flags
import jax
from jax.stages import Lowered
from ml_collections import ConfigDict, config_flags
import numpy as np

from dsa_jax.claims import claimed
from dsa_jax.command_line import check_no_words, end_stopped
from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.cost import training_flops
from dsa_jax.parallel.processes import (
    LOST,
    check_same,
    end_process,
    is_first,
    join_job,
    of_first,
    place_batch,
)
from dsa_jax.reporting.compare import group_runs, print_table, read_run
from dsa_jax.reporting.evaluate import look, look_batch
from dsa_jax.reporting.meter import Meter
from dsa_jax.reporting.metrics import MetricsWriter, SilentWriter, of_selecting
from dsa_jax.reporting.progress import StepProgress
from dsa_jax.reporting.report import print_report, write_report
from dsa_jax.reporting.results import evaluate_recipe, kept_results, report_programs
from dsa_jax.training.ahead import Ahead
from dsa_jax.training.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    Progress,
    saved_steps,
)
from dsa_jax.training.compilation_cache import compilation_cache
from dsa_jax.training.flags import parse_flags
from dsa_jax.training.origin import Start, is_below, keep_origin, keep_starts, keep_tokenizer
from dsa_jax.training.recipe import Recipe, read_recipe
from dsa_jax.training.run import Run, open_run
from dsa_jax.training.state import TrainState, abstract_params
from dsa_jax.training.sweep import sweep_configs
from dsa_jax.training.workdir import check_data, check_workdir, of_job, write_config

NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
OF_THE_DISK = *NO_ROOM, errno.EROFS, errno.EIO


class NotFiniteError(FloatingPointError):
  """A loss or a gradient stopped being finite; the message says where, and what to go back to."""


def train(config: ConfigDict) -> dict[str, Any]:
  """Runs the stages of a recipe one after another, each from where it stands; then reports.

  Returns:
    What `report.json` holds.

  Raises:
    ConfigError: The config, the data or the workdir will not do; nothing has been written.
    NotFiniteError: A loss or a gradient stopped being finite.
  """
  recipe = read_recipe(config)
  with compilation_cache(recipe.compilation_cache):
    return run_recipe(config, recipe)


def train_all(config: ConfigDict):
  """Trains a config, or every run of its sweep, which it then compares."""
  configs = sweep_configs(config)
  workdirs = [pathlib.Path(one.workdir).expanduser() for one in configs]
  starts = [check(one, workdirs[:i]) for i, one in enumerate(configs if len(configs) > 1 else [])]
  for workdir, of_run in zip(workdirs, starts):
    if is_first() and of_run:  # All runs have the same teachers, although those may go on meanwhile.
      keep_starts(workdir, of_run)
  for one in configs:
    train(one)
  if len(configs) > 1 and is_first():
    print_table(group_runs([read_run(workdir) for workdir in workdirs]))


def check(config: ConfigDict, before: Sequence[pathlib.Path] = ()) -> dict[pathlib.Path, Start]:
  """Looks at all that a run needs, so that none of several fails after others have been trained.

  Args:
    config: Its config.
    before: The workdirs of the runs that are trained before it, whose checkpoints may not exist yet.

  Returns:
    The steps of other runs that it starts from, as far as they are known, but for a run that has ended.

  Raises:
    ConfigError: The config, the data or the workdir will not do.
  """
  if waits_for_tokenizer(config, before):
    return {}
  recipe = read_recipe(config)
  moved = check_workdir(config, recipe.workdir)
  if jax.process_count() == 1 and kept_results(recipe) and not moved:
    return {}
  run, files = open_run(recipe, before), recipe.data.describe()
  for batches in run.data.train.values():
    batches.close()
  check_data(files, recipe.workdir, recipe.on_changed_data, moved)
  return run.starts


def waits_for_tokenizer(config: ConfigDict, before: Sequence[pathlib.Path]) -> bool:
  """Returns whether an earlier run has yet to write the tokenizer by which a run reads its data."""
  entries = [config.stages[name] for name in config.recipe if name in config.stages]
  starts = [pathlib.Path(entry.init_from).expanduser() for entry in entries if entry.get('init_from')]
  is_open = config.data.get('source') == 'mixture' and not config.data.get('tokenizer')
  return is_open and any(is_below(start, before) and not start.exists() for start in starts)


def run_recipe(config: ConfigDict, recipe: Recipe) -> dict[str, Any]:
  if jax.process_count() == 1 and (results := kept_results(recipe)):
    if not check_workdir(config, recipe.workdir):
      print_report(recipe.workdir, results)
      return results
  check_same(of_job(config))  # Before hours may go into tokens.
  moved = check_workdir(config, recipe.workdir)
  run, files = open_run(recipe), recipe.data.describe()
  check_data(files, recipe.workdir, recipe.on_changed_data, moved)
  with claimed(recipe.workdir) if is_first() else contextlib.nullcontext():
    return run_entries(config, run, files)


def run_entries(config: ConfigDict, run: Run, files: dict[str, str]) -> dict[str, Any]:
  """Runs all entries of a recipe in its workdir, which is this run's own, and writes the report."""
  recipe = run.recipe
  starts = {'the checkpoints that it starts from': [start.weights for start in run.starts.values()]}
  check_same({'data': files} | starts)
  if is_first():
    write_config(config, recipe.workdir, files)
    keep_starts(recipe.workdir, run.starts)
    keep_origin(recipe.workdir, recipe.origins)
    keep_tokenizer(recipe.workdir, 'bytes' if recipe.data.source == 'text' else recipe.data.tokenizer)
  ahead = Ahead(all_programs(run), run.mesh)
  with jax.set_mesh(run.mesh) if run.mesh else contextlib.nullcontext(), ahead:
    writer = MetricsWriter(recipe.workdir) if is_first() else SilentWriter()
    with writer, StepProgress(quiet=not is_first()) as bar:
      for name in recipe.stages:
        run_stage(run, name, writer, bar, ahead)
    began = time.monotonic()
    ahead.wait()
    results = evaluate_recipe(run, began)
  if is_first():
    write_report(recipe.workdir, results)
  return results


def run_stage(run: Run, name: str, writer: MetricsWriter, bar: StepProgress, ahead: Ahead):
  """Runs one entry of the recipe to its last step, from its last checkpoint if it has one."""
  recipe, entry = run.recipe, run.recipe.stages[name]
  began, batch_tokens = time.monotonic(), entry.batch_size * entry.seq_len
  rates, train_step, batches = entry.rates(), run.train_step(name), run.data.train[name]
  with Checkpoints(recipe.checkpoint_folder(name)) as checkpoints, contextlib.closing(batches):
    first_step, state, seconds_before = resume(run, name, checkpoints)
    writer.rewind(name, first_step)
    bar.start_stage(name, entry.steps, first_step)
    if first_step == entry.steps:
      return
    ahead.wait(f'{name}/step')
    sparse, form = entry.stage == 'sparse', 'mha' if run.mode(name).attention == 'masked' else 'mqa'
    flops = lambda batch: training_flops(
        recipe.model, entry.trains, batch.end - batch.start, sparse=sparse, form=form
    )
    meter = Meter(batch_tokens, first_step, flops, recipe.mesh.n_devices)

    def take(step: int):  # The device gets each batch one step ahead.
      rows = next(batches)
      meter.count(step, rows)
      placed = place_batch(rows, entry.batch_size, run.mesh)
      return placed if run.mesh else jax.device_put(placed)

    pending, text, batch, loop_began, paused = None, '', take(first_step + 1), time.monotonic(), 0.0
    for step in range(first_step + 1, entry.steps + 1):
      now = {part: of_step[step - 1] for part, of_step in rates.items()}
      state, metrics = train_step(state, batch, now)
      metrics |= {f'{part}_lr': rate for part, rate in now.items()}
      ahead.begin(f'{name}/step')  # From now on the device is busy, and the host is not.
      save = step % recipe.save_every == 0 or step == entry.steps
      if not save:
        batch = take(step + 1)
      if pending is not None:  # The step before this one; the device is already at work.
        text = record(*pending, name, checkpoints, writer, recipe, meter)
      pending = step, metrics
      looks = step % recipe.measure_every == 0 or step == entry.steps
      if save or looks:
        text = record(*pending, name, checkpoints, writer, recipe, meter)
        pending = None
      paused -= time.monotonic()  # What follows is no training.
      if looks:
        ahead.wait(f'{name}/look')
        seen = look(run.graph, state.params, run.data.look[name], run.look_mode(name))
        writer.write(name, step, seen)
      if save:
        seconds = seconds_before + time.monotonic() - began
        checkpoints.save(step, state, Progress(batches.get_state(), seconds, entry.stage))
        if step < entry.steps:  # Only now: what is wrong with it must not cost the steps until here.
          batch = take(step + 1)
      paused += time.monotonic()
      done = step - first_step - (pending is not None)  # The device may still be at work.
      bar.update(step, batch_tokens * done / (time.monotonic() - loop_began - paused), text)


def resume(run: Run, name: str, checkpoints: Checkpoints) -> tuple[int, TrainState | None, float]:
  """Returns the step, the state and the seconds from which an entry goes on.

  The state is None if the entry has ended. Damaged checkpoints are set aside if the config says so
  and there is an older one.
  """
  skips = run.recipe.resume == 'last_good'
  while step := of_first(checkpoints.latest_step or 0):
    if step == run.recipe.stages[name].steps and not skips:
      return step, None, 0.0
    try:
      state, progress = checkpoints.restore(step, run.abstract_state(name))
    except DamagedCheckpoint as error:
      if not skips or step == saved_steps(checkpoints.folder)[0]:
        raise
      logging.warning('%s It is set aside.', error)
      checkpoints.set_aside(step)
      continue
    run.data.train[name].set_state(progress.data)
    return step, state, progress.seconds
  return 0, run.initial_state(name), 0.0


def record(
    step: int,
    metrics: dict[str, jax.Array],
    name: str,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    recipe: Recipe,
    meter: Meter,
) -> str:
  """Stops a run that is no longer finite; writes the metrics of every `log_every`-th step.

  Returns:
    The losses, for the progress bar.
  """
  values, cfg = by_layer(metrics, recipe.model), recipe.model
  if any(nonfinite_layers(x) for x in values.values()):
    raise NotFiniteError(nonfinite_message(name, step, values, checkpoints))
  if step % recipe.log_every == 0:
    writer.write(name, step, values | meter.read(step))
  kl = ''
  if 'index_kl' in values:
    kl = f'  KL {np.mean(of_selecting(values["index_kl"], cfg.window_layers)):.3f}'
  return f'loss {values["lm_loss"]:.3f}{kl}'


def by_layer(metrics: dict[str, Any], cfg: ModelConfig) -> dict[str, float | list[float | None]]:
  """Returns metrics as numbers, and as lists of a number for each layer.

  None stands for the divergence of a layer with a window, which does not select, and for the
  gradient of an indexer that a layer does not have.
  """
  values = {name: np.asarray(x).tolist() for name, x in metrics.items()}
  if 'index_kl' in values:
    kl = enumerate(values['index_kl'])
    values['index_kl'] = [None if i in cfg.window_layers else x for i, x in kl]
  if 'layer_grad_norm_indexer' in values:
    norms = dict(zip(cfg.full_layers, values['layer_grad_norm_indexer'], strict=True))
    values['layer_grad_norm_indexer'] = [norms.get(i) for i in range(cfg.n_layers)]
  return values


def nonfinite_layers(value: float | list[float | None]) -> list[int]:
  """Returns the layers in which a metric is not finite; a metric without layers counts as one."""
  of_layers = enumerate(value if isinstance(value, list) else [value])
  return [i for i, x in of_layers if x is not None and not math.isfinite(x)]


def nonfinite_message(
    name: str,
    step: int,
    values: dict[str, float | list[float | None]],
    checkpoints: Checkpoints,
) -> str:
  """Says what stopped being finite, from which layer on, and where to go back to."""
  wrong = {k: layers for k, v in values.items() if (layers := nonfinite_layers(v))}
  forward = [wrong[k][0] for k in ('residual_rms', 'index_kl') if k in wrong]
  backward = [layers[-1] for k, layers in wrong.items() if k.startswith('layer_grad_norm')]
  if forward:
    where = f'layer {min(forward)}, in the forward pass'
  elif backward:
    where = f'layer {max(backward)}, in the backward pass'
  else:
    where = 'the head'
  last = checkpoints.latest_step
  good = f'{checkpoints.folder / str(last)}' if last else 'none of this stage'
  return (
      f'{list(wrong)} not finite at step {step} of stage {name}, first in {where}. '
      f'Last good checkpoint: {good}. Try a lower learning rate, or more warmup_steps, in a new workdir.'
  )


def all_programs(run: Run) -> dict[str, Callable[[], Lowered]]:
  """Returns what lowers each program of the stages and of the report, in the order of their use."""
  programs = {}
  for name in run.recipe.stages:
    programs[f'{name}/step'] = functools.partial(run.lower_step, name)
    programs[f'{name}/look'] = functools.partial(lower_look, run, name)
  return programs | report_programs(run)


def lower_look(run: Run, name: str) -> Lowered:
  """Lowers the program of `look`."""
  params = abstract_params(run.recipe.model, mesh=run.mesh)
  return look_batch.lower(run.graph, params, run.data.look[name], run.look_mode(name))


def main(argv: list[str]):
  for name in 'absl', 'asyncio':  # orbax also raises the errors that they log.
    logging.getLogger(name).setLevel(logging.CRITICAL)
  sys.unraisablehook = _print_unraisable
  try:
    check_no_words(argv)
    join_job()
    train_all(CONFIG.value)
  except (ConfigError, NotFiniteError) as error:
    sys.exit(f'error: {error}')
  except OSError as error:
    if error.errno not in OF_THE_DISK:
      raise
    name = error.filename or 'a file of the run'
    reason, way_out = f'{name}: {error.strerror}.', 'Start'
    if error.errno in NO_ROOM:
      reason, way_out = f'{name} could not be written: {error.strerror}.', 'Make room, and start'
    again = 'the same command again: the run resumes from its last checkpoint.'
    print(f'error: {reason} {way_out} {again}', file=sys.stderr, flush=True)
    os._exit(1)  # At a usual end, TensorBoard's writers would try again, and print what they raise.
  except jax.errors.JaxRuntimeError as error:
    end_process(error, LOST)
  except KeyboardInterrupt:
    end_stopped('stopped; the same command goes on from the last checkpoint')


def _print_unraisable(unraisable: Any):
  """Prints an error of a thread as Python does, except where TensorStore speaks to a closed loop.

  If one array cannot be written, its threads report every other one to a loop that has ended.
  """
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file('config', help_string='A file of configs/.')
  flags.mark_flag_as_required('config')
  app.run(main, flags_parser=parse_flags)
