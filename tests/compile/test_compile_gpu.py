# SPDX-License-Identifier: Apache-2.0
"""The compile report for GPUs reads what ptxas and nvdisasm say, and notices what got worse."""

import importlib.util
import json
import subprocess
import sys

import pytest

from dsa_jax.chips import DEVICES
from dsa_jax.compile import chips as targets, gpu_cases, layer, ptxas, report as compile_report

SAID = """\
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function 'x' for 'sm_90a'
    72 bytes stack frame, 84 bytes spill stores, 76 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 72 bytes cumulative stack size
"""
INSTRUCTIONS = """\
.text.x:
        /*0000*/                   STL [R1], R2 ;
.L_x_0:
        /*0010*/                   LDL R2, [R1] ;
.L_x_1:
        /*0020*/                   HGMMA.64x32x16.F32.BF16 R168, gdesc[UR40], R168 ;
        /*0030*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0040*/              @P0  BRA `(.L_x_1) ;
        /*0050*/              @P1  BRA `(.L_x_0) ;
        /*0060*/              @P2  BRA `(.L_x_2) ;
.L_x_2:
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3) ;
"""
THUNKS = """\
001: kCustomKernel [source] loop_fusion grid: [32, 1, 1] threads: [8, 1, 1]  shared_memory: 0 bytes
002: kCustomKernel [sink  ] x grid: [8192, 1, 1] threads: [8, 1, 1]  shared_memory: 225536 bytes
"""
ROW = {'chip': 'h200', 'model': 'v32', 'S': 4096, 'op': 'x', 'temporaries_mib': 1.0}


def has_cuda() -> bool:
  try:
    ptxas.toolkit()
  except ValueError:
    return False
  return importlib.util.find_spec('jax_plugins.xla_cuda13') is not None


def test_loops_end_where_they_jump_back():
  inner, outer = ptxas.loops(INSTRUCTIONS)
  assert [len(inner), len(outer)] == [3, 5]
  assert inner[0].startswith('HGMMA') and outer[0].startswith('LDL')


def test_describes_a_kernel():
  assert ptxas.describe(SAID, INSTRUCTIONS) == {
      'registers': 255,
      'spilled_bytes': 84,
      'loop_spills': 1,  # Not the one before the loop.
      'loop_instructions': 5,
      'loop_products': 1,
      'serialized': True,
  }
  assert not ptxas.describe(SAID.split('\n', 1)[1], INSTRUCTIONS)['serialized']
  assert ptxas.shared_bytes(THUNKS) == {'loop_fusion': 0, 'x': 225536}
  launches = ['dynamic_shared_memory_size %other', 'dynamic_shared_memory_size %c231480_i32 {']
  assert ptxas.launched_bytes(launches) == 231480 and ptxas.launched_bytes([]) is None


@pytest.mark.parametrize('what', ['loop_spills', 'serialized'])
def test_notices_a_first_spill(what):
  good = ROW | {'loop_spills': 0, 'serialized': 0}
  assert not compile_report.compare([good], [good])
  (complaint,) = compile_report.compare([good | {what: 1}], [good])
  assert f'{what} 1, was 0' in complaint


@pytest.mark.parametrize('series, sizes', [('0.10', ['--all']), ('0.12', ['--all'])])
def test_what_is_committed_spills_nothing_in_loops(series, sizes, monkeypatch):
  rows = json.loads(compile_report.committed_path('h200', series).read_text())
  monkeypatch.setattr(sys, 'argv', ['x', *sizes])
  cases = compile_report.models_and_sizes(compile_report.parse())
  some = gpu_cases.BASELINES | gpu_cases.OF_GROUPS
  grouped = [row for row in rows if row['op'] in gpu_cases.OF_GROUPS]
  rows = [row for row in rows if row['op'] not in some]
  expected = {(*x, op.name) for x in cases for op in gpu_cases.OPS.values() if x[0] in op.models}
  assert {(row['model'], row['S'], row['op']) for row in rows} == expected
  for row in rows + grouped:
    assert 'error' not in row and row['loop_spills'] == row['serialized'] == 0, row


def test_a_committed_layer_takes_at_most_24_gib_and_its_parts_are_those_of_arithmetic():
  rows = json.loads(compile_report.committed_path('h200', '0.10').read_text())
  layers = {row['op']: row for row in rows if row['op'] in gpu_cases.BASELINES}
  assert layers.keys() == {'layer_warmup', 'layer_sparse'}
  for name, row in layers.items():
    assert row['S'] == 32_768 and row['temporaries_mib'] <= 24 * 1024
    stage = layer.stage_of(gpu_cases.BASELINES[name])
    assert row['parts'] == layer.roofline(stage, row['S'], DEVICES['h200'])


def test_parts_of_a_layer_are_bound_by_arithmetic_or_by_memory(capsys):
  slow = DEVICES['h200']._replace(bf16=1e12, bandwidth=1e30), DEVICES['h200']._replace(bf16=1e30)
  parts = [layer.roofline('sparse', 4096, device) for device in slow]
  for name, part in parts[0].items():
    assert part['ms'] == pytest.approx(1e3 * part['tflop'])
    assert parts[1][name]['ms'] == pytest.approx(1e3 * part['gib'] * 2**30 / DEVICES['h200'].bandwidth)
  gpu_cases.print_table([ROW | {'op': 'layer_sparse', 'temporaries_mib': 2048.0, 'parts': parts[0]}])
  out = capsys.readouterr().out
  assert 'layer_sparse, v32, 4096 tokens, h200: temporaries 2.0 GiB.' in out
  assert out.count('\n|') == len(parts[0]) + 3


def test_says_what_is_missing(tmp_path, monkeypatch):
  monkeypatch.setattr(ptxas.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='ptxas and nvdisasm are not installed: pip install'):
    targets.environment('h200', tmp_path)


@pytest.mark.nightly
@pytest.mark.skipif(not has_cuda(), reason="needs pip install 'dsa_jax[compile-gpu]'")
def test_a_whole_layer_fits_an_h200_in_both_stages(tmp_path):
  path = tmp_path / 'rows.json'
  what = '--chips h200 --models v32 --sizes 32768 --ops layer_warmup layer_sparse'
  command = [sys.executable, '-m', 'dsa_jax.compile', *what.split(), f'--json={path}']
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  rows = json.loads(path.read_text())
  assert {row['op'] for row in rows} == {'layer_warmup', 'layer_sparse'}
  for row in rows:
    assert row['temporaries_mib'] <= 24 * 1024, row


@pytest.mark.nightly
@pytest.mark.skipif(not has_cuda(), reason="needs pip install 'dsa_jax[compile-gpu]'")
def test_compiles_an_op_for_a_gpu(tmp_path):
  path = tmp_path / 'rows.json'
  what = '--chips h200 --models glm5 --sizes 4096 --ops sparse_attention_forward --check'
  command = [sys.executable, '-m', 'dsa_jax.compile', *what.split(), f'--json={path}']
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  (row,) = json.loads(path.read_text())
  (kernel,) = row['kernels'].values()
  assert compile_report.name(row) == ('h200', 'glm5', 4096, 'sparse_attention_forward')
  assert kernel['loop_products'] > 0 and kernel['loop_spills'] == 0
  assert 0 < kernel['shared_bytes'] <= 232_448 and 0 < kernel['registers'] <= 255
  assert '| h200 | glm5 | sparse_attention_forward | 4096 |' in done.stdout
