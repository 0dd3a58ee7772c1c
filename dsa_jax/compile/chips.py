# SPDX-License-Identifier: Apache-2.0
"""Chips to compile for without having one.

libtpu, the TPU's own compiler, needs no TPU attached: `pip install 'dsa_jax[compile]'`. Nor do
XLA's compiler for NVIDIA GPUs and ptxas: `pip install 'dsa_jax[compile-gpu]'`.
"""

import importlib.util
import os
import pathlib
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from dsa_jax.chips import DEVICES
from dsa_jax.compile import ptxas

# The passes that are written. Writing all 70 takes four times as long as compiling.
DUMPED = '^(original|final_bundles)$'


class Chip(NamedTuple):
  """One device as jax sees it, with its peaks of `dsa_jax.chips`."""

  topology: str
  accelerator: str
  hertz: float
  flops: float  # FLOP/s in bfloat16.
  bytes: float  # Bytes of HBM per second.
  gathered: float | None = None  # Bytes per second that SparseCores gather in rows of 512 bytes.


def _peaks(name: str) -> tuple[float | None, ...]:
  device = DEVICES[name]
  return device.hertz, device.bf16, device.bandwidth, device.gathered


CHIPS = {
    'v5p': Chip('v5p:2x2x1', 'v5p-8', *_peaks('v5p')),
    'v6e': Chip('v6e:2x2', 'v6e-4', *_peaks('v6e')),
    'tpu7x': Chip('tpu7x:2x2x1', 'tpu7x-8', *_peaks('tpu7x')),
}


class Gpu(NamedTuple):
  """One device as XLA's compiler sees it, with its peaks of `dsa_jax.chips`."""

  architecture: str  # What ptxas compiles for.
  flops: float  # FLOP/s in bfloat16, of dense products.
  bytes: float  # Bytes of HBM per second.
  config: str  # What XLA compiles for, a GpuTargetConfigProto.


GPUS = {
    'h200': Gpu(
        'sm_90a', DEVICES['h200'].bf16, DEVICES['h200'].bandwidth,
        """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000  l2_cache_size: 62914560  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
""",
    ),
}  # fmt: skip


def environment(chip: str, dump: pathlib.Path | None = None) -> dict[str, str]:
  """Returns what a process needs in its environment, before jax starts, to compile for a chip.

  Args:
    chip: A key of CHIPS or of GPUS.
    dump: The folder for programs and schedules of kernels. Dumping them more than doubles the time
      that a layer takes to compile.
  """
  if chip in GPUS:
    flags = f'--xla_dump_to={dump} --xla_gpu_cuda_data_dir={ptxas.toolkit()} '
    return {
        'JAX_PLATFORMS': 'cpu',
        'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1',
        'XLA_FLAGS': flags + '--xla_dump_emitter_re=ptx',  # jax 0.11 dumps PTX only if asked.
        'MOSAIC_GPU_DUMP_TO': str(dump),
    }
  flags = f'--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true '
  flags += f'--xla_jf_dump_llo_pass_label_regex={DUMPED}'
  return {
      'JAX_PLATFORMS': 'cpu',
      'TPU_SKIP_MDS_QUERY': '1',
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'TPU_ACCELERATOR_TYPE': _checked(chip).accelerator,
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # Two processes may compile at a time.
      'LIBTPU_INIT_ARGS': flags if dump else '',
  }


def make_mesh(chip: str) -> Mesh:
  """Returns a mesh of one device of a chip, in a process with its `environment`."""
  if chip in GPUS:
    topology = topologies.get_topology_desc(
        platform='cuda', topology_name='', topology='1x1x1', target_config=GPUS[chip].config
    )
    return Mesh(np.array(topology.devices[:1]), ('device',))
  spec = _checked(chip)
  if os.environ.get('TPU_ACCELERATOR_TYPE') != spec.accelerator:
    raise ValueError(f'compiling for {chip} needs a process with environment({chip!r}).')
  topology = topologies.get_topology_desc(platform='tpu', topology_name=spec.topology)
  return Mesh(np.array(topology.devices[:1]), ('device',))


def lower_for(chip: str, f, *shapes: Any) -> jax.stages.Lowered:
  """Lowers f for one device of a chip, in a process with its `environment`."""
  mesh = make_mesh(chip)
  place = NamedSharding(mesh, PartitionSpec())
  put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  with jax.set_mesh(mesh):
    return jax.jit(f).lower(*jax.tree.map(put, shapes))


def check_compiler(chip: str):
  """Raises ValueError if a chip is not known, or its compiler is not installed."""
  if chip in GPUS:
    ptxas.toolkit()
  else:
    _checked(chip)


def _checked(chip: str) -> Chip:
  if chip not in CHIPS:
    raise ValueError(f'{chip=} must be one of {(*CHIPS, *GPUS)}.')
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError("libtpu is not installed: pip install 'dsa_jax[compile]'.")
  return CHIPS[chip]
