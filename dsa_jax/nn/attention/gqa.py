# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention (GQA)."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

from dsa_jax.config import ModelConfig
from dsa_jax.nn.attention.layer import Attention
from dsa_jax.nn.norms import RMSNorm
from dsa_jax.nn.project import project
from dsa_jax.nn.rope import apply_rope, rope_frequencies
from dsa_jax.parallel import collectives
from dsa_jax.params import BackboneParam, param


class GQA(Attention):
  """Attention of H heads to G key heads, each of which H / G neighbouring heads share.

  A row holds the value and the rotated key of every key head. The indexer reads the hidden state,
  because there is no query latent.
  """

  def __init__(self, cfg: ModelConfig, *, out_scale: float, rngs: nnx.Rngs):
    d, h, g, e, v = cfg.dim, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.v_head_dim
    weight = functools.partial(param, BackboneParam, rngs=rngs)
    self.wq = weight((d, h, e), ('embed', 'heads', None), std=d**-0.5)
    self.wk = weight((d, g, e), ('embed', None, None), std=d**-0.5)
    self.wv = weight((d, g, v), ('embed', None, None), std=d**-0.5)
    self.wo = weight((h, v, d), ('heads', None, 'embed'), std=out_scale * (h * v) ** -0.5)
    bias = lambda heads, width, axis: BackboneParam(jnp.zeros((heads, width)), axes=(axis, None))
    self.bq = bias(h, e, 'heads') if cfg.qkv_bias else None
    self.bk = bias(g, e, None) if cfg.qkv_bias else None
    self.bv = bias(g, v, None) if cfg.qkv_bias else None
    self.q_norm = RMSNorm(e, eps=cfg.norm_eps) if cfg.qk_norm else None
    self.k_norm = RMSNorm(e, eps=cfg.norm_eps) if cfg.qk_norm else None
    super().__init__(cfg, rngs=rngs)

  def query_latent(self, x):
    return x

  def queries(self, q_latent, positions):
    q = _project(q_latent, self.wq, self.bq)
    return self._scale(self._rotate(q if self.q_norm is None else self.q_norm(q), positions))

  def row_queries(self, q_latent, positions):
    return self.queries(q_latent, positions)

  def rows(self, x, positions):
    k = _project(x, self.wk, self.bk)
    k = self._rotate(k if self.k_norm is None else self.k_norm(k), positions)
    return jnp.concatenate([_project(x, self.wv, self.bv), k], axis=-1)

  def own_key_heads(self, x):
    """Returns the key heads of this device's heads: a share of them, or the one they all read.

    What holds no others already, as rows of a cache do, is returned as it is.
    """
    n_heads, per_group = self.wo.shape[0], self.cfg.n_heads // self.cfg.n_kv_heads
    n_own = max(n_heads // per_group, 1)
    if x.shape[2] == n_own:
      return x
    first = collectives.axis_index('tensor') * n_heads // per_group
    return jax.lax.dynamic_slice_in_dim(x, first, n_own, axis=2)

  def expanded(self, rows):
    value, key = jnp.split(self.own_key_heads(rows), [self.cfg.v_head_dim], axis=-1)
    return key, value

  def from_rows(self, out, q_latent, lse):
    return self.join_heads(out, q_latent, lse)

  def _rotate(self, x, positions):
    """Rotates the first channels of heads."""
    width = self.cfg.qk_rope_head_dim
    rope, nope = jnp.split(x, [width], axis=-1)
    frequencies = rope_frequencies(self.cfg, width)
    rope = apply_rope(rope, positions, frequencies, interleaved=self.cfg.rope_interleave)
    return jnp.concatenate([rope, nope], axis=-1)

  def _scale(self, q):
    """Takes YaRN's factor of the softmax scale back from channels of queries that nothing rotates."""
    cfg = self.cfg
    if cfg.yarn_factor == 1 or (self.rotates is None and not cfg.qk_nope_head_dim):
      return q
    is_rotated = jnp.arange(cfg.head_dim) < cfg.qk_rope_head_dim
    is_rotated &= True if self.rotates is None else self.rotates[...]
    # In bfloat16 the factor would be a quarter of a percent off, for all logits alike.
    scale = jnp.where(is_rotated, 1, 1 / cfg.yarn_factor).astype(jnp.float32)
    return (q * scale).astype(q.dtype)


def _project(x, weight, bias):
  """Returns the channels of heads, with their biases where there are some."""
  y = project(x, weight[...])
  if bias is None:
    return y
  return (y.astype(jnp.float32) + bias[...]).astype(y.dtype)  # Its gradient sums over all tokens.
