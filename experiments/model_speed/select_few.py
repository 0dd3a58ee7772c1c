# SPDX-License-Identifier: Apache-2.0
"""Measures the selection of a decoded token, for one text and for many, beside another checkout.

  git worktree add ../before a53ce5f
  python experiments/model_speed/select_few.py --baseline=../before

Each checkout has processes of its own, which take turns. The milliseconds are those of one core.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
CASES = (1, 16_384), (1, 65_536), (8, 16_384), (8, 65_536), (16, 65_536)  # Texts, and keys of each.


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--baseline', type=pathlib.Path, required=True, help='the other checkout')
  parser.add_argument('--turns', type=int, default=5)
  parser.add_argument('--core', type=int, default=1)
  args = parser.parse_args()
  roots = {'before': args.baseline.resolve(), 'now': HERE.parents[1]}
  runs = {name: [] for name in roots}
  for _ in range(args.turns):
    for name, root in roots.items():
      command = ['taskset', '-c', str(args.core), sys.executable, __file__, '--measure']
      done = subprocess.run(
          command, check=True, text=True, stdout=subprocess.PIPE, env=environment(root)
      )
      runs[name].append(json.loads(done.stdout.splitlines()[-1]))
  results = {}
  for case in runs['now'][0]:
    times = {name: [run[case] for run in of_side] for name, of_side in runs.items()}
    ratio = statistics.median(a / b for a, b in zip(times['before'], times['now']))
    medians = {name: statistics.median(x) for name, x in times.items()}
    results[case] = medians | {'times_faster': ratio}
    print(case, {name: round(x, 2) for name, x in results[case].items()})
  (HERE / 'select_few.json').write_text(json.dumps(results, indent=1) + '\n')


def environment(root: pathlib.Path) -> dict[str, str]:
  one_thread = {'XLA_FLAGS': '--xla_cpu_multi_thread_eigen=false', 'JAX_PLATFORMS': 'cpu'}
  return os.environ | one_thread | {'PYTHONPATH': str(root)}


def measure() -> dict[str, float]:
  """Returns the milliseconds of 2048 selected keys, with 8 index heads of 64."""
  import jax
  import numpy as np

  from dsa_jax.kernels.index_topk.op import index_topk

  milliseconds, rng = {}, np.random.default_rng(0)
  for n_texts, n_keys in CASES:
    random = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    q, k, weights = random(n_texts, 1, 8, 64), random(n_texts, n_keys, 64), random(n_texts, 1, 8)
    start, end = np.zeros((n_texts, 1), np.int32), np.full((n_texts, 1), n_keys, np.int32)
    args = jax.device_put((q, k, weights, start, end))
    select = jax.jit(lambda *args: index_topk(*args, topk=2048, backend='xla'))
    jax.block_until_ready(select(*args))
    times = []
    for _ in range(20):
      began = time.process_time()
      jax.block_until_ready(select(*args))
      times.append(time.process_time() - began)
    milliseconds[f'{n_texts} texts of {n_keys}'] = 1e3 * statistics.median(times)
  return milliseconds


if __name__ == '__main__':
  if sys.argv[1:] == ['--measure']:
    print(json.dumps(measure()))
  else:
    main()
