# SPDX-License-Identifier: Apache-2.0
"""Imports and runs what needs no GPU compiler, in a process in which jax has none.

test_backend.py starts it. Modules whose value in `sys.modules` is None cannot be imported.
"""

import sys

MISSING = 'jax.experimental.pallas.triton', 'jax.experimental.pallas.mosaic_gpu'
sys.modules.update(dict.fromkeys(MISSING))

import importlib
import pkgutil

import jax
import jax.numpy as jnp

import dsa_jax
from dsa_jax import sample, train
from dsa_jax.kernels import (
    dense_attention,
    grouped_matmul,
    index_kl,
    index_scores,
    index_topk,
    indexed_attention,
    sparse_attention,
)
from dsa_jax.reporting import evaluate  # The entry points, and all that they import.

OF_GPUS = 'gpu', 'gpu_dense', 'gpu_cases', 'hopper', 'triton', 'score_tiles', 'selected_rows'
B, T, S, H, E, V, I, J, K = 1, 16, 24, 2, 24, 16, 2, 8, 4


def of_shape(*dims: int) -> jax.Array:
  return jnp.ones(dims, jnp.float32)


START = jnp.zeros((B, T), jnp.int32)
INTERVAL = START, START + S
INDEX = of_shape(B, T, I, J), of_shape(B, S, J), of_shape(B, T, I)
INDICES = jnp.broadcast_to(jnp.arange(K), (B, T, K))
Q, KEYS = of_shape(B, T, H, E), of_shape(B, S, 1, E)
LSE = of_shape(B, T, H)
MATRICES, GROUPS = of_shape(2, E, V), jnp.array([T, 0], jnp.int32)
FAST = {'xla_backend_optimization_level': 0}
SIZES = dict(v_dim=V, sm_scale=0.1)


def ops(backend: str, of=jax.value_and_grad) -> dict:
  """Every op as a function of nothing; of those with gradients, what `of` makes of them."""
  attend = lambda q: sparse_attention(q, KEYS, None, INDICES, **SIZES, backend=backend)[0].sum()
  teach = lambda q: dense_attention(q, KEYS, KEYS, *INTERVAL, sm_scale=0.1, backend=backend)[0].sum()
  compare = lambda q, indices: index_kl(
      Q, KEYS, LSE, q, *INDEX[1:], *INTERVAL, sm_scale=0.1, indices=indices, backend=backend
  ).sum()
  multiply = lambda q: grouped_matmul(q[0, :, 0], MATRICES, GROUPS, backend=backend).sum()
  return {
      'index_topk': lambda: index_topk(*INDEX, *INTERVAL, topk=K, backend=backend),
      'sparse_attention': lambda: of(attend)(Q),
      'dense_attention': lambda: of(teach)(Q),
      'grouped_matmul': lambda: of(multiply)(Q),
      'index_kl of all': lambda: of(compare)(INDEX[0], None),
      'index_kl of selected': lambda: of(compare)(INDEX[0], INDICES),
      'indexed_attention': lambda: indexed_attention(
          Q, KEYS, None, *INDEX, *INTERVAL, topk=K, **SIZES, backend=backend
      ),
  }


def loaded(*names: str) -> list[str]:
  """Imported modules, ours or those jax offers for kernels, with one of these names in theirs."""
  whose = 'jax.experimental', 'dsa_jax'
  there = [name for name, module in sys.modules.items() if module and name.startswith(whose)]
  return sorted(name for name in there if set(name.split('.')) & set(names))


for run in ops('xla', of=lambda f: f).values():
  jax.block_until_ready(jax.jit(run, compiler_options=FAST)())
index_scores(*INDEX)
assert not loaded('pallas', 'tpu', 'tpu_dense', *OF_GPUS), loaded('pallas', 'tpu', *OF_GPUS)

for run in ops('tpu').values():
  jax.eval_shape(run)
assert loaded('tpu') and not loaded(*OF_GPUS), loaded(*OF_GPUS)

for name, run in ops('gpu').items():
  try:
    jax.eval_shape(run)
  except ImportError as error:
    message = str(error)
    assert 'gpu' in message and MISSING[0] in message and jax.__version__ in message, message
  else:
    raise AssertionError(f'{name} ran on a GPU backend whose compiler is missing')

for module in pkgutil.walk_packages(dsa_jax.__path__, 'dsa_jax.'):
  if module.name.rsplit('.', 1)[-1] not in (*OF_GPUS, '__main__'):
    importlib.import_module(module.name)
print('all modules but those of GPUs')
