# SPDX-License-Identifier: Apache-2.0
"""Writes arrays into an orbax checkpoint piece by piece, so that none is in memory as a whole."""

from collections.abc import Callable, Iterator
import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from dsa_jax.convert.building import nested
from dsa_jax.training.stored_arrays import Checksums, piece_checksums, write_checksums

# The largest size of the files that a checkpoint is cut into: a reader holds at least one.
CHUNK_BYTES = 64 * 2**20

Index = tuple[int, ...]  # An index into the leading axes; () is the whole array.
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Streamed:
  """An array that is made piece by piece while it is written.

  A small array is assembled in memory and written at once. Of a large one, no more than two pieces
  exist at the same time.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  n_leading: int  # The number of axes that `pieces` indexes: layers, experts.
  pieces: Callable[[], Iterator[tuple[Index, np.ndarray]]]  # Yields pieces of shape[n_leading:].

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize

  @property
  def chunk_shape(self) -> tuple[int, ...]:
    """The shape of each file: at most one piece, unless the whole array is one file."""
    if self.nbytes <= CHUNK_BYTES:
      return self.shape
    chunk = [1] * self.n_leading + list(self.shape[self.n_leading :])
    while math.prod(chunk) * self.dtype.itemsize > CHUNK_BYTES:
      widest = max(range(len(chunk)), key=lambda axis: chunk[axis])
      chunk[widest] = -(-chunk[widest] // 2)
    return tuple(chunk)

  def assemble(self) -> np.ndarray:
    whole = np.empty(self.shape, self.dtype)
    for index, piece in self.pieces():
      whole[index] = piece
    return whole


class _StreamHandler(ocp.type_handlers.NumpyHandler):
  """Writes `Streamed` arrays one after another, in the format in which orbax writes numpy's."""

  def __init__(self):
    super().__init__(deepcopy_host_arrays=False)
    self._failed = False
    self.checksums: dict[Streamed, Checksums] = {}

  async def _open_and_write(self, value: Streamed, tspec: dict[str, Any], ts_context: ts.Context):
    """Writes one array, and blocks where orbax would await, so that no two are written at once."""
    if self._failed:
      return
    self._failed = True
    zarr = tspec['base'] if tspec['driver'] == 'cast' else tspec
    zarr['metadata']['chunks'] = value.chunk_shape
    store = ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context).result()
    pieces = [((), value.assemble())] if value.nbytes <= CHUNK_BYTES else value.pieces()
    writing, sums = None, {}
    for index, piece in pieces:
      before = writing
      writing = store[index].write(piece, can_reference_source_data_indefinitely=True)
      piece = piece.astype(value.dtype, copy=False)
      sums.update(piece_checksums(value.shape, value.chunk_shape, index, piece))
      if before:  # TensorStore writes one piece while the next one is made.
        before.result()
    writing.result()
    self.checksums[value] = Checksums(value.chunk_shape, [sums[n] for n in sorted(sums)])
    self._failed = False


def write_step(folder: pathlib.Path, items: dict[str, dict[Path, Streamed]]):
  """Writes arrays as a step of an orbax checkpoint.

  Args:
    folder: The folder of the step.
    items: What becomes a folder in it, by its name: arrays by their paths.
  """
  written = _StreamHandler()
  registry = ocp.type_handlers.create_type_handler_registry((Streamed, written))
  checksums = {}
  for item, arrays in items.items():
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save((folder / item).absolute(), args=ocp.args.PyTreeSave(nested(arrays)))
    checksums[item] = {'.'.join(path): written.checksums[array] for path, array in arrays.items()}
  write_checksums(folder, checksums)
