# SPDX-License-Identifier: Apache-2.0
"""Products of the ops are as precise as their operands, whatever precision is asked for elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.kernels import (
    dense_attention, grouped_matmul, index_kl, index_scores, index_topk, sparse_attention,
)  # fmt: skip
from dsa_jax.kernels.products import einsum

T, S, H, E, I, J, K = 3, 8, 2, 6, 2, 4, 4
ROWS = {name: jax.ShapeDtypeStruct((1, T), jnp.int32) for name in ('start', 'end')}
INDICES = jax.ShapeDtypeStruct((1, T, K), jnp.int32)


def of(dtype, *shape):
  return jax.ShapeDtypeStruct(shape, dtype)


def products(dtype, backend):
  """Yields programs of all ops with products, and what they take."""
  q, k, lse = of(dtype, 1, T, H, E), of(dtype, 1, S, 1, E), of(jnp.float32, 1, T, H)
  index = of(dtype, 1, T, I, J), of(dtype, 1, S, J), of(jnp.float32, 1, T, I)
  attend = lambda q, k, start, end: dense_attention(q, k, k, start, end, sm_scale=1.0, backend=backend)[0]
  yield attend, (q, k, *ROWS.values())
  select = lambda q, k, indices: sparse_attention(q, k, None, indices, v_dim=E, sm_scale=1.0, backend=backend)[0]
  yield select, (q, k, INDICES)
  kl = lambda *x: index_kl(*x, sm_scale=1.0, backend=backend)
  yield kl, (q, k, lse, *index, *ROWS.values())
  selected = lambda *x: index_kl(*x[:-1], indices=x[-1], sm_scale=1.0, backend=backend)
  yield selected, (q, k, lse, *index, *ROWS.values(), INDICES)
  topk = lambda *x: index_topk(*x, topk=K, backend=backend)
  yield topk, (*index, *ROWS.values())
  matmul = lambda *x: grouped_matmul(*x, backend=backend)
  yield matmul, (of(dtype, 5, 8), of(dtype, 2, 8, 6), of(jnp.int32, 2))
  yield index_scores, index


def gradients(run):
  """The program with the gradients of all that is no integer."""

  def both(*args):
    floats = [i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)]

    def total(*values):
      whole = dict(enumerate(args)) | dict(zip(floats, values))
      return jnp.sum(run(*whole.values()).astype(jnp.float32))

    return jax.grad(total, argnums=tuple(range(len(floats))))(*(args[i] for i in floats))

  return both


def dots(jaxpr):
  """Yields the dtypes and the precision of every product of a program and of what it calls."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      yield {str(x.aval.dtype) for x in eqn.invars}, eqn.params['precision']
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
      if hasattr(inner := getattr(inner, 'jaxpr', inner), 'eqns'):
        yield from dots(inner)


@pytest.mark.parametrize('asked', [None, 'highest'])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('backend', ['reference', 'xla'])
def test_every_product_has_the_precision_of_its_operands(backend, dtype, asked):
  counted = 0
  for run, args in products(dtype, backend):
    is_selection = jnp.issubdtype(jax.eval_shape(run, *args).dtype, jnp.integer)
    with jax.default_matmul_precision(asked):
      program = jax.make_jaxpr(run if is_selection else gradients(run))(*args)
    for dtypes, precision in dots(program.jaxpr):
      counted += 1
      if dtypes == {'float32'}:
        assert precision == (jax.lax.Precision.HIGHEST,) * 2
      elif backend != 'reference':
        assert precision == (jax.lax.Precision.DEFAULT,) * 2, dtypes
  assert counted > 10


def test_the_narrowest_operand_decides():
  wide, narrow = jnp.ones((2, 3)), jnp.ones((3, 2), jnp.bfloat16)
  program = str(jax.make_jaxpr(lambda a, b: einsum('ij,jk->ik', a, b))(wide, narrow))
  assert 'HIGHEST' not in program
  out = einsum('ij,jk->ik', wide, narrow)
  assert out.dtype == jnp.float32
  np.testing.assert_array_equal(out, np.full((2, 2), 3.0))
