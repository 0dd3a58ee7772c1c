# SPDX-License-Identifier: Apache-2.0
"""Operations of jax that NumPy does, so that no program is compiled for each of them and each shape.

XLA takes some 30 milliseconds for the first sum of each shape, NumPy a few microseconds. What is not
listed here, or not of these types, XLA does as ever.
"""

import contextlib
import functools

import jax
from jax import lax
from jax._src.lax import lax as internal
from jax._src.lib import xla_client
import numpy as np

TYPES = {np.dtype(x) for x in ('float32', 'int32', 'uint32', 'bool')}


@contextlib.contextmanager
def operations():
  """Within it, operations that run one by one are NumPy's."""
  before = {}
  for name, operation in OPERATIONS.items():
    primitive = primitive_of(name)
    before[primitive] = primitive.impl
    primitive.impl = functools.partial(_run, primitive, operation, primitive.impl)
  try:
    yield
  finally:
    for primitive, impl in before.items():
      primitive.impl = impl


def primitive_of(name: str):
  """Returns jax's primitive of this name. `jax.lax` does not name all of them."""
  return getattr(lax, f'{name}_p', None) or getattr(internal, f'{name}_p')


def _run(primitive, operation, impl, *args, **params):
  """Returns what the primitive returns: NumPy's, or XLA's where NumPy has none."""
  avals = [jax.typeof(x) for x in args]
  if any(aval.dtype not in TYPES for aval in avals):
    return impl(*args, **params)
  outs = _abstract(primitive, tuple(avals), tuple(params.items()))
  with np.errstate(all='ignore'):
    # What is given as NumPy's own array is copied: it may change, and jax's must not.
    arrays = [np.array(x, aval.dtype) if isinstance(x, np.ndarray) else np.asarray(x, aval.dtype)
              for x, aval in zip(args, avals)]  # fmt: skip
    results = operation(*arrays, **params) if outs else NotImplemented
  if results is NotImplemented:
    return impl(*args, **params)
  if primitive.multiple_results:
    return [_place(x, aval) for x, aval in zip(results, outs, strict=True)]
  return _place(results, outs[0])


@functools.cache
def _abstract(primitive, avals, params):
  """Returns the results' types, those that users see; none where they are not of `TYPES`."""
  if primitive.name == 'stage':  # jax 0.12.0.1 lacks a part of its rule, which jax never asks.
    return avals
  outs, _ = primitive.abstract_eval(*avals, **dict(params))
  outs = outs if primitive.multiple_results else [outs]
  return outs if all(out.dtype in TYPES for out in outs) else []


def _place(x, aval):
  """Returns jax's array of a NumPy array, whose memory it may share."""
  x = np.ascontiguousarray(x, aval.dtype).reshape(aval.shape)
  device, = _sharding().device_set
  return xla_client.batched_device_put(aval, _sharding(), [x], [device], False)


@functools.cache
def _sharding():
  return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _elementwise(f):
  return lambda *arrays, **_: f(*arrays)


def _floats(f):
  """For what NumPy does otherwise with integers."""
  return lambda *arrays, **_: f(*arrays) if arrays[0].dtype.kind == 'f' else NotImplemented


def _divide(x, y, **_):
  if x.dtype.kind == 'f':
    return x / y
  return (x - np.fmod(x, y)) // y if y.all() else NotImplemented


def _remainder(x, y, **_):
  return np.fmod(x, y) if x.dtype.kind == 'f' or y.all() else NotImplemented


def _convert(x, *, new_dtype, **_):
  if x.dtype.kind == 'f' and new_dtype.kind in 'iu':
    return NotImplemented  # What has no integer is nowhere defined.
  return x.astype(new_dtype)


def _broadcast(x, *, shape, broadcast_dimensions, **_):
  sizes = dict(zip(broadcast_dimensions, x.shape))
  return np.broadcast_to(x.reshape([sizes.get(i, 1) for i in range(len(shape))]), shape)


def _largest(x, *, axes, **_):
  lowest = {'f': -np.inf, 'b': False}.get(x.dtype.kind)
  return np.max(x, axes, initial=np.iinfo(x.dtype).min if lowest is None else lowest)


def _least(x, *, axes, **_):
  highest = {'f': np.inf, 'b': True}.get(x.dtype.kind)
  return np.min(x, axes, initial=np.iinfo(x.dtype).max if highest is None else highest)


def _dot(x, y, *, dimension_numbers, **_):
  (x_axes, y_axes), (x_batch, y_batch) = dimension_numbers
  if x.dtype.kind != 'f':
    return NotImplemented
  x, x_free = _as_matrices(x, x_batch, x_axes)
  y, y_free = _as_matrices(y, y_batch, y_axes)
  # By float32, rows would differ in their last bits by where they stand in their matrix, on many processors.
  exact = np.float64(x) @ np.float64(y).transpose(0, 2, 1)
  return np.float32(exact).reshape(x.shape[0], *x_free, *y_free)


def _as_matrices(x, batch, axes):
  """Returns x with the batch, the free and the contracted axes flat, and the sizes of the free ones."""
  free = [i for i in range(x.ndim) if i not in batch and i not in axes]
  size = lambda dims: int(np.prod([x.shape[i] for i in dims], initial=1))
  matrices = x.transpose(*batch, *free, *axes).reshape(size(batch), size(free), size(axes))
  return matrices, [x.shape[i] for i in free]


def _pad(x, value, *, padding_config, **_):
  if any(low < 0 or high < 0 or interior for low, high, interior in padding_config):
    return NotImplemented
  return np.pad(x, [(low, high) for low, high, _ in padding_config], constant_values=value)


def _begins(x, size, starts):
  """Returns where a part begins that lies within x, as near as may be to the given place."""
  return [int(np.clip(start, 0, n - m)) for start, n, m in zip(starts, x.shape, size)]


def _dynamic_slice(x, *starts, slice_sizes, **_):
  begins = _begins(x, slice_sizes, starts)
  return x[tuple(slice(begin, begin + n) for begin, n in zip(begins, slice_sizes))]


def _dynamic_update_slice(x, update, *starts, **_):
  x, begins = x.copy(), _begins(x, update.shape, starts)
  x[tuple(slice(begin, begin + n) for begin, n in zip(begins, update.shape))] = update
  return x


def _slice(x, *, start_indices, limit_indices, strides, **_):
  strides = strides or (1,) * x.ndim
  return x[tuple(map(slice, start_indices, limit_indices, strides))]


def _iota(*, dtype, shape, dimension, **_):
  column = [-1 if i == dimension else 1 for i in range(len(shape))]
  return np.broadcast_to(np.arange(shape[dimension], dtype=dtype).reshape(column), shape)


def _select(which, *cases, **_):
  if len(cases) != 2:
    return NotImplemented
  return np.where(which.astype(bool), cases[1], cases[0])


def _cumsum(x, *, axis, reverse, **_):
  turned = np.flip(x, axis) if reverse else x
  sums = np.cumsum(turned, axis, dtype=x.dtype)
  return np.flip(sums, axis) if reverse else sums


def _split(x, *, sizes, axis, **_):
  return np.split(x, np.cumsum(sizes)[:-1], axis)


def _shift(f, words: str):
  """For shifts by fewer bits than there are, of words that are signed or not."""

  def shift(x, n, **_):
    if x.dtype.kind not in 'iu' or (n.view(np.uint32) >= 32).any():
      return NotImplemented
    return f(x.view(words), n.view(words)).view(x.dtype)

  return shift


OPERATIONS = {
    'add': _elementwise(np.add), 'sub': _elementwise(np.subtract), 'mul': _elementwise(np.multiply),
    'div': _divide, 'rem': _remainder, 'max': _elementwise(np.maximum), 'min': _elementwise(np.minimum),
    'neg': _elementwise(np.negative), 'sign': _elementwise(np.sign), 'abs': _elementwise(np.abs),
    'square': _elementwise(np.square),
    'exp': _floats(np.exp), 'log': _floats(np.log), 'sqrt': _floats(np.sqrt),
    'rsqrt': _floats(lambda x: 1 / np.sqrt(x)), 'sin': _floats(np.sin), 'cos': _floats(np.cos),
    'logistic': _floats(lambda x: 1 / (1 + np.exp(-x))), 'integer_pow': lambda x, *, y, **_: x**y,
    'eq': _elementwise(np.equal), 'ne': _elementwise(np.not_equal), 'lt': _elementwise(np.less),
    'le': _elementwise(np.less_equal), 'gt': _elementwise(np.greater), 'ge': _elementwise(np.greater_equal),
    'and': _elementwise(np.bitwise_and), 'or': _elementwise(np.bitwise_or),
    'xor': _elementwise(np.bitwise_xor), 'not': _elementwise(np.invert),
    'is_finite': _elementwise(np.isfinite),
    'bitcast_convert_type': lambda x, *, new_dtype, **_: x.reshape(-1).view(new_dtype),
    'select_n': _select, 'stage': lambda x, **_: x,
    'stack': lambda *arrays, axis, **_: np.stack(arrays, axis),
    'unstack': lambda x, *, axis, **_: list(np.moveaxis(x, axis, 0)),
    'convert_element_type': _convert, 'broadcast_in_dim': _broadcast,
    'reshape': lambda x, *, new_sizes, **_: x.reshape(new_sizes),
    'squeeze': lambda x, *, dimensions, **_: np.squeeze(x, dimensions),
    'transpose': lambda x, *, permutation, **_: x.transpose(permutation),
    'slice': _slice, 'dynamic_slice': _dynamic_slice, 'dynamic_update_slice': _dynamic_update_slice,
    'concatenate': lambda *arrays, dimension, **_: np.concatenate(arrays, dimension),
    'split': _split, 'pad': _pad, 'iota': _iota, 'cumsum': _cumsum, 'dot_general': _dot,
    'reduce_sum': lambda x, *, axes, **_: np.sum(x, axes, dtype=x.dtype), 'reduce_max': _largest,
    'reduce_min': _least, 'reduce_and': lambda x, *, axes, **_: np.all(x, axes),
    'reduce_or': lambda x, *, axes, **_: np.any(x, axes),
    'shift_left': _shift(np.left_shift, 'uint32'),
    'shift_right_logical': _shift(np.right_shift, 'uint32'),
    'shift_right_arithmetic': _shift(np.right_shift, 'int32'),
}  # fmt: skip
