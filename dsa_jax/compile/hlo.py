# SPDX-License-Identifier: Apache-2.0
"""Reads the collectives of a compiled program."""

from collections.abc import Iterator
import math
import re
from typing import NamedTuple

import numpy as np

KINDS = (
    'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'ragged-all-to-all',
    'collective-permute',
)  # fmt: skip
_FUSED_SCATTER = 'all-reduce-scatter'  # TPUs fuse an all-reduce with the choice of a share.

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(')
_CALLED = re.compile(r'(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'(?:branch_computations|called_computations)=\{(.*?)\}')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+(?:e\w+)?)\[([\d,]*)\]')


class Collective(NamedTuple):
  """One instruction of a program, as one device runs it."""

  kind: str  # One of KINDS.
  axes: tuple[str, ...]  # The axes of the mesh that its devices span; () for permutes.
  shape: str
  bytes: int  # Bytes of the whole array that is gathered, summed or exchanged; all rows if ragged.
  times: int  # How often it runs in one run of the program.


def collectives(text: str, mesh: dict[str, int]) -> list[Collective]:
  """Returns the collectives of a compiled program, with how often those in loops run.

  Every branch of a conditional counts as taken.

  Args:
    text: The program, `compiled.as_text()`.
    mesh: The sizes of the mesh's axes, in order. The program numbers its devices row by row.

  Raises:
    ValueError: A loop with collectives in it does not say how often it runs.
  """
  computations, entry = _computations(text)

  def walk(name: str, times: int | None) -> Iterator[Collective]:
    for line in computations.get(name, ()):
      instruction = _INSTRUCTION.match(line)
      if not instruction:
        continue
      shape, op = instruction.groups()
      kind = op.removesuffix('-start')
      if kind in KINDS:
        if times is None:
          raise ValueError(f'{op} of {shape} is in a loop that does not say how often it runs.')
        if kind == 'ragged-all-to-all':  # One side holds all rows sent.
          shape = min(shape, _operand_shape(line, computations[name]), key=_total)
        collective = _collective(kind, op, shape, line, mesh, times)
        if name.startswith(_FUSED_SCATTER):
          collective = collective._replace(kind='reduce-scatter')
        yield collective
        continue
      inner = times
      if op == 'while':
        trips = _trips(line, computations)
        inner = None if times is None or trips is None else times * trips
      called = _CALLED.findall(line)
      for names in _BRANCHES.findall(line):
        called += re.findall(r'[\w.\-]+', names)
      for callee in called:
        yield from walk(callee, inner)

  return list(walk(entry, 1))


def total_bytes(exchanges: list[Collective]) -> dict[str, int]:
  """Sums bytes over one run, by kind and axes: {'all-gather over context, tensor': 123}."""
  totals = {}
  for c in exchanges:
    key = f'{c.kind} over {", ".join(c.axes)}' if c.axes else c.kind
    totals[key] = totals.get(key, 0) + c.bytes * c.times
  return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  computations, entry, lines = {}, '', []
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      lines = computations[head[2]] = []
      entry = head[2] if head[1] else entry
    else:
      lines.append(line)
  return computations, entry


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
  """Returns how often a loop runs: as the compiler says, or as its condition counts from 0."""
  if known := re.search(r'known_trip_count[^\d]*(\d+)', line):
    return int(known[1])
  condition = computations[re.search(r'condition=%?([\w.\-]+)', line)[1]]
  pattern = r's32\[\]\S* constant\((\d+)\)'
  constants = [int(n) for line in condition for n in re.findall(pattern, line)]
  below = any('ROOT' in line and 'direction=LT' in line for line in condition)
  return constants[0] if below and len(constants) == 1 else None


def _operand_shape(line: str, computation: list[str]) -> str:
  """Returns the shape of an instruction's first operand."""
  operand = re.search(r' ragged-all-to-all(?:-start)?\(%?([\w.\-]+)', line)[1]
  definition = re.compile(rf'^\s+%?{re.escape(operand)} = ')
  return next(_INSTRUCTION.match(other)[1] for other in computation if definition.match(other))


def _total(shape: str) -> int:
  return sum(_bytes(*array) for array in _ARRAY.findall(shape))


def _collective(kind: str, op: str, shape: str, line: str, mesh, times: int) -> Collective:
  arrays = [(dtype, dims) for dtype, dims in _ARRAY.findall(shape) if (dtype, dims) != ('u32', '')]
  if op.endswith('-start') and kind != 'all-reduce':
    arrays = arrays[len(arrays) // 2 :]  # Operands come first.
  size = sum(_bytes(*array) for array in arrays)
  axes = () if kind == 'collective-permute' else _axes(line, mesh)
  if kind == 'reduce-scatter':
    size *= math.prod(mesh[axis] for axis in axes)
  return Collective(kind, axes, ' '.join(f'{d}[{dims}]' for d, dims in arrays), size, times)


def _bytes(dtype: str, dims: str) -> int:
  bits = 8 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0])
  return math.prod(map(int, filter(None, dims.split(',')))) * bits // 8


def _axes(line: str, mesh: dict[str, int]) -> tuple[str, ...]:
  """Returns the axes along which the devices of the first group differ."""
  places = np.stack(np.unravel_index(_first_group(line, mesh), tuple(mesh.values())))
  return tuple(axis for axis, place in zip(mesh, places) if len(set(place.tolist())) > 1)


def _first_group(line: str, mesh: dict[str, int]) -> np.ndarray:
  """Returns the devices of one group, in any of the ways that programs write groups."""
  numbers = lambda text: [int(n) for n in re.findall(r'\d+', text)]
  devices = np.arange(math.prod(mesh.values()))
  if listed := re.search(r'replica_groups=\{\{([\d,]*)\}', line):
    return np.array(numbers(listed[1]))
  if tiled := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line):
    devices = _turned(numbers(tiled[2]), tiled[3] and numbers(tiled[3]))
    return devices.reshape(numbers(tiled[1]))[0]
  if named := re.search(r"replica_groups=mesh\[(.*?)\](.*?)\{('[^}]*)\}", line):
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
    if order := re.search(r'\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)', named[2]):
      devices = _turned(numbers(order[1]), order[2] and numbers(order[2]))
    inside = re.findall(r"'(\w+)'", named[3])
    whole = tuple(slice(None) if name in inside else 0 for name in sizes)
    return devices.reshape(tuple(sizes.values()))[whole].ravel()
  return devices  # {}: all of them.


def _turned(sizes: list[int], order: list[int] | None) -> np.ndarray:
  return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).ravel()
