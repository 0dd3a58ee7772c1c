# SPDX-License-Identifier: Apache-2.0
"""Writes tables and plots of what bench.py measured."""

import pathlib

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import programs

RATIOS = [  # Title, what is slow, what is fast.
    ('dense / (selection + sparse), forward', 'dense_attention', 'sparse_forward'),
    ('dense / sparse stage, forward + backward', 'dense_attention_grad', 'sparse_stage_grad'),
    ('lax.top_k form / index_topk', 'naive_topk', 'index_topk'),
]
PLOTTED = {
    'forward': ('dense_attention', 'sparse_forward', 'naive_topk', 'index_topk'),
    'forward and backward': ('dense_attention_grad', 'sparse_stage_grad', 'sparse_attention_grad'),
}


def write(results: dict, folder: pathlib.Path):
  (folder / 'table.md').write_text('\n'.join(tables(results)) + '\n')
  plot(results, folder / 'plot.png')


def tables(results: dict):
  machine, seconds = results['machine'], results.get('seconds', {})
  yield '{processor}, Python {python}, jax {jax}, {date}.'.format(**machine)
  yield '2048 x 2048 matmul {:.0f} GFLOP/s, copy {:.0f} GB/s.'.format(
      machine['matmul_flops'] / 1e9, machine['copy_bytes'] / 1e9
  )
  yield '\n## Seconds, the fastest run (the median run)\n'
  yield from grid(seconds, lambda x: f'{min(x):.3f} ({sorted(x)[len(x) // 2]:.3f})')
  shared = results.get('shared', {})
  yield '\n## The same, query rows shared by two CPU devices\n'
  yield from grid(shared, lambda x: f'{min(x):.3f} ({sorted(x)[len(x) // 2]:.3f})')
  yield '\n## How many times faster, fastest run against fastest run, each in its faster form\n'
  ratios = {
      title: quotient(fastest(seconds, shared, slow), fastest(seconds, shared, fast))
      for title, slow, fast in RATIOS
  }
  yield from grid(ratios, lambda x: f'{x:.1f}')
  yield '\n## GFLOP/s reached, by the work that the mathematics asks for\n'
  yield from grid(rates(seconds, programs.flops), lambda x: f'{x:.0f}')
  yield '\n## GB/s reached, by the dots and scores that scoring writes and reads\n'
  yield from grid(rates(seconds, programs.scoring_bytes), lambda x: f'{x:.1f}')
  yield '\n## Temporary memory by the compiler, MiB\n'
  yield from grid(results.get('memory', {}), lambda x: f'{x / 2**20:.0f}')
  if 'transformers' in results:
    yield '\n## One attention layer, forward: transformers deepseek_v32 and ours\n'
    yield from grid(results['transformers'], lambda x: x)


def rates(seconds, amount) -> dict:
  """Returns billions of what `amount` counts, per second of each program's fastest run."""
  return {
      name: {n: amount(name, int(n)) / min(x) / 1e9 for n, x in row.items()}
      for name, row in seconds.items()
      if amount(name, 1)
  }


def fastest(seconds, shared, name) -> dict[str, float]:
  """Returns, by size, the fastest run of either form."""
  rows = seconds.get(name, {}), shared.get(name, {})
  return {n: min(sum((row.get(n, []) for row in rows), [])) for n in rows[0] | rows[1]}


def quotient(slow, fast):
  return {n: slow[n] / fast[n] for n in slow if n in fast}


def grid(rows: dict, show):
  sizes = sorted({n for row in rows.values() for n in row}, key=int)
  yield '| | ' + ' | '.join(f'{int(n) // 1024}K' for n in sizes) + ' |'
  yield '| --- |' + ' ---: |' * len(sizes)
  for name, row in rows.items():
    yield f'| {name} | ' + ' | '.join(show(row[n]) if n in row else '' for n in sizes) + ' |'


def plot(results: dict, path: pathlib.Path):
  figure, axes = plt.subplots(1, 3, figsize=(15, 4.5))
  for axis, (title, names) in zip(axes, PLOTTED.items()):
    for name in names:
      row = results.get('seconds', {}).get(name, {})
      axis.plot([int(n) for n in row], [min(x) for x in row.values()], 'o-', label=name)
    axis.set(title=title, xlabel='context', ylabel='seconds')
  for name, row in results.get('memory', {}).items():
    if name in sum(PLOTTED.values(), ()):
      axes[2].plot([int(n) for n in row], [x / 2**20 for x in row.values()], 'o-', label=name)
  axes[2].set(title='temporary memory', xlabel='context', ylabel='MiB')
  for axis in (x for x in axes if x.lines):
    axis.set(xscale='log', yscale='log')
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
  figure.tight_layout()
  figure.savefig(path, dpi=80)
