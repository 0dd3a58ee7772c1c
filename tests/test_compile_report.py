# SPDX-License-Identifier: Apache-2.0
"""The compile report reads schedules as they are, and notices what got worse."""

import json
import sys

import pytest

from dsa_jax import compile_report, targets

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
ROW = {'chip': 'v6e', 'model': 'v32', 'S': 4096, 'kernel': 'x'}
ROW |= {'cycles': 100.0, 'temporaries_mib': 50.0}


def test_bundles_of_a_loop_exclude_those_of_its_inner_loops():
  assert targets.loop_bodies(SCHEDULE) == [(1, 3), (2, 3)]


def test_cycles_are_bundles_times_trips(tmp_path):
  (tmp_path / '1-x.2-70-schedule-analysis_final_bundles.txt').write_text('no schedule')
  (tmp_path / '1-x.2-71-final_bundles.txt').write_text(SCHEDULE)
  assert compile_report.cycles_of(tmp_path, 'x', [(1, 0.5), (2, 10)]) == 31.5
  with pytest.raises(ValueError, match=r'x has loops \[\(1, 3\), \(2, 3\)\]'):
    compile_report.cycles_of(tmp_path, 'x', [(1, 0.5), (3, 10)])


@pytest.mark.parametrize('what', ['cycles', 'temporaries_mib'])
def test_notices_what_is_more_than_a_tenth_worse(what):
  change = lambda factor: [ROW | {what: factor * ROW[what]}]
  assert not compile_report.compare(change(1.09), [ROW])
  assert not compile_report.compare(change(0.5), [ROW])
  (complaint,) = compile_report.compare(change(1.11), [ROW])
  assert what in complaint and "'v6e', 'v32', 4096, 'x'" in complaint
  (complaint,) = compile_report.compare([ROW], [])
  assert 'not in the committed report' in complaint


def test_every_chip_and_kernel_of_the_check_is_committed():
  rows = json.loads(compile_report.COMMITTED.read_text())
  rows = [row for row in rows if (row['model'], row['S']) == ('v32', 32_768)]
  kernels = {'index_topk_cut', 'index_topk_positions'}
  for op in ('sparse_attention', 'index_kl_selected'):
    kernels |= {f'{op}_forward', f'{op}_backward'}
  found = {(row['chip'], row['kernel']) for row in rows}
  assert found == {(chip, kernel) for chip in targets.CHIPS for kernel in kernels}


def test_says_what_is_wrong(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="chip='v9' must be one of"):
    targets.environment('v9', tmp_path)
  monkeypatch.setattr(targets.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='libtpu is not installed: pip install'):
    targets.environment('v6e', tmp_path)
  monkeypatch.setattr(sys, 'argv', ['compile_report', '--chips', 'v9'])
  with pytest.raises(SystemExit):
    compile_report.main()
