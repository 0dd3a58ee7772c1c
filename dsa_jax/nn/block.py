# SPDX-License-Identifier: Apache-2.0
"""A layer of the decoder, and the extra layer that predicts the token after the next one."""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dsa_jax.config import ModelConfig
from dsa_jax.nn.attention.gqa import GQA
from dsa_jax.nn.attention.mla import MLA
from dsa_jax.nn.attention.types import Measures, Mode, Selections, Shared
from dsa_jax.nn.mlp import MLP
from dsa_jax.nn.moe import MoE
from dsa_jax.nn.norms import GatedRMSNorm, RMSNorm
from dsa_jax.nn.streams import Streams
from dsa_jax.params import BackboneParam, param


class LayerReport(NamedTuple):
  """A layer's measures beside its output. The scan over layers stacks them."""

  residual_rms: Float[Array, '*L']  # Root mean square of the residual stream after the layer.
  index_kl: Float[Array, '*L B T'] | None  # In nats; 0 in layers without an indexer of their own.
  # Tokens of each expert; of a section of layers, by the stack that holds them. None without experts.
  expert_load: Float[Array, '*L X'] | dict[str, Float[Array, 'L X']] | None
  measures: dict[str, Measures]  # One entry for each rule that is measured.
  rows: Float[Array, 'B T G P'] | None = None  # What later layers read of this one, if they do.


class Block(nnx.Module):
  """Attention, then an MLP or experts. Each reads the normed residual stream and adds to it."""

  def __init__(self, cfg: ModelConfig, *, experts: bool, reads: bool = False, rngs: nnx.Rngs):
    out_scale = (2 * cfg.n_layers) ** -0.5
    self.attn_norm = _norm(cfg, cfg.gated_norm_rank, rngs)
    if cfg.attention == 'mla':
      self.attn = MLA(cfg, out_scale=out_scale, reads=reads, rngs=rngs)
    else:
      self.attn = GQA(cfg, out_scale=out_scale, rngs=rngs)
    self.ffn_norm = _norm(cfg, cfg.gated_norm_rank if experts else 0, rngs)
    streams = lambda: Streams(cfg, writes=True, rngs=rngs) if cfg.n_streams else None
    self.attn_streams, self.ffn_streams = streams(), streams()
    if experts:
      self.ffn = MoE(cfg, out_scale=out_scale, rngs=rngs)
    else:
      self.ffn = MLP(cfg.dim, cfg.inter_dim, out_std=out_scale * cfg.inter_dim**-0.5, rngs=rngs)

  def __call__(
      self,
      x: Float[Array, 'B T *M D'],
      start: Int[Array, 'B T'],
      end: Int[Array, 'B T'],
      key: Key[Array, ''],
      mode: Mode,
      shared: Shared | None = None,
      choice: Int[Array, ''] | None = None,
      rows: Float[Array, 'B T G P'] | None = None,
  ) -> tuple[Float[Array, 'B T *M D'], Selections, LayerReport]:
    with jax.named_scope('attention'):
      h = self.attention_input(x)
      out, selections, attention = self.attn(h, start, end, key, mode, shared, choice, rows)
      x = self.add_attention(x, out)
    x, load = self.feed_forward(x, end > start, mode.backend)
    rms = jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
    report = LayerReport(rms, attention.index_kl, load, attention.measures, attention.rows)
    return x, selections, report

  def attention_input(self, x: Float[Array, 'B T *M D']) -> Float[Array, 'B T D']:
    """Returns what attention reads of the residual stream, or of all streams."""
    return self.attn_norm(x if self.attn_streams is None else self.attn_streams.read(x))

  def add_attention(
      self, x: Float[Array, 'B T *M D'], out: Float[Array, 'B T D']
  ) -> Float[Array, 'B T *M D']:
    """Returns the residual stream, or all streams, with what attention has computed."""
    return add(x, out) if self.attn_streams is None else self.attn_streams.add(x, out)

  def feed_forward(
      self, x: Float[Array, 'B T *M D'], counted: Bool[Array, 'B T'], backend: str
  ) -> tuple[Float[Array, 'B T *M D'], Float[Array, 'X'] | None]:
    """Applies the second half of the layer.

    Returns:
      The residual stream, and the number of counted tokens that each expert received.
    """
    with jax.named_scope('feed_forward'):
      load, streams = None, self.ffn_streams
      h = self.ffn_norm(x if streams is None else streams.read(x))
      if isinstance(self.ffn, MoE):
        h, load = self.ffn(h, counted.astype(jnp.float32), backend)
      else:
        h = self.ffn(h)
      return add(x, h) if streams is None else streams.add(x, h), load


class MTP(nnx.Module):
  """One more layer, which predicts the token after the next one from the next one's embedding.

  It reads the model's hidden state after the final norm, and uses the model's embedding and head.

  Source:
    DeepSeek-V3 report, section 2.2, which does not say on which side of the final norm it reads.
    The modeling_deepseek.py shipped with DeepSeek-R1-0528's MTP weights reads after it, and so do
    the engines that serve them (vllm-project/vllm#47448, ROCm/ATOM#1764).
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

  def __call__(self, hidden, next_embedding, start, end, key, mode: Mode, choice=None):
    x = self.joined(hidden, next_embedding)
    x, _, report = self.block(x, start, end, key, mode, choice=choice)
    return self.norm(x), jax.tree.map(lambda a: a[None], report)

  def joined(
      self, hidden: Float[Array, 'B T D'], next_embedding: Float[Array, 'B T D']
  ) -> Float[Array, 'B T D']:
    """Returns what the layer reads of each token."""
    x = jnp.concatenate([self.enorm(next_embedding), self.hnorm(hidden)], axis=-1)
    return x @ self.eh_proj[...].astype(x.dtype)


def _norm(cfg: ModelConfig, rank: int, rngs: nnx.Rngs) -> RMSNorm:
  """Returns the norm of a layer's input, with gates of this rank unless it is 0."""
  if rank:
    return GatedRMSNorm(cfg.dim, rank=rank, eps=cfg.norm_eps, rngs=rngs)
  return RMSNorm(cfg.dim, eps=cfg.norm_eps)


def add(x, y):
  """Adds to the residual stream in float32 and returns the sum in the stream's own dtype."""
  return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)
