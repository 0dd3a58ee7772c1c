# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: it belongs to one config, and says so if another comes along."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from dsa_jax.checkpoint_paths import UNREADABLE, check_readable
from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.data.corpus import changes
from dsa_jax.json_files import read_object
from dsa_jax.training.checkpoint import saved_steps
from dsa_jax.training.recipe import ADDED, SECTIONS
from dsa_jax.training.stages import StageConfig

# A run may go on in another place, on other devices, with another cache and in another way: its
# config.json does not keep these fields.
ELSEWHERE = ('workdir', 'mesh', 'compilation_cache', 'resume', 'on_changed_data', 'sweep')
# These change nothing that is trained. A run may go on with others, which its config.json then keeps.
CHANGEABLE = ('report', 'log_every', 'measure_every', 'measure_rows', 'save_every')
# So may these, as for want of memory: they change what is trained in the last bits alone.
ROUNDING = ('remat', 'backend')
ROUNDING_OF_ENTRIES = ('micro_batches', 'attention')

# A checkpoint in a folder with `[` in its path cannot be read: orbax takes it for a pattern.
UNUSABLE = UNREADABLE | {'['}


def check_workdir(config: ConfigDict, workdir: pathlib.Path) -> list[str]:
  """Checks that a workdir is empty or this config's own; writes nothing.

  A run may go on with fields that change nothing which is trained, or its last bits alone, with
  entries that have not begun changed, added or left out, and with more steps of an entry from which
  none that has begun descends. A config.json of an earlier version may lack fields; they count as
  what was done before they existed (see `recipe.ADDED`).

  Returns:
    The fields that name files of the corpus at another place than before, which `check_data` takes.

  Raises:
    ConfigError: The workdir belongs to another config, holds a checkpoint that no start with this
      config has written, or cannot be written.
  """
  check_readable(workdir, 'workdir', UNUSABLE)
  parent = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
  if not parent.is_dir() or not os.access(parent, os.W_OK):
    raise ConfigError(f'workdir {workdir} cannot be written; choose another with --config.workdir=...')
  moved = _check_config(config, workdir) if (workdir / 'config.json').exists() else []
  for name in config.recipe:
    _check_last_step(workdir / 'checkpoints' / name, f'stages.{name}.steps', config.stages[name].steps)
  return moved


def _check_config(config: ConfigDict, workdir: pathlib.Path) -> list[str]:
  theirs, ours = complete(read_config(workdir)), complete(_kept(config))
  begun = [name for name in theirs['recipe'] if saved_steps(workdir / 'checkpoints' / name)]
  before, now = _take_places(theirs['data']), _take_places(ours['data'])
  moved = _differences(before, now)
  if rows := _differences(_fixed(theirs), _fixed(ours)) + _changed_entries(theirs, ours, begun):
    _refuse(workdir, rows + moved)
  return moved


def _refuse(workdir: pathlib.Path, rows: list[str], why: str = ''):
  raise ConfigError(
      f'workdir {workdir} belongs to another config; it differs in\n  '
      + '\n  '.join(rows)
      + f'\n{why}Choose another with --config.workdir=..., or delete this one.'
  )


def _take_places(data: dict[str, Any]) -> dict[str, Any]:
  """Takes the fields that say where files lie out of the data of a config; returns them by dotted names."""
  places = {'data.files': data.pop('files')}
  for name, source in data['sources'].items():
    for field in 'files', 'validation_files':
      places[f'data.sources.{name}.{field}'] = source.pop(field, None)
  return places


def _check_last_step(folder: pathlib.Path, field: str, steps: int):
  """Checks that an entry's folder holds no step beyond its last one, such as a copy of another step."""
  if beyond := [step for step in saved_steps(folder) if step > steps]:
    raise ConfigError(
        f'checkpoint {folder / str(beyond[-1])} is beyond {field}={steps}, so no start with this config has '
        'written it. Move it out of the workdir.'
    )


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
  free = (*CHANGEABLE, *ROUNDING, 'recipe', 'stages')
  return {name: value for name, value in config.items() if name not in free}


def _changed_entries(theirs: dict, ours: dict, begun: list[str]) -> list[str]:
  """Returns what is different in the entries that have begun."""
  if [name for name in ours['recipe'] if name in begun] != begun:
    return [f'recipe: {theirs["recipe"]} there, {ours["recipe"]} here; {begun} have begun']
  rows = []
  for name in begun:
    before, now = theirs['stages'][name], ours['stages'][name]
    has_heirs = any(theirs['stages'][other]['init_from'] == name for other in begun)
    if not has_heirs and now['steps'] > before['steps']:
      before = before | {'steps': now['steps']}
    draws = ours['selection'] == 'random' and before['stage'] == 'sparse'  # For each micro-batch anew.
    free = [field for field in ROUNDING_OF_ENTRIES if not (draws and field == 'micro_batches')]
    before = before | {field: now[field] for field in free}
    rows += _differences(before, now, f'stages.{name}')
  return rows


def check_data(
    descriptions: dict[str, str], workdir: pathlib.Path, on_changed: str, moved: Sequence[str] = ()
):
  """Compares the files or sources of a corpus with those that the run began with, which data.json describes.

  Args:
    descriptions: What describes them now.
    workdir: The run's.
    on_changed: What to do if they have changed: 'stop' or 'go_on'.
    moved: The fields that name another place than before, where they must be the same in any case.

  Raises:
    ConfigError: They have changed, and `on_changed` is 'stop', or they are elsewhere.
  """
  path = workdir / 'data.json'
  if moved and read_object(path) != descriptions:
    why = 'What lies there, or which of it is for validation, is not what the data.json of the run describes. '
    _refuse(workdir, moved, why)
  if not path.exists() or on_changed == 'go_on':
    return
  of_mixture = read_object(workdir / 'config.json').get('data', {}).get('source') == 'mixture'
  what, whole = ('source', 'the files and the tokenizer') if of_mixture else ('file', 'the files')
  if changed := changes(read_object(path), descriptions, what):
    raise ConfigError(
        f'the data has changed since the run in {workdir} began: {changed}. It would go on with other '
        f'rows. Restore {whole}, or go on all the same with --config.on_changed_data=go_on.'
    )


def write_config(config: ConfigDict, workdir: pathlib.Path, descriptions: dict[str, str] | None = None):
  """Keeps the config in its workdir as config.json, and a description of its data as data.json.

  Raises:
    ConfigError: The workdir cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    for name, values in ('config', _kept(config)), ('data', descriptions or {}):
      fresh = workdir / f'{name}.tmp'
      fresh.write_text(json.dumps(values, indent=2, sort_keys=True))
      os.replace(fresh, workdir / f'{name}.json')
  except OSError as error:
    raise ConfigError(
        f'workdir {workdir} cannot be written ({error.strerror}); choose another with '
        '--config.workdir=...'
    ) from error


def of_job(config: ConfigDict) -> dict[str, Any]:
  """Returns the fields of a config by their names, but for those that each host may have its own of."""
  values = json.loads(config.to_json())
  values['data'] = {name: x for name, x in values['data'].items() if name != 'cache'}
  own = 'workdir', 'compilation_cache', 'sweep'
  return {f'config.{name}': value for name, value in values.items() if name not in own}


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the config.json of a run.

  Raises:
    ConfigError: There is none, or it is no JSON object.
  """
  path = workdir / 'config.json'
  if not path.is_file():
    raise ConfigError(f'{workdir} is not the workdir of a run: it has no config.json.')
  return read_object(path)


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
  """Fills in the fields that a config of an earlier version lacks."""
  config = ADDED | dict(config)
  for name, kind in SECTIONS.items():
    config[name] = _defaults(kind) | config.get(name, {})
  config['data'].pop('cache')  # Where tokens lie decides nothing.
  config['model']['rope_type'] = _rope_kind(config['model'])
  stages = config.get('stages', {})
  config['stages'] = {name: _defaults(StageConfig) | entry for name, entry in stages.items()}
  return json.loads(json.dumps({k: v for k, v in config.items() if k not in ELSEWHERE}))


def _rope_kind(model: Mapping[str, Any]) -> Any:
  """Returns the kind of rotary positions, which a config may leave open."""
  try:
    return ModelConfig(**model).rope_kind
  except (TypeError, ConfigError):  # A later version has made it.
    return model['rope_type']


def _defaults(kind: type) -> dict[str, Any]:
  values, missing = {}, dataclasses.MISSING
  for field in dataclasses.fields(kind):
    if field.default is not missing:
      values[field.name] = field.default
    elif field.default_factory is not missing:
      values[field.name] = field.default_factory()
  return values


def _kept(config: ConfigDict) -> dict[str, Any]:
  values = json.loads(config.to_json())
  return {name: value for name, value in values.items() if name not in ELSEWHERE}


def _differences(theirs: Any, ours: Any, where: str = '') -> list[str]:
  if isinstance(theirs, dict) and isinstance(ours, dict):
    rows = []
    for name in sorted(theirs.keys() | ours.keys()):
      inner = f'{where}.{name}' if where else name
      rows += _differences(theirs.get(name), ours.get(name), inner)
    return rows
  return [] if theirs == ours or _same_path(theirs, ours) else [f'{where}: {theirs} there, {ours} here']


def _same_path(a: Any, b: Any) -> bool:
  """Returns whether two texts are one path, such as `ours`, `./ours` and its absolute path."""
  real = lambda path: os.path.realpath(os.path.expanduser(path))
  return bool(a and b) and isinstance(a, str) and isinstance(b, str) and real(a) == real(b)
