# SPDX-License-Identifier: Apache-2.0
"""Measures sparse against dense attention of grouped heads on a CPU.

python experiments/gqa_speed/run.py                       # times, of some rows of each context
python experiments/gqa_speed/run.py --rows 0 --sizes 16384  # of all rows
python experiments/gqa_speed/run.py --memory_only         # temporaries by the compiler's own count
"""

import argparse
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent / 'kernel_speed'))

import bench  # noqa: E402
import plot  # noqa: E402

from dsa_jax.kernels import dense_attention, index_kl, index_topk, sparse_attention  # noqa: E402
from dsa_jax.kernels.groups import fold_indices, fold_keys  # noqa: E402
from dsa_jax.kernels.xla.rows import gather_rows, scan_rows  # noqa: E402

H, G, E, K = 32, 8, 128, 512
I, J = 16, 64
SM_SCALE = E**-0.5
BLOCK = 128  # Rows next to each other, where some of a context are measured.
MEMORY_SIZES = (16_384, 32_768, 65_536, 131_072)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--sizes', type=int, nargs='*', default=[16_384, 32_768])
  parser.add_argument('--rows', type=int, default=4096, help='rows of each context; 0 for all')
  parser.add_argument('--runs', type=int, default=2)
  parser.add_argument('--programs', nargs='*', default=list(PROGRAMS), choices=list(PROGRAMS))
  parser.add_argument('--memory_only', action='store_true')
  parser.add_argument('--results', type=pathlib.Path, default=HERE / 'results.json')
  args = parser.parse_args()
  results = json.loads(args.results.read_text()) if args.results.exists() else {}
  if args.memory_only:
    results['temporaries'] = {
        name: {str(n): temporaries(name, n) for n in MEMORY_SIZES} for name in MEASURED
    }
  else:
    results['machine'] = bench.machine()
    for n in args.sizes:
      x = make_inputs(n, args.rows or n)
      put(results, n, args.rows or n, time_in_turn(x, args.programs, args.runs))
      args.results.write_text(json.dumps(results, indent=1) + '\n')
  args.results.write_text(json.dumps(results, indent=1) + '\n')
  plot.write(results, args.results.parent)


def make_inputs(n: int, n_rows: int) -> dict[str, jax.Array]:
  """Returns random float32 inputs: n keys, and rows of queries in blocks all over the context."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
  first = np.linspace(0, n - BLOCK, n_rows // BLOCK).astype(int)
  position = (first[:, None] + np.arange(BLOCK)).reshape(-1)
  indices = np.full((1, n_rows, K), -1, np.int32)
  for row, t in zip(indices[0], position):
    chosen = np.arange(t + 1) if t < K else rng.choice(t + 1, K, replace=False, shuffle=False)
    row[: len(chosen)] = np.sort(chosen)
  k, v = normal(1, n, G, E), normal(1, n, G, E)
  end = jnp.asarray(position + 1, jnp.int32)[None]
  return {
      'q': normal(1, n_rows, H, E), 'k': k, 'v': v, 'rows': jnp.concatenate([v, k], axis=-1),
      'index_q': normal(1, n_rows, I, J), 'index_k': normal(1, n, J),
      'weights': normal(1, n_rows, I), 'start': jnp.zeros_like(end), 'end': end,
      'lse': jnp.broadcast_to(1 + jnp.log(end.astype(jnp.float32))[..., None], (1, n_rows, H)),
      'indices': jnp.asarray(indices),
  }  # fmt: skip


def dense(x):
  options = dict(sm_scale=SM_SCALE, backend='xla')
  return dense_attention(x['q'], x['k'], x['v'], x['start'], x['end'], **options)


def sparse(x):
  options = dict(v_dim=E, sm_scale=SM_SCALE, backend='xla')
  return sparse_attention(x['q'], x['rows'], None, x['indices'], **options)


def select(x):
  index = x['index_q'], x['index_k'], x['weights']
  return index_topk(*index, x['start'], x['end'], topk=K, backend='xla')


def divergence(x, indices=None):
  return index_kl(
      x['q'], x['k'], x['lse'], x['index_q'], x['index_k'], x['weights'], x['start'], x['end'],
      indices=indices, sm_scale=SM_SCALE, backend='xla',
  )  # fmt: skip


def gather(x):
  """Brings the rows of each query and key head together, and reads them once: a floor."""
  rows, weights = fold_keys(x['rows']), jnp.ones(K)

  def step(_, block):
    folded = fold_indices(block, G, x['k'].shape[1])
    read = lambda _, i: (None, jnp.einsum('K,BTKE->BTE', weights, gather_rows(rows, i)))
    return None, scan_rows(read, None, folded, 1)[1].sum(axis=1, keepdims=True)

  return scan_rows(step, None, x['indices'], 1)[1]


def with_gradients(f, *trained):
  """Returns f with its gradients to the named inputs."""

  def both(x):
    rest = {name: x[name] for name in x if name not in trained}
    out, vjp = jax.vjp(lambda some: f(some | rest), {name: x[name] for name in trained})
    return out, vjp(jax.tree.map(jnp.ones_like, out))

  return both


INDEXER = ('index_q', 'index_k', 'weights')
PROGRAMS = {
    'dense': dense,
    'sparse': sparse,
    'select': select,
    'gather': gather,
    'dense_grad': with_gradients(dense, 'q', 'k', 'v'),
    'sparse_grad': with_gradients(sparse, 'q', 'rows'),
    'dense_kl_grad': with_gradients(divergence, *INDEXER),
    'sparse_kl_grad': with_gradients(lambda x: divergence(x, x['indices']), *INDEXER),
}
MEASURED = [name for name in PROGRAMS if name != 'gather']


def time_in_turn(x, names, runs: int) -> dict[str, list[list[float]]]:
  """Returns wall and processor seconds of each run; programs take turns."""
  run = {name: jax.jit(PROGRAMS[name]).lower(x).compile() for name in names}
  seconds = {name: [] for name in names}
  for _ in range(runs):
    for name in names:
      began = time.perf_counter(), time.process_time()
      jax.block_until_ready(run[name](x))
      took = time.perf_counter() - began[0], time.process_time() - began[1]
      seconds[name].append([round(t, 4) for t in took])
      print(f'{x["k"].shape[1]:7d} {name:16s} {took[0]:9.3f} s, {took[1]:9.3f} s of a core', flush=True)
  return seconds


def put(results, n: int, n_rows: int, seconds: dict):
  held = results.setdefault('seconds', {}).setdefault(str(n), {})
  for name, times in seconds.items():
    held[name] = {'rows': n_rows, 'runs': times}


def temporaries(name: str, n: int) -> int:
  """Returns the bytes of temporary buffers where every token is a query."""
  shapes = jax.eval_shape(lambda: make_inputs(K, K))
  longer = lambda x: jax.ShapeDtypeStruct((1, n, *x.shape[2:]), x.dtype)
  compiled = jax.jit(PROGRAMS[name]).lower(jax.tree.map(longer, shapes)).compile()
  return compiled.memory_analysis().temp_size_in_bytes


if __name__ == '__main__':
  main()
