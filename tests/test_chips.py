# SPDX-License-Identifier: Apache-2.0
"""The peaks of chips stand in one table, and all that compute with them read it."""

import ast
import pathlib
import sys

import pytest

from dsa_jax import cost
from dsa_jax.chips import DEVICES, device_of_kind
from dsa_jax.compile import chips as compiled

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize('name', DEVICES)
def test_costs_are_of_whole_chips(name):
  device, chip = DEVICES[name], cost.CHIPS[name]
  assert cost.CHIPS.keys() == DEVICES.keys()
  for peak in ('bf16', 'fp8', 'bandwidth', 'memory'):
    assert getattr(chip, peak) == device.per_chip * getattr(device, peak)
  assert device.fp8 in (device.bf16, pytest.approx(2 * device.bf16, rel=1e-3))


def test_a_chip_of_tpu7x_is_two_devices():
  """By its vendor a chip has 2307 TFLOP/s, 4614 in FP8, 7380 GB/s and 192 GiB."""
  chip = cost.CHIPS['tpu7x']
  assert (chip.bf16, chip.fp8, chip.bandwidth) == (2307e12, 4614e12, 7380e9)
  assert chip.memory == 192 * 2**30
  assert [name for name, device in DEVICES.items() if device.per_chip > 1] == ['tpu7x']


def test_devices_go_by_what_jax_calls_them():
  assert device_of_kind('NVIDIA H200') is DEVICES['h200']
  assert device_of_kind('TPU v6 lite') is DEVICES['v6e']
  assert device_of_kind('cpu') is device_of_kind('NVIDIA H200 NVL') is None  # That one is slower.


def test_compile_reports_are_of_single_devices():
  for name, chip in compiled.CHIPS.items():
    device = DEVICES[name]
    assert (chip.hertz, chip.flops, chip.bytes) == (device.hertz, device.bf16, device.bandwidth)
    assert chip.gathered == device.gathered
  for name, gpu in compiled.GPUS.items():
    assert (gpu.flops, gpu.bytes) == (DEVICES[name].bf16, DEVICES[name].bandwidth)


def test_plans_of_pods_grant_what_the_table_says():
  sys.path.insert(0, str(ROOT / 'experiments' / 'pod_plan'))
  import plan

  assert plan.HBM_GIB == {'v5p': DEVICES['v5p'].granted, 'tpu7x': DEVICES['tpu7x'].granted}


def test_no_other_file_has_a_peak():
  """Judged by the rates of devices and of chips, and by what was once written elsewhere."""
  rates = {989e12, 1153e12, 95.74, 94.75}
  for device in DEVICES.values():
    for peak in (device.bf16, device.fp8, device.bandwidth):
      rates |= {peak, device.per_chip * peak}
  for folder in ('dsa_jax', 'configs', 'experiments'):
    for path in (ROOT / folder).rglob('*.py'):
      tree = ast.walk(ast.parse(path.read_text()))
      values = {n.value for n in tree if isinstance(n, ast.Constant) and type(n.value) is float}
      assert not rates & values or path == ROOT / 'dsa_jax' / 'chips.py', path
