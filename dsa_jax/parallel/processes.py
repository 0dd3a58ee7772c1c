# SPDX-License-Identifier: Apache-2.0
"""A job of several processes: how they meet, which one writes, and what each of them reads."""

import calendar
from collections.abc import Mapping
import datetime
import glob
import importlib.util
import json
import logging
import os
import re
import sys
import time
import traceback
from typing import Any
import zlib

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.data.batch import Batch
from dsa_jax.parallel.mesh import ALL_TOKENS

# srun and mpirun state in these variables how many processes they started. (SLURM_NTASKS is set
# without srun, too.)
LAUNCHERS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
TOGETHER = (
    'one of %d processes: where one goes, all end, within two minutes. Started again, the job '
    'resumes from the last checkpoint in its workdir.'
)
LOST = (
    'another process of this job has gone. Start the job again as it was, or on other devices: it '
    'resumes from the last checkpoint in its workdir.'
)


# What jax and its collectives say where another process does not answer any more.
_GONE = re.compile(
    r'heartbeat|coordination service|barrier|gloo|nccl|connection (reset|closed|refused)|by peer|task.*died',
    re.IGNORECASE,
)


def has_lost_a_process(error: Exception) -> bool:
  """Returns whether a runtime error of this process says that another one has gone."""
  return 'RESOURCE_EXHAUSTED' not in str(error) and bool(_GONE.search(str(error)))


def end_process(error: jax.errors.JaxRuntimeError, advice: str):
  """Ends a process of several by a runtime error, with the advice if another process has gone.

  A process that is alone raises the error.
  """
  if jax.process_count() == 1:
    raise error
  traceback.print_exception(error)
  if has_lost_a_process(error):
    print(f'error: {advice}', file=sys.stderr)
  sys.stderr.flush()
  os._exit(1)  # The way out of jax waits for processes that have gone, and then aborts.


def join_job():
  """Meets the other processes of the job, if the environment says that there are any.

  jax itself recognises Slurm, Open MPI and TPU pods. Elsewhere, as on Kubernetes, three variables say
  which process this is: JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES
  and JAX_PROCESS_ID.

  If one process ends early, so do the others. Either the collective that waits for it raises an
  error, or jax aborts once it has missed the heartbeats of that process for 100 seconds.

  Raises:
    ConfigError: One of the three variables is missing.
  """
  names = 'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'
  given = [os.environ.get(name) for name in names]
  if all(given):
    jax.distributed.initialize(given[0], int(given[1]), int(given[2]))
  elif any(given):
    missing = [name for name, value in zip(names, given) if not value]
    raise ConfigError(f'{missing} must be set, too: the three say which process this is.')
  elif any(int(os.environ.get(name, 1)) > 1 for name in LAUNCHERS):
    jax.distributed.initialize()
  elif _has_tpu():
    try:
      jax.distributed.initialize()
    except ValueError:  # This means that jax sees no pod around this TPU.
      logging.info('this TPU is no part of a pod: one process.')
  if jax.distributed.is_initialized():
    logging.info(TOGETHER, jax.process_count())


def _has_tpu() -> bool:
  platforms = [name for name in os.environ.get('JAX_PLATFORMS', '').split(',') if name.strip()]
  if platforms and 'tpu' not in platforms or not importlib.util.find_spec('libtpu'):
    return False
  return bool(glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*'))


def is_first() -> bool:
  """Returns whether this is the process that writes."""
  return jax.process_index() == 0


def to_host(x: jax.Array) -> np.ndarray:
  """Returns an array of all processes, which all ask for it, as each of them sees it."""
  is_here = x.is_fully_addressable or x.is_fully_replicated
  return np.asarray(x) if is_here else multihost_utils.process_allgather(x, tiled=True)


def wait_for_all(what: str):
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def any_process(x: bool) -> bool:
  """Returns whether some process says so. All of them call it."""
  return x if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(x)).any())


def check_same(given: Mapping[str, Any]):
  """Checks that all processes of the job, which all ask, were given the same, before any of them writes.

  Args:
    given: By the name that a message gives it, what JSON can hold.

  Raises:
    ConfigError: They were not. Every process raises it.
  """
  if jax.process_count() == 1:
    return
  given = {'the version of jax': jax.__version__} | dict(given)
  digests = [zlib.crc32(json.dumps(x, sort_keys=True).encode()) for x in given.values()]
  of_all = multihost_utils.process_allgather(np.array(digests, np.uint32))
  if differing := [name for name, of_each in zip(given, of_all.T) if np.ptp(of_each)]:
    raise ConfigError(
        f'the processes of this job differ in {", ".join(differing)}: start all of them by one command, '
        'where they find the same files.'
    )


def of_first(x: int) -> int:
  """Returns the number, below 2**32, that the first process has. All of them call it."""
  return x if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.uint32(x)))


def moment_of_job(kept: str | None) -> datetime.datetime:
  """Returns when a job began: what it has kept of that, or now by the clock and zone of the first process.

  All processes call it.
  """
  seconds = of_first(calendar.timegm(time.localtime()))
  now = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=seconds)
  try:
    return datetime.datetime.fromisoformat(kept)
  except (TypeError, ValueError):  # Nothing is kept.
    return now


def own_share(batch_size: int, mesh: Mesh | None) -> tuple[int, int]:
  """Returns (i, n): this process reads the i-th of n equal shares of a batch's sequences."""
  if mesh is None or jax.process_count() == 1:
    return 0, 1
  places = NamedSharding(mesh, ALL_TOKENS).addressable_devices_indices_map((batch_size, 1 << 20))
  rows = [range(*index[0].indices(batch_size)) for index in places.values()]
  first, last = min(r.start for r in rows), max(r.stop for r in rows)
  if batch_size % (last - first) or first % (last - first):
    return 0, 1  # The shares would not be equal, so every process reads all sequences.
  return first // (last - first), batch_size // (last - first)


def place_batch(batch: Batch, batch_size: int, mesh: Mesh | None) -> Batch:
  """Returns the batch as global arrays, from the sequences that this process has read."""
  if mesh is None:
    return batch
  share, _ = own_share(batch_size, mesh)
  before = share * len(batch.tokens)

  def put(x: np.ndarray) -> jax.Array:
    def piece(index):
      rows = range(*index[0].indices(batch_size))
      return x[rows.start - before : rows.stop - before, index[1]]

    shape = batch_size, x.shape[1]
    return jax.make_array_from_callback(shape, NamedSharding(mesh, ALL_TOKENS), piece)

  return jax.tree.map(put, batch)
