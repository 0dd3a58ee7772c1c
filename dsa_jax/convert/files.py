# SPDX-License-Identifier: Apache-2.0
"""Reads a folder of safetensors files tensor by tensor, and writes one file by file."""

from collections.abc import Callable, Iterator
import json
import logging
import pathlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from dsa_jax.convert.problems import Problems
from dsa_jax.data.formats import POINTER, recognise

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
IS_POINTER = 'is a git-lfs pointer, not the file itself: run `git lfs pull` where it was cloned.'
DTYPES = {
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PACKED = 'PACKED'  # The dtype of quantised tensors of GGUF files, which are read as float32.


class Place(NamedTuple):
  """The place of a tensor in a file."""

  path: pathlib.Path
  dtype: str  # A key of DTYPES, PACKED, or another dtype that safetensors knows by name.
  shape: tuple[int, ...]
  offset: int  # The first byte, counted from the beginning of the file.
  nbytes: int  # The bytes that it takes in the file.
  # Returns the tensor for its bytes. None says that they are the tensor as it is.
  unpack: Callable[[np.ndarray], np.ndarray] | None = None

  def read(self) -> np.ndarray:
    dtype = np.dtype(np.uint8) if self.unpack else DTYPES[self.dtype]
    flat = np.fromfile(self.path, dtype, self.nbytes // dtype.itemsize, offset=self.offset)
    if flat.nbytes != self.nbytes:
      raise OSError(f'{self.path.name} was cut short while it was read.')
    return self.unpack(flat) if self.unpack else flat.reshape(self.shape)


def open_folder(folder: pathlib.Path) -> tuple[dict[str, Place], Problems]:
  """Locates every tensor of a checkpoint, by its index or in its only file.

  Where both are there, the file has been saved again and the index is stale; the `transformers`
  package prefers the file too.

  Returns:
    The tensors' places by name, and all that is wrong with the files.
  """
  index, problems = None, Problems()
  if (folder / INDEX).exists():
    index = _read_index(folder / INDEX, problems)
    files = sorted(set(index.values()))
  if (folder / SINGLE).exists() and SINGLE not in (index or {}).values():
    if (folder / INDEX).exists():
      logging.warning(f'{folder}: {SINGLE} is read; {INDEX} and what it names are not.')
    index, files, problems = None, [SINGLE], Problems()
  elif not (folder / INDEX).exists():
    problems.add(f'there is neither {INDEX} nor {SINGLE}.')
    return {}, problems
  places: dict[str, Place] = {}
  for file in files:
    if not (folder / file).is_file():
      problems.add(f'{file} is missing; {INDEX} names it.', 'file')
      continue
    for name, place in _open_file(folder / file, problems):
      if name in places:
        problems.add(f'{name} is in both {places[name].path.name} and {file}.', 'twice')
      if index is not None and index.get(name) != file:
        problems.add(f'{name} is in {file}, where {INDEX} does not list it.', 'unlisted')
      places[name] = place
  opened = {place.path.name for place in places.values()}
  for name, file in (index or {}).items():
    if name not in places and file in opened:
      problems.add(f'{name} is not in {file}, where {INDEX} lists it.', 'listed')
  if problems and index is None and (folder / INDEX).exists():
    problems.add(f'{INDEX} is there as well: delete it, or delete {SINGLE}.')
  return places, problems


def is_pointer(path: pathlib.Path) -> bool:
  """Returns whether a file is a git-lfs pointer."""
  with open(path, 'rb') as f:
    return recognise(f.read(100)) == POINTER


def _read_index(path: pathlib.Path, problems: Problems) -> dict[str, str]:
  if is_pointer(path):
    problems.add(f'{path.name} {IS_POINTER}', 'pointer')
    return {}
  try:
    index = json.loads(path.read_bytes())['weight_map']
    names = [*index, *index.values()]
    plain = all(isinstance(n, str) and '/' not in n and n not in ('', '.', '..') for n in names)
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
    plain = False
  if not plain:
    problems.add(f'{path.name} must be JSON with a weight_map from tensor to file name.')
    return {}
  return index


def _open_file(path: pathlib.Path, problems: Problems) -> Iterator[tuple[str, Place]]:
  try:
    if is_pointer(path):
      problems.add(f'{path.name} {IS_POINTER}', 'pointer')
      return
    with safetensors.safe_open(path, framework='numpy'):
      pass  # Opening checks the header, and the length of the file against it.
    with open(path, 'rb') as f:
      length = int.from_bytes(f.read(8), 'little')
      header = json.loads(f.read(length))
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    problems.add(f'{path.name} is damaged or cut short: {error}', 'damaged')
    return
  header.pop('__metadata__', None)
  for name, entry in header.items():
    begin, end = entry['data_offsets']
    yield name, Place(path, entry['dtype'], tuple(entry['shape']), 8 + length + begin, end - begin)


def write_file(path: pathlib.Path, tensors: dict[str, np.ndarray]):
  """Writes one file as the `transformers` package does."""
  contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  specs = {
      name: safetensors.TensorSpec(
          dtype=x.dtype.name,
          shape=x.shape,
          data_ptr=x.ctypes.data,
          data_len=x.nbytes,
      )
      for name, x in contiguous.items()
  }
  safetensors.serialize_file(specs, path, {'format': 'pt'})


def write_index(folder: pathlib.Path, files: dict[str, str], nbytes: int):
  index: dict[str, Any] = {'metadata': {'total_size': nbytes}, 'weight_map': files}
  (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
