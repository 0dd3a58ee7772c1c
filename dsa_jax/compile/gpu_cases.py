# SPDX-License-Identifier: Apache-2.0
"""What `report` compiles for GPUs: our kernels at the dimensions of released models."""

import pathlib

import jax

from dsa_jax import versions
from dsa_jax.chips import DEVICES
from dsa_jax.compile import grouped, layer, ptxas
from dsa_jax.compile.cases import (
    BF16,
    Dims,
    J,
    K,
    Op,
    T,
    V,
    attention_backward_flops,
    attention_backward_shapes,
    attention_flops,
    attention_shapes,
    dense_attention_backward_flops,
    dense_attention_backward_shapes,
    dense_attention_flops,
    dense_attention_shapes,
    dense_kl_backward_flops,
    dense_kl_backward_shapes,
    dense_kl_flops,
    dense_kl_shapes,
    float32,
    kl_constants,
    kl_flops,
    kl_index,
    kl_shapes,
    topk_flops,
    topk_shapes,
)
from dsa_jax.compile.chips import GPUS
from dsa_jax.families import SIZES
from dsa_jax.kernels import grouped_matmul
from dsa_jax.kernels.dense_attention import gpu as dense, op as dense_op
from dsa_jax.kernels.index_kl import gpu as kl, gpu_dense
from dsa_jax.kernels.index_topk import gpu as select
from dsa_jax.kernels.sparse_attention import gpu as attention, op as attention_op

CHIPS = tuple(GPUS)
SM_SCALE = 0.1
ATTENTION = dict(n_groups=1, v_dim=V, sm_scale=SM_SCALE, blocks=attention.BlockSizes())
DENSE = dict(sm_scale=SM_SCALE, blocks=dense.BlockSizes())
KL = dict(sm_scale=SM_SCALE, blocks=kl.BlockSizes())
DENSE_KL = dict(sm_scale=SM_SCALE, blocks=gpu_dense.BlockSizes())
EXPERTS = SIZES['v32']
DECODED = 64  # Sequences, each with one query.


def decoding(shapes, *of_keys: int):
  """Returns the shapes for the last query of many sequences; `of_keys` says which are of keys."""

  def each(dims):
    sizes = [(x, x.shape[1] if i in of_keys else 1) for i, x in enumerate(shapes(dims))]
    return [jax.ShapeDtypeStruct((DECODED, n, *x.shape[2:]), x.dtype) for x, n in sizes]

  return each


KERNELS = [
    Op(
        'index_topk',
        lambda *x: select.forward(*x, topk=K, blocks=select.BlockSizes()),
        topk_shapes,
        topk_flops,
        chips=CHIPS,
    ),
    Op(
        'sparse_attention_forward',
        lambda *x: attention.forward(*x, **ATTENTION),
        attention_shapes,
        attention_flops,
        chips=CHIPS,
    ),
    Op(
        'sparse_attention_backward',
        lambda *x: attention_op.backward(1, V, SM_SCALE, attention, ATTENTION['blocks'], *x)[:2],
        attention_backward_shapes,
        attention_backward_flops,
        chips=CHIPS,
    ),
    Op(
        'dense_attention_forward',
        lambda *x: dense.forward(*x, None, **DENSE),
        dense_attention_shapes,
        dense_attention_flops,
        chips=CHIPS,
    ),
    Op(
        'dense_attention_backward',
        lambda saved, cotangents: dense_op.backward(
            SM_SCALE, dense, DENSE['blocks'], (*saved[:5], None, *saved[5:]), cotangents
        ),
        dense_attention_backward_shapes,
        dense_attention_backward_flops,
        chips=CHIPS,
    ),
    Op(
        'index_kl_selected_forward',
        lambda constants, index: kl.forward(constants, *index, **KL),
        kl_shapes,
        kl_flops,
        chips=CHIPS,
    ),
    Op(
        'index_kl_selected_backward',
        lambda *x: kl.backward(*x, **KL),
        lambda dims: (
            kl_constants(dims),
            (*kl_index(dims), *[float32(T)] * 2, float32(T, K)),
            float32(T),
        ),
        lambda dims: 2 * K * 3 * dims.index_heads * J,
        chips=CHIPS,
    ),
    Op(
        'index_kl_dense_forward',
        lambda constants, index: gpu_dense.forward((*constants, None), *index, **DENSE_KL),
        dense_kl_shapes,
        dense_kl_flops,
        chips=CHIPS,
    ),
    Op(
        'index_kl_dense_backward',
        lambda constants, *x: gpu_dense.backward((*constants, None), *x, **DENSE_KL),
        dense_kl_backward_shapes,
        dense_kl_backward_flops,
        chips=CHIPS,
    ),
]


def grouped_products(rows, weights, sizes, dout):
  """Returns a product of experts and both its gradients."""
  product = lambda rows, weights: grouped_matmul(rows, weights, sizes, backend='gpu')
  out, vjp = jax.vjp(product, rows, weights)
  return out, vjp(dout)


def grouped_shapes(dims: Dims):
  """Returns the shapes of one of an expert's three products for T tokens of V3.2."""
  del dims
  n_rows, n_experts = T * EXPERTS.n_activated_experts, EXPERTS.n_routed_experts
  sides = EXPERTS.dim, EXPERTS.moe_inter_dim
  of = lambda *dims, dtype=BF16: jax.ShapeDtypeStruct(dims, dtype)
  return of(n_rows, sides[0]), of(n_experts, *sides), of(n_experts, dtype='int32'), of(n_rows, sides[1])


KERNELS.append(
    Op(
        'grouped_matmul',
        grouped_products,
        grouped_shapes,
        lambda dims: 3 * 2 * EXPERTS.n_activated_experts * EXPERTS.dim * EXPERTS.moe_inter_dim,
        chips=CHIPS,
        models=('v32',),
    )
)
for op in KERNELS[:2]:  # Selection and attention.
  KERNELS.append(op._replace(name=f'{op.name}_decode', shapes=decoding(op.shapes, 1)))
OPS = {op.name: op for op in KERNELS}
OF_GROUPS = {op.name: op for op in grouped.ops(attention, chips=CHIPS)}
BASELINES = {}  # Compiled where they are asked for by name.
for stage in 'warmup', 'sparse':
  BASELINES[f'layer_{stage}'] = layer.layer_op(stage, 'gpu', CHIPS)
COMPILERS = versions.GPU_COMPILERS
OURS = ('sparse_attention_', 'dense_attention_', 'index_', 'add_rows', 'grouped_')  # Other kernels are XLA's own.


def vmem_of(chip: str) -> int:
  """Returns 0: plans for GPUs ask for no memory's size."""
  del chip
  return 0


def expects(op: Op, dims: Dims):
  """Returns None: `measure` is told nothing of the kernels whose numbers it reads."""
  del op, dims


def measure(
    op: Op, chip: str, dims: Dims, dump: pathlib.Path, compiled: jax.stages.Compiled
) -> dict:
  """Reads what the compiler left of an op in the folder of its dumps."""
  del compiled
  if op.name in BASELINES:
    return {'parts': layer.roofline(layer.stage_of(op), dims.n_keys, DEVICES[chip])}
  kernels = ptxas.read_kernels(dump, GPUS[chip].architecture, OURS)
  if not kernels:
    raise ValueError(f'{op.name}: the compiler wrote no kernel of ours.')
  return {
      'tensor_us': 1e6 * op.flops(dims) / GPUS[chip].flops,
      'loop_spills': sum(kernel['loop_spills'] for kernel in kernels.values()),
      'serialized': sum(kernel['serialized'] for kernel in kernels.values()),
      'kernels': kernels,
  }


def print_table(rows: list[dict]):
  """Prints a line for each kernel, and a table for each layer."""
  for row in rows:
    if 'parts' in row:
      layer.print_parts(row)
  rows = [row for row in rows if 'parts' not in row]
  if not rows:
    return
  print('| chip | model | op | S | temporaries MiB | compiled s | tensor floor, us a query '
        '| kernel | registers | loop spills | shared KiB | loop instructions | of them products '
        '| serialized |')  # fmt: skip
  print('| --- | --- | --- |' + ' ---: |' * 4 + ' --- |' + ' ---: |' * 6)
  for row in rows:
    start = [row['chip'], row['model'], row['op'], str(row['S'])]
    if 'error' in row:
      print('|', ' | '.join([*start, row['error']]), '|')
      continue
    start += [f'{row["temporaries_mib"]:.0f}', f'{row["seconds"]:.0f}', f'{row["tensor_us"]:.2f}']
    for name, kernel in row['kernels'].items():
      cells = [kernel['registers'], kernel['loop_spills'], f'{kernel["shared_bytes"] / 1024:.0f}']
      cells += [kernel['loop_instructions'], kernel['loop_products'], kernel['serialized']]
      print('|', ' | '.join(map(str, [*start, name, *cells])), '|')
