# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report."""

from collections.abc import Iterable, Mapping, Sequence
import functools
import io
import itertools
import logging
import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from dsa_jax.reporting import metrics


class Look(NamedTuple):
  """The name and the drawing style of a model or of a selection rule."""

  label: str
  colour: str
  marker: str


MODELS = {
    'dense_before': Look('dense', '#999999', 'd'),
    'dense_baseline': Look('dense, fair baseline', '#404040', 's'),
    'sparse': Look('sparse, indexer', '#0072B2', 'o'),
    'oracle': Look('sparse, oracle', '#009E73', '^'),
    'window_sinks': Look('sparse, window + sinks', '#E69F00', 'v'),
    'random': Look('sparse, random', '#CC79A7', 'x'),
}
# The model in MODELS whose look a selection rule shares.
RULES = {
    'indexer': 'sparse', 'oracle': 'oracle', 'window_sinks': 'window_sinks', 'random': 'random'
}
# The usual names of entries. A label adds the name of an entry that is called otherwise.
USUAL = {'dense_before': 'dense', 'dense_baseline': 'baseline', 'sparse': 'sparse'}
STAGE_COLOURS = {'dense': '#404040', 'warmup': '#009E73', 'sparse': '#0072B2'}
OTHER_COLOURS = ('#E69F00', '#CC79A7', '#56B4E9', '#D55E00', '#F0E442')  # Of further entries.
_COLOURS, _MARKS = itertools.cycle(OTHER_COLOURS), itertools.cycle('.vDP*X')  # Of models not known here.
# The baseline lies on top, dashed, so that both show where another curve coincides with it.
BASELINE = {'linestyle': (0, (4, 3)), 'zorder': 4}
SELECTION_PANELS = {
    'index_kl': 'Divergence of the indexer (KL, nats)',
    'captured_mass': 'Share of the true attention captured',
    'topk_recall': 'Recall of the true top-K',
    'neighbour_overlap': 'Overlap with the previous query',
    'layer_overlap': 'Overlap with the next layer',
    'selected_distance': 'Mean distance (tokens)',
}
RC = {
    'figure.constrained_layout.h_pad': 0.08, 'figure.constrained_layout.w_pad': 0.08,
    'font.size': 10, 'text.parse_math': False, 'axes.titlesize': 10.5, 'axes.titlelocation': 'left',
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.edgecolor': '#888888',
    'axes.grid': True, 'axes.axisbelow': True, 'grid.color': '#e6e6e6', 'grid.linewidth': 0.7,
    'lines.linewidth': 1.6, 'legend.frameon': False, 'xtick.color': '#444444',
    'ytick.color': '#444444', 'xtick.labelcolor': '#222222', 'ytick.labelcolor': '#222222',
}


class Curves:
  """The rows of metrics.csv, grouped for drawing."""

  def __init__(self, rows: Sequence[metrics.Row]):
    self.last_step: dict[str, int] = {}
    self._by_name: dict[str, list[metrics.Row]] = {}
    for row in rows:
      self.last_step[row.stage] = max(row.step, self.last_step.get(row.stage, 1))
      self._by_name.setdefault(row.name, []).append(row)

  def of(self, stage: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    return metrics.series(self._by_name.get(name, []), stage, name)

  @property
  def n_layers(self) -> int:
    layers = [int(n.rpartition('_')[2]) for n in self._by_name if '/layer_' in n]
    return 1 + max(layers, default=0)

  def layers(self, name: str) -> list[int]:
    prefix = f'{name}/layer_'
    return sorted(int(n.removeprefix(prefix)) for n in self._by_name if n.startswith(prefix))



class Lineage(NamedTuple):
  """The entries of a recipe in their order, and which of them each one starts from."""

  stages: Mapping[str, Mapping[str, Any]]  # Their `stage`, `init_from` and `trains`, by entry.
  roles: Mapping[str, str]  # The entries that the report compares.

  @classmethod
  def of(cls, results: Mapping[str, Any]) -> 'Lineage':
    return cls(results.get('stages') or {}, results.get('roles') or {})

  def starts(self, length: Mapping[str, float | int]) -> dict[str, float | int]:
    """Returns where each entry begins, if it follows the entry that it starts from."""
    starts: dict[str, float | int] = {}
    for name in length:
      parent = self.stages.get(name, {}).get('init_from', '')
      starts[name] = starts[parent] + length[parent] if parent in starts else 0
    return starts

  def trains_indexer(self, name: str) -> bool:
    return self.stages.get(name, {}).get('stage') in ('warmup', 'sparse')

  def trains_backbone(self, name: str) -> bool:
    entry = self.stages.get(name, {})
    return 'backbone' in entry.get('trains', ()) or ('trains' not in entry and entry.get('stage') != 'warmup')

  def chain(self, name: str) -> list[str]:
    """Returns an entry and those it descends from, the oldest first."""
    names = []
    while name in self.stages and name not in names:
      names.insert(0, name)
      name = self.stages[name].get('init_from', '')
    return names


def smooth(values: np.ndarray, windows: int = 20) -> np.ndarray:
  window = np.ones(max(1, values.size // windows))
  return np.convolve(values, window, 'same') / np.convolve(values * 0 + 1, window, 'same')


def draw(workdir: pathlib.Path, results: Mapping[str, Any], curves: Curves) -> list[str]:
  """Draws what there is data for and returns the names of these files.

  A picture that cannot be drawn is logged, and costs nobody the numbers.
  """
  import matplotlib  # Here, because it is slow to import.
  from matplotlib import figure as mpl_figure

  drawn = []
  figures = {'overview.png': _overview, 'training.png': _training, 'selection.png': _selection}
  layer_colours = matplotlib.colormaps['viridis'](np.linspace(0, 0.88, curves.n_layers))
  cycle = matplotlib.cycler(color=layer_colours)
  with matplotlib.rc_context(RC | {'axes.prop_cycle': cycle}):
    for name, draw in figures.items():
      (workdir / name).unlink(missing_ok=True)
      figure, png = mpl_figure.Figure(dpi=150, layout='constrained'), io.BytesIO()
      try:
        draw(figure, results, curves)
        if figure.get_axes():
          figure.savefig(png, format='png')
      except Exception:  # Whatever matplotlib raises.
        logging.exception(f'{name} could not be drawn.')
        continue
      if png.getvalue():
        replace_bytes(workdir / name, png.getvalue())
        drawn.append(name)
  return drawn


def _overview(figure: Any, results: Mapping[str, Any], curves: Curves) -> None:
  by_position, mass = results.get('bits_by_position') or {}, captured_mass(results)
  n_left = bool(by_position) + bool(mass)
  widths = [n_left] * bool(n_left) + [1] * bool(curves.layers('index_kl'))
  if not widths:
    return
  figure.set_size_inches(4.5 * sum(widths), 4.8)
  parts = figure.subfigures(1, len(widths), width_ratios=widths, wspace=0.04, squeeze=False)[0]
  if n_left:
    columns = iter(parts[0].add_gridspec(1, n_left, wspace=0.1))
    if by_position:
      _draw_positions(parts[0], next(columns), results, by_position)
    if mass:
      _draw_mass(parts[0].add_subplot(next(columns)), mass)
    legend_below(parts[0], 3)
  if curves.layers('index_kl'):
    axes = parts[-1].add_subplot()
    _draw_layers(axes, results, curves, 'index_kl')
    axes.set_xlabel('training step')
    legend_below(parts[-1], 3)


def _draw_positions(part: Any, cell: Any, results: Mapping[str, Any], by_position: Any) -> None:
  edges = np.maximum(np.array(results['position_edges'], float), 1)
  centres = np.sqrt(edges[:-1] * edges[1:])
  bits = {name: np.array(by_position[name], float) for name in ordered([by_position], MODELS)}
  if 'dense_baseline' in bits:
    bits.pop('dense_before', None)
  panels = {f'Bits per {unit(results)}, by position': bits}
  if 'dense_baseline' in bits and not results.get('accuracy'):
    excess = {name: 100 * (values / bits['dense_baseline'] - 1) for name, values in bits.items()}
    panels[f'Difference to the {"fair " * is_fair(results)}baseline (%)'] = excess
  grid = cell.subgridspec(len(panels), 1)
  for row, (title, lines) in enumerate(panels.items()):
    axes = part.add_subplot(grid[row])
    for name, values in lines.items():
      _, colour, marker = look(name)
      style = BASELINE if name == 'dense_baseline' else {}
      axes.plot(
          centres, values, color=colour, marker=marker, ms=4, label=label(name, results), **style
      )
    axes.axvline(results['index_topk'], color='#888888', lw=1, ls='--')
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:.0f}' if row == len(panels) - 1 else '')
    axes.set_title(title)
  axes.set_xlabel(f'position in the context (dashed: budget of {results["index_topk"]} tokens)')
  if len(panels) == 2:
    others = np.concatenate([v for name, v in excess.items() if name != 'random'])
    low, high = np.nanmin(others), np.nanmax(others)
    if high > low:
      axes.set_ylim(low - 0.15 * (high - low), high + 0.3 * (high - low))


def _draw_mass(axes: Any, mass: Mapping[str, Sequence[float | None]]) -> None:
  rules = ordered([mass], RULES)
  width = 0.8 / len(rules)
  for i, rule in enumerate(rules):
    at = np.arange(len(mass[rule])) + (i - (len(rules) - 1) / 2) * width
    shown, colour, _ = look(RULES.get(rule, rule))
    axes.bar(at, np.array(mass[rule], float), 0.9 * width, color=colour, label=shown)
  axes.set(ylim=(0, 1), xlabel='layer', title='Share of the true attention captured')
  axes.grid(visible=False, axis='x')
  axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_layers(axes: Any, results: Mapping[str, Any], curves: Curves, name: str) -> None:
  """Draws one line per layer, along the entries that train the indexer.

  Lines are dashed for entries from which the compared sparse one does not descend.
  """
  lineage = Lineage.of(results)
  has_curve = lambda s: any(curves.of(s, f'{name}/layer_{layer}')[0].size for layer in curves.layers(name))
  steps = {s: n for s, n in curves.last_step.items() if lineage.trains_indexer(s) and has_curve(s)}
  starts, sparse = lineage.starts(steps), lineage.roles.get('sparse', next(reversed(steps), ''))
  main = [s for s in lineage.chain(sparse) if s in starts]
  for layer in curves.layers(name):
    drawn = lambda s: (starts[s] + (xy := curves.of(s, f'{name}/layer_{layer}'))[0], smooth(xy[1]))
    parts = [drawn(s) for s in main]
    # A NaN between two entries breaks the line there.
    x, y = (np.concatenate([np.append(part[i], np.nan) for part in parts] or [[]]) for i in (0, 1))
    [line] = axes.plot(x, y, label=f'layer {layer}')
    for s in starts.keys() - set(main):
      axes.plot(*drawn(s), color=line.get_color(), ls='--', lw=1, label='_' + s)
  if starts.get(lineage.roles.get('sparse')):
    label = f'{sparse} stage starts'
    axes.axvline(starts[sparse], color='#888888', lw=1, ls='--', label=label)
  axes.set_title(SELECTION_PANELS[name])
  if name == 'index_kl':
    axes.set_yscale('log')
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter('')


def legend_below(figure: Any, columns: int) -> None:
  """Draws one legend for all axes, with some of the layers if there are many."""
  by_label = {}
  for axes in figure.axes:
    for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
      by_label.setdefault(text, handle)
  layers = [text for text in by_label if text.startswith('layer ')]
  shown = {layers[round(i)] for i in np.linspace(0, len(layers) - 1, min(len(layers), 9))}
  labels = [text for text in by_label if text in shown or text not in layers]
  handles = [by_label[text] for text in labels]
  figure.legend(handles, labels, loc='outside lower center', ncols=columns)


def _training(figure: Any, results: Mapping[str, Any], curves: Curves) -> None:
  stages = [stage for stage in curves.last_step if curves.of(stage, 'lm_loss')[0].size]
  if not stages:
    return
  tokens, lineage = results.get('tokens_by_stage') or {}, Lineage.of(results)
  known = all(stage in tokens for stage in stages)
  length = {s: tokens[s] if known else curves.last_step[s] for s in stages}
  starts = lineage.starts(tokens if known else length)  # Of entries too short for a row of losses, too.
  if {'dense_baseline', 'sparse'} <= lineage.roles.keys():  # Both go on from one dense model.
    starts[lineage.roles['dense_baseline']] = starts.get(lineage.roles['sparse'], 0)
  colours = stage_colours(lineage, stages)
  panels = {'Language-model loss (nats per token)': stages}
  if len(stages) > 1:
    panels['The same, after the first stage'] = stages[1:]
  figure.set_size_inches(5.5 * len(panels), 4)
  for title, shown in panels.items():
    axes = figure.add_subplot(1, len(panels), len(figure.axes) + 1)
    for stage in shown:
      colour = colours[stage]
      steps, loss = curves.of(stage, 'lm_loss')
      scale = length[stage] / curves.last_step[stage]
      at = starts[stage] + steps * scale
      axes.plot(at, loss, color=colour, alpha=0.2, lw=0.7)
      style = BASELINE if stage == lineage.roles.get('dense_baseline') else {}
      smoothed = smooth(loss, 20 if shown is stages else 8)
      axes.plot(at, smoothed, color=colour, label=stage, **style)
      steps, held_out = curves.of(stage, 'validation_loss')
      if steps.size:
        axes.plot(starts[stage] + steps * scale, held_out, '.', color=colour, label='_validation')
    axes.set(title=title, xlabel='tokens' if known else 'steps')
    axes.xaxis.set_major_formatter(lambda x, _: si(x))
  legend_below(figure, 4)


def _selection(figure: Any, results: Mapping[str, Any], curves: Curves) -> None:
  names = [name for name in SELECTION_PANELS if curves.layers(name)]
  columns = min(3, len(names))
  figure.set_size_inches(4 * max(columns, 1), 2.6 * -(-len(names) // 3) + 0.6)
  for i, name in enumerate(names):
    axes = figure.add_subplot(-(-len(names) // 3), columns, i + 1)
    _draw_layers(axes, results, curves, name)
    if i >= len(names) - columns:
      axes.set_xlabel('training step')
  if names:
    legend_below(figure, 9)


def stage_colours(lineage: Lineage, names: Sequence[str]) -> dict[str, str]:
  """Returns the colour of each entry: the first of each stage has the stage's own."""
  colours, free = {}, itertools.cycle(OTHER_COLOURS)
  for name in names:
    own = STAGE_COLOURS.get(lineage.stages.get(name, {}).get('stage', ''))
    colours[name] = next(free) if own is None or own in colours.values() else own
  return colours


def look(model: str) -> Look:
  return MODELS.get(model) or _other_look(model)


@functools.cache
def _other_look(model: str) -> Look:
  """Returns a look that no other model has that is not known here, in the order in which they come."""
  return Look(model, next(_COLOURS), next(_MARKS))


def unit(results: Mapping[str, Any]) -> str:
  """Returns what one target is: the data says so, and without its word it is a token."""
  return results.get('unit') or 'token'


def label(model: str, results: Mapping[str, Any]) -> str:
  """Returns the label of a model, with the name of its entry if that is not the usual one."""
  entry = Lineage.of(results).roles.get(model)
  name = f' ({entry})' if entry not in (None, USUAL.get(model)) else ''
  if model == 'sparse':
    return f'sparse, {rule_label(results.get("selection", "indexer"))}{name}'
  if model == 'dense_baseline' and not is_fair(results):
    return f'dense, baseline{name}'
  return look(model).label + name


def is_fair(results: Mapping[str, Any]) -> bool:
  """Returns whether the baseline has learnt from as many tokens as the sparse model since they parted."""
  lineage, tokens = Lineage.of(results), results.get('tokens_by_stage') or {}
  parted = lineage.chain(lineage.roles.get('dense_before', ''))
  learnt = lambda role: sum(
      tokens.get(entry, 0)
      for entry in lineage.chain(lineage.roles.get(role, ''))
      if entry not in parted and lineage.trains_backbone(entry)
  )
  return learnt('dense_baseline') == learnt('sparse')


def rule_label(rule: str) -> str:
  return look(RULES.get(rule, rule)).label.removeprefix('sparse, ')


def ordered(dicts: Iterable[Mapping[str, Any]], known: Iterable[str]) -> list[str]:
  names = dict.fromkeys(itertools.chain.from_iterable(dicts))
  first = [name for name in known if name in names]
  return first + [name for name in names if name not in first]


def captured_mass(results: Mapping[str, Any]) -> Mapping[str, Sequence[float | None]]:
  if results.get('captured_mass_by_rule'):
    return results['captured_mass_by_rule']
  return {'indexer': results['captured_mass']} if results.get('captured_mass') else {}


def is_number(value: Any) -> bool:
  return value is not None and math.isfinite(value)


def si(value: float | int | None) -> str:
  if not is_number(value):
    return 'n/a'
  value = float(f'{value:.3g}')  # 999,700 is 1 M.
  power = min(max(int(math.log10(max(value, 1)) // 3), 0), 4)
  return f'{value / 1000**power:.3g} {["", "k", "M", "G", "T"][power]}'.strip()


def replace_bytes(path: pathlib.Path, data: bytes) -> None:
  temporary = path.with_name(f'.{path.name}.tmp')
  temporary.write_bytes(data)
  os.replace(temporary, path)
