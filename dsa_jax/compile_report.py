# SPDX-License-Identifier: Apache-2.0
"""Compiles the TPU kernels for real chips, on any machine, and says what they will take.

python -m dsa_jax.compile_report
python -m dsa_jax.compile_report --all --json=experiments/kernel_speed/compile_report.json
python -m dsa_jax.compile_report --check   # Against that file, as CI does.

Cycles are bundles of each loop of the compiler's final schedule times how often the loop runs for
a query that selects K keys, evenly spread, and sees half of S; DMA and stalls are not in them.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from dsa_jax.kernels.index_kl import tpu as kl
from dsa_jax.kernels.index_topk import tpu as select
from dsa_jax.kernels.resident import LANES, Rows, fit_tile, make_shards
from dsa_jax.kernels.sparse_attention import tpu as attention
from dsa_jax.targets import CHIPS, compile_for, environment, loop_bodies

COMMITTED = pathlib.Path('experiments/kernel_speed/compile_report.json')
T, E, V, J, K = 4096, 576, 512, 128, 2048
HEADS = {'v32': (128, 64), 'glm5': (64, 32)}  # Of attention, of the indexer.
BISECTIONS = 26  # Seen for random scores; at most 32.
WORSE = 1.10  # What --check lets pass.
VMEM = {'v5p': 64, 'v6e': 128, 'tpu7x': 64}  # MiB.


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--chips', nargs='*', default=list(CHIPS), choices=list(CHIPS))
  parser.add_argument('--sizes', type=int, nargs='*', default=[32_768])
  parser.add_argument('--models', nargs='*', default=['v32'], choices=list(HEADS))
  parser.add_argument('--all', action='store_true', help='4K, 32K and 128K keys, both models')
  parser.add_argument('--check', action='store_true', help=f'fail where worse than {COMMITTED}')
  parser.add_argument('--json', type=pathlib.Path, help='also write the rows there')
  parser.add_argument('--worker', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.all:
    args.sizes, args.models = [4096, 32_768, 131_072], list(HEADS)
  if args.worker:
    return work(args)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    rows = sum(pool.map(functools.partial(rows_of, args), args.chips), [])
  print_table(rows)
  if args.json:
    args.json.write_text(json.dumps(rows, indent=1) + '\n')
  if args.check:
    complaints = compare(rows, json.loads(COMMITTED.read_text()))
    sys.exit('\n'.join(complaints) or None)


def rows_of(args, chip: str) -> list[dict]:
  """The rows of a chip, from a process of its own: libtpu reads its flags once."""
  with tempfile.TemporaryDirectory() as dump:
    command = [sys.executable, '-m', 'dsa_jax.compile_report', '--worker', dump, '--chips', chip]
    command += ['--models', *args.models, '--sizes', *map(str, args.sizes)]
    env = os.environ | environment(chip, pathlib.Path(dump))
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
  return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]


def print_table(rows: list[dict]):
  print('| chip | model | S | kernel | temporaries MiB | compiled s | cycles a query | us | MXU |')
  print('| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |')
  for r in rows:
    print('| {chip} | {model} | {S} | {kernel} | {temporaries_mib:.0f} | {seconds:.0f} '
          '| {cycles:.0f} | {us:.2f} | {mxu_cycles:.0f} |'.format(**r))


def work(args):
  dump, (chip,) = pathlib.Path(args.worker), args.chips
  for model in args.models:
    for n_keys in args.sizes:
      for op in OPS:
        began = time.perf_counter()
        f, shapes, kernels = op(n_keys, *HEADS[model], VMEM[chip])
        compiled = compile_for(chip, f, *shapes)
        seconds = time.perf_counter() - began
        temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
        for kernel, (trips, flops) in kernels.items():
          cycles = cycles_of(dump, kernel, trips)
          spec = CHIPS[chip]
          row = {'chip': chip, 'model': model, 'S': n_keys, 'kernel': kernel}
          row |= {'temporaries_mib': temporaries, 'seconds': seconds, 'cycles': cycles}
          row |= {'us': 1e6 * cycles / spec.hertz, 'mxu_cycles': flops / spec.flops * spec.hertz}
          print(json.dumps(row), flush=True)
        for path in dump.iterdir():
          path.unlink()


def cycles_of(dump: pathlib.Path, kernel: str, trips: list) -> float:
  """Bundles times trips; `trips` has (depth, count) for each loop, in the schedule's order."""
  found = [x for x in dump.glob(f'*-{kernel}.*final_bundles.txt') if 'analysis' not in x.name]
  loops = loop_bodies(max(found).read_text())
  if [depth for depth, _ in loops] != [depth for depth, _ in trips]:
    raise ValueError(f'{kernel} has loops {loops}, (depth, bundles); expected {trips}.')
  return sum(bundles * n for (_, bundles), (_, n) in zip(loops, trips))


def compare(rows: list[dict], committed: list[dict]) -> list[str]:
  """What is worse than what was committed, a line each."""
  name = lambda row: (row['chip'], row['model'], row['S'], row['kernel'])
  known, complaints = {name(row): row for row in committed}, []
  for row in rows:
    before = known.get(name(row))
    if before is None:
      complaints.append(f'{name(row)}: not in the committed report.')
      continue
    for what in ('cycles', 'temporaries_mib'):
      if row[what] > WORSE * before[what]:
        complaints.append(f'{name(row)}: {what} {row[what]:.0f}, was {before[what]:.0f}.')
  return complaints


def shape(*dims: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, *dims), dtype)


def int32(*dims: int) -> jax.ShapeDtypeStruct:
  return shape(*dims, dtype=jnp.int32)


def float32(*dims: int) -> jax.ShapeDtypeStruct:
  return shape(*dims, dtype=jnp.float32)


def tile_trips(blocks, bytes_per_key: int, n_keys: int, vmem: int, row_loops: int) -> list:
  """Loops of a kernel that meets shards, for one query: step, query, tile, groups of rows."""
  shards = make_shards(n_keys, bytes_per_key, int(blocks.vmem_share * vmem * 2**20))
  slots = -(-K // shards.n)
  tiles = shards.n * -(-slots // fit_tile(blocks.tile, K, shards))
  groups = shards.n * -(-slots // blocks.group)
  return [(1, shards.n / blocks.step_t), (2, shards.n), (3, tiles), *[(4, groups)] * row_loops]


def index_topk(n_keys, _, heads, vmem):
  blocks = select.BlockSizes()
  how = dict(topk=K, blocks=blocks)
  shapes = shape(T, heads, J), shape(n_keys, J), float32(T, heads), int32(T), int32(T)
  seen, tiles = n_keys / 2 / select.TILE, -(-n_keys // select.TILE)
  per_tile = select.TILE / blocks.step_s
  loops = (1, tiles), (2, seen * per_tile), (2, seen), (2, BISECTIONS)
  loops += (3, BISECTIONS * seen), (2, seen)
  trips = [(depth, n / blocks.step_t) for depth, n in loops]
  return lambda *x: select.forward(*x, **how), shapes, {
      'index_topk_cut': (trips, n_keys / 2 * heads * 2 * J),
      'index_topk_positions': ([(1, 1 / blocks.step_t), (2, 1)], 0),
  }


def attention_forward(n_keys, heads, _, vmem):
  blocks = attention.BlockSizes()
  how = dict(v_dim=V, sm_scale=0.1, blocks=blocks)
  shapes = shape(T, heads, E), shape(n_keys, E), int32(T, K)
  trips = tile_trips(blocks, Rows(E, jnp.dtype('bfloat16')).bytes, n_keys, vmem, 1)
  work = 2 * K * heads * (E + V)
  f = lambda *x: attention.forward(*x, **how)
  return f, shapes, {'sparse_attention_forward': (trips, work)}


def attention_backward(n_keys, heads, _, vmem):
  blocks, rows = attention.BlockSizes(), Rows(E, jnp.dtype('bfloat16'))
  how = dict(v_dim=V, sm_scale=0.1, blocks=blocks)
  out, lse = shape(T, heads, V), float32(T, heads)
  shapes = (shape(T, heads, E), shape(n_keys, E), int32(T, K), out, lse), (out, lse)
  trips = tile_trips(blocks, rows.bytes + 4 * rows.channels, n_keys, vmem, 2)
  work = 2 * K * heads * (3 * E + 2 * V)
  f = lambda *x: attention.backward(*x, **how)
  return f, shapes, {'sparse_attention_backward': (trips, work)}


def _kl_shapes(n_keys, heads, index_heads):
  constants = shape(T, heads, E), shape(n_keys, 1, E), float32(T, heads)
  constants += int32(T), int32(T), int32(T, K)
  return constants, (shape(T, index_heads, J), shape(n_keys, J), float32(T, index_heads))


def kl_forward(n_keys, heads, index_heads, vmem):
  blocks, bf16 = kl.BlockSizes(), jnp.dtype('bfloat16')
  constants, index = _kl_shapes(n_keys, heads, index_heads)
  size = Rows(E, bf16).bytes + Rows(J, bf16).bytes
  trips = tile_trips(blocks, size, n_keys, vmem, 2)
  f = lambda constants, index: kl.forward(constants, *index, sm_scale=0.1, blocks=blocks)
  work = 2 * K * (heads * E + index_heads * J)
  return f, (constants, index), {'index_kl_selected_forward': (trips, work)}


def kl_backward(n_keys, heads, index_heads, vmem):
  blocks, bf16 = kl.BlockSizes(), jnp.dtype('bfloat16')
  constants, index = _kl_shapes(n_keys, heads, index_heads)
  size = Rows(E, bf16).bytes + Rows(J, bf16).bytes + 4 * LANES
  trips = tile_trips(blocks, size, n_keys, vmem, 3)
  f = lambda *x: kl.backward(*x, sm_scale=0.1, blocks=blocks)
  work = 2 * K * (heads * E + 3 * index_heads * J)
  shapes = constants, (*index, float32(T), float32(T)), float32(T)
  return f, shapes, {'index_kl_selected_backward': (trips, work)}


OPS = (index_topk, attention_forward, attention_backward, kl_forward, kl_backward)

if __name__ == '__main__':
  main()
