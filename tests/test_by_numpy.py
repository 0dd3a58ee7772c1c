# SPDX-License-Identifier: Apache-2.0
"""NumPy's operations are those of XLA, whose types they have, too."""

import by_numpy
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

RNG = np.random.default_rng(0)
FLOATS = jnp.asarray(RNG.normal(size=(3, 4, 5)), jnp.float32)
OTHERS = jnp.asarray(RNG.normal(size=(3, 4, 5)).round(1), jnp.float32)
POSITIVE = jnp.abs(FLOATS) + 0.1
INTEGERS = jnp.asarray(RNG.integers(-9, 9, size=(3, 4, 5)), jnp.int32)
DIVISORS = jnp.where(INTEGERS == 0, 3, INTEGERS[::-1] * 2 + 1)
WORDS = jnp.asarray(RNG.integers(2**32, size=(3, 4, 5)), jnp.uint32)
BITS = jnp.asarray(RNG.integers(0, 32, size=(3, 4, 5)), jnp.uint32)
TRUE = FLOATS > 0
ODD = jnp.asarray([np.nan, np.inf, -np.inf, -0.0, 0.0, 1.0, -2.5], jnp.float32)


def both(f):
  return [(f, FLOATS, OTHERS), (f, INTEGERS, DIVISORS), (f, ODD, ODD[::-1]), (f, FLOATS[0, 0, 0], OTHERS[0, 0, 0])]


def logical(f):
  return [(f, TRUE, OTHERS > 0), (f, INTEGERS, DIVISORS), (f, WORDS, BITS)]


def reductions(f):
  return [(lambda x, axes=axes: f(x, axes), x) for x in (FLOATS, INTEGERS, TRUE) for axes in ((), (1,), (0, 2), (0, 1, 2))]


def shifts(f):
  return [(f, INTEGERS, lax.bitcast_convert_type(BITS, jnp.int32)), (f, WORDS, BITS)]


def dots():
  """Of matrices; with a batch; over two axes of which one comes last; of vectors."""
  for x, y, contracted, batch in (
      (FLOATS[0], OTHERS[1], ((1,), (1,)), ((), ())), (FLOATS, OTHERS, ((2,), (2,)), ((0,), (0,))),
      (FLOATS, OTHERS, ((1,), (1,)), ((2, 0), (2, 0))), (FLOATS, OTHERS, ((2, 0), (2, 0)), ((), ())),
      (FLOATS[0, 0], OTHERS[0, 0], ((0,), (0,)), ((), ())), (FLOATS[:0, 0], OTHERS[0], ((1,), (1,)), ((), ())),
  ):  # fmt: skip
    yield lambda x, y, dims=(contracted, batch): lax.dot_general(x, y, dims), x, y


CASES = {
    'add': both(lax.add), 'sub': both(lax.sub), 'mul': both(lax.mul), 'div': both(lax.div), 'rem': both(lax.rem),
    'max': both(lax.max), 'min': both(lax.min), 'eq': both(lax.eq), 'ne': both(lax.ne), 'lt': both(lax.lt),
    'le': both(lax.le), 'gt': both(lax.gt), 'ge': both(lax.ge),
    'neg': [(lax.neg, FLOATS), (lax.neg, INTEGERS)], 'abs': [(lax.abs, FLOATS), (lax.abs, INTEGERS)],
    'sign': [(lax.sign, ODD), (lax.sign, INTEGERS)], 'square': [(lax.square, FLOATS)],
    'exp': [(lax.exp, FLOATS), (lax.exp, ODD)], 'log': [(lax.log, POSITIVE), (lax.log, ODD)],
    'sqrt': [(lax.sqrt, POSITIVE)], 'rsqrt': [(lax.rsqrt, POSITIVE)], 'sin': [(lax.sin, FLOATS)],
    'cos': [(lax.cos, FLOATS)], 'logistic': [(lax.logistic, 50 * FLOATS)],
    'integer_pow': [(lambda x: lax.integer_pow(x, 3), FLOATS), (lambda x: lax.integer_pow(x, -2), POSITIVE)],
    'is_finite': [(lax.is_finite, ODD)],
    'and': logical(lax.bitwise_and), 'or': logical(lax.bitwise_or), 'xor': logical(lax.bitwise_xor),
    'not': [(lax.bitwise_not, TRUE), (lax.bitwise_not, INTEGERS)],
    'bitcast_convert_type': [(lambda x: lax.bitcast_convert_type(x, jnp.uint32), FLOATS),
                             (lambda x: lax.bitcast_convert_type(x, jnp.int32), FLOATS[0, 0, 0])],
    'select_n': [(lax.select_n, TRUE, FLOATS, OTHERS), (lax.select_n, TRUE[0, 0, 0], FLOATS, OTHERS)],
    'convert_element_type': [(lambda x, t=t: lax.convert_element_type(x, t), x)
                             for x, t in ((INTEGERS, 'float32'), (TRUE, 'int32'), (WORDS, 'int32'), (ODD, 'bool'))],
    'broadcast_in_dim': [(lambda x: lax.broadcast_in_dim(x, (2, 4, 7, 5), (1, 3)), FLOATS[0]),
                         (lambda x: lax.broadcast_in_dim(x, (3, 2), (0, 1)), FLOATS[:, :1, 0])],
    'reshape': [(lambda x: lax.reshape(x, (5, 12)), FLOATS)],
    'squeeze': [(lambda x: lax.squeeze(x, (0, 2)), FLOATS[:1, :, :1])],
    'transpose': [(lambda x: lax.transpose(x, (2, 0, 1)), FLOATS)],
    'slice': [(lambda x: lax.slice(x, (1, 0, 1), (3, 4, 5), (1, 2, 3)), FLOATS)],
    'dynamic_slice': [(lambda x, i, j: lax.dynamic_slice(x, (i, j, 0), (2, 3, 5)), FLOATS, jnp.int32(9), jnp.int32(-1))],
    'dynamic_update_slice': [(lambda x, y, i: lax.dynamic_update_slice(x, y, (i, 2, 3)), FLOATS, OTHERS[:2, :2], jnp.int32(-5))],
    'concatenate': [(lambda x, y: lax.concatenate([x, y], 1), FLOATS, OTHERS[:, :1])],
    'split': [(lambda x: lax.split(x, (2, 0, 3), 2), FLOATS)],
    'stack': [(lambda x, y: jnp.stack([x, y], 1), FLOATS, OTHERS)], 'unstack': [(lambda x: jnp.unstack(x, axis=1), FLOATS)],
    'stage': [(lambda: jnp.asarray(np.float32(3)),)],
    'pad': [(lambda x, y: lax.pad(x, y, ((1, 0, 0), (0, 2, 0), (0, 0, 0))), FLOATS, OTHERS[0, 0, 0])],
    'iota': [(lambda t=t: lax.broadcasted_iota(t, (2, 3, 4), 1),) for t in ('int32', 'float32')],
    'cumsum': [(lambda x: lax.cumsum(x, 1), FLOATS), (lambda x: lax.cumsum(x, 2, reverse=True), INTEGERS)],
    'dot_general': list(dots()),
    'reduce_sum': reductions(lax.reduce_sum)[:8], 'reduce_max': reductions(lax.reduce_max),
    'reduce_min': reductions(lax.reduce_min), 'reduce_and': reductions(lax.reduce_and)[8:],
    'reduce_or': reductions(lax.reduce_or)[8:],
    'shift_left': shifts(lax.shift_left), 'shift_right_logical': shifts(lax.shift_right_logical),
    'shift_right_arithmetic': shifts(lax.shift_right_arithmetic),
}  # fmt: skip


@pytest.mark.parametrize('name', by_numpy.OPERATIONS)
def test_numpy_does_what_xla_does(name, monkeypatch):
  primitive = by_numpy.primitive_of(name)
  for f, *arguments in CASES[name]:
    with jax.disable_jit():
      want = f(*arguments)
      with monkeypatch.context() as patch:
        patch.setattr(primitive, 'impl', lambda *_, **__: pytest.fail('XLA was asked.'))
        with by_numpy.operations():
          got = f(*arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      assert jax.typeof(a) == jax.typeof(b)
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_xla_does_the_rest():
  half, too_far = jnp.ones(3, jnp.bfloat16), jnp.full(3, 32, jnp.uint32)
  with jax.disable_jit(), by_numpy.operations():
    assert (half + half).dtype == jnp.bfloat16
    assert (lax.shift_left(jnp.ones(3, jnp.uint32), too_far) == 0).all()
    assert lax.convert_element_type(jnp.float32(2.7), jnp.int32) == 2
    assert lax.div(jnp.int32(7), jnp.int32(0)) == -1
  assert lax.add_p.impl.args == (lax.add_p,)  # As before.


def test_an_array_does_not_change_with_what_it_was_made_of():
  with jax.disable_jit(), by_numpy.operations():
    numbers = np.zeros(4096, np.float32)
    copy = jnp.array(numbers)
    numbers[:] = 7
    assert not copy.any()
