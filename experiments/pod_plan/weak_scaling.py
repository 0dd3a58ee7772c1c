# SPDX-License-Identifier: Apache-2.0
"""Compiles a small model's step for 1 to 256 v5p, with equally many tokens on every device.

python experiments/pod_plan/weak_scaling.py --json=experiments/pod_plan/weak_scaling.json

Sequences grow with the devices. Prints a table of what one device computes, holds and receives,
from the compiler's report and program.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import plan

from dsa_jax.compile.chips import environment
from dsa_jax.compile.hlo import collectives, total_bytes
from dsa_jax.config import ModelConfig
from dsa_jax.cost.work import index_flops, mha_flops
from dsa_jax.parallel.mesh import MeshConfig
from dsa_jax.training.stages import StageConfig

TOKENS = 1024  # Tokens of each device.
POD = {1: '2x2x1', 4: '2x2x1', 16: '2x2x4', 64: '4x4x4', 256: '4x8x8'}
LONGEST = TOKENS * max(POD)
MODEL = ModelConfig(
    vocab_size=4096, dim=512, n_layers=2, n_dense_layers=1, inter_dim=1024, moe_inter_dim=256,
    n_routed_experts=8, n_activated_experts=2, n_expert_groups=1, n_limited_groups=1, n_heads=4,
    q_lora_rank=256, index_n_heads=4, index_topk=256, max_seq_len=LONGEST, original_seq_len=LONGEST,
)  # fmt: skip
COLUMNS = {
    'stage': 'stage',
    'devices': 'devices',
    'context': 'context',
    'gflops': 'GFLOPs, compiler',
    'context_gflops': 'GFLOPs over the context, arithmetic',
    'arguments_mib': 'arguments, MiB',
    'temporaries_mib': 'temporaries, MiB',
    'gathered_mib': 'gathered, MiB',
    'scattered_mib': 'scattered, MiB',
    'summed_mib': 'summed, MiB',
    'compile_seconds': 'compiled in, s',
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--json', type=pathlib.Path, help='also write the rows there')
  parser.add_argument('--compile', action='store_true', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if not options.compile:  # The compiler reads its environment once.
    command = [sys.executable, *sys.argv, '--compile']
    sys.exit(subprocess.run(command, env=os.environ | environment('v5p')).returncode)
  rows = []
  print_row(COLUMNS.values())
  print_row(['---:'] * len(COLUMNS))
  for stage in ('warmup', 'sparse'):
    for n in POD:
      rows.append(measure(stage, n))
      print_row(rows[-1][name] for name in COLUMNS)
      if options.json:
        options.json.write_text('[\n ' + ',\n '.join(map(json.dumps, rows)) + '\n]\n')


def measure(stage: str, n: int) -> dict:
  """Returns one device's share of a step on n of them."""
  entry = plan.deepseek_v32.get_config().stages[stage].to_dict()
  entry = StageConfig(**entry | dict(batch_size=1, micro_batches=1, seq_len=TOKENS * n))
  mesh = plan.pod_mesh(f'v5p:{POD[n]}', MeshConfig(context=n))
  began = time.monotonic()
  compiled, _ = plan.compile_step(MODEL, entry, mesh, 1)
  seconds = time.monotonic() - began
  memory = compiled.memory_analysis()
  said = total_bytes(collectives(compiled.as_text(), dict(mesh.shape)))
  of = lambda kind: round(sum(v for name, v in said.items() if name.startswith(kind)) / 2**20, 2)
  return {
      'stage': stage,
      'devices': n,
      'context': entry.seq_len,
      'gflops': round(compiled.cost_analysis()['flops'] / 1e9, 1),
      'context_gflops': round(context_flops(stage, entry.seq_len) / 1e9, 1),
      'arguments_mib': round(memory.argument_size_in_bytes / 2**20, 1),
      'temporaries_mib': round(memory.temp_size_in_bytes / 2**20, 1),
      'gathered_mib': of('all-gather'),
      'scattered_mib': of('reduce-scatter'),
      'summed_mib': of('all-reduce'),
      'compile_seconds': round(seconds),
  }


def context_flops(stage: str, context: int) -> float:
  """Returns FLOPs of a device's queries with all keys before them, in one forward pass."""
  flops = index_flops(MODEL) + (mha_flops(MODEL) if stage == 'warmup' else 0)
  return TOKENS * MODEL.n_layers * flops * context / 2


def print_row(values):
  print('|', ' | '.join(map(str, values)), '|', flush=True)


if __name__ == '__main__':
  main()
