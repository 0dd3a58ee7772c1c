# SPDX-License-Identifier: Apache-2.0
"""Chips to compile for without having one.

libtpu, the TPU's own compiler, needs no TPU attached: `pip install 'dsa_jax[compile]'`.
"""

import importlib.util
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DUMPED = '^(original|final_bundles)$'  # Passes; to write all 70 takes four times the compile.


class Chip(NamedTuple):
  """One device as jax sees it. Peaks are the makers'.

  The clock of tpu7x, 2.2 GHz, is assumed: none is published.
  """

  topology: str
  accelerator: str
  hertz: float
  flops: float  # bfloat16 per second.
  bytes: float  # HBM, per second.


CHIPS = {
    'v5p': Chip('v5p:2x2x1', 'v5p-8', 1.75e9, 459e12, 2.76e12),
    'v6e': Chip('v6e:2x2', 'v6e-4', 1.75e9, 918e12, 1.64e12),
    'tpu7x': Chip('tpu7x:2x2x1', 'tpu7x-8', 2.2e9, 1153e12, 3.69e12),
}


def environment(chip: str, dump: pathlib.Path | None = None) -> dict[str, str]:
  """What a process needs in its environment, before jax starts, to compile for a chip.

  Args:
    chip: A key of CHIPS.
    dump: Where the compiler writes the programs and schedules of kernels, in more than twice the
      time for a layer.
  """
  flags = f'--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true '
  flags += f'--xla_jf_dump_llo_pass_label_regex={DUMPED}'
  return {
      'JAX_PLATFORMS': 'cpu',
      'TPU_SKIP_MDS_QUERY': '1',
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'TPU_ACCELERATOR_TYPE': _checked(chip).accelerator,
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # Two processes at a time.
      'LIBTPU_INIT_ARGS': flags if dump else '',
  }


def make_mesh(chip: str) -> Mesh:
  """A mesh of one device of a chip, in a process with its `environment`."""
  spec = _checked(chip)
  if os.environ.get('TPU_ACCELERATOR_TYPE') != spec.accelerator:
    raise ValueError(f'compiling for {chip} needs a process with environment({chip!r}).')
  topology = topologies.get_topology_desc(platform='tpu', topology_name=spec.topology)
  return Mesh(np.array(topology.devices[:1]), ('device',))


def compile_for(chip: str, f, *shapes: Any) -> jax.stages.Compiled:
  """Compiles f for one device of a chip, in a process with its `environment`."""
  mesh = make_mesh(chip)
  place = NamedSharding(mesh, PartitionSpec())
  put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  with jax.set_mesh(mesh):
    return jax.jit(f).lower(*jax.tree.map(put, shapes)).compile()


def _checked(chip: str) -> Chip:
  if chip not in CHIPS:
    raise ValueError(f'{chip=} must be one of {tuple(CHIPS)}.')
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError("libtpu is not installed: pip install 'dsa_jax[compile]'.")
  return CHIPS[chip]
