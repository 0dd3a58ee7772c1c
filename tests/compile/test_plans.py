# SPDX-License-Identifier: Apache-2.0
"""Each plan says of every kernel that its op calls, and of no other, with which grid."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from dsa_jax.compile import tpu_cases
from dsa_jax.compile.cases import Dims
from dsa_jax.kernels.gpu import hopper
from dsa_jax.kernels.index_kl import gpu, gpu_dense, tpu, tpu_dense
from dsa_jax.kernels.index_topk import gpu as topk_gpu, tpu as topk_tpu
from dsa_jax.kernels.indexed_attention import tpu as indexed
from dsa_jax.kernels.sparse_attention import gpu as attention_gpu, tpu as attention, tpu_plan
from dsa_jax.kernels.tpu import chip, sparse_cores
from dsa_jax.kernels.tpu.gather_scatter import Fetch

E, V, J, H, I = 576, 512, 128, 64, 32
VMEM = [64 * 2**20, 128 * 2**20]
# Batch, queries, keys, selected keys: less than a block, a few blocks of a long context, decoding.
SMALL, LONG, DECODE = (2, 37, 53, 5), (1, 1500, 131_072, 2048), (3, 2, 40_000, 2048)
SIZES = [SMALL, LONG, DECODE]


def array(*shape, dtype='bfloat16'):
  return jax.ShapeDtypeStruct(shape, dtype)


f32, i32 = (functools.partial(array, dtype=dtype) for dtype in ('float32', 'int32'))


def shapes(batch, n_queries, n_keys, n_slots):
  """Returns the arguments of attention, of selection, and of both forms of the divergence."""
  rows = batch, n_queries
  attend = array(*rows, H, E), array(batch, n_keys, E), i32(*rows, n_slots)
  index = array(*rows, I, J), array(batch, n_keys, J), f32(*rows, I)
  interval = i32(*rows), i32(*rows)
  main = array(*rows, H, E), array(batch, n_keys, 1, E), f32(*rows, H), *interval
  wide = array(*rows, 16, 192), array(batch, n_keys, 16, 192), f32(*rows, 16), *interval
  return attend, (*index, *interval), (*main, i32(*rows, n_slots)), (*wide, None)


def calls(f, *args) -> dict[str, set]:
  """Traces f, and returns the grids of each kernel that it calls."""
  grids = {}

  def walk(jaxpr):
    for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
      if eqn.primitive.name == 'pallas_call':
        name, grid = eqn.params['name'], eqn.params['grid_mapping'].grid
        grids.setdefault(name, set()).add(grid)
        continue
      for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
        if is_jaxpr(inner):
          walk(inner)

  walk(jax.make_jaxpr(f)(*args))
  return grids


@pytest.fixture
def hopper_calls(monkeypatch) -> dict[str, set]:
  """Has Mosaic GPU's kernels not traced but noted."""
  grids = {}

  def call(kernel, n_programs, out, args, scratch):
    grids.setdefault(kernel.__name__, set()).add((n_programs,))
    return [jnp.zeros(x.shape, x.dtype) for x in out]

  monkeypatch.setattr(hopper, 'call', call)
  return grids


def is_jaxpr(x) -> bool:
  return hasattr(getattr(x, 'jaxpr', x), 'eqns')


def grids_of(plan) -> dict[str, set]:
  return {name: {kernel.grid} for name, kernel in plan.kernels().items()}


def programs(kernels: dict[str, int]) -> dict[str, set]:
  return {name: {(n,)} for name, n in kernels.items()}


@pytest.fixture(params=VMEM, ids=lambda n: f'{n >> 20}MiB')
def vmem(request, monkeypatch):
  monkeypatch.setattr(chip, 'vmem_bytes', lambda: request.param)
  return request.param


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_selection_on_a_tpu(size, vmem):
  _, inputs, _, _ = shapes(*size)
  options = dict(topk=size[3], blocks=topk_tpu.BlockSizes())
  plan = topk_tpu.plan(*inputs[:2], vmem=vmem, **options)
  assert calls(lambda *x: topk_tpu.forward(*x, **options), *inputs) == grids_of(plan)


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_attention_on_a_tpu(size, vmem):
  (q, kv, indices), *_ = shapes(*size)
  options = dict(v_dim=V, blocks=attention.BlockSizes())
  plan = attention.plan_forward(q, kv, size[3], vmem=vmem, **options)
  forward = functools.partial(attention.forward, n_groups=1, sm_scale=0.1, **options)
  assert calls(forward, q, kv, indices) == grids_of(plan)


@pytest.mark.parametrize('n_slots', [2048, 256])
def test_attention_of_groups_on_a_tpu(n_slots, vmem):
  """With many selected keys, all key heads lie side by side; with few, one comes after the other."""
  dims = Dims.of('llama3_8b', 131_072, vmem)
  op = tpu_cases.OF_GROUPS[f'grouped_forward_{n_slots}']
  plan = op.plan(dims)
  assert isinstance(plan, tpu_cases.GroupsPlan) == (n_slots == 256)
  assert calls(lambda *x: op.function(*x), *op.shapes(dims)) == grids_of(plan)


@pytest.mark.parametrize('model, n_wide', [('llama3_8b', 8), ('smollm2_135m', 3)])
def test_gradients_of_groups_on_a_tpu(model, n_wide, vmem):
  """Key heads lie side by side, and a shard of their keys and sums leaves room for the queries."""
  dims = Dims.of(model, 131_072, vmem)
  op = tpu_cases.OF_GROUPS['grouped_backward_256']
  of_set, n_sets = op.plan(dims)
  assert (of_set.n_wide, n_sets) == (n_wide, 1)
  rows, shards = of_set.sizes.rows, of_set.row_shards
  assert 0.7 < shards.stored * (rows.bytes + rows.sum_bytes) / vmem < 0.92
  assert calls(lambda *x: op.function(*x), *op.shapes(dims)) == grids_of(of_set)


@pytest.mark.parametrize(
    'n_heads, n_groups, channels, wide', [(32, 8, 256, True), (96, 8, 256, True), (32, 32, 128, False), (40, 40, 256, False)]
)
def test_key_heads_lie_side_by_side_forward_where_vmem_holds_them(n_heads, n_groups, channels, wide, monkeypatch):
  """The third is SmolLM2 1.7B, whose keys with all else were refused by the compiler of v6e."""
  monkeypatch.setattr(chip, 'vmem_bytes', lambda: VMEM[1])
  forward = functools.partial(
      attention.forward, n_groups=n_groups, v_dim=channels, sm_scale=1.0, blocks=attention.BlockSizes()
  )
  n_keys = 8192
  program = jax.make_jaxpr(forward)(
      array(1, 1024, n_heads, channels), array(1, n_keys * n_groups, channels), i32(1, 1024, 2048)
  )
  maps = [eqn for eqn in program.eqns if eqn.primitive.name == 'scan' and eqn.params['length'] == n_groups]
  assert bool(maps) != wide  # Otherwise one key head comes after the other.


def test_many_key_heads_lie_side_by_side_in_sets():
  q, kv = array(1, 64, 48, 256), array(1, 128 * 12, 256)
  plan = functools.partial(attention.plan_wide, q, kv, 16, vmem=VMEM[0])
  blocks = attention.BlockSizes()
  assert [plan(n_groups=n, blocks=blocks).n_wide for n in (2, 3, 12)] == [2, 3, 6]
  more = dataclasses.replace(blocks, wide_heads=12)
  assert plan(n_groups=12, blocks=more).n_wide == 6, 'a spare token has eight rows'


@pytest.mark.parametrize('with_sparse_cores', [False, True])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_gradients_of_attention_on_a_tpu(size, with_sparse_cores, vmem, monkeypatch):
  monkeypatch.setattr(sparse_cores, 'available', lambda: with_sparse_cores)
  monkeypatch.setattr(sparse_cores, 'gather', lambda table, rows: table[rows])  # No kernel of ours.
  (q, kv, indices), *_ = shapes(*size)
  options = dict(v_dim=V, blocks=attention.BlockSizes())
  plan = attention.plan_backward(
      q, kv, size[3], vmem=vmem, sparse_cores=with_sparse_cores, **options
  )
  lse, dout = f32(*q.shape[:3]), array(*q.shape[:3], V)
  backward = functools.partial(attention.backward, n_groups=1, sm_scale=0.1, **options)
  assert calls(backward, (q, kv, indices, lse), dout, lse) == grids_of(plan)
  fetches = isinstance(plan, tpu_plan.TogetherBackward) and isinstance(plan.gather, Fetch)
  assert bool(plan.gathered_bytes) == fetches


@pytest.mark.parametrize('vmem', VMEM)
def test_plans_ask_no_chip(vmem, monkeypatch):
  def ask():
    raise AssertionError('a plan follows from its arguments')

  monkeypatch.setattr(chip, 'vmem_bytes', ask)
  monkeypatch.setattr(sparse_cores, 'available', ask)
  planned = [op for op in tpu_cases.OPS.values() if op.plan]
  assert len(planned) == 11
  for op in [*planned, *tpu_cases.OF_GROUPS.values()]:
    dims = Dims.of('llama3_8b' if op.name in tpu_cases.OF_GROUPS else 'v32', 131_072, vmem)
    trips, streams, gathered = tpu_cases.expects(op, dims)
    assert trips and all(n >= 0 for loops in trips.values() for _, n in loops)
    assert set(streams) <= set(trips) and gathered >= 0


def test_every_path_is_taken():
  options = dict(v_dim=V, blocks=attention.BlockSizes())
  forward, backward = set(), set()
  for size, vmem in itertools.product(SIZES, VMEM):
    (q, kv, _), *_ = shapes(*size)
    forward.add(type(attention.plan_forward(q, kv, size[3], vmem=vmem, **options)))
    more = dict(vmem=vmem, sparse_cores=True)
    backward.add(type(attention.plan_backward(q, kv, size[3], **more, **options)))
  assert forward == {tpu_plan.InVmem, tpu_plan.Together, tpu_plan.Decode}
  assert backward == {tpu_plan.InVmem, tpu_plan.TogetherBackward}


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_selected_divergence_on_a_tpu(size, vmem):
  _, (*index, _, _), constants, _ = shapes(*size)
  blocks = tpu.BlockSizes()
  keys = constants[1], index[1], constants[5]
  options = dict(sm_scale=0.1, blocks=blocks)
  forward = lambda constants, index: tpu.forward(constants, *index, **options)
  plan = tpu.plan_forward(*keys, vmem=vmem, blocks=blocks)
  assert calls(forward, constants, index) == grids_of(plan)
  row = f32(*size[:2])
  plan = tpu.plan_backward(*keys, vmem=vmem, blocks=blocks)
  backward = functools.partial(tpu.backward, **options)
  assert calls(backward, constants, (*index, row, row), row) == grids_of(plan)


@pytest.mark.parametrize('n_groups, channels', [(8, 128), (16, 192), (32, 64), (40, 128), (128, 192)])
@pytest.mark.parametrize('vmem', VMEM)
def test_a_selected_divergence_leaves_room_for_the_tiles_of_many_key_heads(vmem, n_groups, channels):
  keys = array(1, 32_768, n_groups, channels), array(1, 32_768, 128), i32(1, 1024, 2048)
  for make_plan in tpu.plan_forward, tpu.plan_backward:
    plan = make_plan(*keys, vmem=vmem, blocks=tpu.BlockSizes())
    of_key = plan.rows.bytes + plan.index_rows.bytes + plan.index_rows.sum_bytes * plan.adds
    shard, tiles = plan.keys.shards.stored * of_key, plan.keys.step_t * plan.keys.tile * of_key
    assert tiles <= 0.13 * vmem and shard + 2 * tiles <= vmem, (shard / vmem, tiles / vmem)
    assert all(n >= 0 for kernel in plan.kernels().values() for _, n in kernel.loops)


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_dense_divergence_on_a_tpu(size, vmem):
  _, (*index, _, _), _, constants = shapes(*size)
  blocks = tpu_dense.BlockSizes()
  arrays = *constants[:2], index[0]
  options = dict(sm_scale=0.1, blocks=blocks)
  forward = lambda constants, index: tpu_dense.forward(constants, *index, **options)
  plan = tpu_dense.plan_forward(*arrays, vmem=vmem, blocks=blocks)
  assert calls(forward, constants, index) == grids_of(plan)
  row = f32(*size[:2])
  plan = tpu_dense.plan_backward(*arrays, vmem=vmem, blocks=blocks)
  backward = functools.partial(tpu_dense.backward, **options)
  assert calls(backward, constants, (*index, row, row), row) == grids_of(plan)


@pytest.mark.parametrize('size', [SMALL, LONG], ids=str)
def test_selection_with_attention_on_a_tpu(size, vmem, monkeypatch):
  monkeypatch.setattr(sparse_cores, 'gather', lambda table, rows: table[rows])
  (q, kv, _), inputs, *_ = shapes(*size)
  sizes = dict(topk=size[3], v_dim=V, vmem=vmem, blocks=indexed.BlockSizes())
  plan = indexed.plan(q, kv, *inputs[:2], **sizes)
  forward = functools.partial(indexed.forward, plan=plan, sm_scale=0.1)
  assert calls(forward, q, kv, *inputs) == grids_of(plan)


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_selection_on_a_gpu(size):
  _, inputs, _, _ = shapes(*size)
  options = dict(topk=size[3], blocks=topk_gpu.BlockSizes())
  plan = topk_gpu.plan(*inputs[:2], **options)
  assert calls(lambda *x: topk_gpu.forward(*x, **options), *inputs) == programs(plan.kernels())


def test_no_kernel_of_a_gpu_has_more_threads_than_there_are():
  q, k = array(1, 8, 2, 64), array(1, 131_072, 64)
  of = lambda topk: topk_gpu.plan(q, k, topk=topk, blocks=topk_gpu.BlockSizes())
  assert of(8192).has_candidates and of(8192).groups == 512 * 32
  assert not of(8193).has_candidates and not of(16_384).has_candidates


def test_sizes_of_hopper():
  assert attention_gpu.HOPPER_HEADS == hopper.HEADS and attention_gpu.HOPPER_STEP == hopper.STEP


@pytest.mark.parametrize('groups, dtype', [(1, 'bfloat16'), (1, 'float32'), (4, 'bfloat16')])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_attention_on_a_gpu(size, groups, dtype, hopper_calls):
  (q, kv, indices), *_ = shapes(*size)
  q, kv = array(*q.shape, dtype=dtype), array(kv.shape[0], kv.shape[1] * groups, E, dtype=dtype)
  options = dict(n_groups=groups, v_dim=V, blocks=attention_gpu.BlockSizes())
  plan = attention_gpu.plan_forward(q, kv, size[3], **options)
  forward = functools.partial(attention_gpu.forward, sm_scale=0.1, **options)
  assert calls(forward, q, kv, indices) | hopper_calls == programs(plan.forward_kernels())
  hopper_calls.clear()
  lse, dout = f32(*q.shape[:3]), array(*q.shape[:3], V, dtype=dtype)
  plan = attention_gpu.plan_backward(q, kv, size[3], **options)
  backward = functools.partial(attention_gpu.backward, sm_scale=0.1, **options)
  args = (q, kv, indices, lse), dout, lse
  assert calls(backward, *args) | hopper_calls == programs(plan.backward_kernels())


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_selected_divergence_on_a_gpu(size):
  _, (*index, _, _), constants, _ = shapes(*size)
  blocks = gpu.BlockSizes()
  plan = gpu.plan(*constants[:2], index[0], size[3], blocks=blocks)
  options = dict(sm_scale=0.1, blocks=blocks)
  forward = lambda constants, index: gpu.forward(constants, *index, **options)
  assert calls(forward, constants, index) == programs(plan.forward_kernels())
  row, target = f32(*size[:2]), f32(*size[:2], size[3])
  args = constants, (*index, row, row, target), row
  assert calls(functools.partial(gpu.backward, **options), *args) == programs(plan.backward_kernels())


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_dense_divergence_on_a_gpu(size):
  _, (*index, _, _), _, constants = shapes(*size)
  blocks = gpu_dense.BlockSizes()
  plan = gpu_dense.plan(*constants[:2], *index[:2], blocks=blocks)
  options = dict(sm_scale=0.1, blocks=blocks)
  forward = lambda constants, index: gpu_dense.forward(constants, *index, **options)
  assert calls(forward, constants, index) == programs(plan.forward_kernels())
  row = f32(*size[:2])
  args = constants, (*index, row, row), row
  backward = functools.partial(gpu_dense.backward, **options)
  assert calls(backward, *args) == programs(plan.backward_kernels())
