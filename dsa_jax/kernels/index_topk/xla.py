# SPDX-License-Identifier: Apache-2.0
"""Scores and exact selection, a block of query rows at a time: the best groups, then the best keys.

The K best keys lie in the K groups of neighbouring keys with the highest maxima, where ties go to
the lowest group: a group left out has K groups before it, each with a key that comes before any of
its own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dsa_jax.kernels.backend import Blocks
from dsa_jax.kernels.index_scores import weigh
from dsa_jax.kernels.products import einsum
from dsa_jax.kernels.select_topk import hide
from dsa_jax.kernels.xla.rows import key_range, pad_axis, scan_rows
from dsa_jax.kernels.xla.threshold import best_positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes(Blocks):
  """They change the speed, never the result."""

  block_t: int = 64  # Query rows per pass, whose scores exist at one time.
  block_s: int = 1024  # Keys scored at one time.
  few_t: int = 8  # Up to so many query rows, as in decoding, keys are read as they lie.
  few_block_s: int = 16_384  # Keys that few query rows score at one time, of all sequences together.
  few_scores: int = 1 << 20  # Shorter sequences are scored whole if there are at most so many, of all heads.
  ungrouped_s: int = 1024  # Up to so many keys are not grouped: one search is faster than three.


def forward(q, k, weights, start, end, *, topk: int, blocks: BlockSizes, span=None):
  """Returns the positions [B, T, topk], as the op does."""
  batch, few = q.shape[0], q.shape[1] <= blocks.few_t
  if span is not None and not few:
    k, span = jax.lax.dynamic_slice_in_dim(k, *span, axis=1), None
  first_key, n_keys = span or (0, k.shape[1])
  size = 1 if n_keys <= blocks.ungrouped_s else _group_size(n_keys, topk, dividing=few)
  n_groups = -(-n_keys // size)
  block_s = _few_block_s(blocks, q.shape, n_keys) if few else blocks.block_s
  step_groups = min(max(block_s // size, 1), n_groups)
  if few:
    score_groups = functools.partial(_score_as_they_lie, first_key=first_key, size=size)
  else:
    k = pad_axis(k, 1, size * step_groups).reshape(batch, -1, size, k.shape[-1])
    n_groups, k, score_groups = k.shape[1], _interleave(k, step_groups), _score_interleaved
  end = jnp.minimum(end, n_keys)  # Never the padding.
  block_t = min(blocks.block_t, q.shape[1])

  def select(scores, rows):
    q, weights, start, end = rows

    def score(j, state):
      scores, tops = state
      first = jnp.minimum(j * step_groups, n_groups - step_groups)
      new = score_groups(q, k, weights, first, step_groups)
      position = (first + jnp.arange(step_groups)) * size + jnp.arange(size)[:, None]
      visible = (position >= start[..., None, None]) & (position < end[..., None, None])
      new = hide(new, visible)
      put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, first, axis=-1)
      return put(scores, new), put(tops, jnp.max(new, axis=2))

    tops = jnp.full((batch, block_t, n_groups), -jnp.inf)
    first, last = key_range(start, end, n_keys, size * step_groups)
    scores, tops = jax.lax.fori_loop(first, last, score, (scores, tops))
    return scores, _best_keys(scores, tops, topk)

  # The scores of groups that no row sees are of earlier rows; no such group is chosen.
  scores = jnp.zeros((batch, block_t, size, n_groups))
  return scan_rows(select, scores, (q, weights, start, end), block_t)[1]


def _few_block_s(blocks: BlockSizes, shape: tuple[int, ...], n_keys: int) -> int:
  """Returns how many keys of each sequence few query rows score at one time.

  A block is copied before it is read, unless it is the whole. XLA:CPU gives large temporaries back
  to the system, which then clears their pages in every call, so blocks shrink as sequences are added.
  """
  batch, t, heads, _ = shape
  if n_keys <= blocks.few_block_s and batch * t * heads * n_keys <= blocks.few_scores:
    return n_keys
  return max(blocks.few_block_s // batch, min(blocks.few_block_s, 1024))


def _group_size(n_keys: int, topk: int, *, dividing: bool) -> int:
  """Returns a power of two near (S / K) ** 0.5: as many group maxima as keys in chosen groups.

  If `dividing`, it also divides S, so that keys need no padding, which would copy them.
  """
  size = 1
  while n_keys >= 2 * topk * size * size and not (dividing and n_keys % (2 * size)):
    size *= 2
  return size


def _interleave(k, step):
  """Turns keys [B, groups, size, J] to [B, groups / step, J, size, step].

  The product reads them so, and a group's maximum is then over whole slices.
  """
  batch, _, size, j = k.shape
  return jnp.moveaxis(k.reshape(batch, -1, step, size, j), (4, 3), (2, 3))


def _score_interleaved(q, k, weights, first, step):
  """Returns scores [B, T, size, step] of groups from the first on, in the order of the keys."""
  keys = jax.lax.dynamic_index_in_dim(k, first // step, 1, keepdims=False)
  keys = keys.reshape(*keys.shape[:2], -1)
  dots = einsum('BTIJ,BJS->BTIS', q, keys)
  return weigh(dots, weights, axis=2).reshape(*q.shape[:2], -1, step)


def _score_as_they_lie(q, k, weights, first, step, *, first_key, size):
  """Returns the same of keys [B, S, J] as they lie: turning the scores of few rows takes less."""
  keys = jax.lax.dynamic_slice_in_dim(k, first_key + first * size, step * size, axis=1)
  keys = keys.reshape(k.shape[0], step, size, -1)
  dots = einsum('BGSJ,BTIJ->BGSTI', keys, q)
  return einsum('BGSTI,BTI->BTSG', jax.nn.relu(dots), weights.astype(jnp.float32))


def _best_keys(scores, tops, topk):
  """Returns the positions of the best keys, of scores [B, T, size, groups] and their maxima."""
  size = scores.shape[2]
  if size == 1:
    return best_positions(tops, topk)
  groups = best_positions(tops, topk, spare=topk // 8)
  candidates = jnp.take_along_axis(scores, groups[:, :, None], axis=3, mode='clip')
  candidates = jnp.where(groups[:, :, None] >= 0, candidates, -jnp.inf)
  # Not by `tops`: XLA may compute a score twice, once for each array, and round it in two ways.
  reached = jnp.max(candidates[..., :topk], axis=2)
  floor = jnp.where(groups[..., topk - 1] >= 0, jnp.min(reached, axis=-1), -jnp.inf)
  candidates = jnp.swapaxes(candidates, 2, 3).reshape(*groups.shape[:2], -1)  # By position.
  few = best_positions(candidates, topk, spare=topk // 8, floor=floor)  # The cut is exact here.
  values = jnp.take_along_axis(candidates, few, axis=2, mode='clip')
  best = best_positions(jnp.where(few >= 0, values, -jnp.inf), topk)
  slots = jnp.where(best >= 0, jnp.take_along_axis(few, best, axis=2, mode='clip'), -1)
  group = jnp.take_along_axis(groups, slots // size, axis=2, mode='clip')
  return jnp.where(slots >= 0, group * size + slots % size, -1)
