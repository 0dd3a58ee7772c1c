# SPDX-License-Identifier: Apache-2.0
"""Losses from hidden states: the logits of a few rows exist at a time, forward and backward.

The caller's weights say which tokens count.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsa_jax.kernels.xla.rows import scan_rows
from dsa_jax.nn.transformer import HEAD, gather_head, softcapped
from dsa_jax.parallel import collectives, shard
from dsa_jax.parallel.mesh import ALL_TOKENS, BATCH

LOGITS_AT_ONCE = 2**27  # Of one device; in float32 they take half a GiB.


def next_token_loss(
    hidden: Float[Array, 'B T D'],
    head: Float[Array, 'D W'],
    targets: Int[Array, 'B T'],
    weights: Float[Array, 'B T'],
    *,
    softcap: float,
) -> Float[Array, '']:
  """Returns the weighted sum of the cross-entropy of every target, in nats, float32.

  Its gradients with respect to hidden states and head are computed along with it, so no logits are
  kept or computed twice.

  Args:
    hidden: Normed hidden states.
    head: The weight that turns them into logits.
    targets: The words that follow.
    weights: The factor of each target's loss. It gets no gradient.
    softcap: The model's `logit_softcap`.
  """
  return _weighted_loss(hidden, head, targets, weights, softcap)


def score_targets(
    hidden: Float[Array, 'B T D'],
    head: Float[Array, 'D W'],
    targets: Int[Array, 'B T'],
    *,
    softcap: float,
) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
  """Returns the cross-entropy of every target, and whether the likeliest word is the target.

  The first one of equally likely words counts as the likeliest. `softcap` is the model's.
  """
  score = functools.partial(_score, softcap=softcap)
  shares = BATCH, HEAD, ALL_TOKENS
  return shard.shard_mapped(score, shares, (ALL_TOKENS, ALL_TOKENS))(hidden, head, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_loss(hidden, head, targets, weights, softcap):
  nats, _ = score_targets(hidden, head, targets, softcap=softcap)
  return jnp.sum(nats * weights)


def _loss_and_gradients(hidden, head, targets, weights, softcap):
  shares, results = (BATCH, HEAD, ALL_TOKENS, ALL_TOKENS), (ALL_TOKENS, BATCH, HEAD)
  differentiate = functools.partial(_differentiate, softcap=softcap)
  differentiated = shard.shard_mapped(differentiate, shares, results)
  nats, *gradients = differentiated(hidden, head, targets, weights)
  return jnp.sum(nats * weights), gradients


def _scale_gradients(softcap, gradients, dloss):
  return *((dloss * x.astype(jnp.float32)).astype(x.dtype) for x in gradients), None, None


_weighted_loss.defvjp(_loss_and_gradients, _scale_gradients)


def _score(hidden, head, targets, softcap):
  """Computes `score_targets` from each device's shard of the vocabulary."""
  hidden, head = gather_head(hidden, head)

  def step(_, rows):
    hidden, targets = rows
    logits = _logits(hidden, head, softcap)
    own = _Softmax.of(logits, targets)
    n_words = logits.shape[-1]
    likeliest = logits.argmax(axis=-1) + collectives.axis_index('tensor') * n_words
    nowhere = collectives.axis_size('tensor') * n_words
    first = -collectives.pmax(-jnp.where(logits.max(axis=-1) == own.top, likeliest, nowhere), 'tensor')
    return None, (own.nats, first == targets)

  return _scan(step, None, (hidden, targets), head)[1]


def _differentiate(hidden, head, targets, weights, softcap):
  """Returns the loss of each target, and the gradients of their weighted sum."""
  dtype, of_weight = hidden.dtype, head.dtype
  hidden, head = gather_head(hidden, head)

  def step(dhead, rows):
    hidden, targets, weights = rows
    logits = _logits(hidden, head, softcap)
    own = _Softmax.of(logits, targets)
    dlogits = weights[..., None] * (own.exponentials / own.mass[..., None] - own.is_target)
    if softcap:  # The slope of tanh.
      dlogits *= 1 - jnp.square(logits / softcap)
    dlogits = dlogits.astype(dtype)
    product = lambda equation, *x: jnp.einsum(equation, *x, preferred_element_type=jnp.float32)
    dhead += product('BTD,BTW->DW', hidden, dlogits)
    return dhead, (own.nats, product('BTW,DW->BTD', dlogits, head).astype(dtype))

  zeros = jnp.zeros(head.shape, jnp.float32)
  dhead, (nats, dhidden) = _scan(step, zeros, (hidden, targets, weights), head)
  dhidden = collectives.psum_scatter(dhidden, 'tensor', dim=1)
  dhead = collectives.psum_scatter(dhead.astype(dtype), 'fsdp', dim=0).astype(of_weight)
  return nats, dhidden, collectives.psum(dhead, 'context', 'expert')


class _Softmax(NamedTuple):
  """What the losses of some rows share; words are those of this device's shard."""

  is_target: Bool[Array, 'B T W']  # A sum under this mask needs no scatter in its gradient.
  top: Float[Array, 'B T']  # The largest logit of all words.
  exponentials: Float[Array, 'B T W']  # Those of the logits, less the largest.
  mass: Float[Array, 'B T']  # The sum of the exponentials over all words.
  nats: Float[Array, 'B T']

  @classmethod
  def of(cls, logits, targets) -> '_Softmax':
    n_words = logits.shape[-1]
    word = targets - collectives.axis_index('tensor') * n_words
    is_target = word[..., None] == jnp.arange(n_words)
    own = collectives.psum(jnp.sum(jnp.where(is_target, logits, 0), axis=-1), 'tensor')
    top = collectives.pmax(logits.max(axis=-1), 'tensor')
    exponentials = jnp.exp(logits - top[..., None])
    mass = collectives.psum(jnp.sum(exponentials, axis=-1), 'tensor')
    return cls(is_target, top, exponentials, mass, top + jnp.log(mass) - own)


def _logits(hidden, head, softcap):
  products = jnp.einsum('BTD,DW->BTW', hidden, head, preferred_element_type=jnp.float32)
  return softcapped(products, softcap)


def _scan(step: Callable, carry, rows, head):
  """Runs `step` over as many rows at a time as LOGITS_AT_ONCE allows, a power of two."""
  most = max(1, LOGITS_AT_ONCE // head.shape[1])
  block = 1 << (most.bit_length() - 1)
  shape = rows[0].shape[:2]
  if shape[0] * shape[1] <= block:
    return step(carry, rows)
  carry, out = scan_rows(step, carry, [x.reshape(1, -1, *x.shape[2:]) for x in rows], block)
  return carry, jax.tree.map(lambda x: x.reshape(*shape, *x.shape[2:]), out)


def shift_targets(
    targets: Int[Array, 'B T'], weights: Float[Array, 'B T']
) -> tuple[Int[Array, 'B T'], Float[Array, 'B T']]:
  """Returns the targets of the MTP layer and their weights: the tokens after the next ones.

  They count where both the next token and the one after it count, which is within one document.
  """
  last = ((0, 0), (0, 1))
  later = jnp.pad(weights, last)[:, 1:]
  return jnp.pad(targets, last)[:, 1:], weights * later
