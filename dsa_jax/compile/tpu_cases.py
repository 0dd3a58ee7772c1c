# SPDX-License-Identifier: Apache-2.0
"""What `report` compiles for TPUs: our kernels, a layer, and jax's dense attention beside them.

What an op does, loop by loop, is what its plan says.
"""

from collections.abc import Callable
import math
import pathlib
from typing import NamedTuple

from flax import nnx
import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
    splash_attention_mask as masks,
)
import jax.numpy as jnp

from dsa_jax import versions
from dsa_jax.compile import grouped, llo as schedule
from dsa_jax.compile.cases import (
    BF16,
    Dims,
    E,
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
    dense_constants,
    dense_kl_backward_flops,
    dense_kl_backward_shapes,
    dense_kl_flops,
    dense_kl_shapes,
    float32,
    int32,
    kl_constants,
    kl_flops,
    kl_index,
    kl_shapes,
    shape,
    topk_flops,
    topk_shapes,
)
from dsa_jax.compile.chips import CHIPS, make_mesh
from dsa_jax.config import ModelConfig
from dsa_jax.kernels.dense_attention import op as dense_op, tpu as dense
from dsa_jax.kernels.groups import fold_keys
from dsa_jax.kernels.index_kl import tpu as kl, tpu_dense
from dsa_jax.kernels.index_topk import tpu as select
from dsa_jax.kernels.indexed_attention import tpu as indexed
from dsa_jax.kernels.sparse_attention import op as attention_op, tpu as attention
from dsa_jax.kernels.tpu import chip as this_chip
from dsa_jax.kernels.tpu.plans import KernelPlan
from dsa_jax.nn.attention.mla import MLA
from dsa_jax.nn.attention.types import Mode

SEQUENCES = 32  # Sequences that decode side by side.
SPLASH_HEADS = 2  # Heads that are compiled; the grid goes over more of them one by one.
SM_SCALE = 0.1


def plan_topk(dims: Dims):
  q, k, *_ = topk_shapes(dims)
  return select.plan(q, k, topk=K, vmem=dims.vmem, blocks=select.BlockSizes())


def plan_attention(dims: Dims):
  return _plan_attention(attention_shapes(dims), dims)


def plan_decode(dims: Dims):
  return _plan_attention(decode_shapes(dims), dims)


def _plan_attention(shapes, dims: Dims):
  q, kv, indices = shapes
  sizes = dict(v_dim=V, vmem=dims.vmem, blocks=attention.BlockSizes())
  return attention.plan_forward(q, kv, indices.shape[2], **sizes)


def plan_attention_backward(dims: Dims):
  q, kv, indices = attention_shapes(dims)
  sizes = dict(v_dim=V, vmem=dims.vmem, sparse_cores=True, blocks=attention.BlockSizes())
  return attention.plan_backward(q, kv, indices.shape[2], **sizes)  # All CHIPS have SparseCores.


def plan_dense(make_plan: Callable) -> Callable:
  """Returns a function of `Dims` that calls a plan function of `dense_attention.tpu`."""

  def plan(dims: Dims):
    q, k, v, *_ = dense_attention_shapes(dims)
    return make_plan(q, k, v, masked=False, vmem=dims.vmem, blocks=DENSE['blocks'])

  return plan


def plan_kl(make_plan: Callable) -> Callable:
  """Returns a function of `Dims` that calls a plan function of `index_kl.tpu`."""

  def plan(dims: Dims):
    (_, k, *_, indices), (_, index_k, _) = kl_constants(dims), kl_index(dims)
    return make_plan(k, index_k, indices, vmem=dims.vmem, blocks=KL['blocks'])

  return plan


def plan_dense_kl(make_plan: Callable) -> Callable:
  """Returns a function of `Dims` that calls a plan function of `index_kl.tpu_dense`."""

  def plan(dims: Dims):
    (q, k, *_), (index_q, *_) = dense_constants(dims), kl_index(dims)
    return make_plan(q, k, index_q, vmem=dims.vmem, blocks=DENSE_KL['blocks'])

  return plan


def plan_indexed(dims: Dims):
  q, kv, index_q, index_k, *_ = indexed_shapes(dims)
  sizes = dict(topk=K, v_dim=V, vmem=dims.vmem, blocks=indexed.BlockSizes())
  return indexed.plan(q, kv, index_q, index_k, **sizes)


def select_and_attend(q, kv, index_q, index_k, *rest):
  sizes = dict(topk=K, v_dim=V, vmem=this_chip.vmem_bytes(), blocks=indexed.BlockSizes())
  plan = indexed.plan(q, kv, index_q, index_k, **sizes)
  return indexed.forward(q, kv, index_q, index_k, *rest, plan=plan, sm_scale=SM_SCALE)


def indexed_shapes(dims):
  q, kv, _ = attention_shapes(dims)
  return q, kv, *topk_shapes(dims)


def decode_shapes(dims):
  """Returns the shapes for one query of each of many sequences."""
  of_each = lambda *dims, dtype=BF16: jax.ShapeDtypeStruct((SEQUENCES, *dims), dtype)
  return of_each(1, dims.heads, E), of_each(dims.n_keys, E), of_each(1, K, dtype=jnp.int32)


def layer(params, x, start, end):
  """Returns the gradients of the attention half of a layer, its KL included, T = S."""
  heads, index_heads = params['wq_b'].shape[1], params['indexer']['wq_b'].shape[1]
  graph, _ = layer_parts(heads, index_heads)
  mode = Mode(attention='sparse', backend='tpu', index_loss=True)

  def loss(params, x):
    out, _, report = nnx.merge(graph, params)(x, start, end, jax.random.key(0), mode)
    return jnp.sum(out.astype(jnp.float32)) + jnp.sum(report.index_kl)

  return jax.grad(loss, argnums=(0, 1))(params, x)


def layer_parts(heads: int, index_heads: int):
  cfg = ModelConfig(n_heads=heads, index_n_heads=index_heads)
  return nnx.split(nnx.eval_shape(lambda: MLA(cfg, out_scale=1.0, rngs=nnx.Rngs(0))))


def layer_shapes(dims):
  rows = int32(dims.n_keys)
  _, params = layer_parts(dims.heads, dims.index_heads)
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, BF16), params)
  return params, shape(dims.n_keys, ModelConfig.dim), rows, rows


def layer_flops(dims):
  """Returns the FLOPs of our kernels for one query, the projections not counted."""
  return sum(op.flops(dims) for op in KERNELS if 'dense' not in op.name)


def splash_attention(block_q: int, block_s: int) -> Callable:
  """Returns causal attention in MHA form, 192 channels of keys, 128 of values, by jax's kernel."""

  def attend(q, k, v):
    mask = masks.MultiHeadMask([masks.CausalMask((q.shape[1],) * 2)] * q.shape[0])
    sizes = dict(block_q=block_q, block_kv=block_s, block_kv_compute=1024)
    of_keys = {f'{name}_dkv': size for name, size in sizes.items() if name != 'block_kv_compute'}
    sizes = splash.BlockSizes(
        **sizes, **of_keys, block_kv_dkv_compute=512, use_fused_bwd_kernel=True
    )
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)(q, k, v)

  return attend


def splash_gradients(*inputs):
  total = lambda *x: jnp.sum(splash_attention(1024, 1024)(*x).astype(jnp.float32))
  return jax.grad(total, argnums=(0, 1, 2))(*inputs)


def splash_shapes(dims):
  of_heads = lambda width: jax.ShapeDtypeStruct((SPLASH_HEADS, dims.n_keys, width), BF16)
  return of_heads(192), of_heads(192), of_heads(128)


class SplashPlan(NamedTuple):
  """Blocks of queries times blocks of keys; those that a causal mask hides cost nothing."""

  name: str
  heads: int
  n_keys: int
  block_q: int
  block_s: int

  gathered_bytes = 0

  def kernels(self) -> dict[str, KernelPlan]:
    rows, columns = self.n_keys // self.block_q, self.n_keys // self.block_s
    seen = sum(math.ceil((i + 1) * self.block_q / self.block_s) for i in range(rows))
    return {
        self.name: KernelPlan((self.heads, rows, columns), [(1, self.heads * seen / self.n_keys)])
    }


def splash_forward(name: str, block_q: int, block_s: int, chips: tuple[str, ...]) -> Op:
  return Op(
      name,
      splash_attention(block_q, block_s),
      splash_shapes,
      dense_attention_flops,
      lambda dims: SplashPlan(
          'splash_mha_fwd_no_residuals', dims.heads, dims.n_keys, block_q, block_s
      ),
      chips=chips,
  )


class GroupsPlan(NamedTuple):
  """The plan of one key head, or of a few side by side, and how many times that work is done."""

  of_one: NamedTuple
  groups: int

  @property
  def gathered_bytes(self) -> float | int:
    return self.groups * self.of_one.gathered_bytes

  def kernels(self) -> dict[str, KernelPlan]:
    more = lambda loops: [(depth, self.groups * n) for depth, n in loops]
    return {
        name: plan._replace(loops=more(plan.loops), hbm_bytes=self.groups * plan.hbm_bytes)
        for name, plan in self.of_one.kernels().items()
    }


def plan_groups(n_slots: int, backward: bool) -> Callable:
  """Returns a function of `Dims` that plans attention of grouped heads."""

  def plan(dims: Dims):
    if backward:
      q, kv, _ = grouped.attention_shapes(n_slots)(dims)
      kv, blocks = jax.eval_shape(fold_keys, kv), attention.BlockSizes()
      sizes = dict(n_groups=dims.groups, vmem=dims.vmem, blocks=blocks)
      of_some = attention.plan_wide(q, kv, n_slots, **sizes)
      return GroupsPlan(of_some, dims.groups // of_some.n_wide)
    inputs = *grouped.of_one_key_head(dims), n_slots
    sizes = dict(v_dim=dims.width, vmem=dims.vmem, blocks=attention.BlockSizes())
    if n_slots >= sizes['blocks'].wide_slots:
      width = 2 * dims.width * dims.groups
      inputs = shape(T, dims.heads, width), shape(dims.n_keys, width), n_slots
      return attention.plan_forward(*inputs, **sizes | dict(v_dim=width))
    return GroupsPlan(attention.plan_forward(*inputs, **sizes), dims.groups)

  return plan


def splash_groups_shapes(dims: Dims):
  return [jax.ShapeDtypeStruct((SPLASH_HEADS, dims.n_keys, dims.width), BF16)] * 3


def splash_groups(backward: bool, n: int = 1024) -> Op:
  """Returns jax's kernel for a model whose heads share keys; it does one head after the other."""
  way = 'backward' if backward else 'forward'
  kernel = 'splash_mha_dkv_no_residuals' if backward else 'splash_mha_fwd_no_residuals'
  return Op(
      f'splash_grouped_{way}',
      splash_gradients if backward else splash_attention(n, n),
      splash_groups_shapes,
      lambda dims: dims.n_keys * dims.heads * dims.width * (5 if backward else 2),
      lambda dims: SplashPlan(kernel, dims.heads, dims.n_keys, n, n),
      models=('llama3_8b',),
  )


ATTENTION = dict(n_groups=1, v_dim=V, sm_scale=SM_SCALE, blocks=attention.BlockSizes())
DENSE = dict(sm_scale=SM_SCALE, blocks=dense.BlockSizes())
KL = dict(sm_scale=SM_SCALE, blocks=kl.BlockSizes())
DENSE_KL = dict(sm_scale=SM_SCALE, blocks=tpu_dense.BlockSizes())
KERNELS = [
    Op(
        'index_topk',
        lambda *x: select.forward(*x, topk=K, blocks=select.BlockSizes()),
        topk_shapes,
        topk_flops,
        plan_topk,
    ),
    Op(
        'sparse_attention_forward',
        lambda *x: attention.forward(*x, **ATTENTION),
        attention_shapes,
        attention_flops,
        plan_attention,
    ),
    Op(
        'sparse_attention_backward',
        lambda *x: attention_op.backward(1, V, SM_SCALE, attention, ATTENTION['blocks'], *x)[:2],
        attention_backward_shapes,
        attention_backward_flops,
        plan_attention_backward,
    ),
    Op(
        'dense_attention_forward',
        lambda *x: dense.forward(*x, None, **DENSE),
        dense_attention_shapes,
        dense_attention_flops,
        plan_dense(dense.plan_forward),
    ),
    Op(
        'dense_attention_backward',
        lambda saved, cotangents: dense_op.backward(
            SM_SCALE, dense, DENSE['blocks'], (*saved[:5], None, *saved[5:]), cotangents
        ),
        dense_attention_backward_shapes,
        dense_attention_backward_flops,
        plan_dense(dense.plan_backward),
        most=(('v6e', 2**23),),  # Keys, values and their gradients of twice as many take 26 GB.
    ),
    Op(
        'index_kl_selected_forward',
        lambda constants, index: kl.forward(constants, *index, **KL),
        kl_shapes,
        kl_flops,
        plan_kl(kl.plan_forward),
    ),
    Op(
        'index_kl_selected_backward',
        lambda *x: kl.backward(*x, **KL),
        lambda dims: (kl_constants(dims), (*kl_index(dims), *[float32(T)] * 2), float32(T)),
        lambda dims: 2 * K * (dims.heads * E + 3 * dims.index_heads * J),
        plan_kl(kl.plan_backward),
    ),
    Op(
        'index_kl_dense_forward',
        lambda constants, index: tpu_dense.forward((*constants, None), *index, **DENSE_KL),
        dense_kl_shapes,
        dense_kl_flops,
        plan_dense_kl(tpu_dense.plan_forward),
    ),
    Op(
        'index_kl_dense_backward',
        lambda constants, residuals, dkl: tpu_dense.backward(
            (*constants, None), residuals, dkl, **DENSE_KL
        ),
        dense_kl_backward_shapes,
        dense_kl_backward_flops,
        plan_dense_kl(tpu_dense.plan_backward),
    ),
]
DECODE = Op(
    'sparse_attention_decode',
    lambda *x: attention.forward(*x, **ATTENTION),
    decode_shapes,
    attention_flops,
    plan_decode,
)
INDEXED = Op(
    'indexed_attention',
    lambda *x: select_and_attend(*x),
    indexed_shapes,
    lambda dims: sum(op.flops(dims) for op in KERNELS[:2]),
    plan_indexed,
)
LAYER = Op('layer', layer, layer_shapes, layer_flops, chips=('v5p',))
SPLASH = [
    splash_forward('splash_attention_forward', 2048, 2048, ('v6e', 'tpu7x')),
    # More does not fit into the VMEM that splash is given on a v5p.
    splash_forward('splash_attention_forward_1024', 1024, 2048, ('v5p',)),
    Op(
        'splash_attention_backward',
        splash_gradients,
        splash_shapes,
        dense_attention_backward_flops,
        lambda dims: SplashPlan(
            'splash_mha_dkv_no_residuals', dims.heads, dims.n_keys, 1024, 1024
        ),
    ),
]
OPS = {op.name: op for op in [*KERNELS, INDEXED, DECODE, LAYER]}
GROUPS = grouped.ops(attention, plan_groups)
GROUPS.append(
    Op(
        'grouped_topk',
        lambda *x: select.forward(*x, topk=K, blocks=select.BlockSizes()),
        grouped.topk_shapes,
        grouped.topk_flops,
        lambda dims: select.plan(
            *grouped.topk_shapes(dims)[:2], topk=K, vmem=dims.vmem, blocks=select.BlockSizes()
        ),
        models=('llama3_8b',),
    )
)
OF_GROUPS = {op.name: op for op in GROUPS}
SPLASH += [splash_groups(backward=False), splash_groups(backward=True)]
BASELINES = {op.name: op for op in SPLASH}
COMPILERS = versions.TPU_COMPILERS


def vmem_of(chip: str) -> int:
  """Returns the bytes of VMEM of a chip, in a process with its `environment`."""
  with jax.set_mesh(make_mesh(chip)):
    return this_chip.vmem_bytes()


def expects(op: Op, dims: Dims):
  """Returns what `measure` is told of an op by its plan: loops, bytes of rows, gathered bytes."""
  if op.plan is None:
    return None
  plan = op.plan(dims)
  kernels = plan.kernels()
  trips = {name: kernel.loops for name, kernel in kernels.items()}
  streams = {name: kernel.hbm_bytes for name, kernel in kernels.items() if kernel.hbm_bytes}
  return trips, streams, plan.gathered_bytes


def measure(
    op: Op, chip: str, dims: Dims, dump: pathlib.Path, compiled: jax.stages.Compiled
) -> dict:
  """Reads what the compiler left of an op: in the folder of its dumps, and in the program."""
  spec = CHIPS[chip]
  row = {'mxu_cycles': op.flops(dims) / spec.flops * spec.hertz}
  if op in KERNELS + GROUPS:
    row['hbm_cycles'] = moved_bytes(op, chip, dims) / T / spec.bytes * spec.hertz
  if op.plan is None:
    return row | {'vmem_mib': None, 'kernels': {}, 'cycles': None, 'us': None}
  all_trips, streams, gathered = expects(op, dims)
  through_hbm = lambda n_bytes: n_bytes / spec.bytes * spec.hertz
  kernels = {
      kernel: max(schedule.cycles_of(dump, kernel, trips), through_hbm(streams.get(kernel, 0)))
      for kernel, trips in all_trips.items()
  }
  vmem = max(schedule.vmem_bytes(schedule.dumped(dump, name, 'original')) for name in kernels)
  cycles = sum(kernels.values())
  row |= {'vmem_mib': vmem / 2**20, 'kernels': kernels}
  if gathered:
    beside = schedule.beside(compiled.as_text(), 'gather_rows', list(kernels))
    row['beside_gather'] = beside
    if spec.gathered:
      row['gather_cycles'] = gathered / spec.gathered * spec.hertz
      cycles += max(row['gather_cycles'] - sum(kernels[kernel] for kernel in beside), 0)
    cycles = max(cycles, through_hbm(sum(streams.values()) + 2 * gathered))
  return row | {'cycles': cycles, 'us': 1e6 * cycles / spec.hertz}


def moved_bytes(op: Op, chip: str, dims: Dims) -> int:
  """Returns what HBM must move at least: each argument read once, each result written once."""
  shapes = op.shapes(dims)
  with jax.set_mesh(make_mesh(chip)):
    results = jax.eval_shape(op.function, *shapes)
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((shapes, results)))


def print_table(rows: list[dict]):
  columns = {'temporaries_mib': '.0f', 'vmem_mib': '.1f', 'seconds': '.0f'}
  columns |= {'mxu_cycles': '.0f', 'hbm_cycles': '.0f', 'gather_cycles': '.0f'}
  columns |= {'cycles': '.0f', 'us': '.2f'}
  print('| chip | model | op | S | temporaries MiB | VMEM MiB | compiled s | MXU floor, cycles '
        '| HBM floor, cycles | SparseCores, cycles | cycles a query | us a query |')  # fmt: skip
  print('| --- | --- | --- |' + ' ---: |' * 9)
  for row in rows:
    known = [row.get(key) for key in columns]
    cells = ['' if x is None else format(x, spec) for x, spec in zip(known, columns.values())]
    cells = [row['error']] if 'error' in row else cells
    print('|', ' | '.join([row['chip'], row['model'], row['op'], str(row['S']), *cells]), '|')
