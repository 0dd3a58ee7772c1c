# SPDX-License-Identifier: Apache-2.0
"""The lightning indexer."""

import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.config import ModelConfig
from dsa_jax.nn.fixed import Configured
from dsa_jax.nn.log_scale import LogScale
from dsa_jax.nn.norms import LayerNorm
from dsa_jax.nn.project import in_float32, project
from dsa_jax.nn.rope import apply_rope, index_rope_frequencies, scaled
from dsa_jax.params import IndexerParam, param


class IndexInputs(NamedTuple):
  """The inputs of the index ops; see `index_scores`."""

  q: Float[Array, 'B T I J']
  k: Float[Array, 'B S J']
  weights: Float[Array, 'B T I']


class LightningIndexer(Configured):
  """Scores which earlier tokens matter to each query. It learns by distillation only.

  Its inputs are detached, so that its loss never reaches the main model.
  """

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    d, q, i, j = cfg.dim, cfg.q_latent_dim, cfg.index_n_heads, cfg.index_head_dim
    weight = functools.partial(param, IndexerParam, rngs=rngs)
    axis = 'q_lora' if cfg.q_lora_rank else 'embed'
    self.wq_b = weight((q, i, j), (axis, 'index_heads', None), std=q**-0.5)
    self.wk = weight((d, j), ('embed', None), std=d**-0.5)
    eps = cfg.index_norm_eps or cfg.norm_eps
    self.k_norm = LayerNorm(j, kind=IndexerParam, eps=eps)
    self.weights_proj = weight((d, i), ('embed', 'index_heads'), std=d**-0.5)
    norms, scales = cfg.index_query_norm, cfg.query_log_scale
    self.q_norm = LayerNorm(q, kind=IndexerParam, eps=eps) if norms else None
    self.q_scale = LogScale(i, kind=IndexerParam, axis='index_heads') if scales else None
    self._cfg = cfg

  def __call__(
      self,
      x: Float[Array, 'B T D'],
      q_latent: Float[Array, 'B T Q'],
      positions: Int[Array, 'B T'],
      rope_factors: Float[Array, 'R2'] | None = None,
  ) -> IndexInputs:
    """Projects the attention's input and its *normalised* query latent, or the input again.

    Source:
      `Indexer.forward` in DeepSeek-V3.2-Exp inference/model.py at commit 87e509a2, less its
      FP8 quantisation and Hadamard rotation.
    """
    x, q_latent = jax.lax.stop_gradient((x, q_latent))
    factors = () if rope_factors is None else (jax.lax.stop_gradient(rope_factors),)
    rotate = lambda x: self._rotate(x, positions, *factors)
    q_latent = q_latent if self.q_norm is None else self.q_norm(q_latent)
    q = project(q_latent, self.wq_b[...])
    q = q if self.q_scale is None else self.q_scale(q, positions)
    k = self.k_norm(project(x, self.wk[...]))
    weights = in_float32('BTD,DH->BTH', x, self.weights_proj[...])
    scale = (self.cfg.index_n_heads * self.cfg.index_head_dim) ** -0.5  # The loss depends on it.
    return IndexInputs(rotate(q), rotate(k[:, :, None])[:, :, 0], scale * weights)

  def _rotate(self, x, positions, rope_factors=None):
    # The indexer rotates its first channels as a rule, MLA its last.
    width, is_last = self.cfg.index_rope_dim, self.cfg.index_rope_last
    if not width:
      return x
    parts = jnp.split(x, [x.shape[-1] - width if is_last else width], axis=-1)
    nope, rope = parts if is_last else reversed(parts)
    frequencies = index_rope_frequencies(self.cfg, width)
    if rope_factors is not None:
      frequencies = scaled(frequencies, rope_factors)
    rope = apply_rope(rope, positions, frequencies, interleaved=self.cfg.indexer_rope_interleave)
    return jnp.concatenate([nope, rope] if is_last else [rope, nope], axis=-1)
