# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels for real TPUs and GPUs, on any machine, and says what they will take.

python -m dsa_jax.compile_report
python -m dsa_jax.compile_report --all --json=experiments/kernel_speed/compile_report.json
python -m dsa_jax.compile_report --check   # Against that file, as CI does.

Cycles are bundles of each loop of the compiler's final schedule times how often the loop runs for
a query that selects K keys, evenly spread, and sees half of S; stalls are not in them. Where rows lie
in HBM, kernels take at least as long as those take through it; other DMA is not in them.
Floors: products at the bfloat16 peak; arguments and results through HBM once, 4096 queries sharing keys.
VMEM is what the kernel allocates there, the largest where an op has several kernels.
Gathers of SparseCores are bytes over a published rate, of which what goes on beside kernels is free.

python -m dsa_jax.compile_report --chips h200 --check

Of a GPU: registers, spills and shared memory of each kernel, and the tensor cores' floor.
"""

import argparse
import concurrent.futures
import functools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax

from dsa_jax import gpu_cases, schedule
from dsa_jax.compile_cases import BASELINES, HEADS, KERNELS, OPS, Dims, Op, T, streamed
from dsa_jax.kernels import resident
from dsa_jax.targets import CHIPS, GPUS, compile_for, environment, make_mesh

COMMITTED = pathlib.Path('experiments/kernel_speed/compile_report.json')
COMMITTED_GPU = COMMITTED.with_name('compile_report_gpu.json')
DEFAULT = [('v32', 32_768), ('glm5', 32_768)]  # CI has a few minutes.
WORSE = 1.10  # What --check lets pass.


def main():
  args = parse()
  if args.worker:
    return work(args)
  jobs = [(chip, *case) for chip in args.chips for case in plan(args)]
  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    rows = sum(pool.map(functools.partial(rows_of, args), jobs), [])
  print_tables(rows)
  if args.json:
    args.json.write_text(json.dumps(rows, indent=1) + '\n')
  complaints = [f'{name(row)}: {row["error"]}' for row in rows if 'error' in row]
  if args.check:
    committed = [json.loads(path.read_text()) for path in (COMMITTED, COMMITTED_GPU)]
    complaints = compare(rows, sum(committed, []))
  sys.exit('\n'.join(complaints) or None)


def parse():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--chips', nargs='+', default=list(CHIPS), choices=[*CHIPS, *GPUS])
  parser.add_argument('--sizes', type=int, nargs='+', help='keys; 32K by default')
  parser.add_argument('--models', nargs='+', choices=list(HEADS))
  ops = list(OPS | gpu_cases.OPS)
  parser.add_argument('--ops', nargs='+', default=ops, choices=[*ops, *BASELINES])
  parser.add_argument('--all', action='store_true', help='4K, 32K and 128K keys, both models')
  parser.add_argument('--check', action='store_true', help=f'fail where worse than {COMMITTED}')
  parser.add_argument('--json', type=pathlib.Path, help='also write the rows there')
  parser.add_argument('--jobs', type=int, default=2, help='processes at a time')
  parser.add_argument('--worker', type=pathlib.Path, help=argparse.SUPPRESS)
  return parser.parse_args()


def plan(args) -> list[tuple[str, int]]:
  """Models and sizes to compile at."""
  if args.all:
    return [(model, size) for model in HEADS for size in (4096, 32_768, 131_072)]
  if not (args.models or args.sizes):
    return DEFAULT
  sizes = args.sizes or [32_768]
  return [(model, size) for model in args.models or HEADS for size in sizes]


def rows_of(args, job: tuple[str, str, int]) -> list[dict]:
  """The rows of a chip, model and size, from processes of their own: libtpu reads its flags once."""
  chip, model, n_keys = job
  cases = cases_of(chip)
  ops = [op for op in args.ops if op in cases and chip in cases[op].chips]
  scheduled = [op for op in ops if chip in GPUS or cases[op].trips]
  others = [op for op in ops if op not in scheduled]
  rows = []
  for some, has_schedule in (scheduled, True), (others, False):
    rows += _rows_of(chip, model, n_keys, some, has_schedule) if some else []
  return rows


def _rows_of(chip: str, model: str, n_keys: int, ops: list[str], has_schedule: bool) -> list[dict]:
  with tempfile.TemporaryDirectory() as dump:
    command = [sys.executable, '-m', 'dsa_jax.compile_report', '--worker', dump, '--chips', chip]
    command += ['--models', model, '--sizes', str(n_keys), '--ops', *ops]
    env = os.environ | environment(chip, pathlib.Path(dump) if has_schedule else None)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
  rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
  if done.returncode:  # The compiler may abort its process.
    reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
    lost = {'chip': chip, 'model': model, 'S': n_keys, 'error': f'process ended: {reason}'}
    rows += [lost | {'op': op} for op in ops if op not in {row['op'] for row in rows}]
  return rows


def cases_of(chip: str) -> dict[str, Op]:
  return gpu_cases.OPS if chip in GPUS else OPS | BASELINES


def work(args):
  """Compiles the ops for one chip, model and size; prints a row of JSON for each."""
  (chip,), (model,), (n_keys,) = args.chips, args.models, args.sizes
  with jax.set_mesh(make_mesh(chip)):
    dims = Dims(*HEADS[model], n_keys, 0 if chip in GPUS else resident.vmem_bytes())
  for op in args.ops:
    row = {'chip': chip, 'model': model, 'S': n_keys, 'op': op}
    try:
      row |= measure(cases_of(chip)[op], chip, dims, args.worker)
    except Exception as e:  # Whatever the compiler raises, the other ops are still reported.
      row['error'] = f'{type(e).__name__}: {e}'.splitlines()[0]
    print(json.dumps(row), flush=True)
    for path in args.worker.iterdir():
      path.unlink()


def measure(op: Op, chip: str, dims: Dims, dump: pathlib.Path) -> dict:
  """Compiles an op and reads what the compiler left."""
  began = time.perf_counter()
  compiled = compile_for(chip, op.function, *op.shapes(dims))
  row = {
      'temporaries_mib': compiled.memory_analysis().temp_size_in_bytes / 2**20,
      'seconds': time.perf_counter() - began,
  }
  if chip in GPUS:
    return row | gpu_cases.measure(op, chip, dims, dump)
  spec = CHIPS[chip]
  row['mxu_cycles'] = op.flops(dims) / spec.flops * spec.hertz
  if op in KERNELS:
    row['hbm_cycles'] = moved_bytes(op, chip, dims) / T / spec.bytes * spec.hertz
  if op.trips is None:
    return row | {'vmem_mib': None, 'kernels': {}, 'cycles': None, 'us': None}
  streams, gathered = streamed(op, dims), op.gathered(dims)
  through_hbm = lambda n_bytes: n_bytes / spec.bytes * spec.hertz
  kernels = {
      kernel: max(cycles_of(dump, kernel, trips), through_hbm(streams.get(kernel, 0)))
      for kernel, trips in op.trips(dims).items()
  }
  vmem = max(schedule.vmem_bytes(dumped(dump, kernel, 'original')) for kernel in kernels)
  cycles = sum(kernels.values())
  row |= {'vmem_mib': vmem / 2**20, 'kernels': kernels}
  if gathered:
    beside = schedule.beside(compiled.as_text(), 'gather_rows', list(kernels))
    row['beside_gather'] = beside
    if spec.gathered:
      row['gather_cycles'] = gathered / spec.gathered * spec.hertz
      cycles += max(row['gather_cycles'] - sum(kernels[kernel] for kernel in beside), 0)
    cycles = max(cycles, through_hbm(sum(streams.values()) + 2 * gathered))
  return row | {'cycles': cycles, 'us': 1e6 * cycles / spec.hertz}


def moved_bytes(op: Op, chip: str, dims: Dims) -> int:
  """What HBM must at least move: each argument read once, each result written once."""
  shapes = op.shapes(dims)
  with jax.set_mesh(make_mesh(chip)):
    results = jax.eval_shape(op.function, *shapes)
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((shapes, results)))


def cycles_of(dump: pathlib.Path, kernel: str, trips: list) -> float:
  """A kernel's cycles for one query."""
  try:
    return schedule.cycles(schedule.loop_bodies(dumped(dump, kernel, 'final_bundles')), trips)
  except ValueError as e:
    raise ValueError(f'{kernel}: {e}') from None


def dumped(dump: pathlib.Path, kernel: str, label: str) -> str:
  """What the compiler wrote of a kernel after a pass."""
  found = [x for x in dump.glob(f'*-{kernel}[.-]*-{label}.txt') if 'analysis' not in x.name]
  if not found:
    raise ValueError(f'{kernel}: the compiler wrote no {label}.')
  return max(found).read_text()


def name(row: dict) -> tuple:
  return row['chip'], row['model'], row['S'], row['op']


def print_tables(rows: list[dict]):
  of_gpus = [row for row in rows if row['chip'] in GPUS]
  if len(of_gpus) < len(rows):
    print_table([row for row in rows if row['chip'] not in GPUS])
  if of_gpus:
    gpu_cases.print_table(of_gpus)


def print_table(rows: list[dict]):
  columns = {'temporaries_mib': '.0f', 'vmem_mib': '.1f', 'seconds': '.0f'}
  columns |= {'mxu_cycles': '.0f', 'hbm_cycles': '.0f', 'gather_cycles': '.0f'}
  columns |= {'cycles': '.0f', 'us': '.2f'}
  print('| chip | model | op | S | temporaries MiB | VMEM MiB | compiled s | MXU floor, cycles '
        '| HBM floor, cycles | SparseCores, cycles | cycles a query | us a query |')  # fmt: skip
  print('| --- | --- | --- |' + ' ---: |' * 9)
  for row in rows:
    known = [row.get(key) for key in columns]
    cells = ['' if x is None else format(x, how) for x, how in zip(known, columns.values())]
    cells = [row['error']] if 'error' in row else cells
    print('|', ' | '.join([row['chip'], row['model'], row['op'], str(row['S']), *cells]), '|')


def compare(rows: list[dict], committed: list[dict]) -> list[str]:
  """What does not compile, or is worse than what was committed, a line each."""
  known, complaints = {name(row): row for row in committed}, []
  for row in rows:
    before = known.get(name(row))
    if 'error' in row:
      complaints.append(f'{name(row)}: {row["error"]}')
    elif before is None:
      complaints.append(f'{name(row)}: not in the committed report.')
    else:
      complaints += [f'{name(row)}: {worse}.' for worse in _worse(row, before)]
  return complaints


def _worse(row, before):
  for kernel in set(before.get('beside_gather', ())) - set(row.get('beside_gather', ())):
    yield f'{kernel} no longer runs beside the gather'
  for what in ('cycles', 'temporaries_mib', 'vmem_mib', 'loop_spills', 'serialized'):
    now, then = row.get(what), before.get(what)
    if then is not None and now is None:
      yield f'{what} unknown, was {then:.0f}'
    elif then is not None and now > WORSE * then:
      yield f'{what} {now:.0f}, was {then:.0f}'


if __name__ == '__main__':
  main()
