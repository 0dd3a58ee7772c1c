# SPDX-License-Identifier: Apache-2.0
"""Runs side by side: what differs, means over seeds, and their curves."""

import io
import json
import subprocess
import sys

from matplotlib import figure as mpl_figure
import numpy as np
import pytest
import rich.console

from configs import quickstart
from dsa_jax.compare import compare
from dsa_jax.config import ConfigError
from dsa_jax.reporting import compare as comparison, plots
from dsa_jax.reporting.metrics import MetricsWriter
from dsa_jax.reporting.plots import Curves
from dsa_jax.training.workdir import write_config


def save_run(folder, bits=None, mass=0.9, **changes):
  config = quickstart.get_config('tiny')
  config.update_from_flattened_dict(changes)
  write_config(config, folder)
  with MetricsWriter(folder) as writer:
    for step in range(1, 5):
      for stage in ('dense', 'sparse'):
        kl = {'index_kl': [1.0 / step, 3.0 / step]} if stage == 'sparse' else {}
        writer.write(stage, step, {'lm_loss': 5.0 - step} | kl)
  if bits is not None:
    results = {
        'unit': 'byte', 'validation_bits': {'dense_baseline': 2.0, 'sparse': bits}, 'seconds': 60.0,
        'captured_mass': [mass, mass], 'tokens_by_stage': {'dense': 1000, 'sparse': 500},
    }  # fmt: skip
    (folder / 'report.json').write_text(json.dumps(results))
  return folder


@pytest.fixture
def runs(tmp_path):
  return [
      save_run(tmp_path / 'a', 2.1),
      save_run(tmp_path / 'k4', 2.4, **{'model.index_topk': 4}),
      save_run(tmp_path / 'b', 2.3, seed=1, log_every=7),
      save_run(tmp_path / 'unfinished', **{'model.index_topk': 2}),
  ]


def test_seeds_are_one_row_and_the_rest_says_what_differs(runs):
  groups = comparison.group_runs([comparison.read_run(run) for run in runs])
  header, rows = comparison.compare_table(groups)
  assert header == [
      'run', 'differs in', 'dense baseline, bits/byte', 'sparse, bits/byte', 'captured mass', 'tokens', 'seconds'
  ]  # fmt: skip
  spread = np.std([2.1, 2.3], ddof=1)
  assert rows == [
      ['a, b', 'model.index_topk=8', '2.0000 ± 0.0000', f'2.2000 ± {spread:.4f}', '0.9000 ± 0.0000', '1,500', '60 ± 0'],
      ['k4', 'model.index_topk=4', '2.0000', '2.4000', '0.9000', '1,500', '60'],
      ['unfinished', 'model.index_topk=2', 'n/a', 'n/a', 'n/a', 'n/a', 'n/a'],
  ]  # fmt: skip
  out = io.StringIO()
  comparison.print_table(groups, rich.console.Console(file=out, width=200))
  assert f'2.2000 ± {spread:.4f}' in out.getvalue() and 'differ in their seed alone' in out.getvalue()


def test_runs_on_other_data_or_from_other_weights_are_in_no_mean(tmp_path):
  """Although their configs name the same files and folders."""
  runs = [save_run(tmp_path / f'{i}', 2.0 + i, seed=i) for i in range(4)]
  write = lambda i, name, kept: (runs[i] / name).write_text(json.dumps(kept))
  write(1, 'data.json', {'a.txt': '10 bytes, 01234567'})
  for i in 2, 3:
    write(i, 'starts.json', {f'/place{i}/checkpoints/dense': [f'/place{i}/checkpoints/dense/{i}', 'weights']})
  groups = comparison.group_runs([comparison.read_run(run) for run in runs])
  assert [group.name for group in groups] == ['0', '1', '2, 3']
  differ = 'the data=', 'the weights it starts from='
  assert all(x in group.differs for group in groups for x in differ)
  assert 'the weights it starts from=absent' in groups[0].differs and 'absent' not in groups[2].differs
  write(3, 'starts.json', {'/place2/checkpoints/dense': ['/place2/checkpoints/dense/2', 'others']})
  assert len(comparison.group_runs([comparison.read_run(run) for run in runs])) == 4


def test_what_many_fields_differ_in_is_below_the_table_and_not_in_the_picture(tmp_path):
  """So that a narrow terminal has a table, and a curve a name."""
  many = {f'model.{name}': 64 for name in ('dim', 'inter_dim', 'kv_lora_rank', 'q_lora_rank')}
  runs = [save_run(tmp_path / 'a', 2.1), save_run(tmp_path / 'wide', 2.0, **many)]
  groups = comparison.group_runs([comparison.read_run(run) for run in runs])
  comparison.print_table(groups, rich.console.Console(file=(out := io.StringIO()), width=80))
  lines = out.getvalue().splitlines()
  assert 'differs in' not in lines[1] and len(lines) < 16
  assert groups[1].differs in ' '.join(' '.join(lines[lines.index('They differ in') :]).split())
  assert [comparison.label(group) for group in groups] == ['a', 'wide']
  short = groups[0]._replace(differs='seed=1')
  assert comparison.label(short) == 'a: seed=1'


def test_every_run_is_in_the_legend_and_rules_of_ones_own_look_unlike():
  figure = mpl_figure.Figure()
  axes = figure.add_subplot()
  for name in [*(f'run {i}' for i in range(15)), *(f'layer {i}' for i in range(30))]:
    axes.plot([0, 1], label=name)
  plots.legend_below(figure, 3)
  labels = [text.get_text() for text in figure.legends[0].get_texts()]
  assert labels[:15] == [f'run {i}' for i in range(15)] and len(labels) == 24
  looks = {plots.look(rule)[1:] for rule in ('nearest', 'every_other', 'first')}
  assert len(looks) == 3


@pytest.mark.filterwarnings('error')
def test_many_runs_leave_room_for_their_curves(tmp_path):
  """And a dollar in a path is no formula."""
  runs = [save_run(tmp_path / f'run{i}', 2.1, **{'model.rope_theta': 10.0 + i, 'data.files': f'$A{i}$_$'}) for i in range(25)]
  groups = comparison.group_runs([comparison.read_run(run) for run in runs])
  comparison.draw_curves(groups, tmp_path / 'compare.png')
  assert len(groups) == 25 and (tmp_path / 'compare.png').stat().st_size > 10_000


def test_seeds_that_decided_nothing_are_told(runs, tmp_path):
  several = [*runs[:3:2], save_run(tmp_path / 'c', 2.3, seed=2)]
  groups = comparison.group_runs([comparison.read_run(run) for run in several])
  comparison.print_table(groups, rich.console.Console(file=(out := io.StringIO()), width=200))
  assert 'b, c have the same numbers: their seeds decided nothing.' in out.getvalue()
  assert comparison.equal_runs(groups[0]._replace(runs=groups[0].runs[:2])) == ''


def test_a_mean_says_how_many_runs_it_is_of(runs, tmp_path):
  several = [*runs[:3:2], save_run(tmp_path / 'c', seed=2)]  # The third has no report yet.
  [group] = comparison.group_runs([comparison.read_run(run) for run in several])
  assert group.cells(['tokens', 'captured mass']) == ['1,500 (2 of 3)', '0.9000 ± 0.0000 (2 of 3)']


def test_reports_of_other_rows_are_in_no_mean(runs, tmp_path):
  other = save_run(tmp_path / 'other', 2.2, seed=2, **{'report.batches': 1})
  groups = comparison.group_runs([comparison.read_run(run) for run in (runs[0], other)])
  assert [group.differs for group in groups] == ['report.rows=4', 'report.rows=2']


def test_layers_with_a_window_are_in_no_mean(runs):
  report = runs[0] / 'report.json'
  results = json.loads(report.read_text()) | {'captured_mass': [None, 0.5, 0.75], 'window_layers': [0]}
  report.write_text(json.dumps(results))
  assert comparison.read_run(runs[0]).numbers()['captured mass'] == 0.625
  report.write_text(json.dumps(results | {'window_layers': [0, 1, 2]}))
  assert 'captured mass' not in comparison.read_run(runs[0]).numbers()


def test_one_run_is_a_table_too(runs):
  header, [row] = comparison.compare_table(comparison.group_runs([comparison.read_run(runs[0])]))
  assert 'differs in' not in header and row[0] == 'a'


def test_curves(runs, tmp_path, capsys):
  compare(runs, tmp_path / 'curves.png')
  assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')
  assert 'k4' in capsys.readouterr().out
  curves = Curves(comparison.read_run(runs[0]).rows)
  x, y = comparison.curve(curves, 'sparse', 'index_kl')
  np.testing.assert_array_equal(x, [1, 2, 3, 4])
  np.testing.assert_allclose(y, [2.0, 1.0, 2 / 3, 0.5])
  assert not comparison.curve(curves, 'dense', 'index_kl')[0].size


def test_what_will_not_do_is_named(runs, tmp_path):
  with pytest.raises(ConfigError, match='nothing is not the workdir of a run'):
    compare([runs[0], tmp_path / 'nothing'])
  (tmp_path / 'converted').mkdir()
  (tmp_path / 'converted' / 'config.json').write_text('{"model": {}, "source": {}}')
  with pytest.raises(ConfigError, match='it is a converted checkpoint'):
    compare([runs[0], tmp_path / 'converted'])
  with pytest.raises(ConfigError, match='names a run twice'):
    compare([runs[0], tmp_path / 'a' / '..' / 'a'])
  with pytest.raises(ConfigError, match='name the workdirs'):
    compare([])
  with pytest.raises(ConfigError, match='must be a local path'):
    compare(['gs://bucket/run'])
  (runs[0] / 'report.json').write_text('{')
  with pytest.raises(ConfigError, match='report.json is no JSON'):
    compare(runs)
  (runs[0] / 'report.json').write_text('{"validation_bits_per_byte": {}}')
  with pytest.raises(ConfigError, match='of an earlier version: delete it, and train again'):
    compare(runs)
  (runs[3] / 'metrics.csv').unlink()
  with pytest.raises(ConfigError, match='no curve to draw'):
    compare(runs[3:], tmp_path / 'curves.png')


def test_command(runs):
  command = [sys.executable, '-m', 'dsa_jax.compare', *map(str, runs[:2]), f'--png={runs[0]}/c.png']
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0 and 'curves:' in done.stdout, done.stderr
  done = subprocess.run([*command[:3], str(runs[0] / 'no')], capture_output=True, text=True)
  assert done.returncode == 1 and done.stderr.startswith('error: ') and 'Traceback' not in done.stderr
