# SPDX-License-Identifier: Apache-2.0
"""The decoder. Its layers are stacked and scanned, and each reports what the losses need."""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key
import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.nn.attention.types import Measures, Mode, Shared
from dsa_jax.nn.block import MTP, Block, LayerReport
from dsa_jax.nn.fixed import Configured
from dsa_jax.nn.layers import OF_EXPERTS, Section, kind_of, layers_of_stacks, row_slots
from dsa_jax.nn.norms import RMSNorm
from dsa_jax.nn.remat import rematerialized
from dsa_jax.nn.scan import cut, in_order, of_kind, scan
from dsa_jax.nn.streams import Streams
from dsa_jax.parallel import collectives, shard
from dsa_jax.parallel.mesh import BATCH, HEAD, LOGITS
from dsa_jax.params import BackboneParam, LayerFact, param


class Output(NamedTuple):
  """The result of a forward pass."""

  hidden: Float[Array, 'B T D']  # After the final norm.
  mtp_hidden: Float[Array, 'B T D'] | None  # That for the token after the next one.
  logits: Float[Array, 'B T W']  # float32. A compiled program that does not read them makes none.
  mtp_logits: Float[Array, 'B T W'] | None  # Those of the token after the next one.
  layers: tuple[LayerReport, ...]  # Of each section of layers, in order, then of the MTP layer.

  @property
  def index_kl(self) -> Float[Array, 'L B T']:
    return jnp.concatenate([report.index_kl for report in self.layers])

  @property
  def residual_rms(self) -> Float[Array, 'L']:
    return jnp.concatenate([report.residual_rms for report in self.layers])

  @property
  def expert_load(self) -> dict[str, Float[Array, 'L X']]:
    """Returns the tokens of each expert, for every stack that has experts, in the stack's order."""
    loads = [report.expert_load for report in self.layers if report.expert_load is not None]
    mtp = {'mtp': loads.pop()} if loads and self.mtp_hidden is not None else {}
    of_stacks = {name: [load[name] for load in loads if name in load] for name in OF_EXPERTS}
    return {name: jnp.concatenate(of_stack) for name, of_stack in of_stacks.items() if of_stack} | mtp

  def measures(self, rule: str) -> Measures:
    """Returns one rule's measures, every field with a leading L."""
    reports = [report.measures[rule] for report in self.layers]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *reports)


class Transformer(Configured):
  """A decoder with an indexer in its attention layers."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    d, w = cfg.dim, cfg.vocab_size
    embed_std = cfg.embed_init_std
    self.embed = param(BackboneParam, (w, d), ('vocab', 'embed'), std=embed_std, rngs=rngs)
    self.dense_blocks = _stack(cfg, 'dense_blocks', rngs)
    self.moe_blocks = _stack(cfg, 'moe_blocks', rngs)
    self.dense_window_blocks = _stack(cfg, 'dense_window_blocks', rngs)
    self.moe_window_blocks = _stack(cfg, 'moe_window_blocks', rngs)
    self.dense_nope_blocks = _stack(cfg, 'dense_nope_blocks', rngs)
    self.moe_nope_blocks = _stack(cfg, 'moe_nope_blocks', rngs)
    self.dense_reading_blocks = _stack(cfg, 'dense_reading_blocks', rngs)
    self.moe_reading_blocks = _stack(cfg, 'moe_reading_blocks', rngs)
    self.dense_nope_reading_blocks = _stack(cfg, 'dense_nope_reading_blocks', rngs)
    self.moe_nope_reading_blocks = _stack(cfg, 'moe_nope_reading_blocks', rngs)
    self.streams = Streams(cfg, writes=False, rngs=rngs) if cfg.n_streams else None
    self.norm = RMSNorm(d, eps=cfg.norm_eps)
    head = lambda: param(BackboneParam, (d, w), ('embed', 'vocab'), std=0.02, rngs=rngs)
    self.head = None if cfg.tie_embeddings else head()
    self.mtp = MTP(cfg, rngs=rngs) if cfg.n_mtp_layers else None
    factors = jnp.zeros(cfg.qk_rope_head_dim // 2)
    self.rope_factors = BackboneParam(factors, axes=(None,)) if cfg.learned_frequencies else None
    self._cfg = cfg

  def __call__(
      self,
      tokens: Int[Array, 'B T'],
      start: Int[Array, 'B T'],
      end: Int[Array, 'B T'],
      mode: Mode,
      *,
      next_tokens: Int[Array, 'B T'] | None = None,
      key: Key[Array, ''] | None = None,
      choice: Int[Array, ''] | None = None,
  ) -> Output:
    """Returns the logits of the next token, and every layer's report.

    Args:
      tokens: Token ids. Rows may hold several documents, or padding.
      start: The first key that each token sees, which is the first of its document.
      end: One past the last key that each token sees, its own position + 1; `start` for padding.
      mode: How to attend.
      next_tokens: The tokens that follow. The MTP layer reads them, and is skipped without them.
      key: The random state of rules that draw. None stands for a fixed one.
      choice: The number of the rule that selects, if `mode.rule` names several.
    """
    keys = self.layer_keys(key)
    x, reports, selections = self.into_streams(self.embedded(tokens)), [], None
    if self.cfg.shares_indexers:  # Nothing is selected before the first full layer.
      nothing = jnp.full((*tokens.shape, *self.cfg.selection_shape), -1, jnp.int32)
      selections = {rule: nothing for rule in mode.rules}
    facts = keys, are_full(self.cfg, range(self.cfg.n_layers))
    carry = x, selections, self._empty_rows(tokens.shape)
    for section, weights in self.sections():
      inputs = section, weights, section.facts(facts)
      carry, report = _run(inputs, carry, start, end, mode, choice)
      reports.append(report)
    hidden, following, mtp_logits = self.final(carry[0]), None, None
    if self.mtp is not None and next_tokens is not None:
      following = self.embedded(next_tokens)
      following, report = self.mtp(hidden, following, start, end, keys[-1], mode, choice)
      mtp_logits = self.logits(following)
      reports.append(report)
    return Output(hidden, following, self.logits(hidden), mtp_logits, tuple(reports))

  def sections(self, *, copies: bool = True) -> Iterator[tuple[Section, dict[str, Any]]]:
    """Yields the sections of the layers, each with its weights as `scan` takes them; see `cut`."""
    layers = layers_of_stacks(self.cfg)
    return cut(self.cfg, lambda name: self._one_each(name, layers[name]), copies=copies)

  def _one_each(self, stack: str, layers: Sequence[int]) -> Block:
    """Returns the layers of a stack with all that each of them needs."""
    blocks = one_each(getattr(self, stack), self.cfg, layers)
    if self.rope_factors is None:
      return blocks
    blocks = jax.tree.map(lambda a: a, blocks)
    factors = self.rope_factors[...]
    factors = jnp.broadcast_to(factors, (len(layers), *factors.shape))
    blocks.attn.rope_factors = nnx.data(BackboneParam(factors, axes=(None,)))
    return blocks

  def _empty_rows(self, shape: tuple[int, int]) -> tuple[Float[Array, 'B T 1 P'], ...]:
    """Returns slots for the rows that later layers read."""
    widths = row_slots(self.cfg)[1]
    return tuple(jnp.zeros((*shape, 1, width), self.cfg.dtype) for width in widths)

  def layer_keys(self, key: Key[Array, ''] | None = None) -> Key[Array, 'L']:
    """Returns the random state of each layer and, as the last, that of the MTP layer."""
    return jax.random.split(jax.random.key(0) if key is None else key, self.cfg.n_layers + 1)

  def logits(self, hidden: Float[Array, 'B T D']) -> Float[Array, 'B T W']:
    """The float32 logits of normed hidden states."""
    products = shard.shard_mapped(_logits, (BATCH, HEAD), LOGITS)(hidden, self.head_weight)
    return softcapped(products, self.cfg.logit_softcap)

  @property
  def head_weight(self) -> Float[Array, 'D W']:
    """The weight that makes logits, which may be the embedding's transpose."""
    return self.embed[...].T if self.head is None else self.head[...]

  def embedded(self, tokens: Int[Array, 'B T']) -> Float[Array, 'B T D']:
    embed = functools.partial(_embed, dtype=self.cfg.dtype)
    return shard.shard_mapped(embed, (P('tensor', 'fsdp'), BATCH), BATCH)(self.embed[...], tokens)

  def into_streams(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T *M D']:
    """Returns the input of the first layer: embeddings, in a copy for each stream."""
    if self.streams is None:
      return x
    return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], self.cfg.n_streams, x.shape[2]))

  def final(self, x: Float[Array, 'B T *M D']) -> Float[Array, 'B T D']:
    """Returns the normed hidden states after the last layer, which logits are made of."""
    return self.norm(x if self.streams is None else self.streams.read(x))

  def block(self, i: int) -> Block:
    """Layer `i` on its own, for a notebook: `model.block(3).attn.indexer(...)`."""
    if not 0 <= i < self.cfg.n_layers:
      raise ConfigError(f'layer {i} must be within 0 and {self.cfg.n_layers - 1}.')
    kind = kind_of(self.cfg, i)
    layers = layers_of_stacks(self.cfg)[kind.stack]
    blocks = self._one_each(kind.stack, layers)
    block = of_kind(jax.tree.map(lambda a: a[layers.index(i)], blocks), kind)
    if not self.cfg.is_full(i):
      block.attn.indexer = None
    return block


def _embed(embed, tokens, dtype):
  x = look_up(embed, collectives.all_gather(tokens, 'tensor', dim=1), dtype)
  return collectives.all_to_all(collectives.psum_scatter(x, 'tensor', dim=1), 'fsdp', split=0, join=2)


def look_up(
    table: Float[Array, 'W D'], tokens: Int[Array, 'B T'], dtype: str
) -> Float[Array, 'A T D']:
  """Returns what this device knows of embeddings, for its own sequences and those of its `fsdp` group.

  It knows its own words. Others are 0, and the sum over `tensor` has them all. What is read is cast,
  not the table: the gradient sums in float32, as the table is, over all places of a word. In bfloat16
  such a sum stops growing after a few hundred places.

  Args:
    table: This device's words and channels.
    tokens: Those of its own sequences.
    dtype: That of the result.
  """
  words = collectives.all_gather(tokens, 'fsdp', dim=0)
  words -= collectives.axis_index('tensor') * len(table)
  here = (words >= 0) & (words < len(table))
  return jnp.where(here[..., None], table[words].astype(dtype), 0)


def gather_head(
    hidden: Float[Array, 'B T D'], head: Float[Array, 'D W']
) -> tuple[Float[Array, 'B T D'], Float[Array, 'D W']]:
  """Returns all tokens of this device's sequences, and its words' weights in the same dtype."""
  hidden = collectives.all_gather(hidden, 'tensor', dim=1)
  return hidden, collectives.all_gather(head.astype(hidden.dtype), 'fsdp', dim=0)


def _logits(hidden, head):
  hidden, head = gather_head(hidden, head)
  return jnp.einsum('BTD,DW->BTW', hidden, head, preferred_element_type=jnp.float32)


def softcapped(products: Float[Array, 'B T W'], limit: float) -> Float[Array, 'B T W']:
  """Returns the logits that a head's products make: `limit` · tanh(product / `limit`), or the same."""
  return limit * jnp.tanh(products / limit) if limit else products


def are_full(cfg: ModelConfig, layers: Sequence[int]) -> np.ndarray:
  return np.array([cfg.is_full(i) for i in layers])


def _stack(cfg: ModelConfig, name: str, rngs: nnx.Rngs) -> Block | None:
  """Returns the layers of a stack, with indexers for full layers only; None without layers."""
  layers = layers_of_stacks(cfg)[name]
  if not layers:
    return None
  sizes = cfg.of_layer(layers[0])
  kind = dict(experts=name in OF_EXPERTS, reads=cfg.reads_rows(layers[0]))
  make: Callable = lambda key: Block(sizes, **kind, rngs=nnx.Rngs(key))
  blocks = jax.vmap(make)(jax.random.split(rngs.params(), len(layers)))
  full = np.flatnonzero(are_full(cfg, layers))
  if not len(full):
    blocks.attn.indexer = None
  elif len(full) < len(layers):
    blocks.attn.indexer = jax.tree.map(lambda a: a[full], blocks.attn.indexer)
  return blocks


def one_each(blocks: Block, cfg: ModelConfig, layers: Sequence[int]) -> Block:
  """Gives every layer of a stack what a scan hands it: an indexer, and whether it rotates.

  Layers that are not full do not use theirs. The given module stays as it is.
  """
  full = are_full(cfg, layers)
  repeats = not full.all() and blocks.attn.indexer is not None
  some_rotate = len(cfg.nope_layers) > 0 and not cfg.nope_layers_expand
  if not repeats and not some_rotate:
    return blocks
  blocks = jax.tree.map(lambda a: a, blocks)
  if repeats:
    owner = np.maximum(np.cumsum(full) - 1, 0)
    blocks.attn.indexer = jax.tree.map(lambda a: a[owner], blocks.attn.indexer)
  if some_rotate:
    rotates = jnp.array([i not in cfg.nope_layers for i in layers])
    blocks.attn.rotates = nnx.data(LayerFact(rotates, axes=()))
  return blocks


def _run(inputs, carry, start, end, mode: Mode, choice):
  """Scans a section. Models with IndexShare hand selections on from layer to layer; some hand on rows."""

  def layer(carry, block, facts):
    (x, selections, kept), (key, is_full) = carry, facts
    shared = None if selections is None else Shared(selections, is_full)
    rows = kept[block.attn.reads] if block.attn.reads >= 0 else None
    x = shard.constrain_activations(x)
    x, own, report = block(x, start, end, key, mode, shared, choice, rows)
    if (slot := block.attn.keeps) >= 0:
      kept = *kept[:slot], report.rows, *kept[slot + 1 :]
    return (x, None if selections is None else own, kept), report._replace(rows=None)

  section, weights, facts = inputs
  layer = rematerialized(layer, mode.remat)
  carry, reports = scan(section, layer, carry, weights, facts)
  loads = dict[str, list]()
  for kind, report in zip(section.group, reports):
    if report.expert_load is not None:
      loads.setdefault(kind.stack, []).append(report.expert_load)
  report = in_order([report._replace(expert_load=None) for report in reports])
  of_stacks = {name: in_order(of_stack) for name, of_stack in loads.items()}
  return carry, report._replace(expert_load=of_stacks or None)
