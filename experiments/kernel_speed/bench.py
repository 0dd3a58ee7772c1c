# SPDX-License-Identifier: Apache-2.0
"""Measures time and memory of the xla backend: python experiments/kernel_speed/bench.py

With --backend=gpu or --backend=tpu it measures the kernels for these: see bench_gpu.py and
bench_tpu.py.
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import re
import runpy
import sys
import time

import jax
import jax.numpy as jnp
import programs
import report

HERE = pathlib.Path(__file__).parent
UP_TO = {  # The longest context that is worth its time.
    'naive_topk': 32_768,
    'dense_attention_16_heads': 4096,
    'masked_attention': 4096,
    'masked_attention_grad': 4096,
    'index_kl': 8192,
    'index_kl_grad': 8192,
    'dense_attention_grad': 32_768,
    'dense_attention': 32_768,
}


def main():
  backend = argparse.ArgumentParser(add_help=False)
  backend.add_argument('--backend', default='xla', choices=['xla', 'tpu', 'gpu'])
  known, sys.argv[1:] = backend.parse_known_args()
  if known.backend != 'xla':
    return runpy.run_path(str(HERE / f'bench_{known.backend}.py'), run_name='__main__')
  parser = argparse.ArgumentParser(description=__doc__, parents=[backend])
  add = parser.add_argument
  add('--sizes', type=int, nargs='*', default=[1024, 2048, 4096, 8192, 16_384, 32_768])
  add('--memory_sizes', type=int, nargs='*', default=[16_384, 32_768, 65_536, 131_072])
  add('--ops', nargs='*', default=list(programs.PROGRAMS), choices=list(programs.PROGRAMS))
  add('--devices', type=int, default=1, choices=[1, 2],
      help='2: sparse and dense attention with their rows shared by two CPU devices')
  add('--seconds', type=float, default=20, help='about how long each program is repeated')
  add('--runs', type=int, default=5, help='at most so many times, and at least twice')
  add('--no_limit', action='store_true', help='also run what UP_TO leaves out')
  add('--results', type=pathlib.Path, default=HERE / 'results.json')
  args = parser.parse_args()
  jax.config.update('jax_num_cpu_devices', args.devices)
  results = json.loads(args.results.read_text()) if args.results.exists() else {}
  results |= {'machine': machine()}
  if (HERE / 'transformers.json').exists():
    results['transformers'] = json.loads((HERE / 'transformers.json').read_text())
  for n in args.memory_sizes if args.devices == 1 else ():
    for name in args.ops:
      put(results, 'memory', name, n, memory(name, n))
    args.results.write_text(json.dumps(results, indent=1))
  kind = 'seconds' if args.devices == 1 else 'shared'
  for n in args.sizes:
    x, runnable = inputs_and_programs(n, args.devices)
    ops = [name for name in args.ops if name in runnable]
    ops = [name for name in ops if args.no_limit or n <= UP_TO.get(name, n)]
    runnable = {name: runnable[name] for name in ops}
    for name, seconds in time_side_by_side(runnable, x, args.runs, args.seconds).items():
      put(results, kind, name, n, seconds)
    args.results.write_text(json.dumps(results, indent=1))
  report.write(results, args.results.parent)


def put(results, kind, name, n, value):
  results.setdefault(kind, {}).setdefault(name, {})[str(n)] = value


def memory(name: str, n: int) -> int:
  """Returns the bytes of temporary buffers by the compiler's own count, without a run."""
  shapes = jax.eval_shape(lambda: programs.make_inputs(programs.K))
  longer = lambda x: jax.ShapeDtypeStruct((1, n, *x.shape[2:]), x.dtype)
  compiled = jax.jit(programs.PROGRAMS[name]).lower(jax.tree.map(longer, shapes)).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def inputs_and_programs(n: int, devices: int):
  if devices == 1:
    return programs.make_inputs(n), programs.PROGRAMS
  return programs.make_shares(n, devices), programs.shared_programs(devices)


def time_side_by_side(jobs, x, runs: int, budget: float) -> dict[str, list[float]]:
  """Returns the seconds of every run; programs take turns, so a slow minute hits them all."""
  n, names = x['q'].shape[1], list(jobs)
  run = {name: jax.jit(f).lower(x).compile() for name, f in jobs.items()}
  seconds = {name: [] for name in names}
  for _ in range(runs):
    for name in names:
      if len(seconds[name]) >= 2 and sum(seconds[name]) > budget:
        continue
      began = time.perf_counter()
      jax.block_until_ready(run[name](x))
      seconds[name].append(time.perf_counter() - began)
  for name, times in seconds.items():
    print(f'{n:7d} {name:26s} {min(times):9.3f} s of {len(times)}', flush=True)
  return seconds


def machine() -> dict[str, float | str]:
  """Returns what the figures were measured on, and what that machine can do at best."""
  x = jnp.ones((2048, 2048))
  big = jnp.ones(2**28, jnp.float32)
  square = jax.jit(lambda x: x @ x)
  double = jax.jit(lambda x: 2 * x)
  return {
      'processor': processor(),
      'python': platform.python_version(),
      'jax': importlib.metadata.version('jax'),
      'jaxlib': importlib.metadata.version('jaxlib'),
      'date': time.strftime('%Y-%m-%d'),
      'matmul_flops': 2 * 2048**3 / best_of(lambda: square(x)),
      'copy_bytes': 2 * big.nbytes / best_of(lambda: double(big)),
  }


def processor() -> str:
  path = pathlib.Path('/proc/cpuinfo')
  models = re.findall(r'model name\s*: (.*)', path.read_text()) if path.exists() else []
  return f'{len(models)} x {models[0]}' if models else platform.machine()


def best_of(f, runs: int = 10) -> float:
  seconds = []
  for _ in range(runs + 1):
    began = time.perf_counter()
    jax.block_until_ready(f())
    seconds.append(time.perf_counter() - began)
  return min(seconds[1:])


if __name__ == '__main__':
  main()
