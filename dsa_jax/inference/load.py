# SPDX-License-Identifier: Apache-2.0
"""Loads a model in one call, from a converted checkpoint or from a run."""

import dataclasses
import logging
import math
import pathlib
from typing import Any, NamedTuple, NoReturn

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsa_jax.checkpoint_paths import readings
from dsa_jax.config import ConfigError, ModelConfig, local_path
from dsa_jax.inference.weights import load_weights
from dsa_jax.nn.transformer import Transformer
from dsa_jax.selection import check_rule
from dsa_jax.training.checkpoint import latest_of_job, saved_stage
from dsa_jax.training.origin import ORIGIN
from dsa_jax.training.recipe import Recipe, read_recipe
from dsa_jax.training.stages import STAGES
from dsa_jax.training.state import model_graph
from dsa_jax.training.workdir import read_config

Folder = str | pathlib.Path


class StoredModel(NamedTuple):
  """A checkpoint on disk."""

  folder: pathlib.Path  # The folder of a converted checkpoint, or RUN/checkpoints/ENTRY.
  step: pathlib.Path | None  # The step below it that was asked for. None: the latest one.
  record: dict[str, Any]  # Its own config.json, or that of the run.

  @property
  def origin(self) -> pathlib.Path:
    """The folder that holds what an import has kept: its own, or RUN/origin."""
    has_files = any((self.folder / name).is_file() for name in ('config.json', 'tokenizer.json'))
    return self.folder if has_files else self.folder.parent.parent / ORIGIN

  @property
  def source(self) -> dict[str, Any]:
    """What an import has recorded of the released checkpoint; {} if the model began elsewhere."""
    is_there = (self.origin / 'config.json').is_file()
    return read_config(self.origin).get('source', {}) if is_there else {}

  @property
  def rule(self) -> str:
    """What selected while it was trained."""
    return self.record.get('selection', 'indexer')

  @property
  def was_fp8(self) -> bool:
    """Whether this is an import whose large matrices were FP8; a run has trained them since."""
    return 'F8_E4M3' in self.record.get('source', {}).get('dtypes', {}).values()

  @property
  def index_seq_len(self) -> int:
    """The length of the longest rows from which its indexer learned, in the entries that led here.

    0 if that is not known, as of a release or of what another run has trained before.
    """
    length = self.record['model'].get('index_original_seq_len', 0)
    if self.record['model'].get('index_rope_factor', 1) > 1:
      return length
    if not length and any('indexer' in path for path in self.source.get('dtypes', {})):
      return 0  # It had learned before.
    lengths, entries = [length], dict(self.record.get('stages', {}))
    name = next((x.folder.name for x in readings(self.folder) if x.folder.name in entries), '')
    while entry := entries.pop(name, None):
      if 'indexer' in (entry.get('trains') or STAGES[entry['stage']].trains):
        lengths.append(entry.get('seq_len', 0))
      name = entry.get('init_from', '')
    if name and (other := _if_there(name)) and other.has_trained_indexer:  # That of another run goes on.
      lengths = [0] if not other.index_seq_len else [*lengths, other.index_seq_len]
    return max(lengths)

  @property
  def has_trained_indexer(self) -> bool:
    """Whether a converted checkpoint had an indexer, or what a run saved is not of the stage `dense`.

    The stage lies beside the weights. Checkpoints of earlier versions have it in the run's config only,
    under the name of the entry.
    """
    if stage := saved_stage(self.step or self.folder):
      return stage != 'dense'
    if 'source' in self.record:
      return any('indexer' in path for path in self.record['source']['dtypes'])
    entries, names = self.record.get('stages', {}), [x.folder.name for x in readings(self.folder)]
    return next((entries[name]['stage'] for name in names if name in entries), '') != 'dense'

  def at_one_step(self) -> 'StoredModel':
    """Returns the checkpoint with what is its latest step now, if none was asked for.

    A training that goes on changes nothing then. All processes of a job call it, and get one step.

    Raises:
      ConfigError: There is no step.
    """
    if self.step:
      return self
    return self._replace(step=self.folder / latest_of_job(self.folder).name)


def load_checkpoint(
    folder: Folder,
    *,
    index_topk: int | None = None,
    index_rope_factor: float | None = None,
    mesh: Mesh | None = None,
    dtype: str = 'float32',
) -> Transformer:
  """Returns the model of a converted checkpoint, or of a run's `checkpoints/<entry>`.

  Args:
    folder: The checkpoint, or one step of it.
    index_topk: How many tokens each token selects. None stands for what the model was trained with.
    index_rope_factor: By how much texts are longer than the rows from which the indexer of a run learned; see
      `ModelConfig`. None stands for what the model was trained with.
    mesh: Devices to split the weights over. Each reads its own share only. None stands for the
      first device.
    dtype: The dtype of matrices, whatever they are stored in: 'float32' or 'bfloat16'. Or 'fp8' or
      'int8': then large ones are codes with a scale for each block, which products widen, and the
      others keep the dtype that they are stored in. Norms and the router's bias are float32.

  Raises:
    ConfigError: The folder holds no checkpoint, the mesh does not divide its weights, or an argument
      is out of range.
  """
  stored = find_checkpoint(folder)
  cfg = config_of(stored, index_topk, index_rope_factor)
  family = stored.source.get('family', '')
  params = load_weights(stored.step or stored.folder, cfg, dtype, mesh=mesh, family=family)
  return nnx.merge(model_graph(cfg), params)


def load_model(
    workdir: Folder,
    entry: str,
    *,
    index_topk: int | None = None,
    index_rope_factor: float | None = None,
    rule: str | None = None,
) -> tuple[Transformer, Recipe]:
  """Returns the model as one entry of a finished recipe left it, and the recipe.

  Args:
    workdir: The folder of a run.
    entry: A name in its recipe, such as 'dense', 'warmup' or 'sparse'.
    index_topk: How many tokens each token selects. None stands for what the model was trained with.
    index_rope_factor: See `load_checkpoint`.
    rule: What selects them, a key of `dsa_jax.selection.RULES`. None stands for the run's own. It is
      the `selection` of the recipe that is returned.

  Raises:
    ConfigError: The folder is no workdir, the entry has no checkpoint, or an argument is out of range.
  """
  workdir = local_path(workdir, 'workdir')
  recipe = read_recipe(ConfigDict(read_config(workdir) | {'workdir': str(workdir)}))
  if entry not in recipe.stages:
    raise ConfigError(f'{entry=} must be one of the recipe, {tuple(recipe.stages)}.')
  if rule is not None:
    check_rule(rule)
  changes = dict(index_topk=index_topk, index_rope_factor=index_rope_factor)
  model = load_checkpoint(recipe.checkpoint_folder(entry), **changes)
  return model, dataclasses.replace(recipe, model=model.cfg, selection=rule or recipe.selection)


def find_checkpoint(folder: Folder) -> StoredModel:
  """Returns what a path names: a converted checkpoint, RUN/checkpoints/ENTRY, or a step of either.

  The path may be relative, hold `..`, or lead over links.

  Raises:
    ConfigError: It names none of them.
  """
  typed = local_path(folder, 'checkpoint')
  for place in readings(typed):
    for home in place.homes:
      if place.folder.is_dir() and (home / 'config.json').is_file():
        return _checked(StoredModel(place.folder, place.step, read_config(home)))
  if place.folder.name == 'checkpoints' and (place.folder.parent / 'config.json').is_file():
    _refuse_run(place.folder.parent)
  if not typed.is_dir():
    raise ConfigError(f'there is no checkpoint folder {typed}.')
  raise ConfigError(f'{typed} is neither a converted checkpoint nor RUN/checkpoints/ENTRY.')


def _checked(stored: StoredModel) -> StoredModel:
  folder, record = stored.folder, stored.record
  if (folder / 'checkpoints').is_dir():
    _refuse_run(folder)
  if 'model_type' in record:
    raise ConfigError(
        f'{folder} is a checkpoint in its released form. Convert it first: python -m dsa_jax.convert '
        f'{folder} TARGET'
    )
  if 'model' not in record:
    raise ConfigError(f'the config.json of {folder} describes no model of this package.')
  return stored


def _refuse_run(folder: pathlib.Path) -> NoReturn:
  entries = ', '.join(sorted(p.name for p in (folder / 'checkpoints').iterdir()))
  raise ConfigError(
      f'{folder} is a run: choose {folder}/checkpoints/ENTRY, ENTRY one of {entries}.'
  )


def _if_there(folder: Folder) -> StoredModel | None:
  """Returns what a path names, None where there is nothing any more."""
  try:
    return find_checkpoint(folder)
  except ConfigError:
    return None


def check_factor(index_rope_factor: float | None, rule: str):
  """Raises a ConfigError if a factor is given where no indexer selects."""
  if index_rope_factor is not None and rule != 'indexer':
    raise ConfigError(f'{index_rope_factor=} would change nothing: what selects is the rule {rule!r}.')


def warn_of_length(stored: StoredModel, cfg: ModelConfig, n_tokens: int):
  """Warns of texts that are longer than those for which a run's indexer is good."""
  good = stored.index_seq_len * cfg.index_rope_factor
  if 0 < good < n_tokens:
    logging.warning(
        f'texts of {n_tokens:,} tokens: the indexer of {stored.folder} learned from rows of {stored.index_seq_len:,}, '
        f'and selects badly beyond {good:,.0f}. index_rope_factor={math.ceil(10 * n_tokens / stored.index_seq_len) / 10:g} '
        'would help.'
    )


def config_of(
    stored: StoredModel, index_topk: int | None = None, index_rope_factor: float | None = None
) -> ModelConfig:
  """Returns the config of a checkpoint's model, with another budget or other positions if they are given.

  Raises:
    ConfigError: One is out of range, or it is not known at which length the indexer has learned.
  """
  cfg = ModelConfig(**stored.record['model'])
  if index_rope_factor is not None:
    length = stored.index_seq_len
    if not cfg.index_rope_dim:
      raise ConfigError(f'{index_rope_factor=} would change nothing: the indexer does not rotate.')
    if index_rope_factor > 1 and not length:
      raise ConfigError(
          f'{index_rope_factor=}: {stored.folder} does not say how long the rows were from which its indexer '
          'learned. A run does, or its config.model.index_original_seq_len.'
      )
    cfg = dataclasses.replace(cfg, index_rope_factor=index_rope_factor, index_original_seq_len=length)
  if index_topk is None:
    return cfg
  if not 1 <= index_topk <= cfg.max_seq_len:
    raise ConfigError(f'{index_topk=} must be within 1 and {cfg.max_seq_len=}.')
  return dataclasses.replace(cfg, index_topk=index_topk)
