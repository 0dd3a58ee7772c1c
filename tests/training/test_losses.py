# SPDX-License-Identifier: Apache-2.0
"""The loss in chunks of rows is that of all logits at once, and no array of all logits exists."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from dsa_jax.nn.attention.types import Mode
from dsa_jax.reporting import evaluate
from dsa_jax.training import losses
from dsa_jax.training.losses import next_token_loss, score_targets
from dsa_jax.training.state import new_state
from dsa_jax.training.step import make_train_step

TOKENS, WORDS = 131_072, 129_280
OPTIM = dataclasses.replace(laws.OPTIM, eps=0.5)  # Of no other test, whose step would be reused.


def plain_loss(hidden, head, targets, weights, softcap=0.0):
  logits = jnp.einsum('BTD,DW->BTW', hidden, head, precision='highest')
  logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
  nats = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
  return jnp.sum(nats * weights)


def example():
  rng = np.random.default_rng(0)
  hidden, head = rng.normal(size=(2, 21, 8)), rng.normal(size=(8, 50))
  targets, weights = rng.integers(50, size=(2, 21)), rng.uniform(size=(2, 21))
  floats = [jnp.asarray(x, jnp.float32) for x in (hidden, head, weights)]
  return *floats[:2], jnp.asarray(targets, jnp.int32), floats[2]


@pytest.mark.parametrize('softcap', [0.0, 2.0])
@pytest.mark.parametrize('at_once', [2**27, 50 * 16, 50, 1])
def test_chunks_change_no_number(at_once, softcap, monkeypatch):
  monkeypatch.setattr(losses, 'LOGITS_AT_ONCE', at_once)
  of = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*example())
  loss, gradients = of(lambda *x: 3 * next_token_loss(*x, softcap=softcap))
  want, want_gradients = of(lambda *x: 3 * plain_loss(*x, softcap))
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  for got, right in zip(gradients, want_gradients):
    np.testing.assert_allclose(got, right, atol=2e-5)
  hidden, head, targets, weights = example()
  nats, is_likeliest = jax.jit(functools.partial(score_targets, softcap=softcap))(hidden, head, targets)
  np.testing.assert_allclose(3 * jnp.sum(nats * weights), loss, rtol=1e-6)
  np.testing.assert_array_equal(is_likeliest, (hidden @ head).argmax(-1) == targets)


def test_the_first_of_equally_likely_words_is_the_likeliest():
  hidden, head = jnp.ones((1, 3, 1)), jnp.array([[0.0, 2.0, 2.0, 1.0]])
  _, is_likeliest = score_targets(hidden, head, jnp.array([[0, 1, 2]]), softcap=0.0)
  assert is_likeliest.tolist() == [[False, True, False]]


def largest_array(lowered: jax.stages.Lowered) -> int:
  """Returns the number of elements of the largest array that the compiled program names."""
  text = lowered.compile().as_text()
  arrays = re.findall(r'\b(?:pred|[a-z]+[0-9]+[a-z0-9]*)\[([0-9,]+)\]', text)
  return max(math.prod(map(int, dims.split(','))) for dims in arrays)


def test_no_array_of_tokens_by_words():
  """Forward, backward, and while a model is evaluated, at the length and vocabulary of V3.2."""
  rows = lambda dtype, *dims: jax.ShapeDtypeStruct((1, TOKENS, *dims), dtype)
  head = jax.ShapeDtypeStruct((8, WORDS), jnp.float32)
  arguments = rows(jnp.bfloat16, 8), head, rows(jnp.int32), rows(jnp.float32)
  loss, score = (functools.partial(f, softcap=30.0) for f in (next_token_loss, score_targets))
  gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments)
  assert largest_array(gradients) <= losses.LOGITS_AT_ONCE
  assert gradients.compile().memory_analysis().temp_size_in_bytes < 16 * losses.LOGITS_AT_ONCE
  assert largest_array(jax.jit(score).lower(*arguments[:3])) <= losses.LOGITS_AT_ONCE
  assert largest_array(jax.jit(plain_loss).lower(*arguments)) == TOKENS * WORDS  # It would be seen.


@pytest.mark.parametrize('program', ['step', 'score', 'look'])
def test_no_program_of_a_model_has_all_logits(program, monkeypatch):
  """Neither a step with an MTP layer, nor scores, nor a look at the validation rows."""
  monkeypatch.setattr(losses, 'LOGITS_AT_ONCE', 2**16)
  cfg = dataclasses.replace(laws.CFG, vocab_size=4096, n_layers=1, n_mtp_layers=1)
  batch, params, trains = laws.make_batch(((64,),) * 2, 64), laws.weights(cfg), ('backbone',)
  mode = Mode(attention='dense', backend='xla')
  if program == 'step':
    step = make_train_step(laws.graph_of(cfg), trains, mode, OPTIM)
    lowered = step.lower(new_state(params, trains, OPTIM, seed=0), batch, {'backbone': 0.1})
  elif program == 'score':
    lowered = evaluate.score_batch.lower(laws.graph_of(cfg), params, batch, mode, None)
  else:
    lowered = evaluate.look_batch.lower(laws.graph_of(cfg), params, batch, mode)
  shapes = re.findall(r'tensor<([0-9x]+)x[a-z]', lowered.as_text())
  assert max(math.prod(map(int, shape.split('x'))) for shape in shapes) < batch.tokens.size * cfg.vocab_size
