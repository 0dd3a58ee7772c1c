# SPDX-License-Identifier: Apache-2.0
"""Several runs side by side: a table of their results, and their training curves in one picture."""

from collections.abc import Mapping, Sequence
import hashlib
import io
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table

from dsa_jax.config import ConfigError
from dsa_jax.json_files import read_object
from dsa_jax.reporting import metrics, plots
from dsa_jax.reporting.report import mean_of_selecting
from dsa_jax.training.workdir import CHANGEABLE, complete, read_config

SCORES = {'dense_before': 'dense', 'dense_baseline': 'dense baseline', 'sparse': 'sparse'}
CURVES = {'lm_loss': 'language-model loss', 'index_kl': 'divergence of the indexer'}
# What a run has kept of what lies outside its config, by the titles of their digests.
KEPT = {'the data': 'data.json', 'the weights it starts from': 'starts.json'}
LONG = 60  # Characters of what runs differ in, beyond which it stands apart.
STYLES = ('-', '--', ':', '-.')  # So that each of several curves is seen where they coincide.
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#404040', '#56B4E9', '#D55E00')


class FinishedRun(NamedTuple):
  """A run as it lies on disk. One that is still training has no results yet."""

  workdir: pathlib.Path
  config: dict[str, Any]  # Its fields by dotted names, less those that change no number.
  results: Mapping[str, Any]
  rows: Sequence[metrics.Row]

  def numbers(self) -> dict[str, float]:
    """Returns the numbers of the table, by the titles of its columns."""
    results = self.results
    unit, bits = plots.unit(results), results.get('validation_bits', {})
    numbers = {f'{title}, bits/{unit}': bits.get(name) for name, title in SCORES.items()}
    for name, title in SCORES.items():
      numbers[f'{title}, accuracy'] = results.get('accuracy', {}).get(name)
    windows = results.get('window_layers', ())
    numbers['captured mass'] = mean_of_selecting(results.get('captured_mass', ()), windows)
    if tokens := results.get('tokens_by_stage'):
      numbers['tokens'] = sum(tokens.values())
    numbers['seconds'] = results.get('seconds')
    return {title: float(value) for title, value in numbers.items() if plots.is_number(value)}


class Group(NamedTuple):
  """Runs that differ in their seeds alone."""

  name: str
  differs: str  # The fields in which its config differs from others that are compared.
  runs: list[FinishedRun]

  def cells(self, titles: Sequence[str]) -> list[str]:
    """Returns the mean of each number, of several runs its standard deviation, and how many have it."""
    numbers = [run.numbers() for run in self.runs]
    return [_cell(title, [n[title] for n in numbers if title in n], len(numbers)) for title in titles]


def read_run(workdir: pathlib.Path) -> FinishedRun:
  """Reads what a run has left behind so far.

  Raises:
    ConfigError: The folder is no workdir, or its report is no JSON.
  """
  record = read_config(workdir)
  if 'source' in record:
    raise ConfigError(f'{workdir} is not the workdir of a run: it is a converted checkpoint.')
  whole = complete(record)
  config = {name: v for name, v in whole.items() if name not in CHANGEABLE}
  report, csv = workdir / 'report.json', workdir / 'metrics.csv'
  results = read_object(report)
  if 'validation_bits_per_byte' in results:
    raise ConfigError(f'{report} is of an earlier version: delete it, and train again to renew it.')
  scored = results.get('report') or whole['report']  # Other rows, lengths or entries have other numbers.
  config['report'] = {name: scored.get(name, '') for name in ('seq_len', *SCORES)}
  config['report']['rows'] = scored['batch_size'] * scored['batches']
  for title, name in KEPT.items():
    if (workdir / name).is_file():
      config[title] = _digest(read_object(workdir / name))
  rows = metrics.read_metrics(csv) if csv.is_file() else []
  return FinishedRun(workdir, dict(_flat(config)), results, rows)


def group_runs(runs: Sequence[FinishedRun]) -> list[Group]:
  """Puts runs together that differ in `seed` alone, in the order of their first ones."""
  by_config: dict[str, list[FinishedRun]] = {}
  for run in runs:
    config = {name: value for name, value in run.config.items() if name != 'seed'}
    by_config.setdefault(json.dumps(config, sort_keys=True), []).append(run)
  differing = _differing([members[0].config for members in by_config.values()])
  names = _names([run.workdir for run in runs])
  groups = []
  for members in by_config.values():
    config = members[0].config
    differs = ', '.join(f'{field}={config.get(field, "absent")}' for field in differing)
    groups.append(Group(', '.join(names[run.workdir] for run in members), differs, members))
  return groups


def compare_table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
  """Returns a row for each group; columns that no run has a number for are left out."""
  titles = list(dict.fromkeys(t for group in groups for run in group.runs for t in run.numbers()))
  header = ['run', *(['differs in'] if any(group.differs for group in groups) else []), *titles]
  rows = []
  for group in groups:
    differs = [group.differs] if 'differs in' in header else []
    rows.append([group.name, *differs, *group.cells(titles)])
  return header, rows


def print_table(groups: Sequence[Group], console: rich.console.Console | None = None):
  """Prints a table; what runs differ in comes below it where it is long."""
  header, rows = compare_table(groups)
  below = []
  if 'differs in' in header and max(len(row[1]) for row in rows) > LONG:
    header, below = [header[0], *header[2:]], [f'{name}: {differs}' for name, differs, *_ in rows]
    rows = [[row[0], *row[2:]] for row in rows]
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for i, column in enumerate(header):
    left = i == 0 or column == 'differs in'
    table.add_column(column, justify='left' if left else 'right', overflow='fold')
  for row in rows:
    table.add_row(*row)
  console = console or rich.console.Console()
  console.print(table, markup=False)
  if below:
    console.print('They differ in', *below, sep='\n', markup=False, highlight=False)
  if any(len(group.runs) > 1 for group in groups):
    console.print('Mean ± standard deviation of runs that differ in their seed alone.', markup=False)
  for names in filter(None, map(equal_runs, groups)):
    console.print(f'{names} have the same numbers: their seeds decided nothing.', markup=False)


def equal_runs(group: Group) -> str:
  """Returns the names of runs of a group whose results are equal to the last bit; '' if there are none.

  A seed decides weights that are drawn. Where a run starts from a checkpoint, the rows are by `data_seed`.
  """
  by_numbers: dict[str, list[str]] = {}
  for run in group.runs:
    numbers = {title: x for title, x in run.numbers().items() if title not in ('tokens', 'seconds')}
    if numbers:
      by_numbers.setdefault(json.dumps(numbers), []).append(run.workdir.name)
  return ', '.join(name for names in by_numbers.values() if len(names) > 1 for name in names)


def draw_curves(groups: Sequence[Group], path: pathlib.Path):
  """Draws each group in a colour of its own: a panel for each entry and each kind of curve.

  Raises:
    ConfigError: No run has any curve.
  """
  import matplotlib  # Here, because it is slow to import.
  from matplotlib import figure as mpl_figure

  curves = {run.workdir: plots.Curves(run.rows) for group in groups for run in group.runs}
  entries = dict.fromkeys(stage for c in curves.values() for stage in c.last_step)
  panels = [(name, entry) for name in CURVES for entry in entries
            if any(curve(c, entry, name)[0].size for c in curves.values())]  # fmt: skip
  if not panels:
    raise ConfigError('none of the runs has a row in its metrics.csv: there is no curve to draw.')
  with matplotlib.rc_context(plots.RC):
    columns = min(len(panels), 4)
    n_rows = -(-len(panels) // columns)
    height = 3.2 * n_rows + 0.3 + 0.22 * len(groups)  # With a line of the legend for each group.
    figure = mpl_figure.Figure(figsize=(4 * columns, height), dpi=150, layout='constrained')
    for i, (name, entry) in enumerate(panels):
      axes = figure.add_subplot(n_rows, columns, i + 1, title=f'{entry}: {CURVES[name]}', xlabel='step')
      for k, group in enumerate(groups):
        for run in group.runs:
          style = {'ls': STYLES[k % len(STYLES)], 'alpha': 0.7 if len(group.runs) > 1 else 1}
          x, y = curve(curves[run.workdir], entry, name)
          axes.plot(x, y, color=COLOURS[k % len(COLOURS)], label=label(group), **style)
    plots.legend_below(figure, 1)
    png = io.BytesIO()
    figure.savefig(png, format='png')
  plots.replace_bytes(path, png.getvalue())


def label(group: Group) -> str:
  """Returns the names of a group's runs and, if it is short, what they differ in."""
  return f'{group.name}: {group.differs}' if 0 < len(group.differs) <= LONG else group.name


def curve(curves: plots.Curves, entry: str, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns a smoothed curve of an entry, the mean over layers of what each layer has."""
  layers = curves.layers(name)
  parts = [curves.of(entry, f'{name}/layer_{i}' if layers else name) for i in layers or [0]]
  if not parts[0][0].size:
    return parts[0]
  return parts[0][0], plots.smooth(np.mean([y for _, y in parts], axis=0))


def _cell(title: str, values: Sequence[float], runs: int) -> str:
  if not values:
    return 'n/a'
  form = '{:,.0f}' if title in ('tokens', 'seconds') else '{:.4f}'
  text = form.format(np.mean(values))
  if len(values) > 1 and title != 'tokens':
    text += f' ± {form.format(np.std(values, ddof=1))}'
  return text if len(values) == runs else f'{text} ({len(values)} of {runs})'


def _names(folders: Sequence[pathlib.Path]) -> dict[pathlib.Path, str]:
  """Returns the name of each folder or, where two have the same, the paths."""
  unique = len({folder.name for folder in folders}) == len(folders)
  return {folder: folder.name if unique else str(folder) for folder in folders}


def _digest(kept: Mapping[str, Any]) -> str:
  """Returns a digest of what is kept of each file or folder, wherever it lies."""
  what = [x[-1] if isinstance(x, list) else x for x in kept.values()]  # Of a start, its weights, not its path.
  return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]


def _flat(tree: Mapping[str, Any], where: str = ''):
  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f'{where}{name}.')
    else:
      yield where + name, value


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns the fields, but the seed, that not all configs have with the same value."""
  fields = dict.fromkeys(field for config in configs for field in config if field != 'seed')
  values = lambda field: {json.dumps(config.get(field, 'absent')) for config in configs}
  return [field for field in fields if len(values(field)) > 1]
