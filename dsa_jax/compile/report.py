# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels for real TPUs and GPUs, on any machine, and reports what they will take.

python -m dsa_jax.compile
python -m dsa_jax.compile --all --json=experiments/kernel_speed/compile_report_jax_0.10.json
python -m dsa_jax.compile --check   # Against the file of the installed jax, as CI does.

A check compiles only those rows whose program or compiler has changed since the file was made: each
row holds the fingerprint of both. `--part 2/5` compiles every fifth row all the same,
from the second one on, so that five checks with different parts compile everything.

Cycles are bundles of each loop of the compiler's final schedule times how often the loop runs for
a query that selects K keys, evenly spread, and sees half of S. The op's plan says how often. Stalls
are not counted. Where rows lie in HBM, kernels take at least as long as the rows take through it;
other DMA is not counted. One floor is products at the bfloat16 peak, the other is arguments and
results through HBM once, with 4096 queries that share keys. VMEM is what the kernel allocates
there, the largest where an op has several kernels. Gathers of SparseCores take their bytes over a
published rate, and are free while kernels run beside them.

python -m dsa_jax.compile --chips h200 --check

For a GPU the report has registers, spills and shared memory of each kernel, and the tensor cores'
floor.

python -m dsa_jax.compile --chips h200 --models v32 --ops layer_warmup layer_sparse

These are whole layers of V3.2 with their experts, forward and backward, in bfloat16. The report has
their temporaries, and for each part its FLOPs, bytes, and the time at the chip's peaks. Temporaries
do not count what lies, for a while, where the results will.
"""

import argparse
from collections.abc import Sequence
import concurrent.futures
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from types import ModuleType

import jax

from dsa_jax.compile.cases import GROUPED, HEADS, Dims, Op
from dsa_jax.compile.chips import CHIPS, GPUS, check_compiler, environment, lower_for, make_mesh
from dsa_jax.compile.fingerprint import fingerprint
from dsa_jax.versions import JAX_SERIES

FOLDER = pathlib.Path('experiments/kernel_speed')
DEFAULT = [('v32', 32_768), ('glm5', 32_768)]  # CI has a few minutes.
WORSE = 1.10  # The factor that --check lets pass.


def main():
  args = parse()
  committed = read_committed(args.chips) if args.check else []
  if args.worker:
    return work(args, committed)
  try:
    for chip in args.chips:
      check_compiler(chip)
  except ValueError as error:
    sys.exit(f'error: {error}')
  jobs = [(chip, *case) for chip in args.chips for case in models_and_sizes(args)]
  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    rows = sum(pool.map(functools.partial(rows_of, args), jobs), [])
  print_tables(rows)
  if args.json:
    write_rows(args.json, rows)
  complaints = [f'{name(row)}: {row["error"]}' for row in rows if 'error' in row]
  if args.check:
    complaints = compare(rows, committed)
  sys.exit('\n'.join(complaints) or None)


def parse():
  parser = argparse.ArgumentParser('python -m dsa_jax.compile', description=__doc__.split('\n')[0])
  parser.add_argument('--chips', nargs='+', default=list(CHIPS), choices=[*CHIPS, *GPUS])
  parser.add_argument('--sizes', type=int, nargs='+', help='keys; 32K by default')
  parser.add_argument('--models', nargs='+', choices=[*HEADS, *GROUPED])
  parser.add_argument('--ops', nargs='+', help="all of the chips' but baselines by default")
  parser.add_argument('--all', action='store_true', help='also 4K and 128K keys, where --sizes names none')
  parser.add_argument('--check', action='store_true', help=f'fail where worse than in {FOLDER}')
  parser.add_argument('--part', type=part, metavar='K/N', help='see above')
  parser.add_argument('--json', type=pathlib.Path, help='also put the rows there, among others')
  parser.add_argument('--jobs', type=int, default=2, help='processes at a time')
  parser.add_argument('--worker', type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  known = {op for chip in args.chips for op in all_ops(chip)}
  if unknown := set(args.ops or ()) - known:
    parser.error(f'--ops: {sorted(unknown)} must be among {sorted(known)}')
  return args


def part(text: str) -> tuple[int, int]:
  k, n = map(int, text.split('/'))
  if not 1 <= k <= n:
    raise ValueError
  return k, n


def models_and_sizes(args) -> list[tuple[str, int]]:
  """Returns the models and sizes to compile at."""
  if not (args.models or args.sizes or args.all):
    return DEFAULT
  sizes = args.sizes or ([4096, 32_768, 131_072] if args.all else [32_768])
  return [(model, size) for model in args.models or HEADS for size in sizes]


def rows_of(args, job: tuple[str, str, int]) -> list[dict]:
  """Returns rows of a chip, model and size, by processes of their own: libtpu reads flags once."""
  chip, model, n_keys = job
  cases, of_chip = all_ops(chip), cases_for(chip)
  names = [op for op in args.ops or of_chip.OPS | of_chip.OF_GROUPS if op in cases]
  ops = [op for op in names if cases[op].fits(chip, model, n_keys)]
  scheduled = [op for op in ops if chip in GPUS or cases[op].plan]
  others = [op for op in ops if op not in scheduled]
  rows = []
  for some, has_schedule in (scheduled, True), (others, False):
    rows += _rows_of(args, job, some, has_schedule) if some else []
  return rows


def _rows_of(args, job: tuple[str, str, int], ops: list[str], has_schedule: bool) -> list[dict]:
  chip, model, n_keys = job
  with tempfile.TemporaryDirectory() as dump:
    command = [sys.executable, '-m', 'dsa_jax.compile', '--worker', dump, '--chips', chip]
    command += ['--models', model, '--sizes', str(n_keys), '--ops', *ops]
    command += ['--check'] if args.check else []
    command += ['--part={}/{}'.format(*args.part)] if args.part else []
    env = os.environ | environment(chip, pathlib.Path(dump) if has_schedule else None)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
  rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
  if done.returncode:  # The compiler may abort its process.
    reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
    lost = {'chip': chip, 'model': model, 'S': n_keys, 'error': f'process ended: {reason}'}
    rows += [lost | {'op': op} for op in ops if op not in {row['op'] for row in rows}]
  return rows


def cases_for(chip: str) -> ModuleType:
  """Returns the cases for a kind of chip, whose imports need that kind's compiler."""
  if chip in GPUS:
    from dsa_jax.compile import gpu_cases as cases
  else:
    from dsa_jax.compile import tpu_cases as cases
  return cases


def all_ops(chip: str) -> dict[str, Op]:
  cases = cases_for(chip)
  return cases.OPS | cases.OF_GROUPS | cases.BASELINES


def work(args, committed: list[dict]):
  """Compiles the ops for one chip, model and size, and prints a row of JSON for each."""
  (chip,), (model,), (n_keys,) = args.chips, args.models, args.sizes
  jax.config.update('jax_traceback_in_locations_limit', 0)  # Programs do not say where they lie.
  dims = Dims.of(model, n_keys, cases_for(chip).vmem_of(chip))
  known = {name(row): row for i, row in enumerate(committed) if not is_due(i, args.part)}
  for op in args.ops:
    row = {'chip': chip, 'model': model, 'S': n_keys, 'op': op}
    try:
      row |= measure(all_ops(chip)[op], chip, dims, args.worker, known.get(name(row), {}))
    except Exception as e:  # Whatever the compiler raises, the other ops are still reported.
      row['error'] = f'{type(e).__name__}: {e}'.splitlines()[0]
    print(json.dumps(row), flush=True)
    for path in args.worker.iterdir():
      path.unlink()


def is_due(i: int, of: tuple[int, int] | None) -> bool:
  """Says whether row `i` is compiled even if nothing has changed, in part k of n or in none."""
  return of is not None and i % of[1] == of[0] - 1


def measure(op: Op, chip: str, dims: Dims, dump: pathlib.Path, known: dict) -> dict:
  """Compiles an op and reads what the compiler left, unless `known` is the row of that program."""
  cases, began = cases_for(chip), time.perf_counter()
  lowered = lower_for(chip, op.function, *op.shapes(dims))
  program = fingerprint(lowered.as_text(), cases.expects(op, dims), cases.COMPILERS)
  if known.get('program') == program:
    return known
  with jax.set_mesh(make_mesh(chip)):
    compiled = lowered.compile()
  row = {
      'program': program,
      'temporaries_mib': compiled.memory_analysis().temp_size_in_bytes / 2**20,
      'seconds': time.perf_counter() - began,
  }
  return row | cases.measure(op, chip, dims, dump, compiled)


def committed_path(chip: str, series: str = JAX_SERIES) -> pathlib.Path:
  """Returns the file of a chip's kind and of a jax release, as '0.10': each pins its compilers."""
  return FOLDER / f'compile_report{"_gpu" * (chip in GPUS)}_jax_{series}.json'


def read_committed(chips: Sequence[str]) -> list[dict]:
  """Reads the rows that were committed for the installed jax."""
  rows = []
  for path in sorted({committed_path(chip) for chip in chips}):
    if not path.exists():
      known = sorted(x.name for x in FOLDER.glob('compile_report*_jax_*.json'))
      sys.exit(
          f'{path} does not exist: nothing was committed for jax {JAX_SERIES}, only {known}. '
          f'Make it with --all --json={path}, and read what differs.'
      )
    rows += json.loads(path.read_text())
  return rows


def write_rows(path: pathlib.Path, rows: list[dict]):
  """Puts rows into a file, whose rows of other names stay."""
  held = json.loads(path.read_text()) if path.exists() else []
  by_name = {name(row): row for row in held + rows}
  path.write_text(json.dumps(list(by_name.values()), indent=1) + '\n')


def name(row: dict) -> tuple:
  return row['chip'], row['model'], row['S'], row['op']


def print_tables(rows: list[dict]):
  for of_gpus in False, True:
    if some := [row for row in rows if (row['chip'] in GPUS) == of_gpus]:
      cases_for(some[0]['chip']).print_table(some)


def compare(rows: list[dict], committed: list[dict]) -> list[str]:
  """Returns a line for each row that does not compile, or is worse than the committed one."""
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
