# SPDX-License-Identifier: Apache-2.0
"""Every number that the report of a finished recipe holds."""

from collections.abc import Callable
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.stages import Lowered
import numpy as np

from dsa_jax.cost import attention_flops
from dsa_jax.nn.attention.types import Mode
from dsa_jax.reporting.checks import verdicts
from dsa_jax.reporting.evaluate import Scores, evaluate, measure, measure_batch, score_batch
from dsa_jax.selection import RULES
from dsa_jax.training.checkpoint import Checkpoints, Progress
from dsa_jax.training.recipe import Recipe
from dsa_jax.training.run import Run
from dsa_jax.training.state import abstract_params

LONG_CONTEXT = 131_072


class Modes(NamedTuple):
  """The modes in which the models of a recipe are evaluated."""

  dense: Mode
  sparse: Mode  # Any rule of the report selects.
  measured: Mode  # The rule of training selects, and the rules of the report are measured.


def report_modes(run: Run) -> Modes:
  rules, sparse = run.recipe.report.rules, {'attention': 'sparse', 'backend': run.backend}
  return Modes(
      dense=Mode(attention='dense', backend=run.backend),
      sparse=Mode(**sparse, rule=rules),
      measured=Mode(**sparse, rule=run.recipe.selection, measure=rules),
  )


def scored_entries(recipe: Recipe) -> dict[str, str]:
  """Returns the entries that are scored, by the names of their scores.

  Those are the three that the report compares, by their roles, and every other model with which the
  recipe ends, by its own name.
  """
  roles = recipe.roles
  ancestors = {entry.init_from for entry in recipe.stages.values()}
  taken = {*roles.values(), *ancestors}
  others = [e for e, entry in recipe.stages.items() if e not in taken and entry.stage != 'warmup']
  reserved = {'dense_before', 'dense_baseline', 'sparse', *RULES}
  return roles | {f'{e} (entry)' if e in reserved else e: e for e in others}


def report_programs(run: Run) -> dict[str, Callable[[], Lowered]]:
  """Returns what lowers each program that `evaluate_recipe` will run."""
  recipe, modes = run.recipe, report_modes(run)
  params, batch = abstract_params(recipe.model, mesh=run.mesh), run.data.report[0]
  score = lambda *args: functools.partial(score_batch.lower, run.graph, params, batch, *args)
  kinds = {recipe.stages[entry].stage for entry in scored_entries(recipe).values()}
  programs = {}
  if 'dense' in kinds or recipe.teacher:
    programs['report/dense'] = score(modes.dense, None)
  if kinds - {'dense'}:
    programs['report/sparse'] = score(modes.sparse, jnp.int32(0))
  if 'sparse' in recipe.roles:
    args = run.graph, params, batch, modes.measured, (0, recipe.model.index_topk)
    programs['report/measured'] = functools.partial(measure_batch.lower, *args)
  return programs


def evaluate_recipe(run: Run, began: float) -> dict[str, Any]:
  """Evaluates the models that a recipe left behind; see `report.write_report` for the fields.

  Args:
    run: The run.
    began: When the last entry had ended, by `time.monotonic`; its programs may have been compiled since.
  """
  recipe, report = run.recipe, run.recipe.report
  scores, (captured, captured_beyond) = _scores(run), _captured_mass(run)
  edges = [2**i for i in range(report.seq_len.bit_length())]
  edges = [e for e in edges if e < report.seq_len] + [report.seq_len + 1]
  progress = {name: _progress(recipe, name) for name in recipe.stages}
  seconds = {name: of_stage.seconds for name, of_stage in progress.items()}
  data_states = [of_stage.data for of_stage in progress.values()]
  results = {
      'title': recipe.workdir.name,
      'command': describe_command(),
      'machine': describe_machine(),
      'date': datetime.date.today().isoformat(),
      'versions': {p: importlib.metadata.version(p) for p in ('jax', 'flax', 'optax')},
      'seconds': sum(seconds.values()) + time.monotonic() - began,
      'seconds_by_stage': seconds,
      'tokens_by_stage': {name: entry.tokens for name, entry in recipe.stages.items()},
      'stages': {
          name: {'stage': entry.stage, 'init_from': entry.init_from, 'trains': entry.trains}
          for name, entry in recipe.stages.items()
      },
      'roles': recipe.roles,
      'selection': recipe.selection,
      'report': dataclasses.asdict(report),
      'unit': recipe.data.unit,
      'bytes_per_target': recipe.data.bytes_per_target(report.seq_len, report.batches * report.batch_size),
      'documents': recipe.data.about_documents(report.seq_len, data_states),
      'context': report.seq_len,
      'index_topk': recipe.model.index_topk,
      'index_n_selections': recipe.model.index_n_selections,
      'left_out': _left_out(run),
      'n_layers': recipe.model.n_layers,
      'window_layers': list(recipe.model.window_layers),
      'validation_bits': {n: s.bits() for n, s in scores.items()},
      'bits_beyond_budget': {
          n: s.bits(n_visible_above=recipe.model.index_topk) for n, s in scores.items()
      },
      'position_edges': edges,
      'bits_by_position': {n: s.bits_by_position(edges) for n, s in scores.items()},
      'captured_mass': captured.get(recipe.selection, []),
      'captured_mass_by_rule': captured,
      'captured_mass_beyond_budget': captured_beyond,
      'attention_flops_per_token': _attention_flops(recipe),
  }
  if recipe.data.source == 'recall':
    results['accuracy'] = {n: float(s.right.mean()) for n, s in scores.items()}
  results['checks'] = verdicts(results, report.checks)
  return results


def kept_results(recipe: Recipe) -> dict[str, Any] | None:
  """Returns what report.json holds, if it is of these last checkpoints and this report config."""
  path = recipe.workdir / 'report.json'
  try:
    written, results = path.stat().st_mtime_ns, json.loads(path.read_text())
  except (OSError, ValueError):
    return None
  if not isinstance(results, dict):
    return None
  if results.get('report') != json.loads(json.dumps(dataclasses.asdict(recipe.report))):
    return None
  for name, entry in recipe.stages.items():
    last = recipe.checkpoint_folder(name) / str(entry.steps)
    if not last.is_dir() or last.stat().st_mtime_ns > written:
      return None
  return results


def _scores(run: Run) -> dict[str, Scores]:
  """Scores every entry, and the model that they descend from.

  The sparse entry that the report compares is scored by every rule.
  """
  recipe, modes, scores = run.recipe, report_modes(run), {}
  rules = recipe.report.rules
  for name, entry in scored_entries(recipe).items():
    params = run.params(recipe.checkpoint_folder(entry))
    score = functools.partial(evaluate, run.graph, params, run.data.report)
    if recipe.stages[entry].stage == 'dense':
      scores[name] = score(modes.dense)
    elif name == 'sparse':
      for i, rule in enumerate(rules):
        scores['sparse' if rule == recipe.selection else rule] = score(modes.sparse, choice=i)
    else:
      scores[name] = score(modes.sparse, choice=rules.index(recipe.selection))
  if recipe.teacher:
    dense = evaluate(run.graph, run.params(recipe.teacher), run.data.report, modes.dense)
    return {'dense_before': dense} | scores
  return scores


def _left_out(run: Run) -> float:
  """Returns the share of the report's queries that see more than the budget."""
  n_visible = np.concatenate([(x.end - x.start)[x.weights > 0] for x in run.data.report])
  return float(np.mean(n_visible > run.recipe.model.index_topk))


def _captured_mass(run: Run) -> list[dict[str, list[float]]]:
  """Returns the mass that each rule captures in each layer, over all queries and beyond the budget.

  Where no query sees more than the budget, the second one is empty.
  """
  if 'sparse' not in run.recipe.roles:
    return [{}, {}]
  folder, mode = run.recipe.checkpoint_folder(run.recipe.roles['sparse']), report_modes(run).measured
  beyond = 0, run.recipe.model.index_topk
  measured = measure(run.graph, run.params(folder), run.data.report, mode, beyond=beyond)
  return [
      {rule: means['captured_mass'].tolist() for rule, means in (by_rule or {}).items()}
      for by_rule in measured
  ]


def _attention_flops(recipe: Recipe) -> dict[str, dict[str, float]]:
  contexts = recipe.report.seq_len, LONG_CONTEXT
  flops = lambda kind: {
      str(context): attention_flops(recipe.model, context, sparse=kind == 'sparse')
      for context in contexts
  }
  return {kind: flops(kind) for kind in ('dense', 'sparse')}


def _progress(recipe: Recipe, entry: str) -> Progress:
  with Checkpoints(recipe.checkpoint_folder(entry)) as checkpoints:
    return checkpoints.progress()


def describe_command() -> str:
  """Returns the command that was typed, or the call that a notebook or a test makes."""
  typed = sys.orig_argv[1:]
  return shlex.join(['python', *typed]) if 'dsa_jax.train' in typed else 'dsa_jax.train.train(config)'


def describe_machine() -> str:
  """Describes the cores, the processor and the accelerator."""
  processor = platform.processor() or platform.machine()
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    names = [line for line in cpuinfo.read_text().splitlines() if line.startswith('model name')]
    processor = names[0].split(':')[1].strip() if names else processor
  device = jax.devices()[0].device_kind
  return f'{os.cpu_count()} cores, {processor}; jax device: {device}'
