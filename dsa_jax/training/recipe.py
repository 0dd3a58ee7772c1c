# SPDX-License-Identifier: Apache-2.0
"""A run as plain values: the one place that reads a ConfigDict."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import difflib
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict

from dsa_jax.config import ConfigError, ModelConfig, local_path
from dsa_jax.data.sources import DataConfig
from dsa_jax.data.tokenizer_files import kept_tokenizer
from dsa_jax.kernels.backend import BACKENDS
from dsa_jax.nn.remat import check_policy
from dsa_jax.parallel.mesh import MeshConfig
from dsa_jax.selection import RULES
from dsa_jax.training.optim import SCHEDULES, OptimConfig
from dsa_jax.training.stages import StageConfig

# Fields that older configs lack, each with the value that means what was done before it existed.
# Fields of the sections below have theirs as defaults of their classes.
ADDED = {
    'mesh': {},
    'compilation_cache': '',
    'resume': 'latest',
    'on_changed_data': 'stop',
}


RESUME = ('latest', 'last_good')
ON_CHANGED_DATA = ('stop', 'go_on')


# What a report may check, and what the bar of each check is compared with.
CHECKS = {
    'loss_excess': 'The loss of sparse above that of the dense baseline, as a share: at most the bar.',
    'accuracy_share': "The share of the dense baseline's accuracy that sparse has: at least the bar.",
    'window_accuracy_share': 'The same share of window and sinks, which should fail: below the bar.',
    'captured_mass': 'The attention mass that the selection captures, on average: at least the bar.',
    'mass_above_window': 'How much more it captures than window and sinks in any layer: above the bar.',
    'order_of_rules': 'The smallest step in bits from sparse to window to random: above the bar.',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
  """What the report compares, and on how much validation data."""

  # The dense entry that the sparse one descends from. '': the one that its warm-up starts from.
  dense_before: str = ''
  # The same model, trained densely for as many more tokens. '': the dense entry that starts there.
  dense_baseline: str = ''
  # The entry that is compared with both. '': the last sparse one.
  sparse: str = ''
  seq_len: int = 512
  batch_size: int = 8
  batches: int = 16
  rules: Sequence[str] = tuple(RULES)
  checks: Mapping[str, float] = dataclasses.field(default_factory=dict)  # Bars, by keys of CHECKS.

  def __post_init__(self):
    object.__setattr__(self, 'rules', tuple(self.rules))  # JSON has lists.
    for name in ('batch_size', 'batches'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.seq_len < 2:
      raise ConfigError(f'{self.seq_len=} must be at least 2: one token and its target.')
    if unknown := [name for name in self.checks if name not in CHECKS]:
      raise ConfigError(f'checks={self.checks} names {unknown}; the checks are {tuple(CHECKS)}.')
    if wrong := {name: bar for name, bar in self.checks.items() if not isinstance(bar, (int, float))}:
      raise ConfigError(f'checks: {wrong} must be numbers.')
    if unknown := [rule for rule in self.rules if rule not in RULES]:
      raise ConfigError(f'rules={self.rules} names {unknown}; the rules are {tuple(RULES)}.')
    if not self.rules or len(set(self.rules)) < len(self.rules):
      raise ConfigError(f'rules={self.rules} must name each of its rules once, and at least one.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """Everything a run needs to know."""

  workdir: pathlib.Path
  seed: int
  backend: str
  selection: str
  remat: str
  compilation_cache: str
  resume: str
  on_changed_data: str
  log_every: int
  measure_every: int
  measure_rows: int
  save_every: int
  mesh: MeshConfig
  model: ModelConfig
  data: DataConfig
  optim: OptimConfig
  report: ReportConfig
  stages: dict[str, StageConfig]  # The entries that run, in their order.

  def checkpoint_folder(self, entry: str) -> pathlib.Path:
    return self.workdir / 'checkpoints' / entry

  def init_folder(self, entry: StageConfig) -> pathlib.Path:
    if entry.init_from in self.stages:
      return self.checkpoint_folder(entry.init_from)
    return local_path(entry.init_from, 'init_from')

  @property
  def origins(self) -> list[pathlib.Path]:
    """The checkpoints of other runs, or of conversions, that entries start from."""
    entries = [entry for entry in self.stages.values() if entry.init_from]
    return [self.init_folder(entry) for entry in entries if entry.init_from not in self.stages]

  @property
  def roles(self) -> dict[str, str]:
    """The entries that the report compares, by the names of its fields, as far as they run.

    Where nothing was trained with sparse attention, the sparse one is what a warm-up has left.
    """
    report, stages = self.report, self.stages
    last_of = lambda stage: _last(stages, lambda name, entry: entry.stage == stage)
    sparse = report.sparse or last_of('sparse') or last_of('warmup')
    before = report.dense_before or self._dense_ancestor(sparse)
    starts_there = lambda name, entry: entry.stage == 'dense' and entry.init_from == before
    baseline = report.dense_baseline or (_last(stages, starts_there) if sparse else '')
    roles = {'dense_before': before, 'dense_baseline': baseline, 'sparse': sparse}
    return {role: entry for role, entry in roles.items() if entry in stages}

  @property
  def teacher(self) -> pathlib.Path | None:
    """The checkpoint that the compared sparse entry descends from, where no entry trained it."""
    roles = self.roles
    if 'sparse' not in roles or 'dense_before' in roles:
      return None
    ancestor = self._dense_ancestor(roles['sparse'])
    return None if ancestor in self.stages else local_path(ancestor, 'init_from')

  def _dense_ancestor(self, entry: str) -> str:
    """Returns the dense entry, or the other run's checkpoint, that `entry` descends from.

    Without such an entry that is the last dense one, if there is one.
    """
    while entry in self.stages and self.stages[entry].stage != 'dense':
      entry = self.stages[entry].init_from
    return entry or _last(self.stages, lambda name, entry: entry.stage == 'dense')


def _last(stages: Mapping[str, StageConfig], fits: Callable[[str, StageConfig], bool]) -> str:
  return next((name for name, entry in reversed(stages.items()) if fits(name, entry)), '')


SECTIONS = {
    'mesh': MeshConfig,
    'model': ModelConfig,
    'data': DataConfig,
    'optim': OptimConfig,
    'report': ReportConfig,
}


def read_recipe(config: ConfigDict) -> Recipe:
  """Turns a config into plain values and checks that they belong together.

  Raises:
    ConfigError: A field is missing, misspelt or out of range. Nothing has been written.
  """
  given = ADDED | config.to_dict()
  if given.pop('sweep', ()):
    raise ConfigError('config.sweep lists several runs: see sweep.sweep_configs.')
  names = [f.name for f in dataclasses.fields(Recipe)] + ['recipe']
  _check_names('config', given, names)
  if missing := [name for name in names if name not in given]:
    raise ConfigError(f'config lacks {missing}; configs/base.py lists every field.')
  if not given['workdir']:
    raise ConfigError('config.workdir must name a folder: --config.workdir=runs/mine')
  entries = list(given['recipe'])
  if unknown := [name for name in entries if name not in given['stages']]:
    raise ConfigError(f'recipe={entries} names {unknown}; the stages are {list(given["stages"])}.')
  if not entries or len(set(entries)) < len(entries):
    raise ConfigError(f'recipe={entries} must name each of its stages once.')
  fields = {name: given[name] for name in names if name != 'recipe'}
  fields |= {name: _build(name, kind, given[name]) for name, kind in SECTIONS.items()}
  recipe = Recipe(
      **fields
      | {
          'workdir': local_path(given['workdir'], 'config.workdir'),
          'stages': {e: _build(f'stages.{e}', StageConfig, given['stages'][e]) for e in entries},
      }
  )
  recipe = _with_own_tokenizer(recipe)
  _check(recipe)
  _check_stages(recipe)
  _check_report(recipe, list(given['stages']))
  _check_mesh(recipe)
  return recipe


def _with_own_tokenizer(recipe: Recipe) -> Recipe:
  """Lets the data be in the ids of the checkpoint that a recipe starts from."""
  data = recipe.data
  if data.source != 'mixture' or data.tokenizer:
    return recipe
  own = next(filter(None, map(kept_tokenizer, (recipe.workdir, *recipe.origins))), None)
  return dataclasses.replace(recipe, data=dataclasses.replace(data, tokenizer=str(own))) if own else recipe


def _check(recipe: Recipe):
  for name in ('log_every', 'measure_every', 'measure_rows', 'save_every'):
    if getattr(recipe, name) < 1:
      raise ConfigError(f'{name}={getattr(recipe, name)} must be at least 1.')
  if not 0 <= recipe.seed < 2**32:  # jax takes others, and turns them into one of these.
    raise ConfigError(f'seed={recipe.seed} must be within 0 and {2**32 - 1}.')
  check_policy(recipe.remat)
  if recipe.backend and recipe.backend not in BACKENDS:
    raise ConfigError(f"backend={recipe.backend!r} must be one of {BACKENDS}, or '' for the default.")
  for name, values in ('resume', RESUME), ('on_changed_data', ON_CHANGED_DATA):
    if getattr(recipe, name) not in values:
      raise ConfigError(f'{name}={getattr(recipe, name)!r} must be one of {values}.')
  if recipe.selection not in RULES:
    raise ConfigError(f'selection={recipe.selection!r} must be one of {tuple(RULES)}.')
  try:
    recipe.data.check_vocabulary(recipe.model.vocab_size)
  except ConfigError as error:
    raise ConfigError(f'{error}{_why_bytes(recipe)}') from error


def _why_bytes(recipe: Recipe) -> str:
  """Says why no tokenizer of a checkpoint reads the data; '' where none was to."""
  if recipe.data.source != 'mixture' or recipe.data.tokenizer or not recipe.origins:
    return ''
  folder = next((folder for folder in recipe.origins if not folder.exists()), recipe.origins[0])
  if folder.exists():
    return f' {folder} has no tokenizer: set config.data.tokenizer to the folder of one.'
  return (
      f' There is no {folder}, whose tokenizer would read the data: convert the release to it '
      '(python -m dsa_jax.convert), or correct init_from.'
  )


def _check_stages(recipe: Recipe):
  done = []
  for name, entry in recipe.stages.items():
    if not re.fullmatch(r'\w[\w.-]*', name):
      raise ConfigError(
          f'stages: the name {name!r} must be of letters, digits, underscores, dots and hyphens: it '
          'names a folder of checkpoints and rows of metrics.csv.'
      )
    if entry.seq_len > recipe.model.max_seq_len:
      raise ConfigError(f'stages.{name}: {entry.seq_len=} exceeds {recipe.model.max_seq_len=}.')
    if entry.stage == 'sparse' and entry.seq_len <= recipe.model.index_topk:
      raise ConfigError(
          f'stages.{name}: {entry.seq_len=} must exceed {recipe.model.index_topk=}: below it every '
          'token is selected, and sparse attention is dense.'
      )
    if 'indexer' in entry.trains and len(recipe.model.window_layers) == recipe.model.n_layers:
      raise ConfigError(
          f'stages.{name}: all layers have a window, model.sliding_window={recipe.model.sliding_window}, '
          "so none has an indexer that could learn: trains=('backbone',) is all that it can."
      )
    if entry.stage != 'dense' and not entry.init_from:
      raise ConfigError(f'stages.{name}: init_from must say which model to start from.')
    if entry.init_from in recipe.stages and entry.init_from not in done:
      raise ConfigError(f'stages.{name}: init_from={entry.init_from!r} must come before it.')
    if entry.schedule not in SCHEDULES:
      entry.rates()  # A function of one's own must be there, and give rates.
    done.append(name)


def _check_report(recipe: Recipe, defined: list[str]):
  report, kinds = recipe.report, {'dense_before': 'dense', 'dense_baseline': 'dense', 'sparse': 'sparse'}
  for role, kind in kinds.items():
    entry = getattr(report, role)
    if entry and entry not in defined:
      raise ConfigError(f'report.{role}={entry!r} must be one of the stages {defined}, or empty.')
    if entry in recipe.stages and recipe.stages[entry].stage != kind:
      raise ConfigError(
          f'report.{role}={entry!r} is a {recipe.stages[entry].stage} stage; it must be a {kind} one.'
      )
  if report.seq_len > recipe.model.max_seq_len:
    raise ConfigError(f'{report.seq_len=} exceeds {recipe.model.max_seq_len=}.')
  if 'sparse' in recipe.roles and recipe.selection not in report.rules:
    raise ConfigError(f'report.rules={report.rules} must hold {recipe.selection=}, which is trained.')
  if 'sparse' in recipe.roles and report.seq_len <= recipe.model.index_topk:
    raise ConfigError(
        f'{report.seq_len=} must exceed {recipe.model.index_topk=}: below it every token is selected, '
        'and no rule leaves anything out.'
    )


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
  except ConfigError as error:
    raise ConfigError(f'config.mesh does not fit {where}: {error}') from error


def _build(where: str, kind: type, fields: dict[str, Any]) -> Any:
  _check_names(where, fields, [f.name for f in dataclasses.fields(kind)])
  try:
    return kind(**fields)
  except (TypeError, ConfigError) as error:
    raise ConfigError(f'config.{where}: {error}') from error


def _check_names(where: str, given: dict[str, Any], known: list[str]):
  for name in given:
    if name not in known:
      close = difflib.get_close_matches(name, known, n=1)
      hint = f'did you mean {close[0]!r}?' if close else f'the fields are {known}.'
      raise ConfigError(f'{where} has no field {name!r}: {hint}')
