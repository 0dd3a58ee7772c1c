# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of other runs that a recipe starts from, looked at before anything is trained."""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import difflib
import json
import logging
import os
import pathlib
import shutil
from typing import Any, NamedTuple

from flax import nnx

from dsa_jax.checkpoint_paths import is_step, readings
from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.data.text import BOS
from dsa_jax.data.tokenizer import Bytes, Tokenizer
from dsa_jax.data.tokenizer_files import (
    TOKENIZER_FILES, find_tokenizer, kept_tokenizer, open_tokenizer, released_config, tokenizer_folder,
)  # fmt: skip
from dsa_jax.json_files import read_object
from dsa_jax.training.checkpoint import (
    check_params, check_wide, latest_of_job, restore_params, saved_steps, weights_of,
)  # fmt: skip
from dsa_jax.training.recipe import Recipe

STARTS = 'starts.json'  # The file of a run that holds the steps of other runs that it starts from.
ORIGIN = 'origin'  # The folder of a run that holds what an import has kept of its release.
# Fields that leave the function of given weights as it is: limits, budgets and initialisers.
FREE = frozenset(('max_seq_len', 'rope_type', 'embed_init_std', 'dtype', 'index_topk'))
# Fields that count for some kinds of rotary positions only, with these kinds.
OF_ROPE_KINDS = {
    'original_seq_len': ('llama3', 'yarn'), 'rope_factor': ('linear', 'llama3', 'yarn'),
    'beta_fast': ('yarn',), 'beta_slow': ('yarn',), 'mscale': ('yarn',),
    'low_freq_factor': ('llama3',), 'high_freq_factor': ('llama3',),
}  # fmt: skip
OF_EXPERTS = frozenset((
    'n_routed_experts', 'n_shared_experts', 'n_activated_experts', 'n_expert_groups',
    'n_limited_groups', 'moe_inter_dim', 'route_scale', 'score_func', 'topk_method', 'norm_topk_prob',
    'zero_dropped_groups', 'swiglu_limit', 'shared_inter_dim',
))  # fmt: skip


class Start(NamedTuple):
  """A step of another run, or of a conversion, that entries start from."""

  step: pathlib.Path
  weights: str | None  # A digest. None: an earlier version saved it.

  def params(self, like: nnx.State) -> nnx.State:
    """Returns its weights, with the structure and shardings of `like`; see `check`."""
    self.check()
    return restore_params(self.step, like)

  def check(self):
    """Raises a ConfigError if it is not there any more, or holds other weights."""
    if not self.step.is_dir() or weights_of(self.step) != self.weights:
      raise ConfigError(
          f'{self.step}, which this run starts from, is gone or has other weights than when the run began. '
          'Bring it back, or go on from what is the latest step there with '
          '--config.on_changed_data=go_on.'
      )


def find_starts(recipe: Recipe, before: Sequence[pathlib.Path] = ()) -> dict[pathlib.Path, Start]:
  """Returns the step of each other checkpoint that a recipe starts from; all processes call it.

  It is the one that was the latest when the run began, so that all entries have the same ancestor
  although the other run may go on.

  Raises:
    ConfigError: One that is still needed, for an entry to come or for the report, is not as it was.
  """
  to_come = [entry for name, entry in recipe.stages.items() if not saved_steps(recipe.checkpoint_folder(name))]
  needed = {recipe.teacher} | {recipe.init_folder(entry) for entry in to_come if entry.init_from}
  is_known, starts = recipe.on_changed_data == 'stop' and (recipe.workdir / STARTS).exists(), {}
  for folder in dict.fromkeys(recipe.origins):
    if is_known and (start := _kept_start(recipe.workdir, folder)):
      starts[folder] = start
      if folder in needed:
        start.check()
    elif (is_step(folder) or saved_steps(folder)) and not is_below(folder, before):
      heirs = _heirs(recipe, folder) if is_known else []
      if not heirs:
        latest = latest_of_job(folder)
        starts[folder] = Start(latest, weights_of(latest))
      elif start := _start_by_weights(recipe.workdir, folder):
        starts[folder] = start
      elif folder in needed:
        _refuse(recipe, folder, heirs)
  return starts


def _kept_start(workdir: pathlib.Path, folder: pathlib.Path) -> Start | None:
  """Returns the step that starts.json names for a folder, if it does; see `keep_starts`.

  Earlier versions had absolute paths of folders and steps only, which the joins below leave as they are.
  """
  home, folder = workdir.resolve(), folder.resolve()
  for place, (step, *same_place, weights) in read_object(workdir / STARTS).items():
    if any((home / path).resolve() == folder for path in (place, *same_place)):
      return Start(folder / step, weights)
  return None


def _start_by_weights(workdir: pathlib.Path, folder: pathlib.Path) -> Start | None:
  """Returns the one step in a folder whose weights starts.json knows from elsewhere; None if not just one.

  That is the case where what this run started from has been moved or copied.
  """
  known = {weights for *_, weights in read_object(workdir / STARTS).values() if weights}
  folder = folder.resolve()
  steps = [folder] if is_step(folder) else [folder / str(step) for step in saved_steps(folder)]
  same = [start for step in steps if (start := Start(step, weights_of(step))).weights in known]
  return same[0] if len(same) == 1 else None


def _heirs(recipe: Recipe, folder: pathlib.Path) -> list[str]:
  """Returns the entries that have begun from a folder."""
  from_there = [name for name, entry in recipe.stages.items()
                if entry.init_from and recipe.init_folder(entry).resolve() == folder.resolve()]  # fmt: skip
  return [name for name in from_there if saved_steps(recipe.checkpoint_folder(name))]


def _refuse(recipe: Recipe, folder: pathlib.Path, heirs: Sequence[str]):
  """Says that it is not known which step entries have begun from."""
  raise ConfigError(
      f'{recipe.workdir / STARTS} does not say from which step of {folder} the entries {heirs} have '
      'begun, and it does not know the weights of exactly one step there. Bring back the folder that the '
      'run began with, or go on from what is the latest step there with --config.on_changed_data=go_on.'
  )


def keep_starts(workdir: pathlib.Path, starts: Mapping[pathlib.Path, Start]):
  """Writes down the steps that a run starts from.

  Their folders are named by paths from the workdir, which hold when a project is moved or copied as a
  whole, and by absolute ones, which hold when the workdir alone is moved.
  """
  home, known = workdir.resolve(), {}
  for folder, (step, weights) in starts.items():
    place = folder.resolve()
    known[os.path.relpath(place, home)] = os.path.relpath(step, place), str(place), weights
  workdir.mkdir(parents=True, exist_ok=True)
  fresh = workdir / f'{STARTS}.tmp'
  fresh.write_text(json.dumps(known, indent=2))
  fresh.replace(workdir / STARTS)


def check_origins(recipe: Recipe, like: nnx.State, before: Sequence[pathlib.Path] = ()):
  """Checks every checkpoint that an entry which has not begun will start from.

  Args:
    recipe: The recipe.
    like: The shapes of its model's weights.
    before: The workdirs of runs that will be trained before it; their checkpoints are not looked at.

  Raises:
    ConfigError: A folder is missing or holds something else, or the model there is another function.
  """
  for name, entry in recipe.stages.items():
    begun = saved_steps(recipe.checkpoint_folder(name))
    if begun or not entry.init_from or entry.init_from in recipe.stages:
      continue
    folder, where = recipe.init_folder(entry), f'stages.{name}.init_from={entry.init_from!r}'
    if is_below(folder, before):
      continue
    _check_kind(folder, where, list(recipe.stages))
    check_wide(check_params(folder, like), folder)
    if not (record := model_record(folder)):
      raise ConfigError(
          f'{where} does not say which model it is of, because it lies outside its run: name '
          "RUN/checkpoints/ENTRY, or put a copy of the run's config.json into the folder."
      )
    _check_function(ModelConfig(**record), recipe.model, entry.init_may_differ, where, name)
    if what := _other_tokenizer(recipe, folder):
      logging.warning(f'{where} came with a tokenizer of its own; {what}: ids may mean other words there.')


def is_below(folder: pathlib.Path, others: Sequence[pathlib.Path]) -> bool:
  return any(folder.resolve().is_relative_to(other.resolve()) for other in others)


def _other_tokenizer(recipe: Recipe, folder: pathlib.Path) -> str:
  """Says what reads the data in place of the tokenizer that came with a checkpoint; '' if that does."""
  own, data = kept_tokenizer(folder), recipe.data
  if own is None or data.source == 'recall' or (data.source == 'mixture' and not data.reads_text):
    return ''
  given = data.tokenizer if data.source == 'mixture' else 'bytes'
  is_own = open_tokenizer(given).digest == open_tokenizer(str(own)).digest
  return '' if is_own else f'data.tokenizer={given!r} is another'


def keep_origin(workdir: pathlib.Path, folders: Sequence[pathlib.Path]):
  """Copies what an import has kept of its release into a workdir, for tokenizers and exports.

  That is the record of the import and small files such as tokenizer.json. A run that starts from
  another run takes over what that one has.

  Args:
    workdir: The run's. What it has already stays.
    folders: The checkpoints that its entries start from. The first that has an origin counts.
  """
  target, before = workdir / ORIGIN, workdir / f'{ORIGIN}.before'
  if before.exists() and not target.exists():  # A process was killed while it was being replaced.
    before.rename(target)
  for place in (place for folder in folders for place in readings(folder)):
    for source in (place.folder, *(home / ORIGIN for home in place.homes)):
      kept = read_object(source / 'config.json').get('source')
      if kept and not target.exists():
        _copy_whole(source, target, ['config.json', *kept.get('files', ())])


def keep_tokenizer(workdir: pathlib.Path, tokenizer: str):
  """Puts the tokenizer of a run's data into its origin, in place of another that came with an import.

  The ids that begin and end its texts are kept with it, because the config of a release may say them.

  Args:
    workdir: The run's.
    tokenizer: See `open_tokenizer`. '' stands for none: the data has no text.
  """
  origin, folder = workdir / ORIGIN, tokenizer_folder(tokenizer)
  if folder is not None and not origin.exists():
    config = json.dumps(released_config(folder))
    _copy_whole(folder, origin, TOKENIZER_FILES, {'config.json': config})
  elif tokenizer and (origin / 'tokenizer.json').is_file():
    given = open_tokenizer(tokenizer)
    if given.digest != find_tokenizer(origin).digest:
      config = read_object(origin / 'config.json')
      record = json.dumps(_with_tokenizer(config, given, folder))
      _copy_whole(folder or origin, origin, TOKENIZER_FILES if folder else (), {'config.json': record})


def _with_tokenizer(
    config: dict[str, Any], tokenizer: Tokenizer, folder: pathlib.Path | None
) -> dict[str, Any]:
  """Returns what is recorded of an import, with the marks and the files of another tokenizer."""
  if 'source' not in config:  # No import, but a tokenizer of before.
    return released_config(folder) if folder else {}
  is_bytes, ends = isinstance(tokenizer, Bytes), list(tokenizer.stop)
  marks = {
      'bos_token_id': BOS if is_bytes else tokenizer.bos,
      'eos_token_id': ends if len(ends) > 1 else next(iter(ends), None),
  }
  released = config['source'].get('config', {}) | marks
  if isinstance(text := released.get('text_config'), dict):  # Some releases have them there.
    released['text_config'] = text | {key: x for key, x in marks.items() if key in text}
  files = [name for name in TOKENIZER_FILES if folder and (folder / name).is_file()]
  return config | {'source': config['source'] | {'config': released, 'files': files}}


def _copy_whole(
    source: pathlib.Path, target: pathlib.Path, names: Sequence[str], texts: Mapping[str, str] = {}
):
  """Copies files, and writes texts, into a folder, which appears with all or not at all.

  One that is there already is replaced.
  """
  partial, before = (target.with_name(f'{target.name}.{end}') for end in ('partial', 'before'))
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  for name in names:
    if (source / name).is_file():
      shutil.copyfile(source / name, partial / name)
  for name, text in texts.items():
    (partial / name).write_text(text)
  if target.exists():
    target.rename(before)
  partial.rename(target)
  shutil.rmtree(before, ignore_errors=True)


def _check_kind(folder: pathlib.Path, where: str, entries: list[str]):
  if not folder.is_dir():
    close = difflib.get_close_matches(folder.name, entries, n=1)
    hint = f'Did you mean the entry {close[0]!r}?' if close else f'The entries are {entries}.'
    raise ConfigError(f'{where} is neither an earlier entry of the recipe nor a folder. {hint}')
  if any(folder.glob('*.safetensors')):
    raise ConfigError(
        f'{where} is a released checkpoint. Convert it first: python -m dsa_jax.convert {folder} TARGET'
    )
  if (folder / 'checkpoints').is_dir():
    inner = sorted(path.name for path in (folder / 'checkpoints').iterdir())
    raise ConfigError(f'{where} is a run. Choose {folder}/checkpoints/ENTRY, ENTRY one of {inner}.')


def model_record(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns the fields of the model that a checkpoint was made with, if its folder says."""
  homes = (home for place in readings(folder) for home in place.homes)
  return next((record for home in homes if (record := read_object(home / 'config.json').get('model'))), None)


def differing_fields(
    theirs: ModelConfig, ours: ModelConfig, may_differ: Collection[str] = FREE
) -> list[str]:
  """Returns the fields in which two models differ and which their functions depend on."""
  skipped, kinds = set(may_differ), {theirs.rope_kind, ours.rope_kind}
  skipped |= {field for field, used_by in OF_ROPE_KINDS.items() if not kinds & set(used_by)}
  if theirs.index_rope_factor == ours.index_rope_factor == 1:
    skipped.add('index_original_seq_len')
  if theirs.n_dense_layers == theirs.n_layers == ours.n_dense_layers:
    skipped |= OF_EXPERTS
  names = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in skipped]
  return [name for name in names if getattr(theirs, name) != getattr(ours, name)]


def _check_function(theirs: ModelConfig, ours: ModelConfig, may_differ, where: str, name: str):
  fields = differing_fields(theirs, ours, {*FREE, *may_differ})
  rows = [f'{field}: {getattr(theirs, field)} there, {getattr(ours, field)} here' for field in fields]
  kinds = {theirs.rope_kind, ours.rope_kind}
  if len(kinds) > 1 and 'rope_type' not in may_differ:
    rows.append(f'rope_type: {theirs.rope_kind} there, {ours.rope_kind} here')
  if rows:
    raise ConfigError(
        f'{where} is of a model that computes something else:\n  '
        + '\n  '.join(rows)
        + f'\nSet config.model as it is there, or name what may differ in stages.{name}.init_may_differ.'
    )
