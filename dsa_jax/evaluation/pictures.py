# SPDX-License-Identifier: Apache-2.0
"""The pictures of an evaluation."""

from collections.abc import Mapping
import io
import math
import pathlib
from typing import Any

import numpy as np

from dsa_jax.reporting import plots

BITS, SELECTION = 'bits.png', 'selection.png'
DENSE = plots.MODELS['dense_baseline']


def draw(folder: pathlib.Path, results: Mapping[str, Any]) -> list[str]:
  """Draws bits by context, and what each rule selects by layer; returns the names of the files."""
  import matplotlib  # Here, because it is slow to import.
  from matplotlib import figure as mpl_figure

  with matplotlib.rc_context(plots.RC):
    for name, draw_one in {BITS: _bits, SELECTION: _selection}.items():
      figure, png = mpl_figure.Figure(dpi=150, layout='constrained'), io.BytesIO()
      draw_one(figure, results)
      figure.savefig(png, format='png')
      plots.replace_bytes(folder / name, png.getvalue())
  return [BITS, SELECTION]


def _style(results: Mapping[str, Any], name: str) -> dict[str, Any]:
  """Returns the line of an arm: the colour says the rule and the dashes the budget."""
  arm, budgets = results['arms'][name], list(results['measures'])
  if not arm['rule']:
    return {'color': DENSE.colour, 'label': 'dense', 'zorder': 4, 'ls': (0, (4, 3))}
  look = plots.look(plots.RULES.get(arm['rule'], arm['rule']))
  dashes = ('-', '--', ':', '-.')[budgets.index(str(arm['index_topk'])) % 4]
  label = plots.rule_label(arm['rule']) + (f', {arm["index_topk"]}' if len(budgets) > 1 else '')
  return {'color': look.colour, 'marker': look.marker, 'ms': 4, 'label': label, 'ls': dashes}


def _bits(figure: Any, results: Mapping[str, Any]):
  """Draws bits by what a query sees, and what each arm adds to dense attention."""
  length = results['bytes_per_target']
  edges = np.array(results['visible_edges'], float)
  centres = np.sqrt(edges[:-1] * edges[1:])
  bits = {n: np.array(x, float) / (length or 1) for n, x in results['bits_by_visible'].items()}
  unit = 'byte' if length else results['unit']
  excess = {n: 100 * (x / bits['dense'] - 1) for n, x in bits.items() if n != 'dense'}
  figure.set_size_inches(11, 4.4)
  panels = {f'Bits per {unit}': bits, 'Difference from dense attention (%)': excess}
  for column, (title, lines) in enumerate(panels.items(), start=1):
    axes = figure.add_subplot(1, 2, column)
    for name, values in lines.items():
      axes.plot(centres, values, **_style(results, name))
    for k in results['measures']:
      axes.axvline(int(k), color='#888888', lw=1, ls='--')
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:.0f}')
    axes.set(title=title, xlabel='tokens that the query sees (dashed: the budget)')
  plots.legend_below(figure, 5)


def _selection(figure: Any, results: Mapping[str, Any]):
  """Draws the measures by layer, for queries that have to leave something out."""
  panels = {name: title for name, title in plots.SELECTION_PANELS.items() if name != 'index_kl'}
  rows = math.ceil(len(panels) / 3)
  figure.set_size_inches(12, 2.8 * rows + 0.5)
  for i, (measure, title) in enumerate(panels.items(), start=1):
    axes = figure.add_subplot(rows, 3, i)
    for k, measured in results['measures'].items():
      for rule, means in (measured['beyond'] or measured['everywhere']).items():
        if f'{rule}@{k}' in results['arms']:
          layers = [i for i, x in enumerate(means[measure]) if plots.is_number(x)]
          values = [means[measure][i] for i in layers]
          axes.plot(layers, values, **_style(results, f'{rule}@{k}'))
    axes.set(title=title, xlabel='layer')
    axes.xaxis.get_major_locator().set_params(integer=True)
  plots.legend_below(figure, 4)
