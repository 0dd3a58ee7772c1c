# SPDX-License-Identifier: Apache-2.0
"""What a finished recipe has shown: every number of the report, and whether it met its bars."""

from collections.abc import Callable, Sequence
import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import sys
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Lowered
import numpy as np

from dsa_jax.cost import attention_flops
from dsa_jax.data.batch import Batch
from dsa_jax.nn.attention.mla import Mode
from dsa_jax.reporting.evaluate import Scores, evaluate, measure, measure_batch, score_batch
from dsa_jax.training.checkpoint import Checkpoints, restore_params
from dsa_jax.training.recipe import Recipe
from dsa_jax.training.state import abstract_params

LONG_CONTEXT = 131_072


class Modes(NamedTuple):
  """How the models of a recipe run while they are judged."""

  dense: Mode
  sparse: Mode  # Selecting by any rule of the report.
  measured: Mode  # Selecting as in training, the rules of the report beside it.


def report_modes(recipe: Recipe, backend: str) -> Modes:
  rules, sparse = recipe.report.rules, {'attention': 'sparse', 'backend': backend}
  return Modes(
      dense=Mode(attention='dense', backend=backend),
      sparse=Mode(**sparse, rule=rules),
      measured=Mode(**sparse, rule=recipe.selection, measure=rules),
  )


def report_programs(
    recipe: Recipe,
    graph: nnx.GraphDef,
    backend: str,
    mesh: Mesh | None,
    batches: Sequence[Batch],
) -> dict[str, Callable[[], Lowered]]:
  """Returns what lowers each program that `evaluate_recipe` will run."""
  setting, modes = recipe.report, report_modes(recipe, backend)
  params, batch = abstract_params(recipe.model, mesh=mesh), batches[0]
  score = lambda *args: functools.partial(score_batch.lower, graph, params, batch, *args)
  programs = {}
  if {setting.dense_before, setting.dense_baseline} & recipe.stages.keys():
    programs['report/dense'] = score(modes.dense, None)
  if setting.sparse in recipe.stages:
    programs['report/sparse'] = score(modes.sparse, jnp.int32(0))
    args = graph, params, batch, modes.measured, (0, recipe.model.index_topk)
    programs['report/measured'] = functools.partial(measure_batch.lower, *args)
  return programs


def evaluate_recipe(
    recipe: Recipe,
    graph: nnx.GraphDef,
    backend: str,
    mesh: Mesh | None,
    batches: Sequence[Batch],
) -> dict[str, Any]:
  """Evaluates the models that the recipe left behind; see `report.write_report` for the fields."""
  began = time.monotonic()
  setting, budget = recipe.report, recipe.model.index_topk
  like = abstract_params(recipe.model, mesh=mesh)
  load = lambda entry: restore_params(recipe.checkpoint_folder(entry), like)

  scores: dict[str, Scores] = {}
  modes = report_modes(recipe, backend)
  for name in ('dense_before', 'dense_baseline'):
    if (entry := getattr(setting, name)) in recipe.stages:
      scores[name] = evaluate(graph, load(entry), batches, modes.dense)
  captured, captured_beyond = {}, {}
  if setting.sparse in recipe.stages:
    params = load(setting.sparse)
    for i, rule in enumerate(setting.rules):
      name = 'sparse' if rule == recipe.selection else rule
      scores[name] = evaluate(graph, params, batches, modes.sparse, choice=i)
    measured = measure(graph, params, batches, modes.measured, beyond=(0, budget))
    captured, captured_beyond = map(_captured, measured)

  edges = [2**i for i in range(setting.seq_len.bit_length())]
  edges = [e for e in edges if e < setting.seq_len] + [setting.seq_len + 1]
  seconds = {name: _seconds(recipe, name) for name in recipe.stages}
  results = {
      'title': recipe.workdir.name,
      'command': describe_command(),
      'machine': describe_machine(),
      'date': datetime.date.today().isoformat(),
      'versions': {p: importlib.metadata.version(p) for p in ('jax', 'flax', 'optax')},
      'seconds': sum(seconds.values()) + time.monotonic() - began,
      'seconds_by_stage': seconds,
      'tokens_by_stage': {name: entry.tokens for name, entry in recipe.stages.items()},
      'context': setting.seq_len,
      'index_topk': budget,
      'n_layers': recipe.model.n_layers,
      'validation_bits_per_byte': {n: s.bits() for n, s in scores.items()},
      'bits_beyond_budget': {n: s.bits(n_visible_above=budget) for n, s in scores.items()},
      'position_edges': edges,
      'bits_by_position': {n: s.bits_by_position(edges) for n, s in scores.items()},
      'captured_mass': captured.get(recipe.selection, []),
      'captured_mass_by_rule': captured,
      'captured_mass_beyond_budget': captured_beyond,
      'attention_flops_per_token': {
          kind: {
              str(context): attention_flops(recipe.model, context, sparse=kind == 'sparse')
              for context in (setting.seq_len, LONG_CONTEXT)
          }
          for kind in ('dense', 'sparse')
      },
  }
  if recipe.data.source == 'recall':
    results['accuracy'] = {n: float(s.right.mean()) for n, s in scores.items()}
  results['checks'] = checks(results)
  return results


def checks(results: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the bars that apply to these results, each with the numbers it was judged by."""
  found = []

  def check(name: str, passed: bool, detail: str):
    found.append({'name': name, 'passed': passed, 'detail': detail})

  bits, beyond = results['validation_bits_per_byte'], results['bits_beyond_budget']
  if 'accuracy' in results and {'dense_baseline', 'sparse'} <= results['accuracy'].keys():
    accuracy = results['accuracy']
    share = accuracy['sparse'] / accuracy['dense_baseline']
    check('sparse reaches 98 % of the dense accuracy', share >= 0.98, f'{share:.4f}')
    if 'window_sinks' in accuracy:
      share = accuracy['window_sinks'] / accuracy['dense_baseline']
      check('window and sinks fail (below half)', share < 0.5, f'{share:.4f}')
  elif {'dense_baseline', 'sparse'} <= bits.keys():
    excess = bits['sparse'] / bits['dense_baseline'] - 1
    check('sparse loss within 0.5 % of the dense baseline', excess <= 0.005, f'{excess:+.2%}')
  by_rule = results['captured_mass_by_rule']
  if results['captured_mass'] and 'accuracy' not in results:
    mean = float(np.mean(results['captured_mass']))
    check('captured attention mass at least 0.9 on average', mean >= 0.9, f'{mean:.3f}')
  if results['captured_mass'] and 'window_sinks' in by_rule:
    margin = np.array(results['captured_mass']) - np.array(by_rule['window_sinks'])
    check(
        'captured mass above window and sinks in every layer',
        bool((margin > 0).all()),
        f'smallest margin {margin.min():+.3f}',
    )
  order = ('oracle', 'sparse', 'window_sinks', 'random')
  if set(order) <= beyond.keys() and 'accuracy' not in results:
    a, b, c, d = (beyond[name] for name in order)
    text = ', '.join(f'{name} {beyond[name]:.4f}' for name in order)
    check('beyond the budget: oracle <= sparse < window and sinks < random', a <= b < c < d, text)
  return found


def _captured(measured: dict[str, dict[str, np.ndarray]]) -> dict[str, list[float]]:
  return {rule: found['captured_mass'].tolist() for rule, found in measured.items()}


def _seconds(recipe: Recipe, entry: str) -> float:
  with Checkpoints(recipe.checkpoint_folder(entry)) as checkpoints:
    return checkpoints.seconds()


def describe_command() -> str:
  """Returns what was typed; a call from a notebook or a test has no command."""
  typed = sys.orig_argv[1:]
  return ' '.join(['python', *typed]) if 'dsa_jax.train' in typed else 'dsa_jax.train.train(config)'


def describe_machine() -> str:
  """Returns cores, processor and accelerator in words."""
  processor = platform.processor() or platform.machine()
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    names = [line for line in cpuinfo.read_text().splitlines() if line.startswith('model name')]
    processor = names[0].split(':')[1].strip() if names else processor
  device = jax.devices()[0].device_kind
  return f'{os.cpu_count()} cores, {processor}; jax device: {device}'
