# SPDX-License-Identifier: Apache-2.0
"""An evaluation in words and tables: evaluate.md, evaluate.json, and what is printed."""

from collections.abc import Iterator, Mapping, Sequence
import json
import pathlib
from typing import Any

import numpy as np
import rich.console

from dsa_jax.evaluation import pictures
from dsa_jax.reporting import plots
from dsa_jax.reporting.report import (
    WINDOWS_CAPTION,
    Table,
    finite,
    markdown_table,
    mean_of_selecting,
    number,
    of_layer,
    print_table,
)

NOT_TRAINED = 'The indexer of this checkpoint was never trained: what it selects is chance.'
MAIN_CAPTION = (
    'Lower is better. Bits per byte compare models of any tokenizer: they are nats per token,'
    ' divided by the average length of a token of these documents in bytes. Beyond the budget'
    ' means queries that see more tokens than they may select; the last column compares them'
    ' with the same queries under dense attention. The oracle selects by the true attention,'
    ' which a real model cannot know.'
)
ACTED_CAPTION = (
    'A query leaves something out if it sees more tokens than the budget. Within the budget,'
    ' the mean difference from dense attention in nats must be zero up to rounding; beyond it, a'
    ' difference of zero means that selection never acted. The share by selections is counted'
    ' from what each layer selected, over all queries of the rows.'
)
TEST_CAPTION = (
    'Nats per token where a query sees so many tokens. Just above its budget an indexer leaves'
    ' out a few of many tokens, so sparse attention should lose next to nothing there. A jump'
    ' (more than 1 % and twice the standard error) means a wrong indexer, as after a mistake in'
    ' a port. No jump does not prove it right: look at the captured mass, too. If there are too'
    ' few targets, give more --rows, and a --context above the budget.'
)
MEASURES_CAPTION = (
    'Means over the queries that see more than the budget, if there are any. Captured is the'
    " share of the true attention on the selected tokens, recall the share of the oracle's"
    ' selection, the overlaps are those with the previous query and with the next layer that selects,'
    ' and the distance is in tokens. The model attended {attention} meanwhile.'
)
TASKS_CAPTION = (
    'The share of the answers that an arm gave, as whole words, writing the likeliest token at'
    ' each step. The text is local, the seeds are fixed, and a length counts the prompt and the'
    ' answer. In single, multi_key and question, what is asked for lies at a known depth: 0 % is'
    ' the beginning.'
)
COLUMNS = {
    'captured_mass': ('captured', '{:.3f}'), 'topk_recall': ('recall', '{:.3f}'),
    'neighbour_overlap': ('overlap, query', '{:.3f}'),
    'layer_overlap': ('overlap, layer', '{:.3f}'),
    'selected_distance': ('distance', '{:.1f}'),
}  # fmt: skip


def write_page(
    folder: pathlib.Path, results: Mapping[str, Any], console: rich.console.Console | None = None
):
  """Writes evaluate.md, its pictures and evaluate.json, and prints the tables."""
  drawn = pictures.draw(folder, results)
  plots.replace_bytes(folder / 'evaluate.md', _markdown(results, drawn).encode())
  text = json.dumps(finite(results), indent=2, allow_nan=False) + '\n'
  plots.replace_bytes(folder / 'evaluate.json', text.encode())
  console = console or rich.console.Console()
  for title, table in (
      ('Dense and sparse', main_table(results)),
      *_tests(results),
      *_task_means(results),
  ):
    print_table(console, title, table)
  plain = {'markup': False, 'highlight': False, 'soft_wrap': True}
  for warning in warnings(results):
    console.print(f'WARNING: {warning}', style='bold red', **plain)
  console.print(f'report: {folder / "evaluate.md"}', **plain)


def warnings(results: Mapping[str, Any]) -> list[str]:
  """Returns what a reader must know before any number."""
  texts = []
  for name, about in results['acted'].items():
    topk = results['arms'][name]['index_topk']
    if about['verdict'] == 'nothing to leave out':
      texts.append(
          f'{name}: selection never acted, because no query sees more than {topk} tokens. Its'
          f' numbers are those of dense attention. Give a smaller --index_topk or longer texts.'
      )
    elif about['verdict'] == 'equal to dense':
      texts.append(
          f'{name}: its scores are those of dense attention, although {about["left_out"]:.0%} of'
          ' the queries see more than the budget. Selection made no difference.'
      )
    elif about['verdict'] == 'wrong within the budget':
      texts.append(
          f'{name}: it differs from dense attention by {about["differs_within_budget"]:.2g} nats'
          ' where nothing is left out. Its attention is wrong, whatever it selects.'
      )
  idle = {n for n, x in results['acted'].items() if x['verdict'] == 'nothing to leave out'}
  for a, b in results['equal_arms']:
    if a != 'dense' and not {a, b} <= idle:
      texts.append(f'{a} and {b} scored every target alike: they selected the same.')
  for name in results['tasks']['scores']:
    topk = results['arms'][name]['index_topk']
    if topk and (short := [n for n in results['tasks']['lengths'] if n <= topk]):
      texts.append(f'{name}: its tasks of {short} tokens leave nothing out, as dense does.')
  for k, measured in results['measures'].items():
    mass = {
        rule: mean_of_selecting(means['captured_mass'], results['window_layers'])
        for rule, means in (measured['beyond'] or {}).items()
    }
    known = plots.is_number(mass.get('indexer')) and plots.is_number(mass.get('random'))
    if known and mass['indexer'] <= mass['random']:
      texts.append(f'indexer@{k}: it captures no more of the attention than random tokens do.')
  for name, test in results['self_test'].items():
    if test['verdict'] == 'jump':
      texts.append(f'{name}: quality jumps above the budget. Its indexer is untrained, or wrong.')
  return texts


def main_table(results: Mapping[str, Any]) -> Table:
  """Returns one row per arm, with its quality beside that of dense attention."""
  arms = results['arms']
  dense, per_byte = arms['dense'], results['bytes_per_target'] is not None
  key = 'bits_per_byte' if per_byte else 'nats_per_token'
  rows = []
  for name, arm in arms.items():
    far, dense_far = arm.get('nats_beyond_budget'), arm.get('dense_nats_beyond_budget')
    loss = far / dense_far - 1 if far is not None and dense_far else None
    bits = [number(arm[key], '{:.4f}')] if per_byte else []
    rows.append([
        name,
        *bits,
        number(arm['nats_per_token'], '{:.4f}'),
        number(arm[key] / dense[key] - 1, '{:+.2%}') if dense[key] else 'n/a',
        number(far, '{:.4f}'),
        number(loss, '{:+.2%}'),
        number(arm['accuracy'], '{:.2%}'),
    ])
  first = ['bits per byte'] if per_byte else []
  beyond = ['nats beyond budget', 'vs dense there']
  return ['arm', *first, 'nats per token', 'vs dense', *beyond, 'right'], rows


def _tests(results: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
  """Yields the tables that say whether selection acted, and whether quality jumps."""
  rows = []
  for name, about in results['acted'].items():
    rows.append([
        name,
        number(about['left_out'], '{:.1%}'),
        _left_out(results, name),
        number(about['differs_within_budget'], '{:.1e}'),
        number(about['differs_beyond_budget'], '{:.1e}'),
        about['verdict'],
    ])
  shares = ['targets beyond budget', 'left out, by selections']
  header = ['arm', *shares, 'differs within', 'beyond', 'verdict']
  yield 'Did selection act?', (header, rows)
  for name, test in results['self_test'].items():
    rows = []
    for window in test['windows']:
      dense, sparse = window['dense'], window['sparse']
      loss = sparse / dense - 1 if dense else None
      means = number(dense, '{:.4f}'), number(sparse, '{:.4f}'), number(loss, '{:+.2%}')
      rows.append([f'{window["from"]} to {window["to"]}', f'{window["targets"]:,}', *means])
    title = f'Self-test of {name}: {test["verdict"]}'
    yield title, (['tokens seen', 'targets', 'dense', 'sparse', 'vs dense'], rows)


def _task_tables(results: Mapping[str, Any]) -> list[tuple[str, Table]]:
  """Returns the scores by kind and length, and by depth and length, if there were tasks."""
  tasks, arms = results['tasks'], list(results['arms'])
  if not tasks['scores']:
    return []
  line = lambda name, scores: [name, *(number(x, '{:.1%}') for x in scores)]
  rows = []
  for length in tasks['lengths']:
    own = [[tasks['scores'][arm][f'{k}-{length}'] for arm in arms] for k in tasks['kinds']]
    rows += [line(f'{k}, {length}', scores) for k, scores in zip(tasks['kinds'], own)]
    rows.append(line(f'mean, {length}', np.mean(own, axis=0)))
  by_depth = tasks['by_depth']
  depths = [line(name, (by_depth[arm][name] for arm in arms)) for name in by_depth['dense']]
  tables = [('Tasks of long context', (['task, tokens', *arms], rows))]
  return tables + ([('The same, by depth', (['depth', *arms], depths))] if depths else [])


def _task_means(results: Mapping[str, Any]) -> list[tuple[str, Table]]:
  """Returns the mean score of each arm at each length, which fits into a terminal."""
  tasks = results['tasks']
  if not tasks['scores']:
    return []
  mean = lambda scores, length: np.mean([scores[f'{kind}-{length}'] for kind in tasks['kinds']])
  rows = [
      [arm, *(number(float(mean(scores, length)), '{:.1%}') for length in tasks['lengths'])]
      for arm, scores in tasks['scores'].items()
  ]
  header = ['arm', *(f'{length:,} tokens' for length in tasks['lengths'])]
  return [('Tasks of long context, mean over kinds', (header, rows))]


def _left_out(results: Mapping[str, Any], name: str) -> str:
  """Returns the share of queries that did not select all they saw, a mean over layers."""
  arm = results['arms'][name]
  shares = results['measures'][str(arm['index_topk'])]['everywhere'][arm['rule']]['left_out']
  return number(mean_of_selecting(shares, results['window_layers']), '{:.1%}')


def _by_context(results: Mapping[str, Any], values: str, edges: str, ends: int) -> Table:
  """Returns bits by what queries see or where they are; a range ends `ends` below the next one."""
  at, scale = results[edges], 1 / (results['bytes_per_target'] or 1)
  names = list(results['arms'])
  rows = []
  for i, (low, high) in enumerate(zip(at, at[1:])):
    cells = (results[values][name][i] for name in names)
    scaled = (x * scale if plots.is_number(x) else None for x in cells)
    rows.append([f'{low:,} to {high - ends:,}', *(number(x, '{:.4f}') for x in scaled)])
  return ['tokens', *names], rows


def _layers(means: Mapping[str, Any], n_layers: int, windows: Sequence[int]) -> Table:
  rows = []
  for rule, of_rule in means.items():
    for layer in range(n_layers):
      values = [of_rule[name][layer] if layer < len(of_rule[name]) else None for name in COLUMNS]
      forms = [form for _, form in COLUMNS.values()]
      cells = (of_layer(x, form, layer, windows) for x, form in zip(values, forms))
      rows.append([rule, str(layer), *cells])
  return ['rule', 'layer', *(title for title, _ in COLUMNS.values())], rows


def _markdown(results: Mapping[str, Any], drawn: Sequence[str]) -> str:
  settings, step = results['settings'], results['step']
  where = results['checkpoint'] + (f', step {step}' if step is not None else '')
  versions = ', '.join(f'{name} {v}' for name, v in results['versions'].items())
  memory = results['memory'].items()
  memory = ', '.join(f'{x:.2f} GiB of the {name.split("_")[0]}' for name, x in memory)
  parts = [
      '# Dense and sparse',
      f'{where}: {results["targets"]:,} targets in {settings["rows"]} rows of'
      f' {results["context"]:,} tokens, whose queries see {results["seen"]["mean"]:,.0f} tokens on average and'
      f' {results["seen"]["most"]:,} at most. {results["machine"]}, {results["date"]} ({versions}).'
      f' {settings["batch_size"]} rows at a time{_devices(settings["mesh"])} took {memory}.',
  ]
  parts += [] if results['has_trained_indexer'] else [NOT_TRAINED]
  parts += [f'**{text}**' for text in warnings(results)]
  parts += [markdown_table(main_table(results)), MAIN_CAPTION, f'![Bits by context]({drawn[0]})']
  (title, table), *tests = _tests(results)
  parts += [f'## {title}', markdown_table(table), ACTED_CAPTION]
  for title, table in tests:
    parts += [f'## {title}', markdown_table(table), TEST_CAPTION]
  for title, table in _task_tables(results):
    parts += [f'## {title}', markdown_table(table), TASKS_CAPTION]
  unit = 'byte' if results['bytes_per_target'] else results['unit']
  seen = _by_context(results, 'bits_by_visible', 'visible_edges', 1)
  parts += [f'## Bits per {unit}, by what the query sees', markdown_table(seen)]
  places = _by_context(results, 'bits_by_position', 'position_edges', 1)
  parts += [f'## Bits per {unit}, by position in the row', markdown_table(places)]
  for k, measured in results['measures'].items():
    means = measured['beyond'] or measured['everywhere']
    layers = markdown_table(_layers(means, results['n_layers'], results['window_layers']))
    attention = 'densely' if measured['attention'] == 'dense' else 'sparsely'
    parts += [f'## What is selected, {k} tokens', layers]
    caption = MEASURES_CAPTION.format(attention=attention)
    parts += [caption + WINDOWS_CAPTION * bool(results['window_layers'])]
  parts += [f'![What each rule selects, by layer]({drawn[1]})', *_times(results)]
  return '\n\n'.join(parts) + '\n'


def _devices(mesh: Mapping[str, int]) -> str:
  """Says what shared the work, if it was more than one device."""
  axes = [f'{name}={size}' for name, size in mesh.items() if size > 1]
  return f' on the mesh {", ".join(axes)}' if axes else ''


def _times(results: Mapping[str, Any]) -> list[str]:
  rows = [[name, number(arm['seconds'], '{:.1f}')] for name, arm in results['arms'].items()]
  measured = results['measures'].items()
  rows += [[f'measures, {k} tokens', number(x['seconds'], '{:.1f}')] for k, x in measured]
  rows += [[f'tasks, {n}', number(x, '{:.1f}')] for n, x in results['tasks']['seconds'].items()]
  table = markdown_table((['part', 'seconds'], rows))
  return ['## What took how long', table, 'Compilation is included.']
