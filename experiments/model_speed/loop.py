# SPDX-License-Identifier: Apache-2.0
"""Measures what the training loop costs beside its steps: python experiments/model_speed/loop.py

It trains the dense stage of the quickstart for a while, and takes the processor time of the loop's own
thread: batches, rates, the call of the step, metrics and the progress bar. Steps run in threads of
XLA, so their work is not in it. With --baseline=FOLDER, another checkout of the package takes turns.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


def measure(steps: int) -> dict[str, float]:
  """Returns milliseconds of a step on the wall, and of the loop's thread within it."""
  from configs import quickstart
  from dsa_jax import train

  config = quickstart.get_config()
  config.recipe, config.stages.dense.steps = ('dense',), steps
  config.report.checks = {}
  config.measure_every = config.save_every = 10_000
  config.compilation_cache = str(pathlib.Path(tempfile.gettempdir()) / 'dsa_jax_loop')
  times, real = [], train.record

  def record(*args):
    text = real(*args)
    times.append((time.perf_counter(), time.thread_time()))
    return text

  train.record = record
  with tempfile.TemporaryDirectory() as folder:
    config.workdir = folder
    train.train(config)
  times = times[20 : steps - 2]  # Neither compilation nor the last step's checkpoint.
  wall, thread = (
      statistics.median(1e3 * (b[i] - a[i]) for a, b in zip(times, times[1:])) for i in (0, 1)
  )
  return {'step_ms': wall, 'loop_ms': thread}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--baseline', type=pathlib.Path, help='another checkout of the package')
  parser.add_argument('--steps', type=int, default=120)
  parser.add_argument('--turns', type=int, default=3)
  parser.add_argument('--one', action='store_true', help='measure once, in this process')
  args = parser.parse_args()
  if args.one:
    print(json.dumps(measure(args.steps)))
    return
  builds = {'now': ROOT} | ({'before': args.baseline} if args.baseline else {})
  runs = {name: [] for name in builds}
  for _ in range(args.turns):
    for name, folder in builds.items():
      command = [sys.executable, __file__, '--one', f'--steps={args.steps}']
      env = os.environ | {'PYTHONPATH': str(folder)}
      done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
      runs[name].append(json.loads(done.stdout.splitlines()[-1]))
      print(name, runs[name][-1], flush=True)
  best = {name: {k: min(r[k] for r in rs) for k in rs[0]} for name, rs in runs.items()}
  for name, row in best.items():
    row['share'] = row['loop_ms'] / row['step_ms']
    print(f'{name}: {row["loop_ms"]:.2f} ms of {row["step_ms"]:.0f}: {100 * row["share"]:.2f} %')
  (HERE / 'loop.json').write_text(json.dumps({'best': best, 'runs': runs}, indent=1) + '\n')


if __name__ == '__main__':
  main()
