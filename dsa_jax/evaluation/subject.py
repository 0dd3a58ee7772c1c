# SPDX-License-Identifier: Apache-2.0
"""A checkpoint and the rows that it is scored on, opened and checked before anything is written."""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import pathlib
from typing import Any

from flax import nnx
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.data.batch import Batch
from dsa_jax.data.pipeline import first_batches
from dsa_jax.data.sources import DataConfig
from dsa_jax.data.tokenizer_files import kept_tokenizer
from dsa_jax.evaluation.settings import CONTEXT, Settings
from dsa_jax.inference.load import StoredModel, config_of, find_checkpoint, load_checkpoint, warn_of_length
from dsa_jax.inference.shares import check_mesh
from dsa_jax.json_files import read_object
from dsa_jax.kernels.backend import default_backend
from dsa_jax.parallel.mesh import make_mesh
from dsa_jax.parallel.processes import is_first, moment_of_job
from dsa_jax.reporting.plots import replace_bytes
from dsa_jax.selection import RULES
from dsa_jax.training.checkpoint import weights_of
from dsa_jax.training.recipe import read_recipe
from dsa_jax.training.state import model_graph

SETTINGS = 'settings.json'  # What the scores of a folder depend on.
BEGUN = 'begun'  # What it also holds: when the folder was begun. It may differ.


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """All that the arms of an evaluation share."""

  settings: Settings  # Nothing in it is left open.
  stored: StoredModel
  cfg: ModelConfig
  data: DataConfig
  batches: list[Batch]
  mesh: Mesh | None  # None: one device.
  identity: dict[str, Any]  # What decides the score of every target.
  moment: datetime.datetime | None = None  # What chat templates take for now. None: the clock.

  @functools.cached_property
  def n_visible(self) -> np.ndarray:
    """The number of tokens that each target's query sees, itself included."""
    return np.concatenate([(b.end - b.start)[b.weights > 0] for b in self.batches])

  @functools.cached_property
  def positions(self) -> np.ndarray:
    """The position of each target's query in its row."""
    return np.concatenate([np.nonzero(b.weights > 0)[1] for b in self.batches])

  @functools.cached_property
  def params(self) -> nnx.State:
    """The weights, which are read when they are first asked for."""
    model = load_checkpoint(
        self.stored.step or self.stored.folder, mesh=self.mesh, dtype=self.settings.dtype
    )
    return nnx.split(model)[1]

  def graph(self, index_topk: int) -> nnx.GraphDef:
    """Returns the model with a budget, without its weights."""
    return model_graph(dataclasses.replace(self.cfg, index_topk=index_topk))

  def on_devices(self) -> contextlib.AbstractContextManager:
    return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()


def open_subject(settings: Settings) -> Subject:
  """Opens a checkpoint and its data.

  Raises:
    ConfigError: Something of it will not do. Nothing has been written.
  """
  stored = find_checkpoint(settings.checkpoint).at_one_step()
  cfg = config_of(stored, index_rope_factor=settings.index_rope_factor)
  settings = _filled_in(settings, stored, cfg)
  data = _data(settings, stored)
  _check_vocabulary(data, cfg, settings)
  if settings.mesh.n_devices > 1:
    settings.mesh.check_model(cfg)
    settings.mesh.check_rows(settings.batch_size, settings.context)
    if settings.tasks:
      check_mesh(settings.mesh, cfg, capacity=min(settings.capacity, cfg.max_seq_len))
  mesh = make_mesh(**settings.mesh.sizes) if settings.mesh.n_devices > 1 else None
  source = data.rows(settings.context, 'validation')
  batches = first_batches(source, settings.batch_size, settings.rows // settings.batch_size, seed=0)
  identity = _identity(settings, stored, data)
  moment = moment_of_job(read_object(settings.out / SETTINGS).get(BEGUN))
  subject = Subject(settings, stored, cfg, data, batches, mesh, identity, moment)
  if not subject.n_visible.size:
    raise ConfigError('no token of the rows has a target: give longer documents.')
  _check_folder(subject)
  return subject


def _check_vocabulary(data: DataConfig, cfg: ModelConfig, settings: Settings):
  _ = data.vocab_size, data.unit  # Opens the files, whose errors are no matter of the vocabulary.
  try:
    data.check_vocabulary(cfg.vocab_size)
  except ConfigError as error:
    advice = ' Give the tokenizer of the model by --tokenizer.' if settings.files else ''
    raise ConfigError(f'{error}{advice}') from error


def keep_settings(subject: Subject):
  """Writes what the scores depend on, so that only the same evaluation goes on in the folder."""
  kept = subject.identity | {BEGUN: subject.moment.isoformat()}
  keep_bytes(subject.settings.out / SETTINGS, json.dumps(kept, indent=2).encode())


def keep_bytes(path: pathlib.Path, data: bytes):
  """Writes a file of the results; of several processes, the first does."""
  if is_first():
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, data)


def _filled_in(settings: Settings, stored: StoredModel, cfg: ModelConfig) -> Settings:
  context = settings.context or min(CONTEXT, cfg.max_seq_len)
  if context > cfg.max_seq_len:
    raise ConfigError(f'{context=} exceeds the {cfg.max_seq_len=} of the model.')
  lengths = settings.lengths or ((context,) if settings.tasks else ())
  if wrong := [n for n in lengths if not 2 <= n <= cfg.max_seq_len]:
    raise ConfigError(f'lengths={wrong} must be within 2 and {cfg.max_seq_len=}.')
  budgets = settings.index_topk or (cfg.index_topk,)
  if wrong := [k for k in budgets if not 1 <= k <= cfg.max_seq_len]:
    raise ConfigError(f'index_topk={wrong} must be within 1 and {cfg.max_seq_len=}.')
  rules = settings.rules or tuple(r for r in RULES if r != 'indexer' or stored.has_trained_indexer)
  if settings.index_rope_factor is not None and 'indexer' not in rules:
    raise ConfigError(f'{settings.index_rope_factor=} would change nothing: the rules are {rules}.')
  if 'indexer' in rules and not stored.has_trained_indexer:
    logging.warning('the indexer of %s was never trained: it selects by chance.', stored.folder)
  elif 'indexer' in rules:
    warn_of_length(stored, cfg, max((context, *lengths)))
  backend = settings.backend or default_backend()
  return dataclasses.replace(
      settings, context=context, lengths=lengths, index_topk=budgets, rules=rules, backend=backend
  )


def _data(settings: Settings, stored: StoredModel) -> DataConfig:
  """Returns what describes the rows: files that were given, or the validation data of the run."""
  if settings.files:
    own = kept_tokenizer(stored.folder)
    fields = {'format': settings.format, 'files': settings.files}
    fields |= {'field': settings.field} if settings.format in ('jsonl', 'parquet', 'arrow') else {}
    return DataConfig(
        source='mixture',
        sources={'files': fields | {'validation_files': settings.files}},
        tokenizer=settings.tokenizer or (str(own) if own else 'bytes'),
        packing=settings.packing,
        min_tokens=settings.min_tokens,
    )
  if 'data' not in stored.record:
    raise ConfigError(f'{stored.folder} is of no run, so it has no data of its own: give --files.')
  usual = {field.name: field.default for field in dataclasses.fields(Settings)}
  names = 'tokenizer', 'min_tokens', 'packing', 'format', 'field'
  if ignored := [f'--{name}' for name in names if getattr(settings, name) != usual[name]]:
    raise ConfigError(f'{", ".join(ignored)} would change nothing without --files.')
  workdir = stored.folder.parent.parent
  return read_recipe(ConfigDict(stored.record | {'workdir': str(workdir)})).data


def _identity(settings: Settings, stored: StoredModel, data: DataConfig) -> dict[str, Any]:
  names = 'context', 'rows', 'packing', 'min_tokens', 'tokenizer', 'dtype', 'backend'
  return {
      'checkpoint': str(stored.folder.resolve()),
      'step': int(stored.step.name),
      'weights': weights_of(stored.step),
      'model': _digest(stored.record['model']),
      'data': _digest([data.describe(trains=False), data.seed]),
      **{name: getattr(settings, name) for name in names},
      **({'index_rope_factor': factor} if (factor := settings.index_rope_factor) is not None else {}),
  }


def _digest(x: Any) -> str:
  return hashlib.sha256(json.dumps(x, sort_keys=True).encode()).hexdigest()


def _digest_without_order(data: DataConfig) -> str:
  """Returns what an earlier version kept of the data: it did not tell the order of documents."""
  texts = {name: text.partition(', in the order ')[0] for name, text in data.describe(trains=False).items()}
  return _digest([texts, data.seed])


def _check_folder(subject: Subject):
  """Checks that the folder of the results is new, or that this evaluation has begun it."""
  out = subject.settings.out
  path = out / SETTINGS
  if not path.exists():
    if out.exists() and any(out.iterdir()):
      raise ConfigError(f'{out} holds something else: name a new folder for the results.')
    return
  before = {name: x for name, x in read_object(path).items() if name != BEGUN}
  if before.get('data') == _digest_without_order(subject.data):
    before = before | {'data': subject.identity['data']}
  before = {'weights': subject.identity['weights']} | before  # An earlier version did not tell them.
  names = sorted(before.keys() | subject.identity.keys())
  both = {name: (before.get(name), subject.identity.get(name)) for name in names}
  differing = {name: pair for name, pair in both.items() if pair[0] != pair[1]}
  rows = [f'{name}: {there} there, {here} here' for name, (there, here) in differing.items()]
  if differing.keys() == {'weights'}:
    rows = ['the weights: another model lay at the same path, or this one was trained or converted anew']
  if rows:
    raise ConfigError(
        f'{out} holds the results of another evaluation; it differs in\n  '
        + '\n  '.join(rows)
        + '\nName another folder, or delete this one.'
    )
