# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention (MLA): its weights, and the views that attention reads."""

import functools

from flax import nnx
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from dsa_jax.config import ModelConfig
from dsa_jax.nn.attention.attend import attend
from dsa_jax.nn.attention.types import (
    AttentionReport,
    Mode,
    Selections,
    Shared,
    Views,
    positions_of,
)  # fmt: skip
from dsa_jax.nn.fixed import Configured
from dsa_jax.nn.indexer import LightningIndexer
from dsa_jax.nn.norms import RMSNorm
from dsa_jax.nn.rope import apply_rope, rope_frequencies
from dsa_jax.parallel import collectives, shard
from dsa_jax.parallel.mesh import BATCH, TOKENS
from dsa_jax.parallel.zigzag import unzigzag
from dsa_jax.params import BackboneParam, param


class MLA(Configured):
  """Attention through a low-rank latent that all heads share.

  Dense and masked attention expand the latent into keys and values for each head (MHA form). Sparse
  attention absorbs the expansion into the queries and gathers latents (MQA form). Both forms are the
  same function of the same weights.
  """

  def __init__(self, cfg: ModelConfig, *, out_scale: float, rngs: nnx.Rngs):
    d, h, q, c = cfg.dim, cfg.n_heads, cfg.q_lora_rank, cfg.kv_lora_rank
    n, r, v = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    weight = functools.partial(param, BackboneParam, rngs=rngs)
    self.wq_a = weight((d, q), ('embed', 'q_lora'), std=d**-0.5)
    self.q_norm = RMSNorm(q, eps=cfg.norm_eps)
    self.wq_b = weight((q, h, n + r), ('q_lora', 'heads', None), std=q**-0.5)
    self.wkv_a = weight((d, c + r), ('embed', None), std=d**-0.5)
    self.kv_norm = RMSNorm(c, eps=cfg.norm_eps)
    self.wkv_b = weight((c, h, n + v), (None, 'heads', None), std=c**-0.5)
    self.wo = weight((h, v, d), ('heads', None, 'embed'), std=out_scale * (h * v) ** -0.5)
    self.indexer = LightningIndexer(cfg, rngs=rngs)
    self._cfg = cfg

  def __call__(
      self,
      x: Float[Array, 'B T D'],
      start: Int[Array, 'B T'],
      end: Int[Array, 'B T'],
      key: Key[Array, ''],
      mode: Mode,
      shared: Shared | None = None,
      choice: Int[Array, ''] | None = None,
  ) -> tuple[Float[Array, 'B T D'], Selections, AttentionReport]:
    """Attends from the normed `x`. Query t sees the keys start <= s < end.

    Only the rule `random` uses `key`. Without `shared`, the layer selects for itself. Where
    `mode.rule` names several rules, `choice` is the number of the one that selects.
    """

    def attend_here(self, x, start, end, key, shared, choice):
      whole = shard.gather_weights(self, x.dtype)
      return attend(whole, x, start, end, key, mode, shared, choice)

    weights = shard.weight_specs(self, whole=() if mode.splits_heads else ('tensor',))
    shares = weights, BATCH, BATCH, BATCH, P(), shared and Shared(BATCH, P())
    shares = *shares, None if choice is None else P()
    return shard.shard_mapped(attend_here, shares, BATCH)(self, x, start, end, key, shared, choice)

  @property
  def splits_heads(self) -> bool:
    """Whether this device holds some of the heads only."""
    return self.wq_b.shape[1] < self.cfg.n_heads

  @property
  def latent_dim(self) -> int:
    """The width of what sparse attention reads from a selected token."""
    return self.cfg.kv_lora_rank

  def views(
      self,
      x: Float[Array, 'B T D'],
      start: Int[Array, 'B T'],
      end: Int[Array, 'B T'],
      *,
      zigzag: bool = False,
  ) -> Views:
    """Projects the normed `x` into everything that attention and indexer read.

    The compiler drops whatever is not used.
    """
    positions = positions_of(start, end)
    q_latent = self.q_norm(x @ self.wq_a[...].astype(x.dtype))
    kv = _of_all_tokens(jnp.concatenate(self._latents(x, positions), axis=-1), zigzag)
    k, v = self.expanded(kv)
    index = None if self.indexer is None else self.indexer(x, q_latent, positions)
    return Views(
        q_latent=q_latent,
        q=self.queries(q_latent, positions),
        k=k,
        v=v,
        absorbed_q=self.absorbed_queries(q_latent, positions),
        kv=kv,
        index=index and index._replace(k=_of_all_tokens(index.k, zigzag)),
    )

  def expanded(
      self, kv: Float[Array, 'B S P']
  ) -> tuple[Float[Array, 'B S H E'], Float[Array, 'B S H V']]:
    """Returns the keys and values of each head, in MHA form."""
    w_k, w_v = self._expansion(kv.dtype)
    c_kv, k_rope = jnp.split(kv, [self.cfg.kv_lora_rank], axis=-1)
    k_nope = jnp.einsum('BSC,CHN->BSHN', c_kv, w_k)
    k_rope_of_heads = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    keys = jnp.concatenate([k_nope, k_rope_of_heads], axis=-1)
    return keys, jnp.einsum('BSC,CHV->BSHV', c_kv, w_v)

  def from_latents(self, out: Float[Array, 'B T H C']) -> Float[Array, 'B T D']:
    """Turns what each head has read in absorbed form, a mean of latents, into the output."""
    return self.join_heads(jnp.einsum('BTHC,CHV->BTHV', out, self._expansion(out.dtype)[1]))

  def join_heads(self, out: Float[Array, 'B T H V']) -> Float[Array, 'B T D']:
    """Projects what each head has read in MHA form into the output."""
    return jnp.einsum('BTHV,HVD->BTD', out, self.wo[...].astype(out.dtype))

  def _expansion(self, dtype):
    """Returns the weights that expand a latent into keys [C, H, N] and values [C, H, V]."""
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

  def queries(
      self, q_latent: Float[Array, 'B T Q'], positions: Int[Array, 'B T']
  ) -> Float[Array, 'B T H E']:
    """Returns queries in MHA form."""
    return jnp.concatenate(self._queries(q_latent, positions), axis=-1)

  def _queries(self, q_latent, positions):
    q = jnp.einsum('BTQ,QHE->BTHE', q_latent, self.wq_b[...].astype(q_latent.dtype))
    nope, rope = jnp.split(q, [self.cfg.qk_nope_head_dim], axis=-1)
    return nope, apply_rope(rope, positions, rope_frequencies(self.cfg), interleaved=True)

  def absorbed_queries(
      self, q_latent: Float[Array, 'B T Q'], positions: Int[Array, 'B T']
  ) -> Float[Array, 'B T H P']:
    """Returns queries in MQA form, which meet latents."""
    nope, rope = self._queries(q_latent, positions)
    absorbed = jnp.einsum('BTHN,CHN->BTHC', nope, self._expansion(q_latent.dtype)[0])
    return jnp.concatenate([absorbed, rope], axis=-1)

  def _latents(self, x, positions):
    """Returns the normed latent and the rotated key of every token."""
    latent, rope = jnp.split(x @ self.wkv_a[...].astype(x.dtype), [self.cfg.kv_lora_rank], axis=-1)
    frequencies = rope_frequencies(self.cfg)
    rope = apply_rope(rope[:, :, None], positions, frequencies, interleaved=True)[:, :, 0]
    return self.kv_norm(latent), rope


def _of_all_tokens(keys, zigzag: bool):
  """All-gathers the keys of a sequence, in the order of the text."""
  keys = collectives.all_gather(keys, *TOKENS, dim=1)
  return unzigzag(keys, collectives.axis_size(*TOKENS)) if zigzag else keys
