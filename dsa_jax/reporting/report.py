# SPDX-License-Identifier: Apache-2.0
"""A finished run in words, tables and pictures: report.md, PNG plots and report.json."""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
import textwrap
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table

from dsa_jax.reporting import metrics, plots
from dsa_jax.reporting.checks import never_acted

SHORTEST = 8  # Letters of a header's line, at least.
TITLES = {
    'overview.png': 'The result in one picture',
    'training.png': 'Language-model loss while training',
    'selection.png': 'What the indexer selects while training',
}
CAPTIONS = {
    'training.png': 'Lower is better. Faint lines are the raw values; dots are validation rows.',
    'selection.png': (
        'One line per layer. The divergence should fall; captured attention and recall should'
        ' rise towards 1; an overlap of 1 means that both select the same tokens; the distance is'
        ' how far back the selected tokens lie on average.'
    ),
}
STAGES_CAPTION = (
    ' {baseline} is drawn where {sparse} starts, because both continue the same dense model: compare'
    ' these two. In warm-up only the indexer learns, so the loss stays flat.'
)
MASS_CAPTION = (
    'The share of the true (dense) attention that falls on the selected tokens, from 0 to 1: at 1,'
    ' leaving out the other tokens changes nothing. The oracle is the most that can be reached.'
)
WINDOWS_CAPTION = ' Layers with a window select nothing, so they are in no mean over layers.'
FLOPS_CAPTION = (
    'Floating-point operations that attention needs for one token, the indexer included, by the'
    ' number of tokens in the context. The last column says how many times cheaper sparse is.'
)
COST_CAPTION = (
    'Seconds include compilation; the whole run includes evaluation, too. Tokens per second are the'
    ' median of what was logged.'
)
MFU_CAPTION = (
    ' MFU is the share of the peak in bfloat16 that the arithmetic of the model makes up, nothing that'
    ' is computed again counted.'
)
DOCUMENTS_CAPTION = (
    'What training reads, by source. A document is cut where it does not end in the row in which it'
    ' begins; its next part sees nothing of the part before. Filled is the share of all positions that'
    ' hold a token. The last columns count documents that are left out: by the whole source, but those of'
    ' other lengths than the config wants by what training may read. Below, documents by their tokens, and the share of queries by what they see.'
)
SAMPLE_CAPTION = (
    ' Of {names}, which is tokenized while it is read, the table describes the first documents alone, and'
    ' the last columns count what all stages have left out, each time that they read it.'
)
NEVER_ACTED = (
    'Selection never acted, because no query sees more tokens than it may select: what is called sparse is'
    ' dense attention. Give longer documents, or a smaller model.index_topk.'
)
# Reasons why documents are left out, and what the report calls such documents.
VERDICTS = {True: 'pass', False: 'FAIL', None: 'n/a'}
LEFT_OUT = {'empty': 'empty', 'damaged': 'damaged', 'length': 'too short or long'}
Table = tuple[list[str], list[list[str]]]


def write_report(
    workdir: pathlib.Path,
    results: Mapping[str, Any],
    console: rich.console.Console | None = None,
) -> None:
  """Writes report.md, its plots and report.json, and prints the main table.

  The report leaves out what the results do not have. report.json is removed first and written last,
  so the report is complete wherever that file exists.
  """
  _check_lengths(results)
  (workdir / 'report.json').unlink(missing_ok=True)
  csv = workdir / 'metrics.csv'
  curves = plots.Curves(metrics.read_metrics(csv) if csv.exists() else [])
  drawn = plots.draw(workdir, results, curves)
  plots.replace_bytes(workdir / 'report.md', _markdown(results, drawn, curves).encode())
  text = json.dumps(finite(results), indent=2, allow_nan=False) + '\n'
  plots.replace_bytes(workdir / 'report.json', text.encode())
  print_report(workdir, results, console)


# Tables


def main_table(results: Mapping[str, Any]) -> Table:
  """Returns one row per model, with its quality beside the fair baseline's or, without one, dense's."""
  bits, beyond = (results.get(k, {}) for k in ('validation_bits', 'bits_beyond_budget'))
  accuracy = results.get('accuracy') or {}
  unit = f'bits per {plots.unit(results)}'
  reference = 'baseline' if 'dense_baseline' in bits else 'dense'
  columns = []
  if accuracy:
    columns += [('accuracy', accuracy, '{:.2%}'), (f'of {reference}', _share(accuracy), '{:.1%}')]
  columns.append((unit, bits, '{:.4f}'))
  if results.get('unit') == 'token':
    columns.append(('nats per token', _scaled(bits, math.log(2)), '{:.4f}'))
    if plots.is_number(length := results.get('bytes_per_target')):
      columns.append(('bits per byte', _scaled(bits, 1 / length), '{:.4f}'))
  if not accuracy:
    columns.append((f'vs {reference}', _excess(bits), '{:+.2%}'))
  columns.append(('beyond budget', beyond, '{:.4f}'))
  if not accuracy:
    columns.append((f'vs {reference}', _excess(beyond), '{:+.2%}'))
  columns = [column for column in columns if column[1]]
  rows = [
      [plots.label(name, results), *(number(values.get(name), form) for _, values, form in columns)]
      for name in plots.ordered([bits, accuracy, beyond], plots.MODELS)
  ]
  return ['model', *(title for title, _, _ in columns)], rows


def _scaled(values: Mapping[str, float], factor: float) -> dict[str, float]:
  return {name: value * factor for name, value in values.items() if plots.is_number(value)}


def _share(values: Mapping[str, float]) -> dict[str, float]:
  """Returns each value as a share of the fair baseline's or, without one, of the dense model's."""
  reference = values.get('dense_baseline', values.get('dense_before'))
  if len(values) < 2 or not plots.is_number(reference) or not reference:
    return {}
  return {name: value / reference for name, value in values.items() if plots.is_number(value)}


def _excess(values: Mapping[str, float]) -> dict[str, float]:
  return {name: share - 1 for name, share in _share(values).items()}


def _mass_table(by_rule: Mapping[str, Sequence[float | None]], windows: Sequence[int]) -> Table:
  rules = plots.ordered([by_rule], plots.RULES)
  rows = [
      [str(layer), *(of_layer(value, '{:.3f}', layer, windows) for value in values)]
      for layer, values in enumerate(zip(*(by_rule[rule] for rule in rules), strict=True))
  ]
  means = [number(mean_of_selecting(by_rule[rule], windows), '{:.3f}') for rule in rules]
  return ['layer', *map(plots.rule_label, rules)], [*rows, ['mean', *means]]


def _flops_table(flops: Mapping[str, Mapping[str, float]]) -> Table:
  dense, sparse = flops.get('dense', {}), flops.get('sparse', {})
  rows = []
  for context in sorted({*dense, *sparse}, key=int):
    d, s = dense.get(context), sparse.get(context)
    ratio = d / s if plots.is_number(d) and plots.is_number(s) and s else None
    rows.append([f'{int(context):,}', plots.si(d), plots.si(s), number(ratio, '{:.1f} x')])
  return ['context', 'dense', 'sparse', 'dense / sparse'], rows


def _documents_table(documents: Mapping[str, Mapping[str, Any]]) -> Table:
  numbers = 'documents', 'tokens', 'rows', 'cut'
  rows = [
      [
          name,
          *(number(about[x], '{:,}') for x in numbers),
          number(about['filled'], '{:.1%}'),
          *(number(about.get('left_out', {}).get(x), '{:,}') for x in LEFT_OUT),
      ]
      for name, about in documents.items()
  ]
  return ['source', *numbers, 'filled', *LEFT_OUT.values()], rows


def _lengths_table(documents: Mapping[str, Mapping[str, Any]]) -> Table:
  """Returns a row for each power of two: documents so long, and queries that see so much."""
  n = max(len(about[x]) for about in documents.values() for x in ('lengths', 'context'))
  rows = []
  for i in range(n):
    cells = []
    for about in documents.values():
      lengths, context = about['lengths'], about['context']
      cells.append(f'{lengths[i]:,}' if i < len(lengths) else '')
      cells.append(f'{context[i]:.1%}' if i < len(context) else '')
    rows.append([f'{2**i:,} to {2 ** (i + 1) - 1:,}', *cells])
  titles = [f'{name}, {x}' for name in documents for x in ('documents', 'queries')]
  return ['tokens', *titles], rows


def _cost_table(results: Mapping[str, Any], curves: plots.Curves) -> Table:
  """Returns one row per stage; speed and utilisation are medians, where they were measured."""
  tokens, seconds = (results.get(k, {}) for k in ('tokens_by_stage', 'seconds_by_stage'))
  stages = plots.ordered([seconds, tokens], {})
  columns = [('tokens', tokens, '{:,}'), ('seconds', seconds, '{:.1f}')]
  for title, name, form in ('tokens/s', 'tokens_per_second', '{:,.0f}'), ('MFU', 'mfu', '{:.1%}'):
    values = {stage: curves.of(stage, name)[1] for stage in stages}
    measured = {stage: float(np.median(of_stage)) for stage, of_stage in values.items() if len(of_stage)}
    columns += [(title, measured, form)] if measured else []
  rows = [[s, *(number(values.get(s), form) for _, values, form in columns)] for s in stages]
  if 'seconds' in results:
    total = sum(tokens.values()) if tokens else None
    cells = [number(total, '{:,}'), number(results['seconds'], '{:.1f}')]
    rows.append(['whole run', *cells, *[''] * (len(columns) - 2)])
  return ['stage', *(title for title, _, _ in columns)], rows


def of_layer(value: float | None, form: str, layer: int, windows: Sequence[int]) -> str:
  """Returns the number of a layer in a format, and 'window' for a layer that has one."""
  return 'window' if layer in windows else number(value, form)


def mean_of_selecting(values: Sequence[float | None], windows: Sequence[int]) -> float | None:
  """Returns the mean over the layers that select; None if none does."""
  selecting = metrics.of_selecting(values, windows)
  return float(np.mean(np.array(selecting, float))) if selecting else None


def number(value: float | int | None, form: str) -> str:
  """Returns a number in a format, and 'n/a' for None, NaN and infinities."""
  return form.format(value) if plots.is_number(value) else 'n/a'


# Words


def _markdown(results: Mapping[str, Any], drawn: Sequence[str], curves: plots.Curves) -> str:
  parts = [f'# {results["title"]}', *_what_was_run(results)]
  parts += ['## Result', markdown_table(main_table(results)), _how_to_read(results)]
  parts += _picture('overview.png', drawn, _about_overview(results, curves))
  parts += _checks_section(results)
  parts += _mass_section(results)
  flops = results.get('attention_flops_per_token')
  if flops:
    parts += ['## Attention FLOPs per token', markdown_table(_flops_table(flops))]
    parts += [FLOPS_CAPTION]
  costs = _cost_table(results, curves)
  parts += ['## Tokens and time', markdown_table(costs)]
  parts += [COST_CAPTION + MFU_CAPTION * ('MFU' in costs[0])]
  if documents := results.get('documents'):
    samples = ' and '.join(name for name, about in documents.items() if about.get('is_sample'))
    caption = DOCUMENTS_CAPTION + (SAMPLE_CAPTION.format(names=samples) if samples else '')
    parts += ['## Documents', markdown_table(_documents_table(documents)), caption]
    parts += [markdown_table(_lengths_table(documents))]
  roles = results.get('roles') or {}
  compared = {'baseline': roles.get('dense_baseline'), 'sparse': roles.get('sparse')}
  stages = STAGES_CAPTION.format(**compared) if all(compared.values()) else ''
  later = _picture('training.png', drawn, CAPTIONS['training.png'] + stages)
  later += _picture('selection.png', drawn, CAPTIONS['selection.png'])
  parts += ['## While it trained', *later] if later else []
  return '\n\n'.join(parts) + '\n'


def _what_was_run(results: Mapping[str, Any]) -> list[str]:
  sentence = f'Run on {results["machine"]}, {results["date"]}'
  if 'seconds' in results:
    sentence += f', in {results["seconds"]:.0f} seconds'
  versions = ', '.join(f'{name} {v}' for name, v in results.get('versions', {}).items())
  sentence += f' ({versions}).' if versions else '.'
  return [sentence + ' The command:', f'```\n{results["command"]}\n```']


def _how_to_read(results: Mapping[str, Any]) -> str:
  names = results.get('validation_bits', {})
  sentences = ['Bits say how well the model predicts text it has not seen: lower is better.']
  if results.get('accuracy'):
    sentences = [
        'Accuracy is the share of right answers, the main number here. Bits per answer say how'
        ' sure the model is of the right one: lower is better.'
    ]
  if 'dense_baseline' in names:
    has_stage = 'dense_before' in (results.get('roles') or {})
    dense = f'Dense is the model {"after the dense stage" if has_stage else "that the run began with"}.'
    sentences.append(
        f'{dense} The fair baseline is that model, trained on for as many tokens as the sparse stage, and'
        ' what every row is compared with.'
        if plots.is_fair(results)
        else f'{dense} The baseline is that model, trained on, and what every row is compared with: for other'
        ' tokens than the sparse stage, so it is not a fair one.'
    )
  elif {'dense_before', 'sparse'} <= names.keys():
    sentences.append(
        'Dense is the model that the sparse one started from. What this one has learned since and what'
        ' sparse attention costs are one difference here: a dense baseline of as many tokens would tell them apart.'
    )
  if 'sparse' in names:
    sentences.append(
        f'The sparse rows are one trained model, in which {_what_selects(results)} attends to'
        f' {results["index_topk"]} of at most {results["context"]} tokens; only the rule that'
        ' selects them differs. The oracle selects by the true attention, which a real model cannot'
        ' know in advance.'
    )
    if plots.is_number(left_out := results.get('left_out')):
      sentences.append(NEVER_ACTED if never_acted(results) else f'{left_out:.0%} of the queries see more than that.')
  if results.get('bits_beyond_budget'):
    sentences.append(
        f'Beyond budget means bits only at positions that see more than {results["index_topk"]}'
        ' tokens: before them nothing has to be left out.'
    )
  return ' '.join(sentences)


def _what_selects(results: Mapping[str, Any]) -> str:
  return 'each key head of a token' if results.get('index_n_selections', 1) > 1 else 'a token'


def _about_overview(results: Mapping[str, Any], curves: plots.Curves) -> str:
  """Says how to read those panels that there are."""
  sentences, lines = [], results.get('bits_by_position') or {}
  if lines:
    position = 'Bits by position: right of the dashed line a token sees more than it may select'
    if 'oracle' in lines:
      position += ', so look there at how close the indexer stays to dense attention and to the oracle'
    if 'random' in lines and 'dense_baseline' in lines:
      position += ' (random selection may leave the frame of the difference)'
    sentences.append(position + '.')
  if plots.captured_mass(results):
    sentences.append('The bars are the share of the true attention that each rule captures: higher is better.')
  if curves.layers('index_kl'):
    sentences.append(
        'The divergence says how far the indexer is from the true attention: lower is better'
        ' (a sparse stage measures it over the selected tokens only, so it may jump there).'
    )
  return ' '.join(sentences)


def _picture(name: str, drawn: Sequence[str], caption: str) -> list[str]:
  return [f'![{TITLES[name]}]({name})', caption] if name in drawn else []


def _checks_section(results: Mapping[str, Any]) -> list[str]:
  checks = results.get('checks')
  if not checks:
    return []
  rows = [[c['name'], VERDICTS[c['passed']].replace('FAIL', '**FAIL**'), c['detail']] for c in checks]
  table = markdown_table((['check', 'result', 'detail'], rows), align='---')
  return ['## Checks', 'What this run has to show, and whether it does.', table]


def _mass_section(results: Mapping[str, Any]) -> list[str]:
  everywhere, beyond = plots.captured_mass(results), results.get('captured_mass_beyond_budget')
  if not everywhere:
    return []
  windows = results.get('window_layers', ())
  caption = MASS_CAPTION + WINDOWS_CAPTION * bool(windows)
  parts = ['## Attention captured by the selection', caption]
  parts += [markdown_table(_mass_table(everywhere, windows))]
  if beyond:
    parts += ['The same, only at positions beyond the budget, where it is harder:']
    parts += [markdown_table(_mass_table(beyond, windows))]
  return parts


def markdown_table(table: Table, align: str = '---:') -> str:
  """Returns a table in Markdown."""
  header, rows = table
  ruler = ['---', *[align] * (len(header) - 1)]
  escaped = ([cell.replace('|', '\\|') for cell in row] for row in (header, ruler, *rows))
  return '\n'.join(f'| {" | ".join(row)} |' for row in escaped)


def print_report(
    workdir: pathlib.Path,
    results: Mapping[str, Any],
    console: rich.console.Console | None = None,
) -> None:
  """Prints the main table, the checks, and where the report is."""
  console = console or rich.console.Console()
  print_table(console, results['title'], main_table(results))
  if never_acted(results):
    console.print(f'WARNING: {NEVER_ACTED}', style='bold red', markup=False, highlight=False)
  for check in results.get('checks') or []:
    console.print(f'{VERDICTS[check["passed"]]}  {check["name"]}: {check["detail"]}', markup=False, highlight=False)
  console.print(f'report: {workdir / "report.md"}', markup=False, highlight=False, soft_wrap=True)


def print_table(console: rich.console.Console, title: str, table: Table) -> None:
  """Prints a table. Where there is little room, headers are folded first, then names; numbers never are."""
  header, rows = table
  longest = [max((len(row[i]) for row in rows), default=0) for i in range(len(header))]
  if sum(map(max, longest, map(len, header))) + 3 * len(header) > console.width:
    header = ['\n'.join(textwrap.wrap(x, max(n, SHORTEST))) for x, n in zip(header, longest)]
  printed = rich.table.Table(
      title=title, title_justify='left', box=rich.box.SIMPLE_HEAD, pad_edge=False
  )
  for i, column in enumerate(header):
    printed.add_column(column, justify='right' if i else 'left', no_wrap=i > 0, overflow='fold')
  for row in rows:
    printed.add_row(*row)
  console.print(printed)


# Files


def _check_lengths(results: Mapping[str, Any]) -> None:
  n_buckets = len(results.get('position_edges') or ()) - 1
  for name, values in (results.get('bits_by_position') or {}).items():
    if len(values) != n_buckets:
      raise ValueError(
          f'bits_by_position[{name!r}] has {len(values)} values; position_edges make {n_buckets}'
      )
  for key in ('captured_mass_by_rule', 'captured_mass_beyond_budget'):
    for rule, values in (results.get(key) or {}).items():
      if len(values) != results['n_layers']:
        raise ValueError(
            f'{key}[{rule!r}] has {len(values)} values; n_layers is {results["n_layers"]}'
        )


def finite(value: Any) -> Any:
  """Returns the same value with None in place of numbers that JSON does not have."""
  if isinstance(value, Mapping):
    return {key: finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
