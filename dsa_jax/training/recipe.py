# SPDX-License-Identifier: Apache-2.0
"""A run as plain values: the one place that reads a ConfigDict."""

import dataclasses
import difflib
import json
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from dsa_jax.config import ModelConfig
from dsa_jax.data.sources import DataConfig
from dsa_jax.nn.remat import check_policy
from dsa_jax.parallel.mesh import MeshConfig
from dsa_jax.selection import RULES
from dsa_jax.training.optim import OptimConfig
from dsa_jax.training.stages import StageConfig

# A run may go on in another place, on other devices and with another cache: a workdir does not keep
# these fields, and where a config lacks them, they are what they are here.
ELSEWHERE = {'workdir': '', 'mesh': {}, 'compilation_cache': ''}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
  """What the report compares, and on how much validation data."""

  dense_before: str = 'dense'  # Entry of the recipe: the dense model that warm-up starts from.
  dense_baseline: str = 'baseline'  # The same model, trained densely for as many more tokens.
  sparse: str = 'sparse'
  seq_len: int = 512
  batch_size: int = 8
  batches: int = 16
  rules: tuple[str, ...] = tuple(RULES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """Everything a run needs to know."""

  workdir: pathlib.Path
  seed: int
  backend: str
  selection: str
  remat: str
  compilation_cache: str
  log_every: int
  measure_every: int
  measure_rows: int
  save_every: int
  mesh: MeshConfig
  model: ModelConfig
  data: DataConfig
  optim: OptimConfig
  report: ReportConfig
  stages: dict[str, StageConfig]  # In the order they run.

  def checkpoint_folder(self, entry: str) -> pathlib.Path:
    return self.workdir / 'checkpoints' / entry

  def init_folder(self, entry: StageConfig) -> pathlib.Path:
    if entry.init_from in self.stages:
      return self.checkpoint_folder(entry.init_from)
    return pathlib.Path(entry.init_from).expanduser()


def read_recipe(config: ConfigDict) -> Recipe:
  """Turns a config into plain values and checks that they belong together.

  Raises:
    ValueError: A field is missing, misspelt or out of range. Nothing has been written.
  """
  given = ELSEWHERE | config.to_dict()
  names = [f.name for f in dataclasses.fields(Recipe)] + ['recipe']
  _check_names('config', given, names)
  if missing := [name for name in names if name not in given]:
    raise ValueError(f'config lacks {missing}; configs/base.py lists every field.')
  if not given['workdir']:
    raise ValueError('config.workdir must name a folder: --config.workdir=runs/mine')
  entries = list(given['recipe'])
  if unknown := [name for name in entries if name not in given['stages']]:
    raise ValueError(f'recipe={entries} names {unknown}; the stages are {list(given["stages"])}.')
  if not entries or len(set(entries)) < len(entries):
    raise ValueError(f'recipe={entries} must name each of its stages once.')
  fields = {name: given[name] for name in names if name != 'recipe'}
  fields |= {
      'workdir': pathlib.Path(given['workdir']).expanduser(),
      'mesh': _build('mesh', MeshConfig, given['mesh']),
      'model': _build('model', ModelConfig, given['model']),
      'data': _build('data', DataConfig, given['data']),
      'optim': _build('optim', OptimConfig, given['optim']),
      'report': _build('report', ReportConfig, given['report']),
      'stages': {e: _build(f'stages.{e}', StageConfig, given['stages'][e]) for e in entries},
  }
  recipe = Recipe(**fields)
  _check(recipe)
  return recipe


def _check(recipe: Recipe):
  for name in ('log_every', 'measure_every', 'measure_rows', 'save_every'):
    if getattr(recipe, name) < 1:
      raise ValueError(f'{name}={getattr(recipe, name)} must be at least 1.')
  check_policy(recipe.remat)
  if recipe.selection not in RULES:
    raise ValueError(f'selection={recipe.selection!r} must be one of {tuple(RULES)}.')
  if recipe.model.vocab_size < recipe.data.vocab_size:
    raise ValueError(
        f'model.vocab_size={recipe.model.vocab_size} is too small for the {recipe.data.source} '
        f'data: it needs {recipe.data.vocab_size}.'
    )
  _check_mesh(recipe)
  done = []
  for name, entry in recipe.stages.items():
    if entry.seq_len > recipe.model.max_seq_len:
      raise ValueError(f'stages.{name}: {entry.seq_len=} exceeds {recipe.model.max_seq_len=}.')
    if entry.stage == 'sparse' and entry.seq_len <= recipe.model.index_topk:
      raise ValueError(
          f'stages.{name}: {entry.seq_len=} must exceed {recipe.model.index_topk=}: below it every '
          'token is selected, and sparse attention is dense.'
      )
    if entry.stage != 'dense' and not entry.init_from:
      raise ValueError(f'stages.{name}: init_from must say which model to start from.')
    if entry.init_from in recipe.stages and entry.init_from not in done:
      raise ValueError(f'stages.{name}: init_from={entry.init_from!r} must come before it.')
    done.append(name)


def _check_mesh(recipe: Recipe):
  rows = {}
  for name, entry in recipe.stages.items():
    rows[f'stages.{name}'] = entry.batch_size // entry.micro_batches, entry.seq_len
    rows[f'measure_rows of stages.{name}'] = recipe.measure_rows, entry.seq_len
  rows['report'] = recipe.report.batch_size, recipe.report.seq_len
  where = 'model'
  try:
    recipe.mesh.check_model(recipe.model)
    for where, (batch_size, seq_len) in rows.items():
      recipe.mesh.check_rows(batch_size, seq_len)
  except ValueError as error:
    raise ValueError(f'config.mesh does not fit {where}: {error}') from error


def _build(where: str, kind: type, fields: dict[str, Any]) -> Any:
  _check_names(where, fields, [f.name for f in dataclasses.fields(kind)])
  try:
    return kind(**fields)
  except (TypeError, ValueError) as error:
    raise ValueError(f'config.{where}: {error}') from error


def _check_names(where: str, given: dict[str, Any], known: list[str]):
  for name in given:
    if name not in known:
      close = difflib.get_close_matches(name, known, n=1)
      hint = f'did you mean {close[0]!r}?' if close else f'the fields are {known}.'
      raise ValueError(f'{where} has no field {name!r}: {hint}')


def claim_workdir(config: ConfigDict, workdir: pathlib.Path):
  """Writes the config into an empty workdir, or checks that the workdir is this config's own.

  Raises:
    ValueError: The workdir belongs to another config, or cannot be written.
  """
  ours = json.loads(config.to_json())
  for name in ELSEWHERE:
    ours.pop(name, None)
  path = workdir / 'config.json'
  if path.exists():
    theirs = json.loads(path.read_text())
    if changed := _differences(theirs, ours):
      raise ValueError(
          f'workdir {workdir} belongs to another config; it differs in\n  '
          + '\n  '.join(changed)
          + '\nChoose another with --config.workdir=..., or delete this one.'
      )
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix('.tmp')
    fresh.write_text(json.dumps(ours, indent=2, sort_keys=True))
    os.replace(fresh, path)
  except OSError as error:
    raise ValueError(
        f'workdir {workdir} cannot be written ({error.strerror}); choose another with '
        '--config.workdir=...'
    ) from error


def _differences(theirs: Any, ours: Any, where: str = '') -> list[str]:
  if isinstance(theirs, dict) and isinstance(ours, dict):
    rows = []
    for name in sorted(theirs.keys() | ours.keys()):
      inner = f'{where}.{name}' if where else name
      rows += _differences(theirs.get(name), ours.get(name), inner)
    return rows
  return [] if theirs == ours else [f'{where}: {theirs} there, {ours} here']
