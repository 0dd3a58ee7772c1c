# SPDX-License-Identifier: Apache-2.0
"""Attention of grouped heads as the reports compile it, with the arguments and FLOPs of each op."""

from collections.abc import Callable

from dsa_jax.compile.cases import GROUPED, Dims, Op, T, float32, int32, shape
from dsa_jax.kernels.groups import fold_keys
from dsa_jax.kernels.sparse_attention import op as attention_op

INDEX_HEADS, INDEX_WIDTH = 16, 64  # Of the indexer that such a model gets.
SLOTS = (2048, 256)  # Selected keys of a query.
SM_SCALE = 0.1


def ops(kernels, plans: Callable = lambda n_slots, backward: None, **more) -> list[Op]:
  """Returns attention with either number of selected keys, forward and backward.

  Args:
    kernels: A backend's module of `sparse_attention`.
    plans: Returns the plan function for a number of selected keys.
    **more: Other fields of each op.
  """
  more = dict(models=tuple(GROUPED)) | more
  made = []
  for n in SLOTS:
    forward, backward = (plans(n, x) for x in (False, True))
    shapes, shapes_backward = attention_shapes(n), attention_backward_shapes(n)
    flops, flops_backward = attention_flops(n), attention_backward_flops(n)
    made += [
        Op(f'grouped_forward_{n}', attend(kernels), shapes, flops, forward, **more),
        Op(
            f'grouped_backward_{n}', differentiate(kernels), shapes_backward, flops_backward,
            backward, **more,
        ),
    ]  # fmt: skip
  return made


def attend(kernels) -> Callable:
  """Returns attention to rows [B, S, G, P]."""

  def attend(q, kv, indices):
    sizes = dict(n_groups=kv.shape[2], v_dim=kv.shape[3] // 2, sm_scale=SM_SCALE)
    return kernels.forward(q, fold_keys(kv), indices, **sizes, blocks=kernels.BlockSizes())

  return attend


def differentiate(kernels) -> Callable:
  """Returns the gradients of `attend`."""

  def differentiate(saved, cotangents):
    q, kv, *rest = saved
    sizes = kv.shape[2], kv.shape[3] // 2, SM_SCALE
    saved = q, fold_keys(kv), *rest
    return attention_op.backward(*sizes, kernels, kernels.BlockSizes(), saved, cotangents)[:2]

  return differentiate


def attention_shapes(n_slots: int) -> Callable:
  """Returns a function of `Dims`: queries, rows that are a value and its key, and a selection."""

  def shapes(dims: Dims):
    rows = shape(dims.n_keys, dims.groups, 2 * dims.width)
    return shape(T, dims.heads, 2 * dims.width), rows, int32(T, n_slots)

  return shapes


def attention_backward_shapes(n_slots: int) -> Callable:
  def shapes(dims: Dims):
    out, lse = shape(T, dims.heads, dims.width), float32(T, dims.heads)
    return (*attention_shapes(n_slots)(dims), out, lse), (out, lse)

  return shapes


def of_one_key_head(dims: Dims):
  """Returns the shapes of the queries and rows of one key head, of which plans for TPUs are."""
  return shape(T, dims.heads // dims.groups, 2 * dims.width), shape(dims.n_keys, 2 * dims.width)


def topk_shapes(dims: Dims):
  index = shape(T, INDEX_HEADS, INDEX_WIDTH), shape(dims.n_keys, INDEX_WIDTH)
  return *index, float32(T, INDEX_HEADS), int32(T), int32(T)


def topk_flops(dims: Dims) -> float:
  return 2 * dims.n_keys / 2 * INDEX_HEADS * INDEX_WIDTH


def attention_flops(n_slots: int) -> Callable:
  """Returns a function of `Dims`: the FLOPs that attention takes, queries not padded."""
  return lambda dims: 2 * n_slots * dims.heads * 2 * dims.width


def attention_backward_flops(n_slots: int) -> Callable:
  return lambda dims: 2 * n_slots * dims.heads * 5 * dims.width
