# SPDX-License-Identifier: Apache-2.0
"""Checks and times the GPU kernels on a GPU: python experiments/kernel_speed/bench.py --backend=gpu

First, every program is compared with the float32 reference on a few queries; nothing is timed if
one is wrong. Times are medians over random inputs that rotate, after a warm-up: `device_ms` is the
sum of the kernels' own times by CUPTI, and `wall_ms` is the time that a caller waits. The last
`--queries` of a context are timed. The dense baselines are cuDNN's attention through jax, with keys
of 192 channels and values padded to them, and PyTorch's where it is installed (bench_torch.py); for
decoding, XLA's products with all latents. cuDNN masks causally only where all queries are there;
elsewhere it reads all keys, and `causal_ms` subtracts what a causal mask would save.
Without a GPU, try it on toy sizes under the interpreter:
--interpret --small --sizes 64 --queries 16 --decode 2 --decode_sizes 64 --seconds 0
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import pathlib
import time

import bench_torch
import bench_tpu
from bench_tpu import DIMS, SMALL
import jax
from jax.experimental.mosaic.gpu import profiler
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from dsa_jax.chips import DEVICES
from dsa_jax.families.deepseek import DEEPSEEK_V32
from dsa_jax.kernels import index_kl, index_scores, index_topk, sparse_attention

HERE = pathlib.Path(__file__).parent
CHECKED = 64  # Queries.
TOLERANCE = 2e-2  # Of the largest value: inputs are bfloat16.
DENSE = dict(  # Channels of a head whose key and value are its own.
    E=DEEPSEEK_V32.qk_nope_head_dim + DEEPSEEK_V32.qk_rope_head_dim, V=DEEPSEEK_V32.v_head_dim
)
SQUARE = 32_768, 32  # Keys and queries, and index heads, of the published figure for selection.
PEAK = DEVICES['h200']
THREADS = 12  # That compile.


def main(argv: list[str] | None = None):
  args = parse(argv)
  if jax.default_backend() != 'gpu' and not args.interpret:
    raise SystemExit(f'no GPU here, only {jax.default_backend()}; see --interpret.')
  with interpreted() if args.interpret else contextlib.nullcontext():
    check_and_measure(args)


@contextlib.contextmanager
def interpreted():
  """Uses the plain interpreter, whose programs take longer to optimize than to run."""
  jax.config.update('jax_disable_most_optimizations', True)
  with pltpu.force_tpu_interpret_mode(True):
    yield


def check_and_measure(args):
  dims = SMALL if args.small else DIMS
  wrong = check(min(args.sizes), dims)
  if wrong:
    raise SystemExit('\n'.join(wrong))
  ceiling = matmul_tflops(256 if args.small else 8192, args)
  device = jax.devices()[0].device_kind
  results = {'device': device, 'date': time.strftime('%Y-%m-%d'), 'jax': jax.__version__}
  results |= {'interpreted': args.interpret, 'matmul_tflops': ceiling, 'rows': []}
  rows = results['rows']
  for row in (*measured(dims, args), *([] if args.interpret else bench_torch.rows(args))):
    if row['tflops'] is not None:
      row['percent_of_ceiling'] = 100 * row['tflops'] / ceiling
    print(json.dumps(row), flush=True)
    rows.append(row)
    args.json.write_text(json.dumps(results, indent=1) + '\n')
  text = '\n'.join([*table(results), *comparison(rows)]) + '\n'
  args.json.with_suffix('.md').write_text(text)
  print(text)


def parse(argv):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('--sizes', type=int, nargs='*', default=[4096, 8192, 16_384, 32_768, 65_536, 131_072])
  add('--queries', type=int, default=4096, help='the last so many of the context')
  add('--decode', type=int, nargs='*', default=[1, 16, 64, 128], help='sequences, a query each')
  add('--decode_sizes', type=int, nargs='*', default=[4096, 32_768], help='keys of each')
  add('--torch_sizes', type=int, nargs='*', default=[4096, 32_768], help='of bench_torch.py')
  add('--seconds', type=float, default=0.4, help='for which each program is repeated')
  add('--buffers', type=int, default=2, help='sets of inputs, used in turn')
  add('--small', action='store_true', help='toy widths')
  add('--interpret', action='store_true', help='on a CPU: no times worth having')
  add('--json', type=pathlib.Path, default=HERE / 'gpu_measured.json')
  return parser.parse_args(argv)


def make_inputs(batch, n_keys, n_queries, d, seed=0):
  """Returns random bfloat16 inputs of the last queries; each selects by the indexer."""
  x = random_inputs(batch, n_keys, n_queries, d, seed)
  return select(x, *(jax.jit(functools.partial(f, d, 'gpu')) for f in (topk, attend)))


def random_inputs(batch, n_keys, n_queries, d, seed):
  keys = iter(jax.random.split(jax.random.key(seed), 9))
  normal = lambda *shape: jax.random.normal(next(keys), (batch, *shape), jnp.bfloat16)
  end = jnp.arange(n_keys - n_queries + 1, n_keys + 1, dtype=jnp.int32)
  end = jnp.broadcast_to(end, (batch, n_queries))
  return {
      'q': normal(n_queries, d['H'], d['E']), 'kv': normal(n_keys, d['E']),
      'index_q': normal(n_queries, d['I'], d['J']), 'index_k': normal(n_keys, d['J']),
      'weights': normal(n_queries, d['I']).astype(jnp.float32),
      'start': jnp.zeros_like(end), 'end': end, 'dout': normal(n_queries, d['H'], d['V']),
      'indices': jnp.zeros((batch, n_queries, d['K']), jnp.int32),
      'lse': jnp.zeros((batch, n_queries, d['H'])),
  }  # fmt: skip


def select(x, topk, attend):
  x |= {'indices': topk(x)}
  return x | {'lse': attend(x)[1]}


def topk(d, backend, x):
  index = x['index_q'], x['index_k'], x['weights']
  return index_topk(*index, x['start'], x['end'], topk=d['K'], backend=backend)


def attend(d, backend, x):
  inputs = x['q'], x['kv'][:, :, None], None, x['indices']
  return sparse_attention(*inputs, v_dim=d['V'], sm_scale=d['E'] ** -0.5, backend=backend)


def attend_backward(d, backend, x):
  op = lambda q, kv: attend(d, backend, x | {'q': q, 'kv': kv})[0]
  return jax.vjp(op, x['q'], x['kv'])[1](x['dout'].astype(x['q'].dtype))


def kl_grad(d, selected, backend, x):
  """Runs on selected keys, as in the sparse stage, or on all keys of each head, as in warm-up."""
  q, k, lse = x['q'], x['kv'][:, :, None], x['lse']
  if not selected:
    q = q[..., : min(DENSE['E'], d['E'])]
    k = jnp.broadcast_to(k[..., : q.shape[3]], (*k.shape[:2], q.shape[2], q.shape[3]))

  def op(*index):
    return index_kl(
        q, k, lse, *index, x['start'], x['end'], sm_scale=q.shape[3] ** -0.5,
        indices=x['indices'] if selected else None, backend=backend,
    )  # fmt: skip

  kl, vjp = jax.vjp(op, x['index_q'], x['index_k'], x['weights'])
  return kl, vjp(jnp.ones_like(kl))


def programs(d):
  """Forward and backward of sparse attention are one program; its backward is the difference."""
  return {
      'index_topk': functools.partial(topk, d),
      'sparse_forward': functools.partial(attend, d),
      'sparse_forward_backward': functools.partial(attend_backward, d),
      'index_kl_selected_grad': functools.partial(kl_grad, d, True),
      'index_kl_dense_grad': functools.partial(kl_grad, d, False),
  }


def check(n_keys: int, d) -> list[str]:
  """Returns a line for each result that differs from the float32 reference."""
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
  """Yields a row for each program and size; all are compiled first, many at a time."""
  cases, shapes = [], {}
  for n in args.sizes:
    rows = min(args.queries, n)
    shapes[1, n, rows] = functools.partial(random_inputs, 1, n, rows, d)
    shapes['dense', n, rows] = functools.partial(dense_inputs, n, rows, d)
    cases += [((1, n, rows), name, functools.partial(f, 'gpu')) for name, f in programs(d).items()]
    cases += [(('dense', n, rows), *item) for item in dense_programs(args.interpret).items()]
  for n in args.decode_sizes:
    for batch in args.decode:
      shapes[batch, n, 1] = functools.partial(random_inputs, batch, n, 1, d)
      for name in ('index_topk', 'sparse_forward'):
        cases.append(((batch, n, 1), name, functools.partial(programs(d)[name], 'gpu')))
      cases.append(((batch, n, 1), 'dense_decode', functools.partial(dense_decode, d)))
  if not args.small:
    n, heads = SQUARE
    small = d | dict(H=1, V=1, E=2, I=heads)
    shapes['square', n, n] = functools.partial(random_inputs, 1, n, n, small)
    cases.append((('square', n, n), 'index_topk', functools.partial(topk, d, 'gpu')))
  compile_inputs = lambda f: jax.jit(f).lower(jnp.int32(0)).compile()
  compile_one = lambda case: (
      jax.jit(case[2]).lower(jax.eval_shape(shapes[case[0]], jnp.int32(0))).compile()
  )
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    run_all = map if args.interpret else pool.map  # A thread of a pool would not interpret.
    inputs = dict(zip(shapes, run_all(compile_inputs, shapes.values())))
    compiled = list(run_all(compile_one, cases))
  of_size = {}
  for (size, name, _), run in zip(cases, compiled):
    of_size.setdefault(size, {})[name] = run
  for size, runs in of_size.items():
    sets = [inputs[size](jnp.int32(seed)) for seed in range(args.buffers)]
    if isinstance(size[0], int):
      sets = [select(x, runs['index_topk'], runs['sparse_forward']) for x in sets]
    for name, run in runs.items():
      yield row_of(name, size, run, sets, d, args)


def dense_inputs(n_keys, n_queries, d, seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  normal = lambda key, n: jax.random.normal(key, (1, n, d['H'], DENSE['E']), jnp.bfloat16)
  return dict(zip('qkv', map(normal, keys, (n_queries, n_keys, n_keys))))


def dense_programs(portable: bool):
  def attend(q, k, v):
    implementation = 'xla' if portable else 'cudnn'
    is_causal = q.shape == k.shape
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=is_causal, implementation=implementation
    )

  def backward(x):
    return jax.vjp(attend, x['q'], x['k'], x['v'])[1](x['q'])

  return {'dense_forward': lambda x: attend(**x), 'dense_forward_backward': backward}


def dense_decode(d, x):
  """Lets one query of each sequence attend to all latents, which all heads share."""
  f32 = dict(preferred_element_type=jnp.float32)
  logits = jnp.einsum('BHE,BSE->BHS', x['q'][:, 0], x['kv'], **f32) * d['E'] ** -0.5
  weights = jax.nn.softmax(logits, axis=-1).astype(x['kv'].dtype)
  return jnp.einsum('BHS,BSV->BHV', weights, x['kv'][..., : d['V']], **f32)


def row_of(name, size, run, sets, d, args):
  kind, n_keys, n_queries = size
  batch = kind if isinstance(kind, int) else 1
  device, wall, began = [], [], time.perf_counter()
  while not wall or time.perf_counter() - began < args.seconds or len(wall) < len(sets):
    x = sets[len(wall) % len(sets)]
    if not args.interpret:
      device.append(profiler.measure(run)(x)[1])
    start = time.perf_counter()
    jax.block_until_ready(run(x))
    wall.append(1e3 * (time.perf_counter() - start))
  device_ms = float(np.median(device)) if device else None
  flops, bytes_, causal = work(name, kind, n_keys, n_queries, d)
  row = {'S': n_keys, 'queries': n_queries * batch, 'program': name, 'device_ms': device_ms}
  row |= {'wall_ms': float(np.median(wall))}
  row |= {'roofline_ms': 1e3 * batch * max(flops / PEAK.bf16, bytes_ / PEAK.bandwidth)}
  row |= {'tflops': None if args.interpret else batch * flops / device_ms / 1e9}
  row |= {'causal_ms': device_ms * causal} if device and causal < 1 else {}
  return row | ({'sequences': batch} if n_queries == 1 else {}) | (
      {'index_heads': SQUARE[1]} if kind == 'square' else {}
  )


def work(name, kind, n_keys, n_queries, d) -> tuple[float, float, float]:
  """Returns FLOPs by the usual convention, bytes that must move, and the share of causal pairs."""
  h, e, v, j = (d[x] for x in 'HEVJ')
  i = SQUARE[1] if kind == 'square' else d['I']
  topk = min(d['K'], n_keys)
  causal = n_queries * (n_keys - (n_queries - 1) / 2)
  pairs = causal if n_queries in (1, n_keys) or not name.startswith('dense') else n_queries * n_keys
  forward = 2 * n_queries * topk * h * (e + v)
  dense = 2 * pairs * h * (DENSE['E'] + DENSE['V'])
  score, target = 2 * i * j, 2 * h * e
  flops = {
      'index_topk': pairs * score,
      'sparse_forward': forward,
      'sparse_forward_backward': forward + 2 * n_queries * topk * h * (3 * e + 2 * v),
      'index_kl_selected_grad': n_queries * topk * (target + 3 * score),
      'index_kl_dense_grad': pairs * (4 * h * DENSE['E'] + 4 * score),  # The target is made twice.
      'dense_forward': dense,
      'dense_forward_backward': dense + 2 * pairs * h * (3 * DENSE['E'] + 2 * DENSE['V']),
      'dense_decode': 2 * pairs * h * (e + v),
  }[name]
  index = 2 * (n_queries * i * j + n_keys * j)
  main = 2 * (n_queries * h * (e + v) + min(n_keys, n_queries * topk) * e)
  dense_bytes = 2 * h * (n_queries + n_keys) * (DENSE['E'] + DENSE['V'])
  latents = 2 * (n_queries * h * (e + v) + n_keys * e)
  bytes_ = {'index_topk': index, 'dense_decode': latents}.get(name, main)
  return flops, dense_bytes if 'dense_f' in name else bytes_, causal / pairs


def matmul_tflops(n: int, args) -> float:
  """Returns the TFLOPS that this chip reaches with one large product."""
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
  yield (
      f'{results["device"]}, jax {results["jax"]}, {results["date"]}; one large product: '
      f'{ceiling:.2f} TFLOPS.'
  )
  if results['interpreted']:
    yield 'Interpreted on a CPU: the times mean nothing.'
  yield '\n| program | S | queries | device ms | wall ms | roofline ms | TFLOPS | % of ceiling |'
  yield '| --- |' + ' ---: |' * 7
  for row in with_differences(results['rows'], ceiling):
    program = row['program'] + (', decoding' if 'sequences' in row else '')
    program += f', {row["index_heads"]} heads' if 'index_heads' in row else ''
    cells = [program, str(row['S']), str(row['queries'])]
    cells += [show(row.get(key), 3) for key in ('device_ms', 'wall_ms', 'roofline_ms')]
    cells += [show(row['tflops'], 0), show(row.get('percent_of_ceiling'), 0)]
    yield '| ' + ' | '.join(cells) + ' |'


def with_differences(rows: list[dict], ceiling: float):
  """Yields each row, and after forward and backward the backward alone, by their difference."""
  measured = {(row['program'], row['S'], row['queries']): row for row in rows}
  for row in rows:
    yield row
    forward = measured.get((row['program'].removesuffix('_backward'), row['S'], row['queries']))
    if row['program'].endswith('forward_backward') and row['tflops'] is not None:
      ms = row['device_ms'] - forward['device_ms']
      flops = row['tflops'] * row['device_ms'] - forward['tflops'] * forward['device_ms']
      alone = {'program': row['program'].replace('forward_', ''), 'device_ms': ms}
      alone |= {'tflops': flops / ms, 'percent_of_ceiling': 100 * flops / ms / ceiling}
      yield {'S': row['S'], 'queries': row['queries'], **alone}


def comparison(rows: list[dict]):
  """Yields a table of what attention costs a layer, with selection, and in training with the KL."""
  alike = [row for row in rows if 'index_heads' not in row]
  prefill = {(row['program'], row['S']): row for row in alike if 'sequences' not in row}
  ms = lambda name, n: prefill[name, n].get('causal_ms', prefill[name, n]['device_ms'])
  yield (
      '\n| S | dense forward, ms | selection + sparse | times'
      ' | and backward, dense | sparse, KL | times |'
  )
  yield '| ---: |' + ' ---: |' * 6
  for n in sorted({n for name, n in prefill if name == 'sparse_forward'}):
    if prefill['sparse_forward', n]['device_ms'] is None:
      continue
    both = [(ms('dense_forward', n), ms('index_topk', n) + ms('sparse_forward', n))]
    trained = 'index_topk', 'sparse_forward_backward', 'index_kl_selected_grad'
    both += [(ms('dense_forward_backward', n), sum(ms(name, n) for name in trained))]
    cells = [f'{dense:.2f} | {sparse:.2f} | {dense / sparse:.2f}' for dense, sparse in both]
    yield f'| {n} | ' + ' | '.join(cells) + ' |'
  decoding = [row for row in rows if 'sequences' in row]
  decoded = {(row['program'], row['S'], row['sequences']): row for row in decoding}
  yield '\n| S | sequences | dense decoding, ms | selection + sparse | times |'
  yield '| ---: |' + ' ---: |' * 4
  for name, n, batch in decoded:
    ms = lambda name: decoded[name, n, batch]['device_ms']
    if name == 'dense_decode' and ms(name) is not None:
      dense, sparse = ms(name), ms('index_topk') + ms('sparse_forward')
      yield f'| {n} | {batch} | {dense:.3f} | {sparse:.3f} | {dense / sparse:.2f} |'


def show(x, digits: int) -> str:
  return '' if x is None else f'{x:.{digits}f}'


if __name__ == '__main__':
  main()
