# SPDX-License-Identifier: Apache-2.0
"""Gathers rows by the SparseCores of a TPU, while its TensorCore does something else."""

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu, tpu_sc
import jax.numpy as jnp

from dsa_jax.kernels.tpu.layout import LANES
from dsa_jax.kernels.xla.rows import pad_axis

WINDOW = 64  # Rows that one indirect DMA fetches.
LISTED = 8192  # Rows whose numbers a subcore holds at one time.


def available() -> bool:
  """Says whether this is a TPU that has SparseCores."""
  return pltpu.is_tpu_device() and pltpu.get_tpu_info().sparse_core is not None


def gather(table: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns `table[rows]` of a 32-bit table [N, 128]; XLA runs it beside other work."""
  n_rows = rows.shape[0]
  mesh = tpu_sc.VectorSubcoreMesh(core_axis_name='core', subcore_axis_name='subcore')
  windows = _windows()
  rows = pad_axis(rows, 0, mesh.size * windows * WINDOW)
  share = rows.shape[0] // mesh.size
  listed = min(share, LISTED)
  rows = jnp.pad(rows, (0, -share % listed))  # For the last list of the last subcore.

  def kernel(table, rows, out, numbers, buffers, arriving, leaving):
    core, subcore = jax.lax.axis_index('core'), jax.lax.axis_index('subcore')
    first = (core * mesh.num_subcores + subcore) * share

    @pl.loop(0, share, step=listed)
    def _(begin):
      pltpu.sync_copy(rows.at[pl.ds(first + begin, listed)], numbers)
      n_windows, behind = jnp.minimum(share - begin, listed) // WINDOW, windows // 2

      def arrive(window, i):
        return indirect_copy(table, numbers, window * WINDOW, buffers.at[i], arriving.at[i])

      def leave(window, i):
        to = out.at[pl.ds(first + begin + window * WINDOW, WINDOW)]
        return pltpu.make_async_copy(buffers.at[i], to, leaving.at[i])

      for i in range(windows):
        arrive(i, i).start()

      @pl.loop(0, n_windows, step=windows)
      def _(window):
        for i in range(windows):
          arrive(window + i, i).wait()
          leave(window + i, i).start()
          before, j = window + i - behind, (i - behind) % windows

          @pl.when(before >= 0)
          def _():
            leave(before, j).wait()

          @pl.when((before >= 0) & (before + windows < n_windows))
          def _():
            arrive(before + windows, j).start()

      for i in range(behind, windows):
        leave(n_windows - windows + i, i).wait()

  call = pl.kernel(
      kernel,
      out_type=jax.ShapeDtypeStruct((mesh.size * share, LANES), table.dtype),
      mesh=mesh,
      scratch_types=[
          pltpu.VMEM((listed,), jnp.int32),
          pltpu.VMEM((windows, WINDOW, LANES), table.dtype),
          pltpu.SemaphoreType.DMA((windows,)),
          pltpu.SemaphoreType.DMA((windows,)),
      ],
      name='gather_rows',
  )
  return call(table, rows)[:n_rows]


def _windows() -> int:
  """Returns how many windows half of a subcore's memory holds; half arrive, the others leave."""
  return tpu_sc.get_sparse_core_info().vmem_capacity_bytes // 2 // (WINDOW * LANES * 4)


def indirect_copy(table, rows, first, buffer, sem):
  """Returns the indirect DMA of a window's rows, which are listed from the first on."""
  return pltpu.make_async_copy(table.at[rows.at[pl.ds(first, WINDOW)]], buffer, sem)


def beside(arriving: Any, results: Any, rows: jax.Array) -> tuple[Any, Any]:
  """Keeps an asynchronous gather overlapped with `results`, by an optimization barrier.

  XLA would otherwise start the gather only once the old rows have made room. In a loop that hands
  the arriving rows on, let `unroll` be 2: they then take the memory of the step before's, and are
  not copied.

  Args:
    arriving: What the gather returns.
    results: What is computed meanwhile.
    rows: The old rows, which stay until both are there.

  Returns:
    The first two arguments.
  """
  return jax.lax.optimization_barrier((arriving, results, rows))[:2]
