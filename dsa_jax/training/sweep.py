# SPDX-License-Identifier: Apache-2.0
"""Several runs by one config: `config.sweep` lists what differs, and one process trains them all."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dsa_jax.config import ConfigError
from dsa_jax.training.workdir import UNUSABLE

DRAW_NOTHING = ('indexer', 'window_sinks', 'oracle')  # Rules; one of a user's own might.


def sweep_configs(config: ConfigDict) -> list[ConfigDict]:
  """Returns the config of each run, in a folder of the workdir that is named for what differs.

  A config without a sweep is its only run. Runs that differ in their seeds, rates or data share
  their compiled programs.

  Raises:
    ConfigError: A field that is to differ does not exist, or two runs are the same, by their fields or
      because nothing of them depends on the seeds in which they differ.
  """
  if not config.get('sweep'):
    return [config]
  configs, names = {}, [_name(changes, whole=False) for changes in config.sweep]
  if len(set(names)) < len(names):  # Of two stages, say.
    names = [_name(changes, whole=True) for changes in config.sweep]
  for changes, name in zip(config.sweep, names):
    one = config.copy_and_resolve_references().lock()  # Fields that do not exist raise.
    try:
      one.update_from_flattened_dict(dict(changes))
    except (KeyError, TypeError, ValueError) as error:
      raise ConfigError(f'sweep: {dict(changes)} cannot be set: {error}') from error
    folder = ''.join('_' if c in UNUSABLE or c == '/' else c for c in name)
    one.sweep, one.workdir = (), f'{config.workdir}/{folder}'
    if not name or one.workdir in configs:
      raise ConfigError(f'sweep: {dict(changes)} must name what is different from the other runs.')
    configs[one.workdir] = one
  _check_seeds(config, list(configs.values()))
  return list(configs.values())


def _check_seeds(config: ConfigDict, runs: Sequence[ConfigDict]):
  rests = [{field: x for field, x in changes.items() if field != 'seed'} for changes in config.sweep]
  for i, run in enumerate(runs):
    entries = [run.stages[name] for name in run.recipe]
    if rests[i] in rests[:i] and run.selection in DRAW_NOTHING and all(x.init_from for x in entries):
      raise ConfigError(
          f'sweep: {dict(config.sweep[i])} must differ in more than its seed. Every entry starts from a checkpoint, so '
          'nothing is drawn: rows are drawn by stages.*.data_seed, and new indexers by `python -m '
          'dsa_jax.convert --seed`.'
      )


def _name(changes: Mapping[str, Any], *, whole: bool) -> str:
  """Returns what differs in a run, by the whole names of its fields or by their last parts."""
  last = lambda field: field if whole else field.rpartition('.')[2]
  return ','.join(f'{last(field)}={value}' for field, value in changes.items())
