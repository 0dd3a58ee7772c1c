# SPDX-License-Identifier: Apache-2.0
"""The programs that read and write texts. They belong to the module: all samplers share them."""

import dataclasses
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

from dsa_jax.config import ModelConfig
from dsa_jax.inference.cache import Cache, init_cache
from dsa_jax.inference.draw import draw
from dsa_jax.inference.extend import extend, short_context
from dsa_jax.nn.attention.mla import MLA
from dsa_jax.nn.attention.types import Attention
from dsa_jax.nn.block import Block
from dsa_jax.nn.transformer import Transformer
from dsa_jax.params import BackboneParam


def prepared_for_cpu(model: Transformer) -> tuple[Transformer, list[Block]]:
  """Returns a model without its layers, and its layers, as XLA:CPU reads them without copies.

  The layers lie by themselves, see `extend`. The head is rounded to the dtype of the activations but
  kept in float32, because XLA:CPU would do both before every product, at ten times the product's cost.
  """
  blocks = [model.block(i) for i in range(model.cfg.n_layers)]
  for block in blocks:
    if isinstance(block.attn, MLA):
      block.attn.split_expansion()
  rest = jax.tree.map(lambda x: x, model)  # A new module; the given one stays as it is.
  rest.dense_blocks = rest.moe_blocks = rest.mtp = None
  if model.cfg.dtype != 'float32':
    head = model.head_weight.astype(model.cfg.dtype).astype(jnp.float32)
    rest.head = nnx.data(BackboneParam(head, axes=('embed', 'vocab')))
  return rest, blocks


@dataclasses.dataclass(frozen=True)
class Reader:
  """What a program reads tokens with. It knows its hash, because that of a model takes a millisecond."""

  structure: jax.tree_util.PyTreeDef  # The model and its layers, without their weights.
  attention: Attention
  backend: str
  rule: str
  on_cpu: bool  # Whether they are as `prepared_for_cpu` returns them.
  known_hash: int

  def __hash__(self) -> int:
    return self.known_hash


@functools.cache  # Samplers of models with one structure have one reader, which equals itself at once.
def make_reader(
    structure: jax.tree_util.PyTreeDef, attention: Attention, backend: str, rule: str, on_cpu: bool
) -> Reader:
  fields = structure, attention, backend, rule, on_cpu
  return Reader(*fields, hash(fields))


def read(
    weights: list[Array],
    cache: Cache,
    tokens: Int[Array, 'B T'],
    n_new: Int[Array, 'B'],
    logits: Float[Array, 'B W'],
    *,
    reader: Reader,
    visible: int = 0,
) -> tuple[Float[Array, 'B W'], Cache]:
  """Reads one chunk of every text; a text without new tokens keeps the logits that it had."""
  model, layers = jax.tree.unflatten(reader.structure, weights)
  reading = extend(
      model, cache, tokens, n_new,
      attention=reader.attention, backend=reader.backend, rule=reader.rule, layers=layers,
      visible=visible,
  )  # fmt: skip
  last = jnp.maximum(n_new - 1, 0)[:, None, None]
  hidden = jnp.take_along_axis(reading.hidden, last, axis=1)
  new = model.logits(hidden.astype(jnp.float32) if reader.on_cpu else hidden)[:, 0]
  return jnp.where(n_new[:, None] > 0, new, logits), reading.cache


read_chunk = jax.jit(read, static_argnames=('reader', 'visible'), donate_argnames='cache')


@functools.partial(jax.jit, static_argnames='n')
def begin_texts(
    seed: Int[Array, ''] | int, n: int
) -> tuple[Key[Array, '{n}'], Bool[Array, '{n}']]:
  """Returns the random state of each of n texts, and that all are running."""
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(n))
  return keys, jnp.ones(n, bool)


@functools.partial(jax.jit, static_argnames=('top_k', 'reader'), donate_argnames='cache')
def draw_and_read(
    weights: list[Array],
    cache: Cache,
    logits: Float[Array, 'B W'],
    keys: Key[Array, 'B'],
    running: Bool[Array, 'B'],
    temperature: Float[Array, ''] | float,
    top_p: Float[Array, ''] | float,
    stop: Int[Array, 'N'],
    *,
    top_k: int,
    reader: Reader,
) -> tuple[Int[Array, 'B'], Bool[Array, 'B'], Float[Array, 'B W'], Cache]:
  """Draws a token for every text, and reads it where the text is running and does not stop with it.

  Returns:
    The ids, which texts go on with theirs, and the next logits and cache.
  """
  position_keys = jax.vmap(jax.random.fold_in)(keys, cache.length)
  ids = draw(logits, position_keys, temperature, top_k, top_p)
  running &= jnp.all(ids[:, None] != stop, axis=1)
  n_new = running.astype(jnp.int32)
  logits, cache = read(weights, cache, ids[:, None], n_new, logits, reader=reader)
  return ids, running, logits, cache


class Engine(NamedTuple):
  """A model that is ready to read, and how it reads."""

  cfg: ModelConfig
  weights: list[Array]
  reader: Reader
  chunk: int  # At most so many tokens of a prompt are read at a time.
  cache_format: str

  def empty_cache(self, batch: int, capacity: int) -> Cache:
    on_tpu = self.reader.backend == 'tpu'
    return init_cache(self.cfg, batch, capacity, fmt=self.cache_format, whole_lines=on_tpu)

  def read(
      self,
      cache: Cache,
      logits: Float[Array, 'B W'],
      tokens: Int[np.ndarray, 'B T'],
      n_new: Int[np.ndarray, 'B'],
      *,
      before: int,
  ) -> tuple[Float[Array, 'B W'], Cache]:
    """Reads one chunk; no text holds more than `before` tokens. The given cache is gone after it."""
    visible = self.visible(before, tokens.shape[1], cache.capacity(self.cfg))
    return read_chunk(self.weights, cache, tokens, n_new, logits, reader=self.reader, visible=visible)

  def visible(self, before: int, width: int, capacity: int) -> int:
    """Returns how many tokens a chunk may see; of a few such numbers, for few programs."""
    topk, most = self.cfg.index_topk, before + width
    longest = short_context(width, topk, self.reader.backend)
    if self.reader.attention != 'sparse' or most > longest:
      return 0
    return min(topk if most <= topk else longest, capacity)
