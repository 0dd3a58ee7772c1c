# SPDX-License-Identifier: Apache-2.0
"""Parses loop bodies and VMEM use from libtpu's dumps of a kernel."""

from collections.abc import Sequence
import pathlib
import re
from typing import NamedTuple

SHORT = 40  # Bundles; a shorter loop without inner ones may be the parts of a large DMA.


class Loop(NamedTuple):
  """A loop body of a schedule: its depth, and its bundles without those of inner loops."""

  depth: int
  bundles: int


def loop_bodies(schedule: str) -> list[Loop]:
  """Returns the loops of a final schedule, in its order. A bundle is a cycle if nothing stalls."""
  loops = []
  for depth, label in _bundles(schedule):
    if label == 'LB':
      loops.append(Loop(depth, 0))
    own = [i for i, loop in enumerate(loops) if loop.depth == depth]
    if own:
      loops[own[-1]] = Loop(depth, loops[own[-1]].bundles + 1)
  return loops


def cycles(loops: Sequence[Loop], trips: Sequence[tuple[int, int | float]]) -> float:
  """Returns bundles times trips; `trips` has (depth, count) for each loop, in the schedule's order.

  Where the schedule has more loops than that, the shortest of those that may start DMAs do not
  count: they run a few times in many queries. It may lack loops that run 0 times.

  Raises:
    ValueError: The loops are not those that `trips` counts.
  """
  for counted in trips, [(depth, n) for depth, n in trips if n]:
    kept = _without_dmas(loops, len(counted))
    if [loop.depth for loop in kept] == [depth for depth, _ in counted]:
      return float(sum(loop.bundles * n for loop, (_, n) in zip(kept, counted)))
  raise ValueError(f'the schedule has {loops}; (depth, trips) are given as {list(trips)}.')


def _without_dmas(loops: Sequence[Loop], n: int) -> list[Loop]:
  """Returns n loops where so many are left without the shortest of those that may start DMAs."""
  afters = [*loops[1:], None]
  of_dma = [i for i, (loop, after) in enumerate(zip(loops, afters)) if _is_dma(loop, after)]
  extra = sorted(of_dma, key=lambda i: loops[i].bundles)[: max(len(loops) - n, 0)]
  return [loop for i, loop in enumerate(loops) if i not in extra]


def _is_dma(loop: Loop, after: Loop | None) -> bool:
  is_leaf = after is None or after.depth <= loop.depth
  return is_leaf and loop.depth > 1 and loop.bundles < SHORT


def beside(program: str, call: str, kernels: Sequence[str]) -> list[str]:
  """Returns the kernels that always run between the start and the end of an asynchronous call.

  Args:
    program: The text of XLA's scheduled program.
    call: The name of the call.
    kernels: Names to look for.
  """
  parts = re.split(r'\n(?=%|ENTRY)', program)
  parts = {match[1]: part for part in parts if (match := re.match(r'(?:ENTRY )?%?(\S+) ', part))}

  def with_loops(text: str) -> str:
    bodies = re.findall(r' body=%?([\w.-]+)', text)
    return text + ''.join(with_loops(parts[body]) for body in bodies)

  def runs(kernel: str, text: str) -> bool:
    return bool(re.search(rf'%{kernel}[.\d]* = ', text))

  during = re.findall(rf'%({call}\S*)\.call-start = (.*?)%\1\.call-done = ', program, re.DOTALL)
  during = [with_loops(text) for _, text in during]
  during = [text for text in during if any(runs(kernel, text) for kernel in kernels)]
  return [kernel for kernel in kernels if during and all(runs(kernel, x) for x in during)]


def vmem_bytes(program: str) -> int:
  """Returns the VMEM that a program allocates: scratch, and windows with their second buffers."""
  return sum(int(size, 16) for size in re.findall(r'space=vmem, size = (0x[0-9a-f]+)', program))


def _bundles(schedule: str):
  line = r'^ *0x[0-9a-f]+ +(LB|LH|LE|PB|PF|CT)?:? *((?:> ?)*)\{'
  for label, marks in re.findall(line, schedule, re.MULTILINE):
    yield marks.count('>'), label


def cycles_of(dump: pathlib.Path, kernel: str, trips: list) -> float:
  """Returns a kernel's cycles for one query."""
  try:
    return cycles(loop_bodies(dumped(dump, kernel, 'final_bundles')), trips)
  except ValueError as e:
    raise ValueError(f'{kernel}: {e}') from None


def dumped(dump: pathlib.Path, kernel: str, label: str) -> str:
  """Returns what the compiler wrote of a kernel after a pass."""
  paths = [x for x in dump.glob(f'*-{kernel}[.-]*-{label}.txt') if 'analysis' not in x.name]
  if not paths:
    raise ValueError(f'{kernel}: the compiler wrote no {label}.')
  return max(paths).read_text()
