# SPDX-License-Identifier: Apache-2.0
"""Compiles in the background what a run will need later, while it trains."""

from collections.abc import Callable, Mapping
from concurrent import futures
import contextlib

import jax
from jax.sharding import Mesh
from jax.stages import Lowered


class Ahead:
  """One thread that lowers and compiles programs in the order of their use.

  A call of such a program after `wait`, with arguments of the same shapes and shardings, compiles
  nothing. If a program could not be compiled ahead, its first call compiles it, or fails.
  """

  def __init__(self, programs: Mapping[str, Callable[[], Lowered]], mesh: Mesh | None):
    self._programs, self._mesh = programs, mesh
    self._thread = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix='compile_ahead')
    self._begun: dict[str, futures.Future] = {}

  def __enter__(self) -> 'Ahead':
    return self

  def __exit__(self, *_):
    self._thread.shutdown(cancel_futures=True)  # Waits for the program that is being compiled.

  def begin(self, first: str):
    """Starts to compile the programs from `first` on. Only the first call does anything.

    In a job of several processes nothing is compiled ahead.
    """
    if self._begun or jax.process_count() > 1:
      return
    names = list(self._programs)
    for name in names[names.index(first) :]:
      self._begun[name] = self._thread.submit(self._compile, name)

  def wait(self, name: str = ''):
    """Waits for one program, or for all of them without a name; returns at once if none is begun."""
    wanted = [name] if name else self._begun
    futures.wait([self._begun[name] for name in wanted if name in self._begun])

  def _compile(self, name: str):
    with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
      self._programs[name]().compile()
