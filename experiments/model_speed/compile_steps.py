# SPDX-License-Identifier: Apache-2.0
"""Compiles every program of configs/one_gpu.py for an H200, on a machine that has none.

python experiments/model_speed/compile_steps.py --json=experiments/model_speed/one_gpu.json

The compiler is XLA's own for GPUs: pip install -e '.[compile-gpu]'. The script prints the memory of
each step and of each program of the report, from the compiler's own report. The model FLOPs of each
step are arithmetic, for rows of one document each. The script fails where a program would need more
memory than an H100 has.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from configs import one_gpu  # noqa: E402
from dsa_jax.chips import DEVICES  # noqa: E402
from dsa_jax.compile.chips import environment, make_mesh  # noqa: E402
from dsa_jax.cost import training_flops  # noqa: E402
from dsa_jax.data.batch import Batch  # noqa: E402
from dsa_jax.reporting.evaluate import look_batch, measure_batch, score_batch  # noqa: E402
from dsa_jax.reporting.results import report_modes  # noqa: E402
from dsa_jax.training.recipe import Recipe, read_recipe  # noqa: E402
from dsa_jax.training.run import Run  # noqa: E402
from dsa_jax.training.state import abstract_params, abstract_state, model_graph  # noqa: E402

CHIP, MOST = 'h200', DEVICES['h100'].memory


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--json', type=pathlib.Path, help='also write the report there')
  parser.add_argument('--programs', nargs='+', help='only those')
  parser.add_argument('--compile', action='store_true', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if not options.compile:  # The compiler reads its environment once.
    with tempfile.TemporaryDirectory() as dump:
      env = os.environ | environment(CHIP, pathlib.Path(dump))
      sys.exit(subprocess.run([sys.executable, *sys.argv, '--compile'], env=env).returncode)
  report = compile_all(read_recipe(one_gpu.get_config()), options.programs)
  if options.json:
    options.json.write_text(json.dumps(report, indent=1) + '\n')
  too_large = [name for name, row in report['programs'].items() if row['total_gib'] * 2**30 > MOST]
  sys.exit(f'{too_large} need more than {MOST / 2**30:.1f} GiB.' if too_large else 0)


def compile_all(recipe: Recipe, names: list[str] | None) -> dict:
  """Returns the model's size, and the memory of every program, compiled one after another."""
  run = Run(recipe, model_graph(recipe.model), 'gpu', None, None)
  params = abstract_params(recipe.model)
  report = {
      'chip': CHIP,
      'jax': jax.__version__,
      'parameters': sum(x.size for x in jax.tree.leaves(params)),
      'model_tflops_per_step': step_tflops(recipe),
      'programs': {},
  }
  mesh = make_mesh(CHIP)
  place = NamedSharding(mesh, PartitionSpec())
  put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  print(json.dumps(report))
  with jax.set_mesh(mesh):
    for name, lower in programs(run, params, put).items():
      if names and name not in names:
        continue
      began = time.monotonic()
      memory = lower().compile().memory_analysis()
      sizes = {
          'arguments_gib': memory.argument_size_in_bytes,
          'temporaries_gib': memory.temp_size_in_bytes,
          'total_gib': memory.argument_size_in_bytes + memory.temp_size_in_bytes,
      }
      row = {key: round(size / 2**30, 2) for key, size in sizes.items()}
      report['programs'][name] = row | {'compile_seconds': round(time.monotonic() - began)}
      print(json.dumps({name: report['programs'][name]}), flush=True)
  return report


def step_tflops(recipe: Recipe) -> dict[str, float]:
  """Returns the model FLOPs of a step of each entry, in units of 1e12."""
  flops = {}
  for name, entry in recipe.stages.items():
    row = np.arange(1, entry.seq_len + 1)
    flops[name] = entry.batch_size * training_flops(
        recipe.model, entry.trains, row, sparse=entry.stage == 'sparse'
    )
  return {name: round(n / 1e12, 1) for name, n in flops.items()}


def programs(run: Run, params, put) -> dict:
  """Returns what lowers each program that a run of the recipe compiles; `baseline` is as `dense`."""
  recipe, lowered = run.recipe, {}
  put_all = lambda tree: jax.tree.map(put, tree)

  def step(name):
    entry = recipe.stages[name]
    state = abstract_state(recipe.model, entry.trains, recipe.optim)
    batch = abstract_batch(entry.batch_size, entry.seq_len)
    rates = dict.fromkeys(entry.trains, jax.ShapeDtypeStruct((), jnp.float32))
    return run.train_step(name).lower(*put_all((state, batch, rates)))

  def evaluation(program, batch_size, seq_len, *rest):
    args = put_all((params, abstract_batch(batch_size, seq_len)))
    return program.lower(run.graph, *args, *rest)

  for name, entry in recipe.stages.items():
    if name == 'baseline':
      continue
    lowered[f'{name}/step'] = lambda name=name: step(name)
    lowered[f'{name}/look'] = lambda name=name, entry=entry: evaluation(
        look_batch, recipe.measure_rows, entry.seq_len, run.look_mode(name)
    )
  modes, size = report_modes(run), (recipe.report.batch_size, recipe.report.seq_len)
  choice, beyond = put(jax.ShapeDtypeStruct((), jnp.int32)), (0, recipe.model.index_topk)
  lowered['report/dense'] = lambda: evaluation(score_batch, *size, modes.dense, None)
  lowered['report/sparse'] = lambda: evaluation(score_batch, *size, modes.sparse, choice)
  lowered['report/measured'] = lambda: evaluation(measure_batch, *size, modes.measured, beyond)
  return lowered


def abstract_batch(batch_size: int, seq_len: int) -> Batch:
  dtypes = Batch(jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
  return Batch(*(jax.ShapeDtypeStruct((batch_size, seq_len), dtype) for dtype in dtypes))


if __name__ == '__main__':
  main()
