# SPDX-License-Identifier: Apache-2.0
"""What `report` compiles for TPUs: our kernels, a layer, and jax's dense attention beside them."""

from collections.abc import Callable
import math
import pathlib

from flax import nnx
import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
    splash_attention_mask as masks,
)
import jax.numpy as jnp

from dsa_jax import versions
from dsa_jax.compile import llo as schedule
from dsa_jax.compile.cases import (
    BF16,
    DENSE_E,
    Dims,
    E,
    J,
    K,
    Op,
    T,
    V,
    attention_backward_shapes,
    attention_shapes,
    dense_constants,
    float32,
    int32,
    kl_constants,
    kl_index,
    shape,
    topk_shapes,
)
from dsa_jax.compile.chips import CHIPS, make_mesh
from dsa_jax.config import ModelConfig
from dsa_jax.kernels.index_kl import tpu as kl, tpu_dense
from dsa_jax.kernels.index_topk import tpu as select
from dsa_jax.kernels.indexed_attention import tpu as indexed
from dsa_jax.kernels.sparse_attention import tpu as attention
from dsa_jax.kernels.tpu import gather_scatter, resident
from dsa_jax.kernels.tpu.resident import LANES, Rows
from dsa_jax.kernels.tpu.shards import fit_shards
from dsa_jax.nn.attention.mla import MLA
from dsa_jax.nn.attention.types import Mode

BISECTIONS = 29  # Of 64K random scores, for the slowest of 16 rows; at most 32.
SEQUENCES = 32  # That decode side by side.
INDEXED_REPEATS = 1 + 2 * indexed.BlockSizes().block_t / T  # There are two steps more than blocks.
SPLASH_HEADS = 2  # Compiled; the grid goes over more of them one by one.


def tile_trips(kernel: str, blocks, bytes_per_key: int, copies: int, adds: int = 0) -> Callable:
  """Loops of a kernel that meets shards, for one query: step, tile, groups of rows."""

  def trips(dims: Dims) -> dict:
    fitting = resident.fit_chip(blocks, dims.vmem)
    shards, tile = fit_shards(dims.n_keys, K, bytes_per_key, dims.vmem, fitting)
    met = shards, tile, fitting.step_t
    return {
        kernel: [*step_trips(*met), *copy_trips(*met, blocks) * copies, *add_trips(*met) * adds]
    }

  return trips


def attention_trips(backward: bool) -> Callable:
  """Of kernels that meet shards, or bring rows together first."""
  name, blocks = 'sparse_attention_forward', attention.BlockSizes()
  tiles = tile_trips(name, blocks, KV.bytes, copies=1)
  if backward:
    name = 'sparse_attention_backward'
    tiles = tile_trips(name, blocks, KV.bytes + 4 * KV.channels, copies=1, adds=1)

  def trips(dims: Dims) -> dict:
    if not brings_together(dims, backward):
      return tiles(dims)
    fitting = resident.fit_chip(blocks, dims.vmem)
    gather, scatter = gather_scatter.fit(KV, dims.n_keys, K, dims.vmem, fitting)
    if backward:  # SparseCores gather.
      met = scatter.shards, scatter.tile, scatter.step_t
      return {
          'sparse_attention_rows_backward': [(1, own_steps(K, dims))],
          'scatter_selected_rows': [*step_trips(*met), *add_trips(*met)],
      }
    met = gather.shards, gather.tile, gather.step_t
    return {
        'gather_selected_rows': [*step_trips(*met), *copy_trips(*met, blocks)],
        'sparse_attention_rows': [(1, own_steps(gather.n_rows, dims))],
    }

  return trips


def brings_together(dims: Dims, backward: bool) -> bool:
  """Whether sparse attention brings rows together in HBM first."""
  blocks = resident.fit_chip(attention.BlockSizes(), dims.vmem)
  bytes_per_key = KV.bytes + 4 * KV.channels * backward
  return fit_shards(dims.n_keys, K, bytes_per_key, dims.vmem, blocks)[0].loose


def streamed(op: Op, dims: Dims) -> dict[str, float]:
  """Bytes through HBM for one query, of kernels that meet rows there: rows, and what they attend."""
  blocks = resident.fit_chip(attention.BlockSizes(), dims.vmem)
  gather, scatter = gather_scatter.fit(KV, dims.n_keys, K, dims.vmem, blocks)
  q, out, sums = dims.heads * KV.channels * 2, dims.heads * V * 4, 4 * KV.channels
  n_rows = gather.n_rows if 'gather_selected_rows' in op.trips(dims) else K
  of_shards = lambda shards, size: shards.n * shards.stored * size / blocks.block_t_compact
  bytes_of = {
      'gather_selected_rows': n_rows * KV.bytes + of_shards(gather.shards, KV.bytes),
      'sparse_attention_rows': n_rows * KV.bytes + q + out,
      'sparse_attention_rows_backward': n_rows * (KV.bytes + sums) + 4 * q,
      'scatter_selected_rows': n_rows * sums + 4 * of_shards(scatter.shards, sums),
  }
  return {kernel: op.repeats * bytes_of[kernel] for kernel in op.trips(dims) if kernel in bytes_of}


def own_steps(n_rows: int, dims: Dims) -> float:
  """Steps, for one query, of a kernel in which each meets rows of its own."""
  blocks = resident.fit_chip(attention.BlockSizes(), dims.vmem)
  return gather_scatter.own_tiles(n_rows, KV, blocks)[0] / blocks.step_t


def step_trips(shards, tile: int, step_t: int) -> list[tuple[int, float]]:
  tiles = shards.n * math.ceil(K / shards.n / tile)
  return [(1, shards.n / step_t), (2, tiles / step_t)]


def copy_trips(shards, tile: int, step_t: int, blocks) -> list[tuple[int, float]]:
  """Groups that are copied, as many as the one of a step needs that has most, and cleared."""
  slots, group = K / shards.n, blocks.copied / step_t
  most = slots + math.sqrt(slots * (1 - 1 / shards.n)) * shards.loose
  copied, all_groups = math.ceil(most / group), math.ceil(slots / tile) * tile / group
  return [(3, shards.n * n / step_t) for n in (copied, all_groups - copied)]


def add_trips(shards, tile: int, step_t: int) -> list[tuple[int, float]]:
  """Groups of sums, of which half a one is in vain where slots are not in whole tiles."""
  groups = K / shards.n / (resident.ADDED * resident.ADDS)
  groups = groups + 0.5 if shards.loose else math.ceil(groups)
  return [(3, shards.n * groups / step_t)] * step_t


def topk_trips(dims) -> dict:
  blocks = select.BlockSizes()
  seen, tiles = dims.n_keys / 2 / select.TILE, -(-dims.n_keys // select.TILE)
  loops = (1, tiles), (2, seen * select.TILE / blocks.step_s), (2, seen), (2, BISECTIONS)
  loops += (3, BISECTIONS * seen), (2, seen)
  chunks = -(-tiles // select.CHUNK)
  sums, slots = [(2, chunks)] * 2, K / LANES
  numbering = (1, 1), *sums, (2, slots), (3, slots * chunks)
  if chunks == 1:  # No loop is made of one trip.
    numbering = (1, 1), (2, slots)
  per_query = lambda loops: [(depth, n / blocks.step_t) for depth, n in loops]
  return {'index_topk_cut': per_query(loops), 'index_topk_positions': per_query(numbering)}


def indexed_trips(dims) -> dict:
  """Selection, and attention to rows that have come. Steps without queries score no keys."""
  more = lambda loops: [(depth, INDEXED_REPEATS * n) for depth, n in loops]
  cut, numbering = topk_trips(dims).values()
  return {
      'index_topk_cut': [*more(cut[:1]), *cut[1:]],
      'index_topk_positions': more(numbering),
      'sparse_attention_rows': more([(1, own_steps(K, dims))]),
  }


def indexed_shapes(dims):
  q, kv, _ = attention_shapes(dims)
  return q, kv, *topk_shapes(dims)


def decode_shapes(dims):
  """One query of each of many sequences."""
  of_each = lambda *dims, dtype=BF16: jax.ShapeDtypeStruct((SEQUENCES, *dims), dtype)
  return of_each(1, dims.heads, E), of_each(dims.n_keys, E), of_each(1, K, dtype=jnp.int32)


def dense_kl_trips(kernel: str, block_t: int, phases: int) -> Callable:
  """Loops of a kernel over all keys: steps of the grid, then tiles, for each tile of queries.

  Steps without work count like others. Blocks of queries at the diagonal see half a block more.
  """

  def trips(dims: Dims) -> dict:
    blocks = DENSE_KL['blocks']
    columns, groups = block_t // blocks.tile_t, dims.heads // blocks.heads
    steps = phases * groups * -(-dims.n_keys // blocks.block_s) / block_t
    tiles = (dims.n_keys + min(block_t, dims.n_keys)) / 2 / blocks.tile_s / block_t
    of_group, of_block = [[(2, n)] * columns for n in (groups * tiles, tiles)]
    loops = [*of_group, *of_block]
    if phases == 2:
      loops = [(2, dims.index_heads / block_t), *loops, *of_group]
    return {kernel: [(1, steps), *loops]}

  return trips


def layer(params, x, start, end):
  """The gradients of the attention half of a layer, its KL included, T = S."""
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
  """For one query: of our kernels; the projections are not counted."""
  return sum(op.flops(dims) for op in KERNELS if 'dense' not in op.name)


def splash_attention(block: int) -> Callable:
  """Causal attention in MHA form, 192 channels of keys and 128 of values, by jax's own kernel."""

  def attend(q, k, v):
    mask = masks.MultiHeadMask([masks.CausalMask((q.shape[1],) * 2)] * q.shape[0])
    sizes = dict(block_q=block, block_kv=block, block_kv_compute=1024)
    of_keys = {f'{name}_dkv': size for name, size in sizes.items() if name != 'block_kv_compute'}
    sizes = splash.BlockSizes(
        **sizes, **of_keys, block_kv_dkv_compute=512, use_fused_bwd_kernel=True
    )
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)(q, k, v)

  return attend


def splash_gradients(*inputs):
  total = lambda *x: jnp.sum(splash_attention(1024)(*x).astype(jnp.float32))
  return jax.grad(total, argnums=(0, 1, 2))(*inputs)


def splash_shapes(dims):
  of_heads = lambda width: jax.ShapeDtypeStruct((SPLASH_HEADS, dims.n_keys, width), BF16)
  return of_heads(192), of_heads(192), of_heads(128)


def splash_trips(kernel: str, block: int) -> Callable:
  """Blocks that a causal mask leaves, for one query; those it hides are taken to cost nothing."""

  def trips(dims: Dims) -> dict:
    n = dims.n_keys // block
    return {kernel: [(1, dims.heads * n * (n + 1) / 2 / dims.n_keys)]}

  return trips


ATTENTION = dict(v_dim=V, sm_scale=0.1, blocks=attention.BlockSizes())
KL = dict(sm_scale=0.1, blocks=kl.BlockSizes())
DENSE_KL = dict(sm_scale=0.1, blocks=tpu_dense.BlockSizes())
KV, INDEX = Rows(E, BF16), Rows(J, BF16)
KERNELS = [
    Op(
        'index_topk',
        lambda *x: select.forward(*x, topk=K, blocks=select.BlockSizes()),
        topk_shapes,
        lambda dims: 2 * dims.n_keys / 2 * dims.index_heads * J,
        topk_trips,
    ),
    Op(
        'sparse_attention_forward',
        lambda *x: attention.forward(*x, **ATTENTION),
        attention_shapes,
        lambda dims: 2 * K * dims.heads * (E + V),
        attention_trips(backward=False),
    ),
    Op(
        'sparse_attention_backward',
        lambda *x: attention.backward(*x, **ATTENTION),
        attention_backward_shapes,
        lambda dims: 2 * K * dims.heads * (3 * E + 2 * V),
        attention_trips(backward=True),
        lambda dims: K * KV.bytes * brings_together(dims, backward=True),
    ),
    Op(
        'index_kl_selected_forward',
        lambda constants, index: kl.forward(constants, *index, **KL),
        lambda dims: (kl_constants(dims), kl_index(dims)),
        lambda dims: 2 * K * (dims.heads * E + dims.index_heads * J),
        tile_trips('index_kl_selected_forward', KL['blocks'], KV.bytes + INDEX.bytes, copies=2),
    ),
    Op(
        'index_kl_selected_backward',
        lambda *x: kl.backward(*x, **KL),
        lambda dims: (kl_constants(dims), (*kl_index(dims), *[float32(T)] * 2), float32(T)),
        lambda dims: 2 * K * (dims.heads * E + 3 * dims.index_heads * J),
        tile_trips(
            'index_kl_selected_backward',
            KL['blocks'],
            KV.bytes + INDEX.bytes + 4 * INDEX.channels,
            copies=2,
            adds=1,
        ),
    ),
    Op(
        'index_kl_dense_forward',
        lambda constants, index: tpu_dense.forward((*constants, None), *index, **DENSE_KL),
        lambda dims: (dense_constants(dims), kl_index(dims)),
        lambda dims: 2 * dims.n_keys / 2 * (dims.heads * DENSE_E + dims.index_heads * J),
        dense_kl_trips('index_kl_dense_forward', DENSE_KL['blocks'].block_t, 1),
    ),
    Op(
        'index_kl_dense_backward',
        lambda constants, residuals, dkl: tpu_dense.backward(
            (*constants, None), residuals, dkl, **DENSE_KL
        ),
        lambda dims: (dense_constants(dims), (*kl_index(dims), *[float32(T)] * 2), float32(T)),
        lambda dims: 2 * dims.n_keys / 2 * (dims.heads * DENSE_E + 3 * dims.index_heads * J),
        dense_kl_trips('index_kl_dense_backward', DENSE_KL['blocks'].block_t_backward, 2),
    ),
]
DECODE = Op(
    'sparse_attention_decode',
    lambda *x: attention.forward(*x, **ATTENTION),
    decode_shapes,
    lambda dims: 2 * K * dims.heads * (E + V),
    lambda dims: {'sparse_attention_rows': [(1, own_steps(K, dims))]},
)
INDEXED = Op(
    'indexed_attention',
    lambda *x: indexed.forward(*x, topk=K, v_dim=V, sm_scale=0.1, blocks=indexed.BlockSizes()),
    indexed_shapes,
    lambda dims: sum(op.flops(dims) for op in KERNELS[:2]),
    indexed_trips,
    gathered=lambda dims: INDEXED_REPEATS * K * KV.bytes,
    repeats=INDEXED_REPEATS,
)
LAYER = Op('layer', layer, layer_shapes, layer_flops, chips=('v5p',))
SPLASH = [
    Op(
        'splash_attention_forward',
        splash_attention(2048),
        splash_shapes,
        lambda dims: 2 * dims.n_keys / 2 * dims.heads * (192 + 128),
        splash_trips('splash_mha_fwd_no_residuals', 2048),
        chips=('v6e', 'tpu7x'),
    ),
    Op(
        'splash_attention_backward',
        splash_gradients,
        splash_shapes,
        lambda dims: 2 * dims.n_keys / 2 * dims.heads * (3 * 192 + 2 * 128),
        splash_trips('splash_mha_dkv_no_residuals', 1024),
        chips=('v6e', 'tpu7x'),
    ),
]
OPS = {op.name: op for op in [*KERNELS, INDEXED, DECODE, LAYER]}
BASELINES = {op.name: op for op in SPLASH}
COMPILERS = versions.TPU_COMPILERS


def vmem_of(chip: str) -> int:
  """Bytes of VMEM of a chip, in a process with its `environment`."""
  with jax.set_mesh(make_mesh(chip)):
    return resident.vmem_bytes()


def expects(op: Op, dims: Dims):
  """Returns what `measure` is told of an op's loops and rows, which follows from block sizes."""
  return op.trips and (op.trips(dims), streamed(op, dims), op.gathered(dims))


def measure(
    op: Op, chip: str, dims: Dims, dump: pathlib.Path, compiled: jax.stages.Compiled
) -> dict:
  """Reads what the compiler left of an op: in the folder of its dumps, and in the program."""
  spec = CHIPS[chip]
  row = {'mxu_cycles': op.flops(dims) / spec.flops * spec.hertz}
  if op in KERNELS:
    row['hbm_cycles'] = moved_bytes(op, chip, dims) / T / spec.bytes * spec.hertz
  if op.trips is None:
    return row | {'vmem_mib': None, 'kernels': {}, 'cycles': None, 'us': None}
  streams, gathered = streamed(op, dims), op.gathered(dims)
  through_hbm = lambda n_bytes: n_bytes / spec.bytes * spec.hertz
  kernels = {
      kernel: max(schedule.cycles_of(dump, kernel, trips), through_hbm(streams.get(kernel, 0)))
      for kernel, trips in op.trips(dims).items()
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
  """What HBM must at least move: each argument read once, each result written once."""
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
    cells = ['' if x is None else format(x, how) for x, how in zip(known, columns.values())]
    cells = [row['error']] if 'error' in row else cells
    print('|', ' | '.join([row['chip'], row['model'], row['op'], str(row['S']), *cells]), '|')
