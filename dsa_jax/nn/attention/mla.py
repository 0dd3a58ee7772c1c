# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention (MLA)."""

import functools

from flax import nnx
import jax.numpy as jnp

from dsa_jax.config import ModelConfig
from dsa_jax.nn.attention.layer import Attention
from dsa_jax.nn.log_scale import LogScale
from dsa_jax.nn.norms import RMSNorm
from dsa_jax.nn.project import project
from dsa_jax.nn.rope import apply_rope, rope_frequencies, scaled
from dsa_jax.params import BackboneParam, param


class MLA(Attention):
  """Attention through a low-rank latent that all heads share.

  A row is the latent and a rotary key, for one key head. Dense and masked attention expand the latent
  into keys and values for each head. Sparse attention absorbs the expansion into the queries, and
  gathers latents.
  """

  def __init__(
      self, cfg: ModelConfig, *, out_scale: float, reads: bool = False, rngs: nnx.Rngs
  ):
    """Makes fresh weights; a layer that `reads` an earlier one's rows has none that make rows."""
    d, h, q, c = cfg.dim, cfg.n_heads, cfg.q_latent_dim, cfg.kv_lora_rank
    n, r, v = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    weight = functools.partial(param, BackboneParam, rngs=rngs)
    has_latent, eps = cfg.q_lora_rank > 0, cfg.latent_eps or cfg.norm_eps
    inward, outward = cfg.query_input_dim, cfg.query_output_dim
    self.wq_a = weight((d, q), ('embed', 'q_lora'), std=d**-0.5) if has_latent else None
    self.q_norm = RMSNorm(q, eps=eps) if has_latent else None
    axis = 'q_lora' if has_latent else 'embed'
    self.wq_b = weight((inward, h, outward), (axis, 'heads', None), std=inward**-0.5)
    self.wkv_a = None if reads else weight((d, c + r), ('embed', None), std=d**-0.5)
    self.kv_norm = None if reads else RMSNorm(c, eps=eps)
    self.wkv_b = weight((c, h, n + v), (None, 'heads', None), std=c**-0.5)
    self.wo = weight((h, v, d), ('heads', None, 'embed'), std=out_scale * (h * v) ** -0.5)
    gates = {'hidden': ((d, h, v), ('embed', 'heads', None)), 'heads': ((d, h), ('embed', 'heads'))}
    has_gate = cfg.output_gate in gates
    self.wg = weight(*gates[cfg.output_gate], std=d**-0.5) if has_gate else None
    has_scale = cfg.query_log_scale
    self.q_scale = LogScale(h, kind=BackboneParam, axis='heads') if has_scale else None
    self.k_rope_norm = RMSNorm(r, eps=eps) if cfg.rope_key_norm and not reads else None
    self.sinks = BackboneParam(jnp.zeros(h), axes=('heads',)) if cfg.attention_sinks else None
    super().__init__(cfg, rngs=rngs)

  def query_latent(self, x):
    if self.wq_a is None:
      return x
    raw = project(x, self.wq_a[...])
    latent = self._rescaled(self.q_norm(raw))
    if not self.cfg.output_gate:
      return latent
    return jnp.concatenate([latent, raw if self.wg is None else x], axis=-1)

  def index_latent(self, q_latent):
    return q_latent[..., : self.cfg.q_latent_dim] if self.cfg.output_gate else q_latent

  def queries(self, q_latent, positions):
    return jnp.concatenate(self._queries(q_latent, positions), axis=-1)

  def row_queries(self, q_latent, positions):
    """Returns absorbed queries, which meet latents."""
    nope, rope = self._queries(q_latent, positions)
    absorbed = jnp.einsum('BTHN,CHN->BTHC', nope, self._expansion(q_latent.dtype)[0])
    return jnp.concatenate([absorbed, rope], axis=-1)

  def _queries(self, q_latent, positions):
    if self.wg is not None:  # The hidden state follows, for the gates.
      q_latent = q_latent[..., : self.cfg.query_input_dim]
    q = project(q_latent, self._query_weights(q_latent.dtype)[0])
    nope, rope = jnp.split(q, [self.cfg.qk_nope_head_dim], axis=-1)
    rope = self._rotate(rope, positions)
    if self.q_scale is None:
      return nope, rope
    return self.q_scale(nope, positions), self.q_scale(rope, positions)

  def gate_logits(self, q_latent):
    if self.wg is not None:
      hidden = q_latent[..., -self.cfg.dim :]
      logits = project(hidden, self.wg[...])
      return logits[..., None] if self.cfg.output_gate == 'heads' else logits
    weights = self._query_weights(q_latent.dtype)[1]
    return None if weights is None else project(q_latent, weights)

  def _query_weights(self, dtype):
    """Returns the weights that make queries [Q, H, E], and those of gates [Q, H, V] or None.

    Where gates read the latents, one matrix holds both side by side, of which codes are widened as a
    whole: a block of them need not end where the queries do.
    """
    if self.cfg.output_gate != 'latents':
      return self.wq_b[...], None
    return jnp.split(self.wq_b[...].astype(dtype), [self.cfg.head_dim], axis=-1)

  def rows(self, x, positions):
    """Returns the normed latent and the rotated key of every token."""
    latent, rope = jnp.split(project(x, self.wkv_a[...]), [self.cfg.kv_lora_rank], axis=-1)
    if self.k_rope_norm is not None:
      rope = self.k_rope_norm(rope)
    rope = self._rotate(rope[:, :, None], positions)
    return jnp.concatenate([self._rescaled(self.kv_norm(latent))[:, :, None], rope], axis=-1)

  def own_key_heads(self, x):
    return x

  def expanded(self, rows):
    w_k, w_v = self._expansion(rows.dtype)
    latent, k_rope = jnp.split(rows, [self.cfg.kv_lora_rank], axis=-1)
    latent = latent[:, :, 0]
    k_nope = jnp.einsum('BSC,CHN->BSHN', latent, w_k)
    k_rope_of_heads = jnp.broadcast_to(k_rope, (*k_nope.shape[:3], k_rope.shape[-1]))
    keys = jnp.concatenate([k_nope, k_rope_of_heads], axis=-1)
    return keys, jnp.einsum('BSC,CHV->BSHV', latent, w_v)

  def from_rows(self, out, q_latent, lse):
    """Turns a mean of latents for each head into the output."""
    values = jnp.einsum('BTHC,CHV->BTHV', out, self._expansion(out.dtype)[1])
    return self.join_heads(values, q_latent, lse)

  def _expansion(self, dtype):
    """Returns the weights that expand a latent into keys [C, H, N] and values [C, H, V].

    Codes are widened as a whole, those of one layer at a time. The products with both halves are
    those of each head for itself, and kernels widen tiles within a product of one matrix only. The
    widened matrix takes 32 MiB in bfloat16 for a layer of V3.2, or a device's share of that, beside 187
    MB of codes for all of its attention (arithmetic).
    """
    if self.wkv_b is None:
      w_k, w_v = self.w_k[...].astype(dtype), self.w_v[...].astype(dtype)
      return jnp.transpose(w_k, (2, 0, 1)), jnp.swapaxes(w_v, 0, 1)
    return jnp.split(self.wkv_b[...].astype(dtype), [self.cfg.qk_nope_head_dim], axis=-1)

  def split_expansion(self):
    """Keeps the halves of `wkv_b` in its place, as [H, N, C] and [H, C, V].

    Absorbed products read them so. XLA:CPU would otherwise turn them around for every product.
    """
    w_k, w_v = self._expansion(self.wkv_b.dtype)
    self.w_k = BackboneParam(jnp.transpose(w_k, (1, 2, 0)), axes=('heads', None, None))
    self.w_v = BackboneParam(jnp.swapaxes(w_v, 0, 1), axes=('heads', None, None))
    self.wkv_b = None

  def _rescaled(self, latent):
    """Returns a normed latent as long as the hidden state is, if the model wants that."""
    if not self.cfg.latent_rescale:
      return latent
    factor = (self.cfg.dim / latent.shape[-1]) ** 0.5  # In bfloat16 it would be 0.2 % off.
    return (latent.astype(jnp.float32) * factor).astype(latent.dtype)

  def _rotate(self, x, positions):
    if not self.cfg.qk_rope_head_dim:
      return x
    frequencies = rope_frequencies(self.cfg, self.cfg.qk_rope_head_dim)
    if self.rope_factors is not None:
      frequencies = scaled(frequencies, self.rope_factors[...])
    return apply_rope(x, positions, frequencies, interleaved=self.cfg.rope_interleave)
