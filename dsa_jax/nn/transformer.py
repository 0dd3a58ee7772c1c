# SPDX-License-Identifier: Apache-2.0
"""The decoder: layers stacked once, scanned always, each reporting what the losses need."""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dsa_jax.config import ModelConfig
from dsa_jax.nn.mla import MLA, Measures, Mode
from dsa_jax.nn.mlp import MLP
from dsa_jax.nn.moe import MoE
from dsa_jax.nn.norms import RMSNorm
from dsa_jax.nn.param import BackboneParam, param


STACKS = ('dense_blocks', 'moe_blocks', 'mtp')  # Leading MLP layers, expert layers, MTP layer.


class LayerReport(NamedTuple):
  """What a layer says beside its output; stacked over layers by the scan."""

  residual_rms: Float[Array, '*L']  # Root mean square of the residual stream after the layer.
  index_kl: Float[Array, '*L B T'] | None  # Nats.
  expert_load: Float[Array, '*L X'] | None  # Tokens per expert; None without experts.
  measures: dict[str, Measures]


class Output(NamedTuple):
  """What a forward pass returns."""

  logits: Float[Array, 'B T W']  # float32.
  mtp_logits: Float[Array, 'B T W'] | None  # Of the token after the next one.
  layers: dict[str, LayerReport]  # By stack, in order: see STACKS.

  @property
  def index_kl(self) -> Float[Array, 'L B T']:
    return jnp.concatenate([stack.index_kl for stack in self.layers.values()])

  @property
  def residual_rms(self) -> Float[Array, 'L']:
    return jnp.concatenate([stack.residual_rms for stack in self.layers.values()])

  def measures(self, rule: str) -> Measures:
    """One rule's measures, every field with a leading L."""
    stacks = [stack.measures[rule] for stack in self.layers.values()]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)


class Block(nnx.Module):
  """Attention, then an MLP or experts, each on the normed residual stream."""

  def __init__(self, cfg: ModelConfig, *, experts: bool, rngs: nnx.Rngs):
    out_scale = (2 * cfg.n_layers) ** -0.5
    self.attn_norm = RMSNorm(cfg.dim, eps=cfg.norm_eps)
    self.attn = MLA(cfg, out_scale=out_scale, rngs=rngs)
    self.ffn_norm = RMSNorm(cfg.dim, eps=cfg.norm_eps)
    if experts:
      self.ffn = MoE(cfg, out_scale=out_scale, rngs=rngs)
    else:
      self.ffn = MLP(cfg.dim, cfg.inter_dim, out_std=out_scale * cfg.inter_dim**-0.5, rngs=rngs)

  def __call__(
      self,
      x: Float[Array, 'B T D'],
      start: Int[Array, 'B T'],
      end: Int[Array, 'B T'],
      key: Key[Array, ''],
      mode: Mode,
  ) -> tuple[Float[Array, 'B T D'], LayerReport]:
    with jax.named_scope('attention'):
      out, attention = self.attn(self.attn_norm(x), start, end, key, mode)
      x = _add(x, out)
    with jax.named_scope('feed_forward'):
      load, h = None, self.ffn_norm(x)
      if isinstance(self.ffn, MoE):
        h, load = self.ffn(h, (end > start).astype(jnp.float32))
      else:
        h = self.ffn(h)
      x = _add(x, h)
    rms = jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
    return x, LayerReport(rms, attention.index_kl, load, attention.measures)


class MTP(nnx.Module):
  """One more layer, that predicts the token after the next one from the next one's embedding.

  The hidden state is taken before the model's final norm; descriptions differ on this.

  Source:
    DeepSeek-V3 report, section 2.2. Embedding and head are the model's own.
  """

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    d = cfg.dim
    self.enorm = RMSNorm(d, eps=cfg.norm_eps)
    self.hnorm = RMSNorm(d, eps=cfg.norm_eps)
    self.eh_proj = param(
        BackboneParam, (2 * d, d), (None, 'embed'), std=(2 * d) ** -0.5, rngs=rngs
    )
    self.block = Block(cfg, experts=cfg.n_dense_layers < cfg.n_layers, rngs=rngs)
    self.norm = RMSNorm(d, eps=cfg.norm_eps)

  def __call__(self, hidden, next_embedding, start, end, key, mode: Mode):
    x = jnp.concatenate([self.enorm(next_embedding), self.hnorm(hidden)], axis=-1)
    x = x @ self.eh_proj[...].astype(x.dtype)
    x, report = self.block(x, start, end, key, mode)
    return self.norm(x), jax.tree.map(lambda a: a[None], report)


class Transformer(nnx.Module):
  """A DeepSeek-V3.2 decoder."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    d, w = cfg.dim, cfg.vocab_size
    embed_std = cfg.embed_init_std
    self.embed = param(BackboneParam, (w, d), ('vocab', 'embed'), std=embed_std, rngs=rngs)
    self.dense_blocks = _stack(cfg, cfg.n_dense_layers, experts=False, rngs=rngs)
    self.moe_blocks = _stack(cfg, cfg.n_layers - cfg.n_dense_layers, experts=True, rngs=rngs)
    self.norm = RMSNorm(d, eps=cfg.norm_eps)
    self.head = param(BackboneParam, (d, w), ('embed', 'vocab'), std=0.02, rngs=rngs)
    self.mtp = MTP(cfg, rngs=rngs) if cfg.n_mtp_layers else None
    self.cfg = cfg

  def __call__(
      self,
      tokens: Int[Array, 'B T'],
      start: Int[Array, 'B T'],
      end: Int[Array, 'B T'],
      mode: Mode,
      *,
      next_tokens: Int[Array, 'B T'] | None = None,
      key: Key[Array, ''] | None = None,
  ) -> Output:
    """Returns the logits of the next token, and every layer's report.

    Args:
      tokens: Token ids. Rows may hold several documents, or padding.
      start: The first position of each token's document: the first key it sees.
      end: One past the last key it sees: its own position + 1; start = end for padding.
      mode: How to attend.
      next_tokens: The tokens that follow; the MTP layer reads them and is skipped without.
      key: For rules that draw lots; a fixed one if None.
    """
    embed = self.embed[...].astype(self.cfg.dtype)
    keys = jax.random.split(jax.random.key(0) if key is None else key, self.cfg.n_layers + 1)
    x, reports = embed[tokens], {}
    leading, following = jnp.split(keys[:-1], [self.cfg.n_dense_layers])
    if self.dense_blocks is not None:
      x, reports['dense_blocks'] = _run(self.dense_blocks, leading, x, start, end, mode)
    if self.moe_blocks is not None:
      x, reports['moe_blocks'] = _run(self.moe_blocks, following, x, start, end, mode)
    mtp_logits = None
    if self.mtp is not None and next_tokens is not None:
      hidden, reports['mtp'] = self.mtp(x, embed[next_tokens], start, end, keys[-1], mode)
      mtp_logits = self._logits(hidden)
    return Output(self._logits(self.norm(x)), mtp_logits, reports)

  def _logits(self, hidden):
    head = self.head[...].astype(hidden.dtype)
    return jnp.einsum('BTD,DW->BTW', hidden, head, preferred_element_type=jnp.float32)

  def block(self, i: int) -> Block:
    """Layer `i` on its own, for a notebook: `model.block(3).attn.indexer(...)`."""
    if not 0 <= i < self.cfg.n_layers:
      raise ValueError(f'layer {i} must be within 0 and {self.cfg.n_layers - 1}.')
    leading = self.cfg.n_dense_layers
    blocks, i = (self.dense_blocks, i) if i < leading else (self.moe_blocks, i - leading)
    return jax.tree.map(lambda a: a[i], blocks)


def _stack(cfg: ModelConfig, depth: int, *, experts: bool, rngs: nnx.Rngs) -> Block | None:
  if depth == 0:
    return None
  make: Callable = lambda key: Block(cfg, experts=experts, rngs=nnx.Rngs(key))
  return jax.vmap(make)(jax.random.split(rngs.params(), depth))


def _run(blocks: Block, keys, x, start, end, mode: Mode):
  def layer(x, block_and_key):
    block, key = block_and_key
    return block(x, start, end, key, mode)

  return jax.lax.scan(jax.checkpoint(layer) if mode.remat else layer, x, (blocks, keys))


def _add(x, y):
  """Adds to the residual stream in float32, keeps it in its own dtype."""
  return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)
