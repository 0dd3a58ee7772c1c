# SPDX-License-Identifier: Apache-2.0
"""Nothing of the size [T, S] exists, in any op, forward or backward, as traced and as compiled."""

import functools
import math
import re

import cases
import jax
import jax.numpy as jnp
import pytest

from dsa_jax import kernels

T = 4096  # And S: large against every block.
H, E, V, I, J, K = 2, 8, 6, 2, 4, 16
Q, KV, INDEX_Q, INDEX_K, WEIGHTS = (T, H, E), (T, E), (T, I, J), (T, J), (T, I)
LSE, VALUES, POSITION, INDICES = (T, H), (T, 1, V), (T,), (T, K)


def index_topk(q, k, weights, start, end, *, backend):
  return kernels.index_topk(q, k, weights, start, end, topk=K, backend=backend)


def sparse_attention(q, kv, indices, *, backend):
  options = dict(v_dim=V, sm_scale=1.0, backend=backend)
  return kernels.sparse_attention(q, kv[:, :, None], None, indices, **options)


def dense_attention(q, k, v, start, end, indices=None, *, backend):
  options = dict(sm_scale=1.0, indices=indices, backend=backend)
  return kernels.dense_attention(q, k[:, :, None], v, start, end, **options)


def index_kl(q, k, lse, index_q, index_k, weights, start, end, indices=None, *, backend):
  options = dict(sm_scale=1.0, indices=indices, backend=backend)
  return kernels.index_kl(q, k[:, :, None], lse, index_q, index_k, weights, start, end, **options)


DENSE = (dense_attention, Q, KV, VALUES, POSITION, POSITION)
KL = (index_kl, Q, KV, LSE, INDEX_Q, INDEX_K, WEIGHTS, POSITION, POSITION)
OPS = {
    'index_topk': (index_topk, INDEX_Q, INDEX_K, WEIGHTS, POSITION, POSITION),
    'sparse_attention': (sparse_attention, Q, KV, INDICES),
    'dense_attention': DENSE,
    'masked_attention': (*DENSE, INDICES),
    'index_kl': KL,
    'index_kl_selected': (*KL, INDICES),
}


def shapes_of(name, scale=1):
  """The op's inputs, for a context `scale` times as long."""
  for shape in OPS[name][1:]:
    dtype = jnp.int32 if shape in (POSITION, INDICES) else jnp.float32
    yield jax.ShapeDtypeStruct((1, scale * shape[0], *shape[1:]), dtype)


def with_gradients(name, backend):
  op = functools.partial(OPS[name][0], backend=backend)

  def both(*args):
    floats = [x for x in args if jnp.issubdtype(x.dtype, jnp.floating)]
    others = args[len(floats) :]  # They come last in every op.
    out, vjp = jax.vjp(lambda *floats: op(*floats, *others), *floats)
    if name == 'index_topk':
      return out
    return out, vjp(jax.tree.map(jnp.ones_like, out))

  return both


def traced_sizes(jaxpr):
  """Elements of every array of a program, those of loop bodies and custom rules included."""
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  for eqn in jaxpr.eqns:
    yield from (getattr(v.aval, 'size', 0) for v in (*eqn.invars, *eqn.outvars))
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
      if is_jaxpr(inner):
        yield from traced_sizes(inner)


def is_jaxpr(x):
  return hasattr(getattr(x, 'jaxpr', x), 'eqns')


def compiled_sizes(text):
  """Elements of every array that a compiled program names."""
  for shape in re.findall(r'\b(?:pred|[a-z]+[0-9]+[a-z0-9]*)\[([0-9,]+)\]', text):
    yield math.prod(map(int, shape.split(',')))


def compile_op(name, backend, scale=1):
  return cases.jit(with_gradients(name, backend)).lower(*shapes_of(name, scale)).compile()


@pytest.mark.parametrize('name', OPS)
@pytest.mark.parametrize('backend', cases.PORTABLE)
def test_no_array_of_queries_by_keys(backend, name):
  traced = jax.make_jaxpr(with_gradients(name, backend))(*shapes_of(name))
  assert T * 8 <= max(traced_sizes(traced)) < T * T / 4
  compiled = compile_op(name, backend).as_text()
  assert T * 8 <= max(compiled_sizes(compiled)) < T * T / 4


@pytest.mark.parametrize('name', OPS)
@pytest.mark.parametrize('backend', cases.PORTABLE)
def test_twice_the_context_takes_twice_the_memory(backend, name):
  """Which also forbids [T, S] in disguise, such as packed into bits."""
  once, twice = (compile_op(name, backend, scale) for scale in (1, 2))
  temporary = lambda x: x.memory_analysis().temp_size_in_bytes
  assert 0 < temporary(twice) <= 2.1 * temporary(once)
  sizes = [sorted(set(compiled_sizes(x.as_text()))) for x in (once, twice)]
  assert sizes[1][-1] <= 2.1 * sizes[0][-1]


@pytest.mark.parametrize('name', [x for x in OPS if x != 'sparse_attention'])
def test_the_definitions_are_caught(name):
  traced = jax.make_jaxpr(with_gradients(name, 'reference'))(*shapes_of(name))
  assert max(traced_sizes(traced)) >= T * T
  compiled = cases.jit(with_gradients(name, 'reference')).lower(*shapes_of(name)).compile()
  assert max(compiled_sizes(compiled.as_text())) >= T * T
