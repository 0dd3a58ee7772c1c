# SPDX-License-Identifier: Apache-2.0
"""The programs that read and write texts. They belong to the module: all samplers share them."""

import dataclasses
import functools
import typing
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.inference.cache import FORMATS, Cache, init_cache
from dsa_jax.inference.extend import Reading, extend
from dsa_jax.inference.piece import short_context
from dsa_jax.inference.shares import Shares, make_texts, mesh_config, shares_of
from dsa_jax.kernels.backend import check_backend, default_backend
from dsa_jax.kernels.block_scaled import BlockScaled
from dsa_jax.nn.attention.mla import MLA
from dsa_jax.nn.attention.types import Attention
from dsa_jax.nn.block import Block
from dsa_jax.nn.layers import layers_of_stacks
from dsa_jax.nn.transformer import Transformer, softcapped
from dsa_jax.parallel import collectives
from dsa_jax.parallel.mesh import TOKENS, MeshConfig, shardings_of
from dsa_jax.params import BackboneParam
from dsa_jax.selection import check_rule

CHUNK = 512  # Tokens of a prompt that are read at a time.
TPU_CHUNK = 4096  # The same on a TPU, whose kernels pack all keys anew for each chunk.


def prepared_for_cpu(model: Transformer) -> tuple[Transformer, list[Block]]:
  """Returns a model without its layers, and its layers, as XLA:CPU reads them without copies.

  The layers lie by themselves, see `extend`; an MTP layer stays with the model. The head is rounded
  to the dtype of the activations but kept in float32, because XLA:CPU would do both before every
  product, at ten times the product's cost.
  """
  blocks = [model.block(i) for i in range(model.cfg.n_layers)]
  for block in blocks:
    _split_expansion(block)
  rest = jax.tree.map(lambda x: x, model)  # A new module; the given one stays as it is.
  for name in layers_of_stacks(model.cfg):
    setattr(rest, name, None)
  if rest.mtp is not None:
    _split_expansion(rest.mtp.block)
  if model.cfg.dtype != 'float32':
    head = model.head_weight.astype(model.cfg.dtype).astype(jnp.float32)
    rest.head = nnx.data(BackboneParam(head, axes=('embed', 'vocab')))
  return rest, blocks


def widened_by(model: Transformer, backend: str) -> Transformer:
  """Returns the model with codes, where it has some, that the kernels of a backend widen."""
  is_scaled = lambda x: isinstance(x, BlockScaled)
  choose = lambda x: dataclasses.replace(x, backend=backend) if is_scaled(x) else x
  return jax.tree.map(choose, model, is_leaf=is_scaled)


def _split_expansion(block: Block):
  """Turns the expansion of latents around, unless it is codes, which every product widens anyway."""
  if isinstance(block.attn, MLA) and not isinstance(block.attn.wkv_b[...], BlockScaled):
    block.attn.split_expansion()


def without_mtp(model: Transformer) -> Transformer:
  """Returns the model without its MTP layer; the given one stays as it is."""
  rest = jax.tree.map(lambda x: x, model)
  rest.mtp = None
  return rest


@dataclasses.dataclass(frozen=True)
class Reader:
  """What a program reads tokens with. It knows its hash, because that of a model takes a millisecond."""

  structure: jax.tree_util.PyTreeDef  # The model and its layers, without their weights.
  attention: Attention
  backend: str
  rule: str
  on_cpu: bool  # Whether they are as `prepared_for_cpu` returns them.
  shares: Shares | None  # What each device of a mesh has of them. None: there is one device.
  shared: tuple[str, ...]  # Axes of the mesh along which devices read the same; see `extend`.
  known_hash: int

  def __hash__(self) -> int:
    return self.known_hash


@functools.cache  # Samplers of models with one structure have one reader, which equals itself at once.
def make_reader(
    structure: jax.tree_util.PyTreeDef,
    attention: Attention,
    backend: str,
    rule: str,
    on_cpu: bool,
    shares: Shares | None,
) -> Reader:
  fields = structure, attention, backend, rule, on_cpu, shares, TOKENS
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
  model, reading = read_hidden(weights, cache, tokens, n_new, reader=reader, visible=visible)
  last = jnp.maximum(n_new - 1, 0)[:, None, None]
  hidden = jnp.take_along_axis(reading.hidden, last, axis=1)
  new = logits_of(model, hidden, reader)[:, 0]
  return jnp.where(n_new[:, None] > 0, new, logits), reading.cache


def read_hidden(
    weights: list[Array],
    cache: Cache,
    tokens: Int[Array, 'B T'],
    n_new: Int[Array, 'B'],
    *,
    reader: Reader,
    visible: int = 0,
) -> tuple[Transformer, Reading]:
  """Reads one chunk of every text; returns the model and what `extend` does."""
  model, layers = jax.tree.unflatten(reader.structure, weights)
  return model, extend(
      model, cache, tokens, n_new,
      attention=reader.attention, backend=reader.backend, rule=reader.rule, layers=layers,
      visible=visible, shared=reader.shared,
  )  # fmt: skip


def logits_of(
    model: Transformer, hidden: Float[Array, 'B T D'], reader: Reader
) -> Float[Array, 'B T W']:
  if reader.shares is None:
    return model.logits(hidden.astype(jnp.float32) if reader.on_cpu else hidden)
  head = collectives.all_gather(model.head_weight.astype(hidden.dtype), 'fsdp', dim=0)
  products = jnp.einsum('BTD,DW->BTW', hidden, head, preferred_element_type=jnp.float32)
  products = collectives.all_gather(products, 'tensor', dim=2)
  return softcapped(products, model.cfg.logit_softcap)


def agreed(ids: Int[Array, 'B'], reader: Reader) -> Int[Array, 'B']:
  """Returns ids that devices have each drawn for the same texts, whose logits may differ in a last bit."""
  return ids if reader.shares is None else collectives.pmax(ids, *reader.shared)


def of_texts(reader: Reader, n_texts: int) -> Reader:
  """Returns what reads so many texts, within a program of all devices."""
  return dataclasses.replace(reader, shared=reader.shares.shared(n_texts))


@functools.partial(jax.jit, static_argnames=('reader', 'visible'), donate_argnames='cache')
def read_chunk(
    weights: list[Array],
    cache: Cache,
    tokens: Int[Array, 'B T'],
    n_new: Int[Array, 'B'],
    logits: Float[Array, 'B W'],
    *,
    reader: Reader,
    visible: int,
) -> tuple[Float[Array, 'B W'], Cache]:
  """Compiles `read`."""
  args = cache, tokens, n_new, logits
  if (shares := reader.shares) is None:
    return read(weights, *args, reader=reader, visible=visible)
  run = functools.partial(read, reader=of_texts(reader, len(tokens)), visible=visible)
  specs = shares.specs(args, len(tokens))
  return shares.run(run, (list(shares.weights), *specs), (specs[3], specs[0]))(weights, *args)


class Engine(NamedTuple):
  """A model that is ready to read, and how it reads."""

  cfg: ModelConfig
  weights: list[Array]
  reader: Reader
  chunk: int  # At most so many tokens of a prompt are read at a time.
  cache_format: str
  drafts: bool  # Whether the MTP layer guesses tokens.

  @property
  def mesh(self) -> MeshConfig:
    return mesh_config(self.reader.shares and self.reader.shares.mesh)

  def empty_cache(self, batch: int, capacity: int) -> Cache:
    on_tpu, shares = self.reader.backend == 'tpu', self.reader.shares
    n_heads = 0 if shares is None else shares.row_heads(self.cfg)
    args = self.cfg, batch, capacity, self.cache_format, on_tpu, n_heads
    return make_texts(_empty_cache, *args, n_texts=batch, shares=shares)

  def empty_logits(self, batch: int) -> Float[Array, 'B W']:
    return make_texts(jnp.zeros, (batch, self.cfg.vocab_size), n_texts=batch, shares=self.reader.shares)

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


def _empty_cache(cfg, batch: int, capacity: int, fmt: str, whole_lines: bool, n_heads: int) -> Cache:
  return init_cache(cfg, batch, capacity, fmt=fmt, whole_lines=whole_lines, n_heads=n_heads)


def make_engine(
    model: Transformer,
    *,
    attention: Attention,
    rule: str,
    cache: str,
    chunk: int | None,
    backend: str,
    drafts: bool,
    mesh: Mesh | None,
) -> Engine:
  """Makes a model ready to read; see `Sampler` for the arguments.

  Raises:
    ConfigError: An argument is out of range.
  """
  if attention not in typing.get_args(Attention):
    raise ConfigError(f'{attention=} must be one of {typing.get_args(Attention)}.')
  check_rule(rule)
  if attention == 'dense' and rule != 'indexer':
    raise ConfigError(f"{rule=} selects nothing under {attention=}: use 'sparse' or 'masked'.")
  if cache not in ('', *FORMATS):
    raise ConfigError(f"{cache=} must be one of {FORMATS}, or '' for the model's dtype.")
  backend = backend or default_backend()
  check_backend(backend)
  chunk = (TPU_CHUNK if backend == 'tpu' else CHUNK) if chunk is None else chunk
  if chunk < 1:
    raise ConfigError(f'{chunk=} must be at least 1.')
  if drafts and model.mtp is None:
    raise ConfigError(f'{drafts=} needs an MTP layer, which the model lacks: {model.cfg.n_mtp_layers=}.')
  model = widened_by(model if drafts else without_mtp(model), backend)
  shares, on_cpu = shares_of(model, mesh), False
  if shares is not None:
    weights, structure = jax.tree.flatten((jax.device_put(model, shardings_of(model, mesh)), None))
  else:
    on_cpu = jax.default_backend() == 'cpu'
    weights, structure = jax.tree.flatten(prepared_for_cpu(model) if on_cpu else (model, None))
  reader = make_reader(structure, attention, backend, rule, on_cpu, shares)
  return Engine(model.cfg, weights, reader, chunk, cache or model.cfg.dtype, drafts)
