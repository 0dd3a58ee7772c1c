# SPDX-License-Identifier: Apache-2.0
"""Writes the table and the plot of `run.py`."""

import pathlib

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

# The name, the programs of the dense side, and those of the sparse side.
RATIOS = (
    ('forward', ('dense',), ('sparse',)),
    ('forward with selection', ('dense',), ('sparse', 'select')),
    ('forward and backward', ('dense_grad',), ('sparse_grad',)),
    ('forward and backward, KL on both sides', ('dense_grad', 'dense_kl_grad'), ('sparse_grad', 'sparse_kl_grad')),
    ('the same, with selection', ('dense_grad', 'dense_kl_grad'), ('sparse_grad', 'sparse_kl_grad', 'select')),
    ('forward and backward, KL and selection on the sparse side', ('dense_grad',), ('sparse_grad', 'sparse_kl_grad', 'select')),
)  # fmt: skip


def write(results: dict, folder: pathlib.Path):
  lines = ['| program | ' + ' | '.join(f'{n} tokens' for n in results['seconds']) + ' |']
  lines.append('| --- |' + ' ---: |' * len(results['seconds']))
  names = {name: None for runs in results['seconds'].values() for name in runs}
  for name in names:
    cells = [_cell(runs.get(name)) for runs in results['seconds'].values()]
    lines.append(f'| {name}, us a query (of a core) | ' + ' | '.join(cells) + ' |')
  for name, above, below in RATIOS:
    cells = [_ratio(runs, above, below) for runs in results['seconds'].values()]
    lines.append(f'| {name}: dense / sparse | ' + ' | '.join(cells) + ' |')
  if 'temporaries' in results:
    sizes = list(next(iter(results['temporaries'].values())))
    lines += ['', '| temporaries, MiB | ' + ' | '.join(sizes) + ' |', '| --- |' + ' ---: |' * len(sizes)]
    for name, by_size in results['temporaries'].items():
      cells = [f'{by_size[n] / 2**20:.0f}' for n in sizes]
      lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  (folder / 'table.md').write_text('\n'.join(lines) + '\n')
  _plot(results, folder / 'plot.png')


def us_of_query(runs: dict, name: str, which: int = 1) -> float:
  """Returns the least microseconds a query took: of wall time (0) or of a core (1)."""
  return 1e6 * min(run[which] for run in runs[name]['runs']) / runs[name]['rows']


def _cell(of_program) -> str:
  if of_program is None:
    return ''
  wall, core = (us_of_query({'x': of_program}, 'x', i) for i in range(2))
  return f'{wall:.0f} ({core:.0f})'


def _ratio(runs, above, below) -> str:
  if not set(above + below) <= set(runs):
    return ''
  return f'{sum(us_of_query(runs, x) for x in above) / sum(us_of_query(runs, x) for x in below):.1f}'


def _plot(results: dict, path: pathlib.Path):
  figure, axes = plt.subplots(figsize=(8, 3.6), layout='constrained')
  sizes = [n for n, runs in results['seconds'].items() if 'dense_grad' in runs]
  names = [name for name, *_ in RATIOS]
  for i, n in enumerate(sizes):
    values = [float(_ratio(results['seconds'][n], *sides) or 'nan') for _, *sides in RATIOS]
    places = [j + 0.35 * i for j in range(len(names))]
    axes.barh(places, values, height=0.33, label=f'{int(n) // 1024}K tokens')
  axes.set_yticks([j + 0.175 for j in range(len(names))], names)
  axes.invert_yaxis()
  axes.axvline(1, color='#888888', lw=1)
  axes.set_xlabel('time of dense / time of sparse, processor seconds')
  axes.legend(frameon=False)
  figure.savefig(path, dpi=110)
  plt.close(figure)
