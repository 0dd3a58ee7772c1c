# SPDX-License-Identifier: Apache-2.0
"""Checks and times the GPU kernels on a GPU: python experiments/kernel_speed/bench.py --backend=gpu

First every program is compared with the float32 reference on a few queries, and nothing is timed
if one is wrong. Times are medians over inputs that rotate, random and after a warm-up: `device_ms`
is the sum of the kernels' own times by CUPTI, `wall_ms` what a caller waits. The dense baseline is
cuDNN's attention with keys of 192 channels and values padded to them.
Try it without a GPU, on toy sizes and interpreted:
--interpret --small --sizes 64 --queries 16 --decode 2 --runs 1
"""

import argparse
import contextlib
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler
from jax.experimental.pallas import tpu as pltpu

import bench_tpu
from bench_tpu import DIMS, SMALL
from dsa_jax.kernels import index_kl, index_scores, index_topk, sparse_attention
from dsa_jax.targets import GPUS

HERE = pathlib.Path(__file__).parent
CHECKED = 64  # Queries.
TOLERANCE = 2e-2  # Of the largest value: inputs are bfloat16.
DENSE = dict(E=192, V=128)
PEAK = GPUS['h200']


def main(argv: list[str] | None = None):
  args = parse(argv)
  if jax.default_backend() != 'gpu' and not args.interpret:
    raise SystemExit(f'no GPU here, only {jax.default_backend()}; see --interpret.')
  with interpreted() if args.interpret else contextlib.nullcontext():
    check_and_measure(args)


@contextlib.contextmanager
def interpreted():
  """The plain interpreter; to optimize its programs takes longer than to run them."""
  jax.config.update('jax_disable_most_optimizations', True)
  with pltpu.force_tpu_interpret_mode(True):
    yield


def check_and_measure(args):
  dims = SMALL if args.small else DIMS
  wrong = check(min(args.sizes), dims)
  if wrong:
    raise SystemExit('\n'.join(wrong))
  ceiling = matmul_tflops(256 if args.small else 8192, args)
  rows = []
  for row in measured(dims, args):
    if row['tflops'] is not None:
      row['percent_of_ceiling'] = 100 * row['tflops'] / ceiling
    print(json.dumps(row), flush=True)
    rows.append(row)
  device = jax.devices()[0].device_kind
  results = {'device': device, 'jax': jax.__version__, 'interpreted': args.interpret}
  results |= {'matmul_tflops': ceiling, 'rows': rows}
  args.json.write_text(json.dumps(results, indent=1) + '\n')
  args.json.with_suffix('.md').write_text('\n'.join(table(results)) + '\n')


def parse(argv):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('--sizes', type=int, nargs='*', default=[4096, 8192, 16_384, 32_768, 65_536, 131_072])
  add('--queries', type=int, default=4096, help='the last so many of the context')
  add('--decode', type=int, nargs='*', default=[1, 16, 64, 128], help='sequences, a query each')
  add('--decode_size', type=int, default=32_768, help='keys of each')
  add('--runs', type=int, default=20)
  add('--buffers', type=int, default=3, help='sets of inputs, used in turn')
  add('--small', action='store_true', help='toy widths')
  add('--interpret', action='store_true', help='on a CPU: no times worth having')
  add('--json', type=pathlib.Path, default=HERE / 'gpu_measured.json')
  return parser.parse_args(argv)


def make_inputs(batch, n_keys, n_queries, d, seed=0):
  """Random bfloat16 inputs; each query selects by the indexer, the last ones of the context."""
  keys = iter(jax.random.split(jax.random.key(seed), 9))
  normal = lambda *shape: jax.random.normal(next(keys), (batch, *shape), jnp.bfloat16)
  end = jnp.arange(n_keys - n_queries + 1, n_keys + 1, dtype=jnp.int32)
  x = {
      'q': normal(n_queries, d['H'], d['E']), 'kv': normal(n_keys, d['E']),
      'index_q': normal(n_queries, d['I'], d['J']), 'index_k': normal(n_keys, d['J']),
      'weights': normal(n_queries, d['I']).astype(jnp.float32),
      'end': jnp.broadcast_to(end, (batch, n_queries)),
      'dout': normal(n_queries, d['H'], d['V']),
  }  # fmt: skip
  x['start'] = jnp.zeros_like(x['end'])
  x['indices'] = jax.jit(functools.partial(topk, d, 'gpu'))(x)
  out, x['lse'] = jax.jit(functools.partial(attend, d, 'gpu'))(x)
  return x


def topk(d, backend, x):
  index = x['index_q'], x['index_k'], x['weights']
  return index_topk(*index, x['start'], x['end'], topk=d['K'], backend=backend)


def attend(d, backend, x):
  how = dict(v_dim=d['V'], sm_scale=d['E'] ** -0.5, backend=backend)
  return sparse_attention(x['q'], x['kv'], x['indices'], **how)


def attend_backward(d, backend, x):
  op = lambda q, kv: attend(d, backend, x | {'q': q, 'kv': kv})[0]
  return jax.vjp(op, x['q'], x['kv'])[1](x['dout'].astype(x['q'].dtype))


def kl_grad(d, selected, backend, x):
  def op(*index):
    return index_kl(
        x['q'], x['kv'][:, :, None], x['lse'], *index, x['start'], x['end'],
        sm_scale=d['E'] ** -0.5, indices=x['indices'] if selected else None, backend=backend,
    )  # fmt: skip

  kl, vjp = jax.vjp(op, x['index_q'], x['index_k'], x['weights'])
  return kl, vjp(jnp.ones_like(kl))


def programs(d):
  """Forward and backward of sparse attention are one program: its backward is the difference."""
  return {
      'index_topk': functools.partial(topk, d),
      'sparse_forward': functools.partial(attend, d),
      'sparse_forward_backward': functools.partial(attend_backward, d),
      'index_kl_selected_grad': functools.partial(kl_grad, d, True),
      'index_kl_dense_grad': functools.partial(kl_grad, d, False),
  }


def check(n_keys: int, d) -> list[str]:
  """What differs from the float32 reference, a line each."""
  x = make_inputs(1, n_keys, min(CHECKED, n_keys), d)
  exact = {
      name: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v for name, v in x.items()
  }
  wrong = []
  for name, program in programs(d).items():
    actual, expected = (
        jax.jit(functools.partial(program, backend))(inputs)
        for backend, inputs in (('gpu', x), ('reference', exact))
    )
    if name == 'index_topk':  # Scores that differ in the last bit may change places at the cut.
      actual, expected = (chosen_scores(exact, indices) for indices in (actual, expected))
    off = bench_tpu.difference(actual, expected)
    print(f'{name}: off by {off:.1e} of the largest value', flush=True)
    if not off <= (1e-5 if name == 'index_topk' else TOLERANCE):
      wrong.append(f'{name} is wrong: off by {off:.1e} of the largest value.')
  return wrong


def chosen_scores(x, indices):
  scores = index_scores(x['index_q'], x['index_k'], x['weights'])
  chosen = jnp.take_along_axis(scores, jnp.maximum(indices, 0), axis=2)
  return jnp.sort(jnp.where(indices >= 0, chosen, 0), axis=2)


def measured(d, args):
  for n in args.sizes:
    rows = min(args.queries, n)
    sets = [make_inputs(1, n, rows, d, seed) for seed in range(args.buffers)]
    for name, program in programs(d).items():
      yield row_of(name, n, rows, functools.partial(program, 'gpu'), sets, d, args)
    sets = [dense_inputs(n, rows, d, seed) for seed in range(args.buffers)]
    for name, program in dense_programs(args.interpret).items():
      yield row_of(name, n, rows, program, sets, d, args)
  for batch in args.decode:
    n = min(args.decode_size, min(args.sizes)) if args.interpret else args.decode_size
    sets = [make_inputs(batch, n, 1, d, seed) for seed in range(args.buffers)]
    for name in ('index_topk', 'sparse_forward'):
      program = functools.partial(programs(d)[name], 'gpu')
      yield row_of(name, n, batch, program, sets, d, args) | {'decode': batch}


def dense_inputs(n_keys, n_queries, d, seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  normal = lambda key, n: jax.random.normal(key, (1, n, d['H'], DENSE['E']), jnp.bfloat16)
  return dict(zip('qkv', map(normal, keys, (n_queries, n_keys, n_keys))))


def dense_programs(portable: bool):
  """cuDNN masks causally only where queries are as many as keys; other queries see all keys."""

  def attend(q, k, v):
    how = dict(is_causal=q.shape == k.shape, implementation='xla' if portable else 'cudnn')
    return jax.nn.dot_product_attention(q, k, v, **how)

  def backward(x):
    return jax.vjp(attend, x['q'], x['k'], x['v'])[1](x['q'])

  return {'dense_forward': lambda x: attend(**x), 'dense_forward_backward': backward}


def row_of(name, n_keys, n_queries, program, sets, d, args):
  run = jax.jit(program)
  jax.block_until_ready(run(sets[0]))
  seconds = []
  for i in range(args.runs):
    began = time.perf_counter()
    jax.block_until_ready(run(sets[i % len(sets)]))
    seconds.append(time.perf_counter() - began)
  device_ms = None
  if not args.interpret:
    device_ms = float(np.median([profiler.measure(run)(x)[1] for x in sets for _ in range(3)]))
  wall_ms = 1e3 * float(np.median(seconds))
  flops, bytes_ = work(name, n_keys, n_queries, d)
  row = {'S': n_keys, 'queries': n_queries, 'program': name, 'device_ms': device_ms}
  row |= {'wall_ms': wall_ms, 'roofline_ms': 1e3 * max(flops / PEAK.flops, bytes_ / PEAK.bytes)}
  return row | {'tflops': None if args.interpret else flops / device_ms / 1e9}


def work(name, n_keys, n_queries, d) -> tuple[float, float]:
  """FLOPs by the usual convention, and bytes that must be read or written."""
  h, e, v, i, j = (d[x] for x in 'HEVIJ')
  topk = min(d['K'], n_keys)
  pairs = n_queries * (n_keys - (n_queries - 1) / 2)
  forward = 2 * n_queries * topk * h * (e + v)
  dense = 2 * pairs * h * (DENSE['E'] + DENSE['V'])
  score, target = 2 * i * j, 2 * h * e
  flops = {
      'index_topk': pairs * score,
      'sparse_forward': forward,
      'sparse_forward_backward': forward + 2 * n_queries * topk * h * (3 * e + 2 * v),
      'index_kl_selected_grad': n_queries * topk * (target + 3 * score),
      'index_kl_dense_grad': pairs * (2 * target + 4 * score),  # The target is made twice.
      'dense_forward': dense,
      'dense_forward_backward': dense + 2 * pairs * h * (3 * DENSE['E'] + 2 * DENSE['V']),
  }[name]
  index = 2 * (n_queries * i * j + n_keys * j)
  main = 2 * (n_queries * h * (e + v) + n_keys * e)
  dense_bytes = 2 * h * (n_queries + n_keys) * (DENSE['E'] + DENSE['V'])
  bytes_ = index if name == 'index_topk' else dense_bytes if 'dense_f' in name else main
  return flops, bytes_


def matmul_tflops(n: int, args) -> float:
  """What this chip reaches with one large product."""
  x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
  run = jax.jit(lambda x: x @ x)
  jax.block_until_ready(run(x))
  if not args.interpret:
    return 2 * n**3 / float(np.median([profiler.measure(run)(x)[1] for _ in range(9)])) / 1e9
  began = time.perf_counter()
  jax.block_until_ready(run(x))
  return 2 * n**3 / (time.perf_counter() - began) / 1e12


def table(results: dict):
  ceiling = results['matmul_tflops']
  yield f'{results["device"]}, jax {results["jax"]}; one large product: {ceiling:.2f} TFLOPS.'
  if results['interpreted']:
    yield 'Interpreted on a CPU: the times mean nothing.'
  yield '\n| program | S | queries | device ms | wall ms | roofline ms | TFLOPS | % of ceiling |'
  yield '| --- |' + ' ---: |' * 7
  show = lambda x, digits: '' if x is None else f'{x:.{digits}f}'
  for row in results['rows']:
    program = row['program'] + (', decoding' if 'decode' in row else '')
    cells = [program, str(row['S']), str(row['queries']), show(row['device_ms'], 3)]
    cells += [show(row['wall_ms'], 3), show(row['roofline_ms'], 3), show(row['tflops'], 0)]
    yield '| ' + ' | '.join([*cells, show(row.get('percent_of_ceiling'), 0)]) + ' |'


if __name__ == '__main__':
  main()
