# SPDX-License-Identifier: Apache-2.0
"""The report holds the right numbers, leaves out what a run does not have, and ends whole."""

import io
import json
import math
import os

from matplotlib.figure import Figure
import numpy as np
import pytest
import rich.console

from dsa_jax.reporting import metrics, plots, report

PNG = b'\x89PNG'
BITS = {
    'dense_before': 2.1600,
    'dense_baseline': 2.0000,
    'oracle': 2.0020,
    'sparse': 2.0060,
    'window_sinks': 2.0500,
    'random': 2.4000,
}
LAYERS = 4
EDGES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def bits_by_position():
  visible = np.array(EDGES[:-1]) * 1.4
  dense = 1.75 + 5.0 / visible**0.6
  beyond = np.log2(np.maximum(visible / 64, 1)) / 3
  excess = {name: bits / 2 - 1 for name, bits in BITS.items()}
  return {name: list(dense * (1 + e * (0.1 + beyond))) for name, e in excess.items()}


def full_results():
  mass = {
      'indexer': [0.92, 0.94, 0.955, 0.93],
      'oracle': [0.965, 0.97, 0.98, 0.968],
      'window_sinks': [0.61, 0.72, 0.80, 0.75],
      'random': [0.22, 0.2, 0.25, 0.21],
  }
  bits = bits_by_position()
  bits['random'][0] = math.nan
  bits['sparse'][0] = None
  return {
      'title': 'Quickstart: dense, warm-up, sparse',
      'command': 'python -m dsa_jax.train --config=configs/quickstart.py',
      'machine': '2 x Intel Xeon, CPU',
      'date': '2026-01-31',
      'versions': {'jax': '0.10.2'},
      'seconds': 331.4,
      'seconds_by_stage': {'dense': 120.0, 'baseline': 60.0, 'warmup': 30.5, 'sparse': 80.0},
      'tokens_by_stage': {
          'dense': 1_638_400, 'baseline': 819_200, 'warmup': 409_600, 'sparse': 819_200
      },
      'stages': {
          'dense': {'stage': 'dense', 'init_from': ''},
          'baseline': {'stage': 'dense', 'init_from': 'dense'},
          'warmup': {'stage': 'warmup', 'init_from': 'dense'},
          'sparse': {'stage': 'sparse', 'init_from': 'warmup'},
      },
      'roles': {'dense_before': 'dense', 'dense_baseline': 'baseline', 'sparse': 'sparse'},
      'context': 512,
      'index_topk': 64,
      'n_layers': LAYERS,
      'validation_bits': BITS,
      'bits_beyond_budget': {name: 0.9 * bits for name, bits in BITS.items()},
      'position_edges': EDGES,
      'bits_by_position': bits,
      'captured_mass': mass['indexer'],
      'captured_mass_by_rule': mass,
      'captured_mass_beyond_budget': {r: [v**1.5 for v in vs] for r, vs in mass.items()},
      'attention_flops_per_token': {
          'dense': {'512': 3.2e6, '131072': 8.1e8}, 'sparse': {'512': 1.6e6, '131072': 8.1e7}
      },
      'checks': [
          {'name': 'loss', 'passed': True, 'detail': '+0.30 % <= 0.5 %'},
          {'name': 'captured mass', 'passed': False, 'detail': '0.89 < 0.9 | layer 1'},
          {'name': 'accuracy_share', 'passed': None, 'detail': 'no such numbers'},
      ],
  }


def dense_results():
  return {
      'title': 'Dense only',
      'command': 'python -m dsa_jax.train --config=configs/dense.py',
      'machine': '2 x Intel Xeon, CPU',
      'date': '2026-01-31',
      'versions': {},
      'seconds': 12.0,
      'seconds_by_stage': {'dense': 10.0},
      'tokens_by_stage': {'dense': 1000},
      'context': 512,
      'index_topk': 64,
      'n_layers': LAYERS,
      'validation_bits': {'dense_before': 2.5},
      'checks': [],
  }


def write_metrics(workdir, stages, every=2):
  """Writes curves of the shapes that training makes."""
  rng = np.random.default_rng(0)
  begin, depth = 0, np.arange(LAYERS)
  with metrics.MetricsWriter(workdir) as writer:
    for stage, n_steps in stages.items():
      for step in range(every, n_steps + 1, every):
        learnt = begin + step * (stage != 'warmup')
        scalars = {'lm_loss': 1.25 + 4.2 * np.exp(-learnt / 25) + 12 / (learnt + 20)}
        scalars['lm_loss'] += 0.05 * rng.normal()
        if stage in ('warmup', 'random') or stage.startswith('sparse'):
          trained = 1 - np.exp(-(step + 200 * stage.startswith('sparse')) / (30 + 10 * depth))
          wobble = 1 + 0.03 * rng.normal(size=(6, LAYERS))
          jump = 0.6 if stage == 'sparse' else 1
          scalars |= {
              'index_kl': jump * (2.2 - 2.1 * trained + 0.05 * depth) * wobble[0],
              'captured_mass': np.minimum(0.3 + (0.64 - 0.03 * depth) * trained * wobble[1], 1),
              'topk_recall': 0.2 + (0.6 - 0.03 * depth) * trained * wobble[2],
              'neighbour_overlap': (0.95 - 0.1 * trained - 0.02 * depth) * wobble[3],
              'layer_overlap': (0.3 + 0.3 * trained[:-1]) * wobble[4, :-1],
              'selected_distance': (220 - (100 + 15 * depth) * trained) * wobble[5],
          }
        writer.write(stage, step, scalars)
      begin += n_steps * (stage == 'dense')


@pytest.fixture(scope='module')
def full(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('full')
  write_metrics(workdir, {'dense': 400, 'baseline': 200, 'warmup': 150, 'sparse': 200})
  out = io.StringIO()
  report.write_report(workdir, full_results(), rich.console.Console(file=out, width=140))
  return workdir, out.getvalue()


@pytest.mark.parametrize('width', [66, 80, 120])
def test_a_narrow_terminal_cuts_no_number(width):
  header = ['model', 'nats per token', 'bits per token', 'bits per byte', 'against the baseline', 'beyond the budget']
  numbers = ['20.6433', '14.3112', '1.0025', '+16.29%', '23.4041']
  out = io.StringIO()
  table = header, [['dense', *numbers], ['sparse_warm, window + sinks', *numbers]]
  report.print_table(rich.console.Console(file=out, width=width), 'a mixture', table)
  assert all(out.getvalue().count(number) == 2 for number in numbers) and '…' not in out.getvalue()
  assert max(map(len, out.getvalue().splitlines())) <= width


def test_full_report_has_every_section_and_plot(full):
  workdir, _ = full
  text = (workdir / 'report.md').read_text()
  for name in ('overview.png', 'training.png', 'selection.png'):
    assert (workdir / name).read_bytes().startswith(PNG)
    assert f']({name})' in text
  for words in ('2 x Intel Xeon', 'jax 0.10.2', '2026-01-31', 'configs/quickstart.py', '## Checks'):
    assert words in text
  assert not [path for path in workdir.iterdir() if path.suffix == '.tmp']


def test_tables_hold_the_right_numbers(full):
  text = (full[0] / 'report.md').read_text()
  rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines()]
  assert ['sparse, indexer', '2.0060', '+0.30%', '1.8054', '+0.30%'] in rows
  assert ['sparse, window + sinks', '2.0500', '+2.50%', '1.8450', '+2.50%'] in rows
  assert ['dense', '2.1600', '+8.00%', '1.9440', '+8.00%'] in rows
  assert ['dense, fair baseline', '2.0000', '+0.00%', '1.8000', '+0.00%'] in rows
  assert ['0', '0.920', '0.965', '0.610', '0.220'] in rows
  assert ['mean', '0.936', '0.971', '0.720', '0.220'] in rows
  assert ['131,072', '810 M', '81 M', '10.0 x'] in rows
  assert ['warmup', '409,600', '30.5'] in rows
  assert ['whole run', '3,686,400', '331.4'] in rows
  assert '| captured mass | **FAIL** | 0.89 < 0.9 \\| layer 1 |' in text
  assert '| accuracy_share | n/a | no such numbers |' in text


def test_terminal_shows_the_main_table_and_the_checks(full):
  _, shown = full
  for words in ('sparse, indexer', '+0.30%', 'pass  loss', 'FAIL  captured mass', 'n/a  accuracy_share'):
    assert words in shown


def test_json_is_valid_and_has_null_for_nan(full):
  read = json.loads((full[0] / 'report.json').read_text(), parse_constant=pytest.fail)
  assert read['bits_by_position']['random'][0] is None
  assert read['bits_by_position']['sparse'][0] is None
  assert read['validation_bits'] == BITS
  assert read['captured_mass'] == full_results()['captured_mass']


def test_report_json_comes_last_and_an_old_one_goes_first(tmp_path, monkeypatch):
  (tmp_path / 'report.json').write_text('old')
  write_metrics(tmp_path, {'dense': 4})
  replaced = []

  def replace(source, target):
    assert not (tmp_path / 'report.json').exists()
    os.rename(source, target)
    replaced.append(target.name)

  monkeypatch.setattr(os, 'replace', replace)
  report.write_report(tmp_path, dense_results(), rich.console.Console(file=io.StringIO()))
  assert replaced == ['training.png', 'report.md', 'report.json']


def test_dense_only_report_leaves_the_rest_out(tmp_path):
  (tmp_path / 'selection.png').write_text('of an earlier run')
  write_metrics(tmp_path, {'dense': 4})
  out = io.StringIO()
  report.write_report(tmp_path, dense_results(), rich.console.Console(file=out))
  text = (tmp_path / 'report.md').read_text()
  assert (tmp_path / 'training.png').exists()
  assert not (tmp_path / 'overview.png').exists()
  assert not (tmp_path / 'selection.png').exists()
  for absent in ('sparse', 'baseline', 'captured', 'FLOPs', 'Checks', 'n/a', 'overview.png'):
    assert absent not in text, absent
  assert '| dense | 2.5000 |' in text


def test_without_metrics_or_baseline(tmp_path):
  results = full_results()
  for key in ('validation_bits', 'bits_beyond_budget', 'bits_by_position'):
    results[key] = {n: v for n, v in results[key].items() if n != 'dense_baseline'}
  report.write_report(tmp_path, results, rich.console.Console(file=io.StringIO()))
  text = (tmp_path / 'report.md').read_text()
  assert 'vs baseline' not in text and '| model | bits per byte | vs dense |' in text.replace('token |', 'byte |')
  assert f'| sparse, indexer | 2.0060 | {2.006 / 2.16 - 1:+.2%} |' in text
  assert (tmp_path / 'overview.png').exists()
  assert not (tmp_path / 'training.png').exists()


def test_it_explains_what_is_drawn(tmp_path):
  def explained(drop=(), rows=(), **changes):
    results = {name: x for name, x in full_results().items() if name not in drop} | changes
    return report._markdown(results, ['overview.png'], plots.Curves(rows))

  marks = 'the dashed line', 'to the oracle', 'leave the frame', 'The bars are', 'The divergence says'
  assert [x in explained() for x in marks] == [True] * 4 + [False]
  lines = bits_by_position()
  few = {name: lines[name] for name in ('dense_before', 'random')}
  mass = 'captured_mass', 'captured_mass_by_rule', 'captured_mass_beyond_budget'
  assert [x in explained(mass, bits_by_position=few) for x in marks] == [True] + [False] * 4
  write_metrics(tmp_path, {'warmup': 4})
  rows = metrics.read_metrics(tmp_path / 'metrics.csv')
  assert [x in explained(('bits_by_position',), rows) for x in marks] == [False] * 3 + [True] * 2
  assert 'in which a token attends to' in explained(index_n_selections=1)
  assert 'in which each key head of a token attends to' in explained(index_n_selections=3)


@pytest.mark.parametrize('left_out, words', [(0.0, 'Selection never acted, because no'), (0.25, '25% of the queries see more than that.')])
def test_it_says_how_often_selection_acted(left_out, words, tmp_path):
  results = full_results() | {'left_out': left_out}
  report.write_report(tmp_path, results, rich.console.Console(file=(out := io.StringIO()), width=300))
  assert words in (tmp_path / 'report.md').read_text()
  assert ('WARNING: Selection never acted' in out.getvalue()) == (left_out == 0)


def test_a_picture_that_cannot_be_drawn_costs_no_number(tmp_path, monkeypatch, caplog):
  def fail(*_):
    raise RuntimeError('no room for the legend')

  monkeypatch.setattr(plots, '_overview', fail)
  report.write_report(tmp_path, full_results(), rich.console.Console(file=io.StringIO()))
  assert json.loads((tmp_path / 'report.json').read_text())['validation_bits'] == BITS
  assert not (tmp_path / 'overview.png').exists() and 'overview.png' not in (tmp_path / 'report.md').read_text()
  assert 'overview.png could not be drawn' in caplog.text and 'no room for the legend' in caplog.text


def test_accuracy_is_the_main_number(tmp_path):
  results = full_results()
  results['accuracy'] = {'dense_baseline': 0.98, 'sparse': 0.9702, 'window_sinks': 0.049}
  header, rows = report.main_table(results)
  assert header[1:4] == ['accuracy', 'of baseline', 'bits per token']
  assert report.main_table(results | {'unit': 'answer'})[0][3] == 'bits per answer'
  by_model = {row[0]: row[1:] for row in rows}
  assert by_model['sparse, indexer'][:3] == ['97.02%', '99.0%', '2.0060']
  assert by_model['sparse, random'][:2] == ['n/a', 'n/a']
  report.write_report(tmp_path, results, rich.console.Console(file=io.StringIO()))
  assert 'share of right answers' in (tmp_path / 'report.md').read_text()


def test_a_stage_has_its_median_speed_and_its_utilisation_where_that_is_known(tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    for step, speed in enumerate((1000.0, 3000.0, 2000.0)):
      writer.write('dense', step, {'lm_loss': 1.0, 'tokens_per_second': speed, 'mfu': speed / 1e4})
  report.write_report(tmp_path, dense_results(), rich.console.Console(file=io.StringIO()))
  text = (tmp_path / 'report.md').read_text()
  assert '| stage | tokens | seconds | tokens/s | MFU |' in text and '| 2,000 | 20.0% |' in text
  assert 'MFU is the share of the peak' in text


def test_entries_are_reported_and_drawn_under_their_own_names(tmp_path):
  new = {'dense': 'base-1', 'baseline': 'more', 'warmup': 'random', 'sparse': 'sparse_k8', '': ''}
  results = full_results()
  results['roles'] = {role: new[entry] for role, entry in results['roles'].items()}
  results['stages'] = {
      new[name]: {'stage': entry['stage'], 'init_from': new[entry['init_from']]}
      for name, entry in results['stages'].items()
  }
  results['stages']['sparse_k9'] = {'stage': 'sparse', 'init_from': 'random'}
  for key in ('seconds_by_stage', 'tokens_by_stage'):
    results[key] = {new[name]: value for name, value in results[key].items()} | {'sparse_k9': 7}
  results['validation_bits'] = BITS | {'sparse_k9': 2.01}
  write_metrics(tmp_path, {'base-1': 4, 'more': 2, 'random': 4, 'sparse_k8': 4, 'sparse_k9': 4})
  curves = plots.Curves(metrics.read_metrics(tmp_path / 'metrics.csv'))
  training, selection = Figure(), Figure()
  plots._training(training, results, curves)
  plots._selection(selection, results, curves)
  labels = [line.get_label() for line in training.axes[0].lines]
  assert [x for x in labels if not x.startswith('_')] == list(results['stages'])
  begins = {line.get_label(): line.get_xdata()[0] for line in training.axes[0].lines}
  assert begins['more'] == pytest.approx(begins['sparse_k8'], rel=0.3)
  assert begins['random'] < begins['sparse_k8']
  labels = {line.get_label() for line in selection.axes[0].lines}
  assert {'layer 0', 'sparse_k8 stage starts', '_sparse_k9'} <= labels
  report.write_report(tmp_path, results, rich.console.Console(file=io.StringIO()))
  text = (tmp_path / 'report.md').read_text()
  for words in ('| dense (base-1) |', '| sparse, indexer (sparse_k8) |', '| sparse_k9 | 2.0100 |'):
    assert words in text, words
  assert 'more is drawn where sparse_k8 starts' in text


def test_the_baseline_is_seen_where_curves_coincide(tmp_path):
  """It is dashed and lies on top, in the overview and while training; validation rows are dots."""
  results = full_results()
  results['bits_by_position']['sparse'] = results['bits_by_position']['dense_baseline']
  write_metrics(tmp_path, {'dense': 8, 'baseline': 8, 'warmup': 8, 'sparse': 8})
  with metrics.MetricsWriter(tmp_path) as writer:
    for stage in ('baseline', 'sparse'):
      writer.write(stage, 8, {'validation_loss': 2.0})
  curves, overview, training = plots.Curves(metrics.read_metrics(tmp_path / 'metrics.csv')), Figure(), Figure()
  plots._overview(overview, results, curves)
  plots._training(training, results, curves)
  for axes, baseline, sparse in (
      (overview.axes[0], 'dense, fair baseline', 'sparse, indexer'),
      (training.axes[0], 'baseline', 'sparse'),
  ):
    lines = {line.get_label(): line for line in axes.lines}
    assert lines[baseline].is_dashed() and not lines[sparse].is_dashed()
    assert lines[baseline].get_zorder() > lines[sparse].get_zorder()
  dots = [line for line in training.axes[0].lines if line.get_label() == '_validation']
  assert [line.get_ydata().tolist() for line in dots] == [[2.0], [2.0]]


@pytest.mark.parametrize('key', ['bits_by_position', 'captured_mass_by_rule'])
def test_refuses_lists_of_the_wrong_length_before_writing(tmp_path, key):
  results = full_results()
  results[key] = {'oracle': [0.5]}
  with pytest.raises(ValueError, match=rf"{key}\['oracle'\] has 1 values"):
    report.write_report(tmp_path, results)
  assert not list(tmp_path.iterdir())


def test_layers_with_a_window_are_in_no_mean(tmp_path):
  results = full_results()
  mass = {'indexer': [None, 0.9, math.nan, 0.7], 'oracle': [None, 0.95, math.nan, 0.85]}
  keys = 'captured_mass_by_rule', 'captured_mass_beyond_budget'
  results |= dict.fromkeys(keys, mass) | {'captured_mass': mass['indexer'], 'window_layers': [0, 2]}
  report.write_report(tmp_path, results, rich.console.Console(file=io.StringIO()))
  text = (tmp_path / 'report.md').read_text()
  rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines()]
  for row in ['0', 'window', 'window'], ['1', '0.900', '0.950'], ['mean', '0.800', '0.900']:
    assert rows.count(row) == 2, row
  assert 'Layers with a window select nothing' in text
  read = json.loads((tmp_path / 'report.json').read_text())
  assert read['captured_mass'] == [None, 0.9, None, 0.7] and read['window_layers'] == [0, 2]


def test_a_sparse_model_is_named_for_what_selected_while_it_was_trained():
  assert plots.label('sparse', full_results()) == 'sparse, indexer'
  results = full_results() | {'selection': 'window_sinks'}
  assert plots.label('sparse', results) == 'sparse, window + sinks'


@pytest.mark.parametrize(
    'tokens, trains, is_fair',
    [
        (819_200, {}, True),
        (409_600, {}, False),
        (819_200, {'sparse': ['indexer']}, False),  # Its backbone has learnt nothing.
        (1_228_800, {'warmup': ['backbone', 'indexer']}, True),
    ],
)
def test_a_baseline_of_other_tokens_is_not_called_fair(tokens, trains, is_fair):
  results = full_results()
  results['tokens_by_stage']['baseline'] = tokens
  for entry, parts in trains.items():
    results['stages'][entry]['trains'] = parts
  label = plots.label('dense_baseline', results)
  assert label == ('dense, fair baseline' if is_fair else 'dense, baseline')
  assert ('so it is not a fair one' in report._how_to_read(results)) == (not is_fair)


def test_an_entry_that_logged_no_divergence_is_in_no_curve(tmp_path):
  """It trained the backbone alone, or ended before its first line."""
  write_metrics(tmp_path, {'dense': 20, 'warmup': 10})
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.write('sparse', 5, {'lm_loss': 2.0})
  curves = plots.Curves(metrics.read_metrics(tmp_path / 'metrics.csv'))
  assert 'overview.png' in plots.draw(tmp_path, full_results(), curves)


@pytest.mark.parametrize('value, text', [(999_700, '1 M'), (999.7, '1 k'), (1234, '1.23 k'), (0.5, '0.5')])
def test_numbers_with_a_prefix(value, text):
  assert plots.si(value) == text
