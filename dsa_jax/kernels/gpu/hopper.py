# SPDX-License-Identifier: Apache-2.0
"""What kernels for Hopper's wgmma share: a ring of tiles of rows, gathered while others multiply.

Mosaic GPU copies no single row into a tile that wgmma reads, so the copies are written here: 16
bytes a thread, at the places of the swizzle. They wait for nothing, and complete a barrier.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
import numpy as np

from dsa_jax.versions import LOAD_WHOLE

HEADS = 64  # Heads of a program, as wgmma takes them.
TILE = 32  # Rows of one of the two groups that multiply.
STEP = 2 * TILE  # Rows of both groups.
GROUP = 128  # Threads of a group.
LINES = 16  # Rows that a group copies at one time, 8 threads each.
PART = 64  # Channels that it copies of them at one time.
CHANNELS = 32  # Channels of a block of shared memory: 8 rows of 64 bytes.
SWIZZLED = plgpu.TilingTransform((8, CHANNELS)), plgpu.SwizzleTransform(2 * CHANNELS)
BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_CHOSEN = plgpu.Layout.WG_STRIDED((GROUP * STEP // LINES,), vec_size=1)


def call(
    kernel: Callable,
    programs: int,
    out: Sequence[jax.ShapeDtypeStruct],
    args: Sequence[Any],
    scratch: Any,
) -> Sequence[jax.Array]:
  """Runs `kernel(*args, *out, scratch)` as so many programs of three groups of threads.

  Args and scratch may be trees of arrays, and `kernel` gets trees of refs.
  """
  params = plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      reduction_scratch_bytes=0,  # Sums and maxima of rows stay within a warp.
  )
  run = plgpu.kernel(
      kernel, out_type=list(out), grid=(programs,), grid_names=('program',), num_threads=3,
      thread_name='group', scratch_types=[scratch], compiler_params=params,
  )  # fmt: skip
  return run(*args)


def tile(*shape: int) -> Any:
  """Returns shared memory that wgmma reads, bfloat16."""
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)


def load(ref: Any, layout: Any) -> jax.Array:
  """Reads all of a part of an array, spread over threads by rows or by columns of products."""
  return plgpu.load(ref, *LOAD_WHOLE, layout=layout, optimized=False)


class RingMemory(NamedTuple):
  """The shared memory of a ring; memory to ask for, or refs to it."""

  tiles: Any
  # float32 [1 + rounds, 64]. The first row has the barriers that copies complete, the others have
  # the bias of each row of a step.
  notes: Any
  free: Any  # A barrier for each tile.


@dataclasses.dataclass(frozen=True)
class Ring:
  """Tiles that one group fills and the other two multiply, two to a step."""

  memory: RingMemory
  rounds: int  # Steps in flight or in use.

  @staticmethod
  def scratch(rounds: int, width: int, readers: int) -> RingMemory:
    """Returns the scratch of a ring whose tiles are read by `readers` groups each."""
    return RingMemory(
        tiles=tile(2 * rounds, TILE, width),
        notes=plgpu.SMEM((1 + rounds, STEP), jnp.float32),
        free=plgpu.Barrier(num_arrivals=readers, num_barriers=2 * rounds),
    )

  def tile(self, i, side):
    """Views the tile of a side of step i."""
    return self.memory.tiles.at[self._place(i, side)]

  def bias(self, i, side):
    return load(self._note(i, side), BY_COLUMN)

  def _place(self, i, side):
    return jax.lax.rem(i, self.rounds) * 2 + side

  def _note(self, i, side):
    return self.memory.notes.at[1 + jax.lax.rem(i, self.rounds), pl.ds(side * TILE, TILE)]

  def _full(self, i, side):
    return self.memory.notes.at[0, pl.ds(2 * self._place(i, side), 2)]

  def wait(self, i, side):
    """Waits until the copies into a tile are done."""
    _wait(self._full(i, side), jax.lax.rem(i // self.rounds, 2))

  def release(self, i, side):
    plgpu.barrier_arrive(self.memory.free.at[self._place(i, side)])

  def create(self):
    """Makes the barriers. One group does it, before any other use."""
    _create(self.memory.notes.at[0], 2 * self.rounds)

  def fill(self, kv, rows, bias, steps):
    """Gathers `kv[rows]`, and the bias of each, step after step."""
    of_step = lambda i: rows.at[pl.ds(i * STEP, STEP)]

    def step(i, chosen):
      following = _load_rows(of_step(jnp.minimum(i + 1, steps - 1)))
      for side in range(2):
        place = self._place(i, side)
        pl.when(i >= self.rounds)(lambda: plgpu.barrier_wait(self.memory.free.at[place]))
        sources = kv, bias.at[pl.ds(i * STEP + side * TILE, TILE)]
        there = self.memory.tiles.at[place], self._note(i, side), self._full(i, side)
        _copy(chosen, side, *sources, *there)
      return following

    jax.lax.fori_loop(0, steps, step, _load_rows(of_step(0)))


def _load_rows(rows):
  """Returns the rows of a step that a thread copies from, one of each `LINES`."""

  @plgpu.inline_mgpu(
      arg_types=(plgpu.RefType(),),
      return_type=plgpu.ShapeDtypeStruct((GROUP * STEP // LINES,), jnp.int32, layout=_CHOSEN),
  )
  def load(_, rows):
    i32 = ir.IntegerType.get_signless(32)
    first = _add(_pointer(rows), arith.muli(arith.divui(_thread(), _number(8)), _number(4)))
    registers = []
    for i in range(STEP // LINES):
      at = _add(first, _number(4 * LINES * i))
      row = llvm.inline_asm(i32, [at], 'ld.global.nc.s32 $0, [$1];', '=r,l', has_side_effects=True)
      registers.append(vector.from_elements(ir.VectorType.get((1,), i32), [row]))
    registers = np.array(registers, dtype=object)
    return mgpu.FragmentedArray(_registers=registers, _layout=_CHOSEN.to_mgpu(), _is_signed=True)

  return load(rows)


def _copy(chosen, side, kv, bias, tile, note, full):
  """Starts copies of a tile's rows and of their bias, which complete `full`."""
  width = kv.shape[1]
  refs = [plgpu.RefType(), plgpu.RefType(), plgpu.RefType(SWIZZLED), *[plgpu.RefType()] * 2]

  @plgpu.inline_mgpu(arg_types=(_CHOSEN, *refs))
  def copy(_, chosen, kv, bias, tile, note, full):
    line, part = arith.divui(_thread(), _number(8)), arith.remui(_thread(), _number(8))
    in_block, blocks = arith.remui(line, _number(8)), width // CHANNELS
    to = _shared(tile)
    for what, size in (
        (arith.divui(line, _number(8)), 512 * blocks),
        (arith.divui(part, _number(4)), 512),
        (in_block, 64),
        (arith.xori(arith.remui(part, _number(4)), arith.divui(in_block, _number(2))), 16),
    ):
      to = arith.addi(to, arith.muli(what, _number(size)))
    source = _add(_pointer(kv), arith.muli(part, _number(16)))
    for i in range(TILE // LINES):
      row = vector.extract(chosen.registers[i + side * TILE // LINES], [], [0])
      row = arith.muli(arith.extui(_int(64), row), _number(2 * width, 64))
      start = arith.addi(source, row)
      for j in range(width // PART):
        there = arith.addi(to, _number(512 * (2 * i * blocks + 2 * j)))
        here = _add(start, _number(2 * PART * j))
        _asm('cp.async.cg.shared.global.L2::128B [$0], [$1], 16;', 'r,l', there, here)
    at = arith.muli(_thread(), _number(4))
    code = f'{{ .reg .pred P; setp.lt.u32 P, $2, {TILE}; '
    code += '@P cp.async.ca.shared.global [$0], [$1], 4; }'
    _asm(code, 'r,l,r', arith.addi(_shared(note), at), _add(_pointer(bias), at), _thread())
    _asm('cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];', 'r', _shared(full))

  copy(chosen, kv, bias, tile, note, full)


def _create(full, n: int):
  """Makes n barriers, each of which the copies of `GROUP` threads complete."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
  def create(_, full):
    with mgpu.single_thread(mgpu.ThreadSubset.WARPGROUP):
      for i in range(n):
        at = arith.addi(_shared(full), _number(8 * i))
        _asm(f'mbarrier.init.shared::cta.b64 [$0], {GROUP};', 'r', at)
      _asm('fence.mbarrier_init.release.cluster;', '')

  create(full)


def _wait(full, turn):
  """Waits until a barrier is completed once more; its turns are 0, 1, 0, ..."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
  def wait(_, full, turn):
    code = '{ .reg .pred P; again: mbarrier.try_wait.parity.shared::cta.b64 P, [$0], $1; '
    code += '@!P bra again; fence.proxy.async.shared::cta; }'
    _asm(code, 'r,r', _shared(full), turn.registers.item())

  wait(full, turn)


def _thread():
  return arith.remui(mgpu.thread_idx(), _number(GROUP))


def _int(bits):
  return ir.IntegerType.get_signless(bits)


def _number(x, bits=32):
  return arith.constant(_int(bits), ir.IntegerAttr.get(_int(bits), x))


def _pointer(ref):
  return llvm.ptrtoint(_int(64), mgpu.utils.memref_ptr(ref))


def _shared(ref):
  return llvm.ptrtoint(_int(32), mgpu.utils.memref_ptr(ref))


def _add(pointer, offset):
  return arith.addi(pointer, arith.extui(_int(64), offset))


def _asm(code, constraints, *operands):
  void = ir.Type.parse('!llvm.void')
  llvm.inline_asm(void, list(operands), code, constraints, has_side_effects=True)
