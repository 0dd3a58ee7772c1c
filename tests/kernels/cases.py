# SPDX-License-Identifier: Apache-2.0
"""Inputs on which selection matters, and the comparisons that every backend must pass."""

import contextlib
import functools

import jax
from jax._src.pallas.mosaic import sc_core
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import jaxtyping
import numpy as np

from dsa_jax.kernels.tpu import sparse_cores

PORTABLE = ['xla']  # What is compiled and measured here; the other kernels are interpreted.
BACKENDS = [*PORTABLE, 'tpu', 'gpu']
TOLERANCE = {'float32': 2e-5, 'bfloat16': 2e-2}  # Of the largest |value|.

T, S, K = 37, 53, 5  # Primes: no block size divides them.
VISIBILITY = ('causal', 'packed', 'chunk', 'empty', 'padded', 'overhang')


# Compilation is most of the time of these tests, and LLVM most of the compilation.
FAST = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
jit = functools.partial(jax.jit, compiler_options=FAST)


def is_simulated(backend: str) -> bool:
  """Whether this machine lacks the chip that the backend's kernels are for."""
  return backend in ('tpu', 'gpu') and backend != jax.default_backend()


@contextlib.contextmanager
def interpreted(backend: str, races: bool = False):
  """Runs the kernels of a backend that this machine lacks by jax's simulation of its memory.

  What no one wrote holds NaN, reads out of bounds raise, and so do races, where they are looked
  for: that takes three times as long. A machine that has the chip runs them on it.
  """
  if not is_simulated(backend):
    yield
    return
  if backend == 'gpu':  # The plain interpreter: a program after the other, outputs born as NaN.
    with pltpu.force_tpu_interpret_mode(True):
      yield
    return
  strict = dict(uninitialized_memory='nan', out_of_bounds_reads='raise', detect_races=races)
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**strict)):
    yield
    if races:
      jax.effects_barrier()
      assert not interpret_pallas_call.races.races_found


def give_sparse_cores(monkeypatch):
  """jax's interpreter knows one subcore, and no indirect DMA: rows are fetched one by one."""
  info = sc_core.tpu_info.SparseCoreInfo(
      num_cores=1, num_subcores=1, num_lanes=16, vmem_capacity_bytes=2**14, dma_granule_size_bytes=32
  )
  for module in sc_core, sparse_cores.tpu_sc:
    monkeypatch.setattr(module, 'get_sparse_core_info', lambda: info)
  monkeypatch.setattr(sparse_cores, 'WINDOW', 4)
  monkeypatch.setattr(sparse_cores, 'LISTED', 32)
  monkeypatch.setattr(sparse_cores, 'available', lambda: True)
  monkeypatch.setattr(sparse_cores, 'indirect_copy', OneByOne)


class OneByOne:
  """In place of an indirect DMA."""

  def __init__(self, table, rows, first, buffer, sem):
    copy = lambda i: pltpu.make_async_copy(table.at[rows[first + i]], buffer.at[i], sem)
    self._copies = [functools.partial(copy, i) for i in range(sparse_cores.WINDOW)]

  def start(self):
    for copy in self._copies:
      copy().start()

  def wait(self):
    for copy in self._copies:
      copy().wait()


def intervals(name: str) -> tuple[jax.Array, jax.Array]:
  """Start and end of each query's interval, [2, T]; see `VISIBILITY`."""
  t = np.arange(T)
  start, end = np.zeros((2, T), int), np.stack([t + 1, t + 1])
  if name == 'packed':  # Documents of many lengths, none aligned to a block.
    for row, lengths in enumerate([(7, 1, 13, 16), (18, 3, 2, 14)]):
      start[row] = np.repeat(np.cumsum((0, *lengths[:-1])), lengths)
  elif name == 'chunk':  # The last queries of a longer prompt.
    start[1], end = 3, end + S - T
  elif name == 'empty':  # Nothing to see, said in three ways, between rows that see.
    start[:, ::3] = end[:, ::3]
    start[1, 1::6] = end[1, 1::6] + 2
    start[0, 30:], end[0, 30:] = -1, -1
  elif name == 'padded':  # Two prompts, shorter than the buffer by different lengths.
    for row, length in enumerate([29, 11]):
      start[row, length:], end[row, length:] = 0, 0
  elif name == 'overhang':  # Intervals that reach past the keys.
    start, end = start + t - 4, end + S - T + 6
  return jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)


def seen(start: jax.Array, end: jax.Array) -> np.ndarray:
  positions = np.arange(S)
  return (positions >= np.asarray(start)[..., None]) & (positions < np.asarray(end)[..., None])


def selection(start: jax.Array, end: jax.Array, topk: int = K, seed: int = 0) -> jax.Array:
  """Random visible positions of each query, ascending, then -1; never position 2 or 3."""
  rng = np.random.default_rng(seed)
  visible = seen(start, end)
  visible[..., 2:4] = False
  indices = np.full((*visible.shape[:2], topk), -1, np.int32)
  for row, mask in zip(indices.reshape(-1, topk), visible.reshape(-1, S)):
    chosen = rng.permutation(np.flatnonzero(mask))[:topk]
    row[: chosen.size] = np.sort(chosen)
  return jnp.asarray(indices)


def normal(seed: int, *shapes: tuple[int, ...], dtype: str = 'float32') -> tuple[jax.Array, ...]:
  rng = np.random.default_rng(seed)
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def f32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def assert_matches(actual: dict, exact: dict, tolerance: float = TOLERANCE['float32']):
  """Compares by name, relative to the largest finite value; infinities must agree exactly."""
  assert actual.keys() == exact.keys()
  for name, want in exact.items():
    want, got = np.asarray(want, np.float64), np.asarray(actual[name], np.float64)
    largest = np.abs(want[np.isfinite(want)]).max(initial=0)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * largest, err_msg=name)
    assert not np.isnan(want).any(), name


def numeric_gradient(f, x: np.ndarray, h: float = 1e-5) -> np.ndarray:
  """Central differences of a float64 function to a number."""
  grad = np.zeros_like(x)
  for i in np.ndindex(x.shape):
    step = np.zeros_like(x)
    step[i] = h
    grad[i] = (f(x + step) - f(x - step)) / (2 * h)
  return grad


def largest_array(f, *shapes: tuple[tuple[int, ...], str]) -> int:
  """Elements of the largest array in the program of `f` and its gradient, loop bodies included."""

  def both(*args):
    out, vjp = jax.vjp(f, *args)
    return out, vjp(jax.tree.map(cotangent, out))

  def cotangent(x):
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    return jnp.ones_like(x) if inexact else np.zeros(x.shape, jax.dtypes.float0)

  def walk(x):
    if isinstance(x, (tuple, list)):
      return max(map(walk, x), default=0)
    x = getattr(x, 'jaxpr', x)
    sizes = [walk([list(eqn.params.values()) for eqn in getattr(x, 'eqns', ())])]
    for eqn in getattr(x, 'eqns', ()):
      sizes += [getattr(v.aval, 'size', 0) for v in (*eqn.invars, *eqn.outvars)]
    return max(sizes, default=0)

  return walk(jax.make_jaxpr(both)(*(jax.ShapeDtypeStruct(*x) for x in shapes)))


@contextlib.contextmanager
def unchecked():
  """Without jaxtyping, as in production: the ops' own errors can be reached."""
  before = jaxtyping.config.jaxtyping_disable
  jaxtyping.config.update('jaxtyping_disable', True)
  try:
    yield
  finally:
    jaxtyping.config.update('jaxtyping_disable', before)
