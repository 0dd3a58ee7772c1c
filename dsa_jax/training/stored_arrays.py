# SPDX-License-Identifier: Apache-2.0
"""Arrays of a checkpoint, which are opened without being read and compared with checksums once read.

A checksum is the CRC-32 of one cell of a regular grid over an array. Cells are what was written at one
time: the shards of a run's state, the files of a conversion.
"""

import collections
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib
import itertools
import json
import math
import operator
import pathlib
from typing import Any, NamedTuple
import zlib

import jax
from jax.experimental import multihost_utils
import ml_dtypes
import numpy as np
import tensorstore as ts

CACHE_BYTES = 64 * 2**20  # Tensorstore keeps this much of a file for the next piece out of it.
CHECKSUMS = 'checksums/metadata'  # In the folder of a step, where orbax keeps an item named checksums.

THREADS = 4  # As many cells are compared at the same time.

Path = tuple[str, ...]
Part = tuple[slice, ...]  # A range of each axis.


class Checksums(NamedTuple):
  """Tells whether an array is what was saved, cell by cell."""

  cell: Sequence[int]  # The shape of a cell; those at the far ends may be smaller.
  crc32: list[int]  # Of each cell, the last axis first.


class Reading(NamedTuple):
  """Stands for a part of an array that is being read."""

  array: 'StoredArray'
  values: ts.Future

  def result(self) -> np.ndarray:
    """Waits for the values.

    Raises:
      ValueError: They are not those that were saved.
    """
    values = self.values.result()
    self.array.compare(values)
    return values.reshape(values.shape[self.array.n_dropped :])


@dataclasses.dataclass(frozen=True, eq=False)
class StoredArray:
  """Stands for an array that lies in a checkpoint, or for a part of one."""

  name: str
  whole: ts.TensorStore
  part: Part
  checksums: Checksums | None  # None: an earlier version saved none.
  good: set[int]  # The cells of the whole that have been compared.
  n_dropped: int = 0  # The leading axes of the part, each of one entry, which the values lack.

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(r.stop - r.start for r in self.part[self.n_dropped :])

  @property
  def dtype(self) -> np.dtype:
    return self.whole.dtype.numpy_dtype

  @property
  def has_codes(self) -> bool:
    """Whether it holds FP8 codes, whose scales lie beside the parameters."""
    return self.dtype == ml_dtypes.float8_e4m3fn

  @property
  def rows_per_file(self) -> int:
    """The entries of the first axis that lie in one file."""
    return self.whole.chunk_layout.read_chunk.shape[0]

  def share(self, part: Part) -> 'StoredArray':
    """Returns a part of a whole array."""
    assert self.part == _ranges((), self.whole.shape) and not self.n_dropped, 'a part has no shares'
    return dataclasses.replace(self, part=_ranges(part, self.whole.shape))

  def piece(self, index: tuple[int, ...]) -> 'StoredArray':
    """Returns what lies at an index into the leading axes."""
    assert not self.n_dropped and all(0 <= i < n for i, n in zip(index, self.shape)), index
    at = tuple(slice(r.start + i, r.start + i + 1) for r, i in zip(self.part, index))
    return dataclasses.replace(self, part=at + self.part[len(at) :], n_dropped=len(at))

  def read(self) -> Reading:
    """Begins to read the values."""
    return Reading(self, self.whole[self.part].read())

  def compare(self, values: np.ndarray):
    """Raises a ValueError if a cell that has values of this part is not what was saved."""
    if self.checksums is None:
      return

    def is_good(numbered_cell: tuple[int, Part]) -> bool:
      number, cell = numbered_cell
      is_inside = all(p.start <= c.start and c.stop <= p.stop for c, p in zip(cell, self.part))
      within = tuple(slice(c.start - p.start, c.stop - p.start) for c, p in zip(cell, self.part))
      of_cell = values[*within, ...] if is_inside else self.whole[cell].read().result()
      return crc32(of_cell) == self.checksums.crc32[number]

    cells = _cells(self.whole.shape, self.checksums.cell, self.part)
    new = [(number, cell) for number, cell in cells if number not in self.good]
    with ThreadPoolExecutor(THREADS) as pool:
      if not all(pool.map(is_good, new)):
        raise ValueError(f'{self.name} has other bytes than were saved')
    self.good.update(number for number, _ in new)


def crc32(x: np.ndarray) -> int:
  """Returns the checksum of an array's bytes, in the order of C."""
  return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8))


def piece_checksums(
    shape: Sequence[int], cell: Sequence[int], index: tuple[int, ...], piece: np.ndarray
) -> Iterator[tuple[int, int]]:
  """Yields the number of each cell of a piece and its checksum.

  Args:
    shape: The shape of the whole array.
    cell: The shape of its cells, none of which reaches beyond a piece.
    index: Where the piece lies, an index into the leading axes.
    piece: Its values.
  """
  part = tuple(slice(i, i + 1) for i in index) + _ranges((), shape)[len(index) :]
  for number, place in _cells(shape, cell, part):
    yield number, crc32(piece[*place[len(index) :], ...])


def n_cells(shape: Sequence[int], cell: Sequence[int]) -> int:
  """Returns the number of cells of an array."""
  return math.prod(_grid(shape, cell))


def state_checksums(arrays: dict[Path, jax.Array]) -> dict[str, Checksums]:
  """Returns the checksums of arrays by their names. All processes call it, with their own shards."""
  cells = {path: x.sharding.shard_shape(x.shape) for path, x in arrays.items()}
  counts = [n_cells(x.shape, cells[path]) for path, x in arrays.items()]
  sums = np.zeros(sum(counts), np.uint32)
  firsts = np.cumsum([0, *counts])
  own = {}
  for (path, x), first in zip(arrays.items(), firsts):
    for shard in x.addressable_shards:
      if shard.replica_id == 0 and x.size:
        [(number, _)] = _cells(x.shape, cells[path], _ranges(shard.index, x.shape))
        own[first + number] = shard.data
        shard.data.copy_to_host_async()
  with ThreadPoolExecutor() as pool:
    sums[list(own)] = list(pool.map(lambda data: crc32(np.asarray(data)), own.values()))
  if jax.process_count() > 1:  # Each cell is of one process, and zero in all others.
    sums = multihost_utils.process_allgather(sums).sum(axis=0, dtype=np.uint32)
  return {
      '.'.join(path): Checksums(cells[path], sums[first : first + n].tolist())
      for path, first, n in zip(arrays, firsts, counts)
  }


def as_json(checksums: dict[str, Checksums]) -> dict[str, Any]:
  """Returns checksums as JSON holds them."""
  return {name: sums._asdict() for name, sums in checksums.items()}


def write_checksums(step: pathlib.Path, items: dict[str, dict[str, Checksums]]):
  """Writes the checksums of the items of a step, as `Checkpoints` does."""
  (step / CHECKSUMS).parent.mkdir()
  (step / CHECKSUMS).write_text(json.dumps({name: as_json(sums) for name, sums in items.items()}))


def digest_of_weights(step: pathlib.Path) -> str | None:
  """Returns what tells the weights of a step from all others; None if an earlier version saved it.

  It is of the checksums of parameters and of their scales, and not of an optimiser's state.

  Raises:
    ValueError: The checksums are damaged.
  """
  if (state := _saved_checksums(step / 'state')) is None:
    return None
  weights = {name: sums for name, sums in state.items() if name.startswith('params.')}
  scales = _saved_checksums(step / 'scales') if (step / 'scales').is_dir() else None
  known = [as_json(weights), as_json(scales or {})]
  return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def open_tree(folder: pathlib.Path) -> dict[Path, StoredArray]:
  """Opens the arrays of an orbax checkpoint without reading them.

  Args:
    folder: An item in the folder of a step, which may have checksums.

  Raises:
    OSError: A file is missing.
    ValueError: What the folder holds is no checkpoint.
  """
  folder = folder.absolute()
  # orbax lists the arrays in this file. Its own reader prints pages where one of them is damaged.
  metadata = json.loads((folder / '_METADATA').read_text())
  if not isinstance(metadata, dict) or not isinstance(metadata.get('tree_metadata'), dict):
    raise ValueError('its _METADATA lists no arrays')
  paths = [
      tuple(key['key'] for key in entry['key_metadata'])
      for entry in metadata['tree_metadata'].values()
      if entry['value_metadata'].get('value_type') != 'None'  # An empty part of the tree.
  ]
  checksums = _saved_checksums(folder)
  context = ts.Context({'cache_pool': {'total_bytes_limit': CACHE_BYTES}})
  arrays = {}
  for path in paths:
    name = '.'.join(path)
    if checksums is not None and name not in checksums:
      raise ValueError(f'its {CHECKSUMS} lacks {name}')
    whole, sums = _open(folder, name, context), checksums and checksums[name]
    if sums and len(sums.crc32) != n_cells(whole.shape, sums.cell):
      raise ValueError(f'its {CHECKSUMS} is not of {name}, which has the shape {whole.shape}')
    arrays[path] = StoredArray(name, whole, _ranges((), whole.shape), sums, set())
  return arrays


def _open(folder: pathlib.Path, name: str, context: ts.Context) -> ts.TensorStore:
  kvstore = {'driver': 'file', 'path': f'{folder}/{name}/'}
  if (folder / 'manifest.ocdbt').exists():  # Runs save in this format, conversions do not.
    base = {'driver': 'file', 'path': f'{folder}/'}  # An address would read % and # in another way.
    kvstore = {'driver': 'ocdbt', 'base': base, 'path': f'{name}/'}
  spec = {'driver': 'zarr', 'kvstore': kvstore, 'recheck_cached_data': False}
  return ts.open(spec, open=True, read=True, context=context).result()


def _saved_checksums(folder: pathlib.Path) -> dict[str, Checksums] | None:
  """Returns the checksums of an item of a step; None if an earlier version saved none."""
  path = folder.parent / CHECKSUMS
  if not path.parent.exists():
    return None
  try:
    saved = json.loads(path.read_text())[folder.name]
    whole = lambda numbers: [operator.index(n) for n in numbers]
    return {name: Checksums(**{k: whole(v) for k, v in sums.items()}) for name, sums in saved.items()}
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(f'its {CHECKSUMS} holds no checksums of {folder.name}') from error


def read_array(stored: StoredArray, target: jax.ShapeDtypeStruct) -> jax.Array:
  """Reads an array, the shards of this process's devices only."""
  shards = []
  for share, devices in shares_of(stored, target):
    shard = share.read().result().astype(target.dtype, copy=False)
    shards += [jax.block_until_ready(jax.device_put(shard, device)) for device in devices]
  return jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards)


def shares_of(
    stored: StoredArray, target: jax.ShapeDtypeStruct
) -> Iterator[tuple[StoredArray, list[jax.Device]]]:
  """Yields the shards of this process's devices, each once, with the devices that hold it."""
  places = collections.defaultdict(list)
  for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
    places[tuple((part.start, part.stop) for part in index)].append(device)
  for index, devices in places.items():
    yield stored.share(tuple(slice(*part) for part in index)), devices


def _grid(shape: Sequence[int], cell: Sequence[int]) -> list[int]:
  """Returns the number of cells along each axis."""
  return [-(-n // max(size, 1)) for n, size in zip(shape, cell)]


def _ranges(part: Part, shape: Sequence[int]) -> Part:
  """Returns a range of each axis, from its first entry to its last where none is given."""
  part += (slice(None),) * (len(shape) - len(part))
  return tuple(slice(*r.indices(n)) for r, n in zip(part, shape))


def _cells(shape: Sequence[int], cell: Sequence[int], part: Part) -> Iterator[tuple[int, Part]]:
  """Yields the number and the place of each cell that has entries of a part."""
  grid = _grid(shape, cell)
  along = [range(r.start // size, -(-r.stop // size)) for r, size in zip(part, (max(c, 1) for c in cell))]
  for at in itertools.product(*along):
    number = 0
    for i, n in zip(at, grid):
      number = number * n + i
    yield number, tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(at, cell, shape))
