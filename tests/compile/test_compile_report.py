# SPDX-License-Identifier: Apache-2.0
"""The compile report reads schedules as they are, and notices what got worse."""

import argparse
import json
import pathlib
import subprocess
import sys
import types

import jax
import pytest

from dsa_jax.compile import (
    chips as targets,
    fingerprint as programs,
    llo as schedule,
    report as compile_report,
    tpu_cases,
)

SCHEDULE = """\
LB: loop body
   0x1   :  { %7 = vsyncpa [#allocation6], 0 }
   0x2 LB: > { %s1 = sadd.s32 1, %s0 }
   0x3   : > { %s2 = sld [smem:[%s1]] }
   0x4 LB: >> { %v1 = vld [vmem:[%s2]] }
   0x5   : >> { %v2 = vadd.f32 %v1, %v1 }
second_minor_factor: 1 */ } /* End region 25 */
   0x6   : >> { vst [vmem:[%s2]], %v2 }
   0x7 PF: > { sbr.rel target = $region3 }
   0x8   :  {}
"""
PROGRAM = """\
  #allocation1 [shape = 'u32[144,128]{1,0:T(1,128)}', space=vmem, size = 0x12000, scoped]
  #allocation3 [shape = 's32[1]{0}', space=sflag, size = 0x4, scoped, tag = 'scoped memory']
    #allocation5 [shape = 'u8[1024]{0}', space=vmem, size = 0x400, scoped, tag = 'window']
"""
ROW = {'chip': 'v6e', 'model': 'v32', 'S': 4096, 'op': 'x'}
NAME = "'v6e', 'v32', 4096, 'x'"
GOOD = ROW | {'cycles': 100.0, 'temporaries_mib': 50.0, 'vmem_mib': 80.0}


def test_bundles_of_a_loop_exclude_those_of_its_inner_loops():
  assert schedule.loop_bodies(SCHEDULE) == [(1, 3), (2, 3)]


def test_an_outer_loop_goes_on_after_its_inner_ones():
  labels = 'LB: >', 'LB: >>', '  : >>', '  : >', 'LB: >>', '  : >', '  : ', 'LB: >'
  text = '\n'.join(f' 0x{i:x} {label} {{ }}' for i, label in enumerate(labels))
  assert schedule.loop_bodies(text) == [(1, 3), (2, 2), (2, 1), (1, 1)]


def test_loops_that_start_dmas_are_left_out():
  loops = [(1, 50), (2, 33), (2, 3), (2, 39), (3, 900), (2, 70)]
  loops = [schedule.Loop(*loop) for loop in loops]
  assert schedule.cycles(loops, [(1, 1), (2, 2), (3, 3), (2, 4)]) == 50 + 2 * 39 + 3 * 900 + 4 * 70
  assert schedule.cycles(loops[3:5], [(2, 2), (3, 3)]) == 2 * 39 + 3 * 900
  assert schedule.cycles(loops[1:2], [(2, 2)]) == 66  # Short, but expected.
  short = [schedule.Loop(2, n) for n in (34, 340, 33)]
  assert schedule.cycles(short, [(2, 1), (2, 1)]) == 34 + 340  # As short, and expected.


def test_a_schedule_may_lack_loops_that_never_run():
  loops = [schedule.Loop(*loop) for loop in [(1, 50), (2, 900), (2, 33)]]
  assert schedule.cycles(loops, [(1, 1), (2, 0), (2, 2)]) == 50 + 2 * 33
  assert schedule.cycles(loops, [(1, 1), (2, 0), (3, 0), (2, 2)]) == 50 + 2 * 900
  with pytest.raises(ValueError, match='the schedule has'):
    schedule.cycles(loops, [(1, 1), (3, 0), (3, 2)])


def test_kernels_run_beside_a_call_where_they_always_do():
  step = """
  %prepare_start_call_it.{i}.call-start = s32[] custom-call()
  %early.{i} = f32[] custom-call()
  %call_it.{i}.cloned.1.call-start = ((s32[]), s32[]) call-start(%x)
  %one.{i} = f32[] custom-call(), metadata={{op_name="jit(f)/sometimes"}}
  %while.{i} = (f32[]) while(%one.{i}), condition=%often, body=%region_{i}.clone
  {more}
  %call_it.{i}.cloned.1.call-done = s32[] call-done(%call_it.{i}.cloned.1.call-start)
  %late = f32[] custom-call(%while.{i})
"""
  loop = '%region_{i}.clone (x: f32[]) -> f32[] {{\n  %two.{i} = f32[] fusion(%x), kind=kCustom\n}}\n'
  own = loop.format(i=1) + loop.format(i=2) + 'ENTRY %main (x: f32[]) -> f32[] {\n'
  own += '  %call_it.9.call-start = () call-start(%x)\n  ROOT %call_it.9.call-done = s32[] call-done()\n'
  steps = step.format(i=1, more=''), step.format(i=2, more='%sometimes.7 = f32[] custom-call()')
  kernels = ['early', 'one', 'two', 'sometimes', 'late', 'on']
  assert schedule.beside(own + ''.join(steps), 'call_it', kernels) == ['one', 'two']
  assert schedule.beside(own + steps[1], 'call_it', kernels) == ['one', 'two', 'sometimes']
  assert schedule.beside(own, 'call_it', kernels) == []


def test_vmem_is_what_the_program_allocates_there():
  assert schedule.vmem_bytes(PROGRAM) == 0x12400


def test_cycles_are_bundles_times_trips(tmp_path):
  (tmp_path / '1-x.2-01-schedule-analysis_final_bundles.txt').write_text('no schedule')
  (tmp_path / '1-xy.2-02-final_bundles.txt').write_text('another kernel')
  (tmp_path / '1-x.2-02-final_bundles.txt').write_text(SCHEDULE)
  assert schedule.cycles_of(tmp_path, 'x', [(1, 0.5), (2, 10)]) == 31.5
  for wrong in [(1, 0.5), (3, 10)], []:
    with pytest.raises(ValueError) as e:
      schedule.cycles_of(tmp_path, 'x', wrong)
    assert 'x: ' in str(e.value) and 'bundles=3' in str(e.value) and str(wrong) in str(e.value)
  with pytest.raises(ValueError, match='z: the compiler wrote no final_bundles'):
    schedule.cycles_of(tmp_path, 'z', [])


def test_notices_kernels_that_wait_for_a_gather():
  before = GOOD | {'beside_gather': ['one', 'two']}
  assert not compile_report.compare([before], [before])
  (complaint,) = compile_report.compare([GOOD | {'beside_gather': ['two']}], [before])
  assert 'one no longer runs beside the gather' in complaint


@pytest.mark.parametrize('what', ['cycles', 'temporaries_mib', 'vmem_mib'])
def test_notices_what_is_more_than_a_tenth_worse(what):
  change = lambda factor: [GOOD | {what: factor * GOOD[what]}]
  assert not compile_report.compare(change(1.09), [GOOD])
  assert not compile_report.compare(change(0.5), [GOOD])
  (complaint,) = compile_report.compare(change(1.11), [GOOD])
  assert what in complaint and NAME in complaint


def test_notices_what_is_missing_or_does_not_compile():
  (complaint,) = compile_report.compare([GOOD], [])
  assert NAME in complaint and 'not in the committed report' in complaint
  (complaint,) = compile_report.compare([ROW | {'error': 'no VMEM left'}], [GOOD])
  assert NAME in complaint and 'no VMEM left' in complaint
  (complaint,) = compile_report.compare([GOOD | {'cycles': None}], [GOOD])
  assert 'cycles unknown, was 100' in complaint
  no_schedule = GOOD | {'cycles': None}
  assert not compile_report.compare([no_schedule], [no_schedule])


def test_an_op_that_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch, capsys):
  def measure(op, *_):
    if op.name == 'index_topk':
      raise RuntimeError('RESOURCE_EXHAUSTED: vmem\nmore')
    return {'cycles': 1.0}

  monkeypatch.setattr(compile_report, 'measure', measure)
  monkeypatch.setattr(tpu_cases, 'make_mesh', lambda chip: _cpu_mesh())
  line = 'x --worker DIR --chips v6e --models v32 --sizes 8 --ops index_topk'.split()
  line[2] = str(tmp_path)
  monkeypatch.setattr(sys, 'argv', [*line, 'sparse_attention_forward'])
  compile_report.main()
  failed, fine = map(json.loads, capsys.readouterr().out.splitlines())
  assert failed['error'] == 'RuntimeError: RESOURCE_EXHAUSTED: vmem'
  assert fine['op'] == 'sparse_attention_forward' and fine['cycles'] == 1


class Lowered:
  """A program that counts how often it is compiled."""

  def __init__(self):
    self.text, self.compiled = 'module', 0

  def as_text(self):
    return self.text

  def compile(self):
    self.compiled += 1
    return self

  def memory_analysis(self):
    return types.SimpleNamespace(temp_size_in_bytes=2**20)


def test_compiles_again_only_what_has_changed(tmp_path, monkeypatch):
  program = Lowered()
  monkeypatch.setattr(compile_report, 'lower_for', lambda *_: program)
  monkeypatch.setattr(compile_report, 'make_mesh', lambda chip: _cpu_mesh())
  monkeypatch.setattr(tpu_cases, 'measure', lambda *_: {'cycles': 1.0})
  dims = compile_report.Dims(128, 64, 4096, 2**26)
  measure = lambda known: compile_report.measure(
      tpu_cases.OPS['index_topk'], 'v6e', dims, tmp_path, known
  )
  row = measure({})
  assert measure(row) == row and program.compiled == 1
  changes = [
      (program, 'text', 'another module'),
      (programs, 'installed', lambda packages: {packages[-1]: '9'}),
      (tpu_cases, 'expects', lambda *_: 'other loops'),
  ]
  for n, (owner, attribute, value) in enumerate(changes):
    with monkeypatch.context() as patch:
      patch.setattr(owner, attribute, value)
      assert measure(row)['program'] != row['program']
      assert program.compiled == 2 + n


def test_parts_compile_every_row_once():
  due = [[compile_report.is_due(i, (k, 5)) for i in range(12)] for k in range(1, 6)]
  assert [sum(rows) for rows in zip(*due)] == [1] * 12
  assert not compile_report.is_due(0, None)


def test_rows_join_those_of_other_names(tmp_path):
  path, other = tmp_path / 'rows.json', GOOD | {'op': 'y'}
  for rows in [GOOD, other], [GOOD | {'cycles': 7.0}]:
    compile_report.write_rows(path, rows)
  assert json.loads(path.read_text()) == [GOOD | {'cycles': 7.0}, other]


def test_an_aborted_compiler_leaves_a_row_for_each_op(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['x', '--ops', 'index_topk', 'sparse_attention_forward'])
  args = compile_report.parse()
  out = json.dumps(ROW | {'op': 'index_topk', 'cycles': 1.0})
  ended = subprocess.CompletedProcess([], -6, stdout=out, stderr='Check failed: x\n')
  monkeypatch.setattr(compile_report.subprocess, 'run', lambda *_, **__: ended)
  monkeypatch.setattr(compile_report, 'environment', lambda *_: {})
  fine, lost = compile_report.rows_of(args, ('v6e', 'v32', 4096))
  assert 'error' not in fine
  assert lost['op'] == 'sparse_attention_forward' and 'Check failed: x' in lost['error']


def test_all_sizes_are_of_the_models_that_are_named():
  named = lambda **given: compile_report.models_and_sizes(argparse.Namespace(**({'all': True, 'models': None, 'sizes': None} | given)))
  assert named(models=['v32']) == [('v32', 4096), ('v32', 32_768), ('v32', 131_072)]
  assert named(models=['glm5'], sizes=[4096]) == [('glm5', 4096)]
  assert len(named()) == 6 and len(named(all=False)) == 2


@pytest.mark.parametrize('series, sizes', [('0.10', ['--all']), ('0.12', [])])
def test_every_row_is_committed_and_above_its_floor(series, sizes, monkeypatch):
  rows = json.loads(compile_report.committed_path('v6e', series).read_text())
  by_name = {compile_report.name(row): row for row in rows}
  monkeypatch.setattr(sys, 'argv', ['x', *sizes])
  for chip in targets.CHIPS:
    for model, size in compile_report.models_and_sizes(compile_report.parse()):
      for op in (op for op in tpu_cases.OPS.values() if op.fits(chip, model, size)):
        row = by_name[chip, model, size, op.name]
        assert 'error' not in row
        floor = max(row['mxu_cycles'], row.get('hbm_cycles', 0))
        assert op.plan is None or row['cycles'] > floor > 0


def test_rows_of_grouped_heads_are_above_their_floor():
  rows = json.loads(compile_report.committed_path('v6e', '0.10').read_text())
  rows = [row for row in rows if row['op'] in tpu_cases.OF_GROUPS]
  assert {row['chip'] for row in rows} == set(targets.CHIPS)
  for row in rows:
    assert tpu_cases.OF_GROUPS[row['op']].fits(row['chip'], row['model'], row['S'])
    assert row['cycles'] > max(row['mxu_cycles'], row['hbm_cycles']) > 0


def test_says_that_nothing_was_committed_for_this_jax(monkeypatch):
  monkeypatch.setattr(compile_report, 'committed_path', lambda chip: pathlib.Path(f'{chip}.json'))
  with pytest.raises(SystemExit, match=r"h200.json does not exist.*jax_0.10.json"):
    compile_report.read_committed(['h200'])


@pytest.mark.parametrize(
    'wrong, message',
    [
        ('--chips=v9', "invalid choice: 'v9'"),
        ('--ops=x', "--ops: ['x'] must be among"),
        ('--models=x', "invalid choice: 'x'"),
        ('--sizes=x', "invalid int value: 'x'"),
        ('--part=6/5', "invalid part value: '6/5'"),
        ('--chips=v6e', 'error: libtpu is not installed: pip install'),
        ('--chips=h200', 'error: ptxas and nvdisasm are not installed: pip install'),
    ],
)
def test_refuses_what_it_does_not_know_or_have(wrong, message, monkeypatch, capsys):
  monkeypatch.setattr(targets.importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(sys, 'argv', ['compile_report', wrong])
  with pytest.raises(SystemExit) as exit:
    compile_report.main()
  assert message in f'{exit.value} {capsys.readouterr().err}'


def test_says_what_is_wrong(tmp_path, monkeypatch):
  monkeypatch.delenv('TPU_ACCELERATOR_TYPE', raising=False)
  for call in lambda: targets.environment('v9', tmp_path), lambda: targets.lower_for('v9', abs):
    with pytest.raises(ValueError, match="chip='v9' must be one of"):
      call()
  monkeypatch.setattr(targets.importlib.util, 'find_spec', lambda name: 'libtpu')
  with pytest.raises(ValueError, match=r"needs a process with environment\('v6e'\)"):
    targets.lower_for('v6e', abs)
  monkeypatch.setattr(targets.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='libtpu is not installed: pip install'):
    targets.environment('v6e', tmp_path)


@pytest.mark.nightly
def test_compiles_an_op_for_a_chip(tmp_path):
  pytest.importorskip('libtpu', reason="needs the TPU's compiler: pip install 'dsa_jax[compile]'")
  path = tmp_path / 'rows.json'
  what = '--chips v6e --models glm5 --sizes 4096 --ops sparse_attention_forward'
  command = [sys.executable, '-m', 'dsa_jax.compile', *what.split(), f'--json={path}']
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  (row,) = json.loads(path.read_text())
  assert compile_report.name(row) == ('v6e', 'glm5', 4096, 'sparse_attention_forward')
  assert row['cycles'] > row['mxu_cycles'] > row['hbm_cycles'] > 0
  assert 0 < row['vmem_mib'] < 128 and row['temporaries_mib'] > 0
  assert '| v6e | glm5 | sparse_attention_forward | 4096 |' in done.stdout


def _cpu_mesh():
  return jax.make_mesh((1,), ('device',), (jax.sharding.AxisType.Auto,))
