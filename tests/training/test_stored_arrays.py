# SPDX-License-Identifier: Apache-2.0
"""Arrays of a checkpoint are read part by part, and each part knows whether it is what was saved."""

import ml_dtypes
import numpy as np
import pytest

from dsa_jax.convert import stream
from dsa_jax.convert.stream import Streamed, write_step
from dsa_jax.training.stored_arrays import open_tree

SHAPE = 3, 2, 5, 7  # Layers, experts, and the matrix of each.


def array(dtype, n_leading=2):
  values = np.random.default_rng(0).normal(size=SHAPE).astype(dtype)
  pieces = lambda: ((index, values[index]) for index in np.ndindex(SHAPE[:n_leading]))
  return values, Streamed(SHAPE, values.dtype, n_leading, pieces)


@pytest.fixture(params=[10**9, 70, 2 * 4], ids=['one file', 'files of 70 bytes', 'files of 2 numbers'])
def stored(request, tmp_path, monkeypatch):
  monkeypatch.setattr(stream, 'CHUNK_BYTES', request.param)
  values, streamed = array(np.float32)
  codes, streamed_codes = array(ml_dtypes.float8_e4m3fn)
  scale = Streamed((), np.dtype(np.float32), 0, lambda: [((), np.asarray(2, np.float32))])
  state = {('a', 'b'): streamed, ('codes',): streamed_codes}
  write_step(tmp_path / '0', {'state': state, 'scales': {('s',): scale}})
  return tmp_path / '0', values, codes


def test_parts_are_the_values_that_were_written(stored):
  step, values, codes = stored
  state = open_tree(step / 'state')
  a, part = state['a', 'b'], (slice(1, 3), slice(None), slice(2, 4), slice(0, 6))
  assert a.shape == SHAPE and not a.has_codes and state[('codes',)].has_codes
  np.testing.assert_array_equal(a.read().result(), values)
  np.testing.assert_array_equal(state[('codes',)].read().result(), codes)
  np.testing.assert_array_equal(a.share(part).read().result(), values[part])
  np.testing.assert_array_equal(a.share(part).piece((1, 0)).read().result(), values[part][1, 0])
  assert a.share(part).piece((1,)).shape == values[part][1].shape
  assert open_tree(step / 'scales')[('s',)].read().result() == 2


def test_a_part_that_lies_in_changed_cells_is_refused(stored):
  """Whether it holds a cell as a whole or a corner of one."""
  step, values, _ = stored
  files = sorted(path for path in (step / 'state' / 'a.b').iterdir() if path.name[0] != '.')
  content = bytearray(files[-1].read_bytes())
  content[-8] ^= 1  # One of the last numbers; the end of the last file lies outside the array.
  files[-1].write_bytes(content)
  a = open_tree(step / 'state')['a', 'b']
  last = a.share((slice(2, 3), slice(1, 2), slice(4, 5), slice(6, 7)))
  for part in a, last, a.piece((2, 1)):
    with pytest.raises(ValueError, match='a.b has other bytes than were saved'):
      part.read().result()
  if len(files) > 1:
    first = slice(0, 1), slice(0, 1)
    np.testing.assert_array_equal(a.share(first).read().result(), values[first])
