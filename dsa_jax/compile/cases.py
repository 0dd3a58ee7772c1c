# SPDX-License-Identifier: Apache-2.0
"""What the reports of TPUs and GPUs share: sizes of released models, and the ops' arguments."""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsa_jax.compile.chips import CHIPS
from dsa_jax.families import SIZES

T, E, V, J, K = 4096, 576, 512, 128, 2048
DENSE_E, DENSE_V = 192, 128  # Of attention whose heads have keys and values of their own.
# Heads of attention and of the indexer, by model.
HEADS = {name: (SIZES[name].n_heads, SIZES[name].index_n_heads) for name in ('v32', 'glm5')}
# Heads of attention, of the indexer, key heads and their width.
GROUPED = {
    name: (SIZES[name].n_heads, SIZES[name].index_n_heads, SIZES[name].n_kv_heads, SIZES[name].head_dim)
    for name in ('llama3_8b', 'qwen3_30b_a3b', 'smollm2_135m')
}
BF16 = jnp.dtype(jnp.bfloat16)


class Dims(NamedTuple):
  """What an op is compiled for: a model's heads, keys, and the chip's bytes of VMEM."""

  heads: int
  index_heads: int
  n_keys: int
  vmem: int
  groups: int = 1
  width: int = E

  @classmethod
  def of(cls, model: str, n_keys: int, vmem: int) -> 'Dims':
    heads, index_heads, *grouped = (HEADS | GROUPED)[model]
    return cls(heads, index_heads, n_keys, vmem, *grouped)


class Op(NamedTuple):
  """A row of the report."""

  name: str
  function: Callable  # What is compiled.
  shapes: Callable  # Returns the shapes of its arguments for `Dims`.
  flops: Callable  # Returns the FLOPs of the matrix unit for one query, for `Dims`.
  plan: Callable | None = None  # Returns the plan that it executes for `Dims`; the report reads it.
  chips: tuple[str, ...] = tuple(CHIPS)  # The chips that have such a row.
  models: tuple[str, ...] = tuple(HEADS)  # The models that have one.
  # The most heads times keys that fit into the memory of a chip, where the report has more.
  most: tuple[tuple[str, int], ...] = ()

  def fits(self, chip: str, model: str, n_keys: int) -> bool:
    """Says whether there is such a row for a chip, a model and a number of keys."""
    size = (HEADS | GROUPED)[model][0] * n_keys
    fits = size <= dict(self.most).get(chip, size)
    return chip in self.chips and model in self.models and fits


def shape(*dims: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, *dims), dtype)


int32 = functools.partial(shape, dtype=jnp.int32)
float32 = functools.partial(shape, dtype=jnp.float32)


def topk_shapes(dims):
  heads = dims.index_heads
  return shape(T, heads, J), shape(dims.n_keys, J), float32(T, heads), int32(T), int32(T)


def attention_shapes(dims):
  return shape(T, dims.heads, E), shape(dims.n_keys, E), int32(T, K)


def attention_backward_shapes(dims):
  out, lse = shape(T, dims.heads, V), float32(T, dims.heads)
  return (*attention_shapes(dims), out, lse), (out, lse)


def kl_constants(dims):
  keys = shape(dims.n_keys, 1, E)
  return shape(T, dims.heads, E), keys, float32(T, dims.heads), int32(T), int32(T), int32(T, K)


def kl_index(dims):
  return shape(T, dims.index_heads, J), shape(dims.n_keys, J), float32(T, dims.index_heads)


def dense_constants(dims):
  heads = dims.heads, DENSE_E
  return shape(T, *heads), shape(dims.n_keys, *heads), float32(T, dims.heads), int32(T), int32(T)


def dense_attention_shapes(dims):
  q, k, _, start, end = dense_constants(dims)
  return q, k, shape(dims.n_keys, dims.heads, DENSE_V), start, end


def dense_attention_backward_shapes(dims):
  out, lse = shape(T, dims.heads, DENSE_V), float32(T, dims.heads)
  return (*dense_attention_shapes(dims), out, lse), (out, lse)


def kl_shapes(dims):
  return kl_constants(dims), kl_index(dims)


def dense_kl_shapes(dims):
  return dense_constants(dims), kl_index(dims)


def dense_kl_backward_shapes(dims):
  return dense_constants(dims), (*kl_index(dims), float32(T), float32(T)), float32(T)


def topk_flops(dims):
  return 2 * dims.n_keys / 2 * dims.index_heads * J


def attention_flops(dims):
  return 2 * K * dims.heads * (E + V)


def attention_backward_flops(dims):
  return 2 * K * dims.heads * (3 * E + 2 * V)


def dense_attention_flops(dims):
  return 2 * dims.n_keys / 2 * dims.heads * (DENSE_E + DENSE_V)


def dense_attention_backward_flops(dims):
  return 2 * dims.n_keys / 2 * dims.heads * (3 * DENSE_E + 2 * DENSE_V)


def kl_flops(dims):
  return 2 * K * (dims.heads * E + dims.index_heads * J)


def dense_kl_flops(dims):
  return 2 * dims.n_keys / 2 * (dims.heads * DENSE_E + dims.index_heads * J)


def dense_kl_backward_flops(dims):
  return 2 * dims.n_keys / 2 * (dims.heads * DENSE_E + 3 * dims.index_heads * J)
