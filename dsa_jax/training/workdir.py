# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: it belongs to one config, and says so if another comes along."""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from dsa_jax.config import ConfigError
from dsa_jax.training.recipe import ADDED, SECTIONS
from dsa_jax.training.stages import StageConfig

# A run may go on in another place, on other devices and with another cache: its config.json does not
# keep these fields.
ELSEWHERE = ('workdir', 'mesh', 'compilation_cache')
# These change nothing that is trained. A run may go on with others, which its config.json then keeps.
CHANGEABLE = ('report', 'log_every', 'measure_every', 'measure_rows', 'save_every')


def check_workdir(config: ConfigDict, workdir: pathlib.Path):
  """Checks that a workdir is empty or this config's own; writes nothing.

  A config.json of an earlier version may lack fields; they count as what was done before they
  existed (see `recipe.ADDED`).

  Raises:
    ConfigError: The workdir belongs to another config.
  """
  if not (workdir / 'config.json').exists():
    return
  fixed = lambda tree: {k: v for k, v in complete(tree).items() if k not in CHANGEABLE}
  if changed := _differences(fixed(read_config(workdir)), fixed(_kept(config))):
    raise ConfigError(
        f'workdir {workdir} belongs to another config; it differs in\n  '
        + '\n  '.join(changed)
        + '\nChoose another with --config.workdir=..., or delete this one.'
    )


def write_config(config: ConfigDict, workdir: pathlib.Path):
  """Keeps the config in its workdir, as config.json.

  Raises:
    ConfigError: The workdir cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    fresh = workdir / 'config.tmp'
    fresh.write_text(json.dumps(_kept(config), indent=2, sort_keys=True))
    os.replace(fresh, workdir / 'config.json')
  except OSError as error:
    raise ConfigError(
        f'workdir {workdir} cannot be written ({error.strerror}); choose another with '
        '--config.workdir=...'
    ) from error


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the config.json of a run.

  Raises:
    ConfigError: There is none, or it is no JSON object.
  """
  path = workdir / 'config.json'
  if not path.is_file():
    raise ConfigError(f'{workdir} is not the workdir of a run: it has no config.json.')
  try:
    config = json.loads(path.read_text())
  except ValueError as error:
    raise ConfigError(f'{path} is no JSON: {error}') from error
  if not isinstance(config, dict):
    raise ConfigError(f'{path} must hold a JSON object; it holds a {type(config).__name__}.')
  return config


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
  """Fills in the fields that a config of an earlier version lacks."""
  config = ADDED | dict(config)
  for name, kind in SECTIONS.items():
    config[name] = _defaults(kind) | config.get(name, {})
  stages = config.get('stages', {})
  config['stages'] = {name: _defaults(StageConfig) | entry for name, entry in stages.items()}
  return json.loads(json.dumps({k: v for k, v in config.items() if k not in ELSEWHERE}))


def _defaults(kind: type) -> dict[str, Any]:
  fields = dataclasses.fields(kind)
  return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


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
  return [] if theirs == ours else [f'{where}: {theirs} there, {ours} here']
