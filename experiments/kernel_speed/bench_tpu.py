# SPDX-License-Identifier: Apache-2.0
"""Checks and times the TPU kernels on a TPU: python experiments/kernel_speed/bench_tpu.py

Each op is first compared with the portable backend on the same inputs. Then both are timed, beside
what the compiler expects of this chip, by `compile_report_jax_0.10.json`. Without a TPU, try it on
toy sizes under the interpreter: --interpret --sizes 64 --queries 16 --small
"""

import argparse
import contextlib
import functools
import json
import pathlib
import time

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from dsa_jax.families.deepseek import DEEPSEEK_V32
from dsa_jax.kernels import (
    dense_attention,
    index_kl,
    index_topk,
    indexed_attention,
    sparse_attention,
)
from dsa_jax.kernels.indexed_attention import tpu as indexed
from dsa_jax.kernels.tpu import layout, sparse_cores
from dsa_jax.kernels.tpu.shards import Shards

DIMS = dict(
    H=DEEPSEEK_V32.n_heads,
    E=DEEPSEEK_V32.kv_lora_rank + DEEPSEEK_V32.qk_rope_head_dim,
    V=DEEPSEEK_V32.kv_lora_rank,
    I=DEEPSEEK_V32.index_n_heads,
    J=DEEPSEEK_V32.index_head_dim,
    K=DEEPSEEK_V32.index_topk,
)
SMALL = dict(H=8, E=40, V=24, I=4, J=16, K=24)
HERE = pathlib.Path(__file__).parent
KINDS = {'TPU v5': 'v5p', 'TPU v5p': 'v5p', 'TPU v6 lite': 'v6e', 'TPU7x': 'tpu7x'}
OPS = {  # The ops of the compile report that a program runs.
    'index_topk': ['index_topk'],
    'sparse_attention': ['sparse_attention_forward'],
    'indexed_attention': ['index_topk', 'sparse_attention_forward'],  # This is without SparseCores.
    'sparse_attention_grad': ['sparse_attention_forward', 'sparse_attention_backward'],
    'index_kl_selected_grad': [
        'sparse_attention_forward', 'index_kl_selected_forward', 'index_kl_selected_backward'
    ],
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('--sizes', type=int, nargs='*', default=[4096, 8192, 16_384, 32_768, 65_536, 131_072])
  add('--queries', type=int, default=4096, help='the last so many of the context')
  add('--runs', type=int, default=5)
  add('--small', action='store_true', help='toy widths')
  add('--interpret', action='store_true', help="under jax's interpreter: no times worth having")
  add('--json', type=pathlib.Path, default=HERE / 'tpu_measured.json')
  args = parser.parse_args()
  if jax.default_backend() != 'tpu' and not args.interpret:
    raise SystemExit(f'no TPU here, only {jax.default_backend()}; see --interpret.')
  rows = [row for n in args.sizes for row in measure(n, args)]
  device = jax.devices()[0].device_kind
  report = {'device': device, 'jax': jax.__version__, 'rows': rows}
  args.json.write_text(json.dumps(report, indent=1))


def measure(n_keys: int, args):
  dims = SMALL if args.small else DIMS
  x = make_inputs(n_keys, min(args.queries, n_keys), dims)
  for name, program in programs(dims).items():
    row = {'S': n_keys, 'program': name, 'expected_ms': expected_ms(x, name, dims)}
    outputs = {}
    for backend in ('xla', 'tpu'):
      if name.startswith('dense') and backend == 'tpu':
        continue
      with interpreted(args.interpret and backend == 'tpu'):
        run = jax.jit(functools.partial(program, backend))
        outputs[backend] = jax.block_until_ready(run(x))
        row[f'{backend}_ms'] = 1e3 * median_seconds(run, x, args.runs)
    if 'tpu' in outputs:
      row['largest_difference'] = difference(outputs['tpu'], outputs['xla'])
    print(json.dumps(row), flush=True)
    yield row


def expected_ms(x: dict, name: str, dims: dict) -> float | None:
  """Returns the time by the compiler's schedule at V3.2's sizes, in the middle of the context."""
  n_queries, n_keys = x['q'].shape[1], x['kv'].shape[1]
  rows = json.loads((HERE / 'compile_report_jax_0.10.json').read_text())
  at = KINDS.get(jax.devices()[0].device_kind), 'v32', n_keys
  us = {row['op']: row.get('us') for row in rows if (row['chip'], row['model'], row['S']) == at}
  ops = OPS.get(name, [None])
  inputs = [x[key] for key in ('q', 'kv', 'index_q', 'index_k')]
  sizes = dict(topk=dims['K'], v_dim=dims['V'], blocks=indexed.BlockSizes())
  if name == 'indexed_attention' and indexed.plan_if_it_pays(*inputs, **sizes) is not None:
    ops = ['indexed_attention']
  parts = [us.get(op) for op in ops]
  return None if None in parts else 1e-3 * n_queries * sum(parts)


def make_inputs(n_keys, n_queries, dims):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)
  end = jnp.arange(n_keys - n_queries + 1, n_keys + 1, dtype=jnp.int32)[None]
  d = dims
  x = {
      'q': normal(1, n_queries, d['H'], d['E']), 'kv': normal(1, n_keys, d['E']),
      'index_q': normal(1, n_queries, d['I'], d['J']), 'index_k': normal(1, n_keys, d['J']),
      'weights': normal(1, n_queries, d['I']).astype(jnp.float32),
      'start': jnp.zeros_like(end), 'end': end,
  }
  select = jax.jit(lambda x: topk('xla', x, d))
  packed = jax.jit(layout.pack, static_argnums=1)(x['kv'], Shards(1, n_keys, 0))
  return x | {'indices': select(x), 'lines': packed.reshape(-1, layout.LANES)}


def topk(backend, x, d):
  index = x['index_q'], x['index_k'], x['weights']
  return index_topk(*index, x['start'], x['end'], topk=d['K'], backend=backend)


def programs(d):
  scale = d['E'] ** -0.5

  def attend(backend, x, q, kv):
    indices = x['indices']
    sizes = dict(v_dim=d['V'], sm_scale=scale, backend=backend)
    return sparse_attention(q, kv[:, :, None], None, indices, **sizes)

  def select_and_attend(backend, x):
    index = x['index_q'], x['index_k'], x['weights'], x['start'], x['end']
    widths = dict(topk=d['K'], v_dim=d['V'])
    inputs = x['q'], x['kv'][:, :, None], None, *index
    return indexed_attention(*inputs, **widths, sm_scale=scale, backend=backend)[0]

  def gather_lines(backend, x):
    """Gathers a line of 512 bytes of each row that 128 queries select: the rate of SparseCores."""
    lines = layout.Rows(d['E'], x['kv'].dtype).lines
    rows = lines * jnp.maximum(x['indices'][0, :128], 0).ravel()
    on_sparse_cores = backend == 'tpu' and sparse_cores.available()
    return sparse_cores.gather(x['lines'], rows) if on_sparse_cores else x['lines'][rows]

  def attend_grad(backend, x):
    out, vjp = jax.vjp(functools.partial(attend, backend, x), x['q'], x['kv'])
    return out, vjp(jax.tree.map(jnp.ones_like, out))

  def kl_grad(backend, x, indices, lse):
    op = lambda *index: index_kl(
        x['q'], x['kv'][:, :, None], lse, *index, x['start'], x['end'],
        sm_scale=scale, indices=indices, backend=backend,
    )
    kl, vjp = jax.vjp(op, x['index_q'], x['index_k'], x['weights'])
    return kl, vjp(jnp.ones_like(kl))

  def selected_kl_grad(backend, x):
    return kl_grad(backend, x, x['indices'], attend(backend, x, x['q'], x['kv'])[1])

  def warmup_kl_grad(backend, x):
    return kl_grad(backend, x, None, dense('xla', x)[1])

  def dense(backend, x):
    k = x['kv'][:, :, None]
    return dense_attention(
        x['q'], k, k[..., : d['V']], x['start'], x['end'], sm_scale=scale, backend=backend
    )

  return {
      'index_topk': lambda backend, x: topk(backend, x, d),
      'sparse_attention': lambda backend, x: attend(backend, x, x['q'], x['kv']),
      'indexed_attention': select_and_attend,
      'gather_lines': gather_lines,
      'sparse_attention_grad': attend_grad,
      'index_kl_selected_grad': selected_kl_grad,
      'index_kl_grad': warmup_kl_grad,
      'dense_attention': dense,
  }


def interpreted(wanted: bool):
  return pltpu.force_tpu_interpret_mode() if wanted else contextlib.nullcontext()


def median_seconds(run, x, runs: int) -> float:
  seconds = []
  for _ in range(runs):
    began = time.perf_counter()
    jax.block_until_ready(run(x))
    seconds.append(time.perf_counter() - began)
  return sorted(seconds)[len(seconds) // 2]


def difference(actual, expected) -> float:
  """Returns the largest difference, relative to the largest value of its array."""

  def leaves(tree):
    arrays = [np.asarray(x, np.float32) for x in jax.tree.leaves(tree)]
    return [np.where(np.isfinite(x), x, 0).astype(np.float64) for x in arrays]

  pairs = zip(leaves(actual), leaves(expected))
  return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


if __name__ == '__main__':
  main()
