# SPDX-License-Identifier: Apache-2.0
"""Compares runs: python -m dsa_jax.compare runs/a runs/b

Prints a table of their results, and draws their training curves into --png. Runs that differ in
their `seed` alone are one row, with mean and spread.
"""

from collections.abc import Sequence
import pathlib
import sys

from absl import app, flags

from dsa_jax.config import ConfigError, local_path
from dsa_jax.reporting.compare import draw_curves, group_runs, print_table, read_run


def compare(workdirs: Sequence[str | pathlib.Path], png: str | pathlib.Path = ''):
  """Prints the table of several runs and, if `png` names a file, draws their curves.

  Raises:
    ConfigError: A folder is no workdir or is named twice, or the picture cannot be drawn.
  """
  folders = [local_path(workdir, 'workdir') for workdir in workdirs]
  path = local_path(png, '--png') if png else None
  if not folders:
    raise ConfigError('name the workdirs to compare: python -m dsa_jax.compare runs/a runs/b')
  if len({folder.resolve() for folder in folders}) < len(folders):
    raise ConfigError(f'{[str(folder) for folder in folders]} names a run twice.')
  groups = group_runs([read_run(folder) for folder in folders])
  print_table(groups)
  if path:
    draw_curves(groups, path)


def main(argv: list[str]):
  try:
    compare(argv[1:], PNG.value)
  except (ConfigError, OSError) as error:
    sys.exit(f'error: {error}')
  if PNG.value:
    print(f'curves: {PNG.value}')


if __name__ == '__main__':
  PNG = flags.DEFINE_string('png', 'compare.png', "Where the curves are drawn; '': nowhere.")
  app.run(main)
