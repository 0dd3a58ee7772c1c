# SPDX-License-Identifier: Apache-2.0
"""Metrics survive a round trip, a kill and a resume; progress reads well in a log."""

import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import rich.console
from tensorboardX.proto import event_pb2

from dsa_jax.chips import DEVICES
from dsa_jax.data.batch import Batch
from dsa_jax.reporting import meter, metrics
from dsa_jax.reporting.progress import ByteProgress, StepProgress


def train(workdir, stage, steps, seed=0):
  """Writes what a deterministic run would write for these steps."""
  with metrics.MetricsWriter(workdir) as writer:
    for step in steps:
      rng = np.random.default_rng([seed, step])
      writer.write(stage, step, {'lm_loss': rng.normal(), 'index_kl': rng.normal(size=3)})


def events(folder):
  """Yields TensorBoard events, oldest file first."""
  for path in sorted(folder.iterdir(), key=lambda p: p.name.rsplit('.')[-1]):
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], 'little')
      event = event_pb2.Event()
      event.ParseFromString(data[12 : 12 + size])
      yield event
      data = data[16 + size :]


def test_round_trip_is_exact(tmp_path):
  values = [0.1, 1 / 3, -1e-300, float(np.float32(0.7)), math.inf, math.nan]
  with metrics.MetricsWriter(tmp_path) as writer:
    for step, value in enumerate(values):
      writer.write('dense', step, {'lm_loss': value, 'index_kl': [value, 2.0]})
  rows = metrics.read_metrics(tmp_path / 'metrics.csv')
  steps, read = metrics.series(rows, 'dense', 'lm_loss')
  np.testing.assert_array_equal(steps, range(6))
  np.testing.assert_array_equal(read, values)
  assert [row.name for row in rows[:3]] == ['lm_loss', 'index_kl/layer_0', 'index_kl/layer_1']
  assert metrics.series(rows, 'sparse', 'lm_loss')[1].size == 0


def test_arrays_and_numpy_scalars_are_numbers(tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.write('dense', 1, {'a': np.float32(0.5), 'b': np.ones(2, np.float32), 'c': 3})
  assert [row.value for row in metrics.read_metrics(tmp_path / 'metrics.csv')] == [0.5, 1, 1, 3]


def test_a_layer_without_a_number_is_not_written(tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.write('sparse', 1, {'captured_mass': [0.25, None, 0.5]})
  rows = metrics.read_metrics(tmp_path / 'metrics.csv')
  assert [row[2:] for row in rows] == [('captured_mass/layer_0', 0.25), ('captured_mass/layer_2', 0.5)]


def test_rows_are_on_disk_after_each_write(tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.write('dense', 1, {'lm_loss': 2.0})
    assert metrics.read_metrics(writer.path) == [('dense', 1, 'lm_loss', 2.0)]


def test_rewind_drops_later_steps_of_that_stage_only(tmp_path):
  train(tmp_path, 'dense', range(5))
  train(tmp_path, 'sparse', range(5))
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.rewind('dense', 2)
  rows = metrics.read_metrics(tmp_path / 'metrics.csv')
  assert metrics.series(rows, 'dense', 'lm_loss')[0].tolist() == [0, 1, 2]
  assert metrics.series(rows, 'dense', 'index_kl/layer_2')[0].tolist() == [0, 1, 2]
  assert metrics.series(rows, 'sparse', 'lm_loss')[0].tolist() == [0, 1, 2, 3, 4]
  assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ['metrics.csv']


@pytest.mark.parametrize('cut', range(1, 240, 7))
def test_killed_and_resumed_equals_undisturbed(tmp_path, cut):
  train(tmp_path / 'undisturbed', 'dense', range(1, 9))
  train(tmp_path / 'killed', 'dense', range(1, 6))
  killed = tmp_path / 'killed' / 'metrics.csv'
  killed.write_bytes(killed.read_bytes()[:-cut])
  rows = metrics.read_metrics(killed)
  checkpoint = max((r.step for r in rows if r.name == 'index_kl/layer_2'), default=0)
  with metrics.MetricsWriter(tmp_path / 'killed') as writer:
    writer.rewind('dense', checkpoint)
  train(tmp_path / 'killed', 'dense', range(checkpoint + 1, 9))
  assert killed.read_bytes() == (tmp_path / 'undisturbed' / 'metrics.csv').read_bytes()


@pytest.mark.parametrize('left', ['', 'stage,st', metrics.HEADER])
def test_heals_a_file_cut_in_its_header(tmp_path, left):
  (tmp_path / 'metrics.csv').write_text(left)
  train(tmp_path, 'dense', [1])
  assert len(metrics.read_metrics(tmp_path / 'metrics.csv')) == 4


def test_opening_heals_a_torn_line(tmp_path):
  train(tmp_path, 'dense', [1])
  with (tmp_path / 'metrics.csv').open('a') as file:
    file.write('dense,2,lm_loss,1.')
  assert len(metrics.read_metrics(tmp_path / 'metrics.csv')) == 4
  train(tmp_path, 'dense', [2])
  assert len(metrics.read_metrics(tmp_path / 'metrics.csv')) == 8


def test_tensorboard_has_one_folder_per_stage_and_is_purged(tmp_path):
  train(tmp_path, 'dense', range(4))
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.rewind('dense', 1)
    writer.write('dense', 2, {'lm_loss': 7.0})
    writer.write('sparse', 2, {'lm_loss': 8.0})
  folder = tmp_path / 'tensorboard'
  assert sorted(path.name for path in folder.iterdir()) == ['dense', 'sparse']
  read = list(events(folder / 'dense'))
  purged_from = [e.step for e in read if e.HasField('session_log')]
  scalars = [(e.step, v.tag) for e in read for v in e.summary.value]
  assert purged_from == [2]
  assert scalars[:2] == [(0, 'lm_loss'), (0, 'index_kl/layer_0')]
  assert scalars[-1] == (2, 'lm_loss')


@pytest.mark.parametrize(
    ('stage', 'scalars', 'named'),
    [
        ('dense', {'a,b': 1.0}, "'a,b'"),
        ('../dense', {'a': 1.0}, "'../dense'"),
        ('dense', {'a': np.ones((2, 2))}, 'a has shape'),
    ],
)
def test_refuses_what_it_cannot_write(tmp_path, stage, scalars, named):
  with metrics.MetricsWriter(tmp_path) as writer:
    with pytest.raises(ValueError, match=named):
      writer.write(stage, 1, scalars)
  assert metrics.read_metrics(tmp_path / 'metrics.csv') == []


def test_refuses_another_programs_file(tmp_path):
  (tmp_path / 'metrics.csv').write_text('epoch,loss\n1,2\n')
  with pytest.raises(ValueError, match='must begin with'):
    metrics.MetricsWriter(tmp_path)
  assert (tmp_path / 'metrics.csv').read_text() == 'epoch,loss\n1,2\n'


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch):
  clock = iter(np.arange(0, 1000, 1.0))
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: float(next(clock)))
  out = io.StringIO()
  with StepProgress(rich.console.Console(file=out)) as progress:
    progress.start_stage('dense', 30, 0)
    for step in range(1, 31):
      progress.update(step, 12_345.6, 'loss [2.5]')
    progress.start_stage('sparse', 50, 40)
    progress.update(41, 10.0)
    progress.start_stage('fresh', 50)
    progress.update(1, 0.0, 'loss')  # Nothing is known yet.
  lines = out.getvalue().splitlines()
  assert lines[0] == 'dense: 30 steps'
  assert lines[1] == 'dense 10/30, 12,346 tokens/s, loss [2.5], 0:00:20 left'
  assert lines[-5] == 'dense 30/30, 12,346 tokens/s, loss [2.5]'
  assert lines[-4:-2] == ['sparse: 50 steps, continues after step 40', 'sparse 41/50, 10 tokens/s']
  assert lines[-2:] == ['fresh: 50 steps', 'fresh 1/50, loss']
  assert len(lines) < 11


def test_progress_in_bytes_says_what_is_left_when_it_can_know(monkeypatch):
  clock = iter([0.0, 20.0, 40.0, 60.0])
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: next(clock))
  with ByteProgress('convert', 200_000_000, rich.console.Console(file=(out := io.StringIO()))) as progress:
    for nbytes in 64, 99_999_936, 100_000_000:
      progress.advance(nbytes)
  assert out.getvalue().splitlines() == [
      'convert 64/200,000,000 bytes, 0 MB/s',
      'convert 100,000,000/200,000,000 bytes, 2 MB/s, 0:00:40 left',
      'convert 200,000,000/200,000,000 bytes, 3 MB/s, 0:00:00 left',
  ]


def test_progress_on_a_terminal_is_a_bar():
  out = io.StringIO()
  console = rich.console.Console(file=out, force_terminal=True, width=100)
  with StepProgress(console) as progress:
    progress.start_stage('warmup', 10, 4)
    progress.update(10, 2000.0, 'KL [0.5]')
  shown = out.getvalue()
  assert 'warmup' in shown and '10/10' in shown and '2,000 tokens/s' in shown
  assert 'KL [0.5]' in shown


def test_a_meter_reads_speed_since_its_last_reading_and_the_largest_peak(monkeypatch):
  clock = iter([0.0, 2.0, 3.0])
  monkeypatch.setattr(meter.time, 'monotonic', lambda: next(clock))
  stats = lambda n: lambda: n and {'peak_bytes_in_use': n}
  devices = [SimpleNamespace(memory_stats=stats(n), device_kind='cpu') for n in (2**30, 2**31)]
  monkeypatch.setattr(meter.jax, 'local_devices', lambda: devices)
  read = meter.Meter(100, step=10, flops=lambda batch: 1.0, n_devices=1)
  read.count(11, Batch(*[np.zeros((1, 100))] * 5))
  assert read.read(14) == {'tokens_per_second': 200.0, 'device_memory_gib': 2.0}
  devices[:] = [SimpleNamespace(memory_stats=lambda: None)]
  assert read.read(15) == {'tokens_per_second': 100.0}


def test_a_meter_knows_the_utilisation_where_it_knows_the_peak(monkeypatch):
  """A process with half the rows counts twice their FLOPs; a step that is not recorded waits."""
  clock = iter([0.0, 2.0, 3.0])
  monkeypatch.setattr(meter.time, 'monotonic', lambda: next(clock))
  device = SimpleNamespace(memory_stats=lambda: None, device_kind='NVIDIA H200')
  monkeypatch.setattr(meter.jax, 'local_devices', lambda: [device])
  peak, half = DEVICES['h200'].bf16, Batch(*[np.zeros((1, 50))] * 5)
  read = meter.Meter(100, step=10, flops=lambda batch: peak, n_devices=4)
  for step in (11, 12, 13):
    read.count(step, half)
  assert read.read(12) == {'tokens_per_second': 100.0, 'mfu': 2 * 2 * peak / (2.0 * 4 * peak)}
  assert read.read(13) == {'tokens_per_second': 100.0, 'mfu': 2 * peak / (1.0 * 4 * peak)}
