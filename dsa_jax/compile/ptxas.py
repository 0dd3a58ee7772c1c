# SPDX-License-Identifier: Apache-2.0
"""Reads from NVIDIA's assembler a kernel's registers, its spills, and which of these are in loops.

The tools come as wheels: `pip install 'dsa_jax[compile-gpu]'`.
"""

from collections.abc import Iterable
import importlib.util
import pathlib
import re
import subprocess
import tempfile

MOSAIC = '_mosaic_gpu_kernel'  # Mosaic GPU adds this to the name of a kernel.


def toolkit() -> pathlib.Path:
  """Returns the folder where the wheels put ptxas, nvdisasm and libdevice.

  Raises:
    ValueError: They are not installed.
  """
  try:
    package = importlib.util.find_spec('nvidia.cu13')
  except ModuleNotFoundError:
    package = None
  for folder in package.submodule_search_locations if package else ():
    if all((pathlib.Path(folder) / 'bin' / tool).exists() for tool in ('ptxas', 'nvdisasm')):
      return pathlib.Path(folder)
  raise ValueError("ptxas and nvdisasm are not installed: pip install 'dsa_jax[compile-gpu]'.")


def read_kernels(
    dump: pathlib.Path, architecture: str, prefixes: tuple[str, ...]
) -> dict[str, dict]:
  """Assembles what XLA and Mosaic dumped, and describes the kernels whose names have a prefix."""
  shared = {}
  for path in dump.glob('*.thunk_sequence.txt'):
    shared |= shared_bytes(path.read_text())
  for path in dump.glob('*.mlir-passes.log'):  # Of Mosaic.
    with path.open() as lines:
      shared[path.name.rsplit('_', 1)[0] + MOSAIC] = launched_bytes(lines)
  kernels = {}
  for path in sorted(dump.glob('*.ptx')):
    names = re.findall(r'^\.visible \.entry (\w+)\(', path.read_text(), re.MULTILINE)
    for name in (name for name in names if name.startswith(prefixes)):
      described = describe(*assemble(path, name, architecture))
      kernels[name.removesuffix(MOSAIC)] = described | {'shared_bytes': shared.get(name)}
  return kernels


def assemble(ptx: pathlib.Path, name: str, architecture: str) -> tuple[str, str]:
  """Returns what ptxas says of a kernel, and its instructions."""
  with tempfile.TemporaryDirectory() as folder:
    cubin = f'{folder}/kernel.cubin'
    said = _run('ptxas', f'-arch={architecture}', '-v', f'-e={name}', str(ptx), '-o', cubin)
    return said, _run('nvdisasm', '-c', cubin)


def describe(said: str, instructions: str) -> dict:
  """Returns a kernel's registers and spilled bytes, and spills, instructions and products of loops.

  `serialized` says that ptxas waits after each product of tiles, which it does where it cannot
  prove that the registers are free.
  """
  bodies = loops(instructions)
  inner = max(bodies, key=len, default=[])
  count = lambda pattern, body: sum(bool(re.search(pattern, line)) for line in body)
  return {
      'registers': int(re.search(r'Used (\d+) registers', said)[1]),
      'spilled_bytes': int(re.search(r'(\d+) bytes spill stores', said)[1]),
      'loop_spills': sum(count(r'\b(STL|LDL)\b', body) for body in bodies),
      'loop_instructions': len(inner),
      'loop_products': count(r'\bHGMMA\b', inner),
      'serialized': 'instructions are serialized' in said,
  }


def loops(instructions: str) -> list[list[str]]:
  """Returns the bodies of a kernel's loops, line by line; inner loops count in outer ones, too."""
  lines, labels, bodies = [], {}, []
  for line in instructions.splitlines():
    if label := re.match(r'\s*(\.L_\w+):', line):
      labels[label[1]] = len(lines)
    elif instruction := re.match(r'\s*/\*[0-9a-f]+\*/\s+(.*?);', line):
      lines.append(instruction[1])
      jump = re.search(r'\bBRA\b.*`\((\.L_\w+)\)', instruction[1])
      if jump and labels.get(jump[1], len(lines)) < len(lines) - 1:
        bodies.append(lines[labels[jump[1]] :])
  return bodies


def shared_bytes(thunks: str) -> dict[str, int]:
  """Reads the shared memory that each kernel is launched with from XLA's list of launches."""
  launches = re.findall(r'\] (\w+) grid: .*shared_memory: (\d+) bytes', thunks)
  return {name: int(n) for name, n in launches}


def launched_bytes(lines: Iterable[str]) -> int | None:
  """Reads the shared memory that a kernel is launched with from Mosaic's log of its passes."""
  matches = (re.search(r'dynamic_shared_memory_size %c(\d+)_i32', line) for line in lines)
  launch = next(filter(None, matches), None)
  return launch and int(launch[1])


def _run(tool, *args):
  done = subprocess.run([toolkit() / 'bin' / tool, *args], capture_output=True, text=True)
  if done.returncode:
    raise ValueError(f'{tool} failed: {done.stderr.strip()}')
  return done.stdout + done.stderr
