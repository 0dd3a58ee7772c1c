# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention in its three modes, with the lightning indexer beside it."""

import dataclasses
import functools
from typing import Literal, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from dsa_jax import selection
from dsa_jax.config import ModelConfig
from dsa_jax.kernels import dense_attention, index_kl, sparse_attention
from dsa_jax.kernels.xla.rows import map_rows
from dsa_jax.nn.indexer import IndexInputs, LightningIndexer
from dsa_jax.nn.norms import RMSNorm
from dsa_jax.nn.remat import check_policy, selected
from dsa_jax.nn.rope import apply_rope, rope_frequencies
from dsa_jax.parallel import spmd
from dsa_jax.parallel.mesh import BATCH, MESH_AXES, TOKENS
from dsa_jax.params import BackboneParam, param
from dsa_jax.selection import measures

Attention = Literal['dense', 'sparse', 'masked']
QUERY_CHANNELS = 2**29  # Of absorbed queries at one time; more go in blocks of rows.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
  """How a forward pass attends, and what it reports beside its output."""

  attention: Attention  # 'masked': the numbers of 'sparse' at the cost of dense attention.
  backend: str
  # A key of dsa_jax.selection.RULES; or several, and whoever runs the model says which by number.
  rule: str | tuple[str, ...] = 'indexer'
  index_loss: bool = False  # Report the indexer's divergence from the attention.
  measure: tuple[str, ...] = ()  # Rules whose selections are compared with the true attention.
  remat: str = 'none'  # What each layer computes again in the backward pass: dsa_jax.nn.remat.POLICIES.
  zigzag: bool = False  # The tokens come in the order of `spmd.zigzag`, not of the text.

  @property
  def rules(self) -> tuple[str | tuple[str, ...], ...]:
    """All rules that must select, each once."""
    used = () if self.attention == 'dense' else (self.rule,)
    return tuple(dict.fromkeys(used + self.measure))

  @property
  def splits_heads(self) -> bool:
    """Whether the heads may lie on several devices: the indexer alone selects without them."""
    return set(self.rules) <= {'indexer'} and not self.measure

  def __post_init__(self):
    if self.attention not in ('dense', 'sparse', 'masked'):
      raise ValueError(f"attention={self.attention!r} must be 'dense', 'sparse' or 'masked'.")
    check_policy(self.remat)
    several = not isinstance(self.rule, str)
    if several and self.measure:
      raise ValueError(f'measure={self.measure} must be empty where rule={self.rule} is several.')
    for rule in (*(self.rule if several else (self.rule,)), *self.measure):
      if rule not in selection.RULES:
        raise ValueError(f'selection rule {rule!r} must be one of {tuple(selection.RULES)}.')


class Measures(NamedTuple):
  """One rule's selection in one layer, held against the layer's true attention."""

  indices: Int[Array, 'B T K']
  captured_mass: Float[Array, 'B T']
  topk_recall: Float[Array, 'B T']  # Share of the oracle's selection that the rule found.
  neighbour_overlap: Float[Array, 'B T']
  selected_distance: Float[Array, 'B T']


Selections = dict[str | tuple[str, ...], Int[Array, 'B T K']]  # By rule.


class Shared(NamedTuple):
  """What a layer of a model with IndexShare receives from the layers before it."""

  selections: Selections  # Of the last layer that has an indexer.
  is_full: Bool[Array, '']  # Whether this layer selects for itself.


class AttentionReport(NamedTuple):
  """What attention says of itself; None where the mode does not ask."""

  index_kl: Float[Array, 'B T'] | None  # Nats.
  measures: dict[str, Measures]


class Views(NamedTuple):
  """A layer's queries and keys: in MHA form (E = N + R), absorbed (P = C + R), and the indexer's.

  Queries are those of this device's tokens, keys those of all; heads those of this device.
  """

  q_latent: Float[Array, 'B T Q']
  q: Float[Array, 'B T H E']
  k: Float[Array, 'B S H E']
  v: Float[Array, 'B S H V']
  absorbed_q: Float[Array, 'B T H P']
  kv: Float[Array, 'B S P']  # The latent, then the rotary key: all that a cache would hold.
  index: IndexInputs | None  # None in a layer that shares another's selection.

  def candidates(
      self,
      start: Int[Array, 'B T'],
      end: Int[Array, 'B T'],
      key: Key[Array, ''],
      cfg: ModelConfig,
      backend: str,
      choice: Int[Array, ''] | None = None,
  ) -> selection.Candidates:
    """What a selection rule may look at, cut off from the gradients."""
    index = self.index or (None, None, None)
    arrays = jax.lax.stop_gradient((*index, self.q, self.k))
    if spmd.size(*MESH_AXES) > 1:  # Devices draw different lots.
      key = jax.random.fold_in(key, spmd.index(*MESH_AXES))
    sizes = {'sm_scale': cfg.sm_scale, 'topk': cfg.index_topk, 'backend': backend}
    return selection.Candidates(*arrays, start, end, key, choice, **sizes)


class MLA(nnx.Module):
  """Attention through a low-rank latent that all heads share.

  Dense and masked attention expand the latent into keys and values for each head (MHA form);
  sparse attention absorbs the expansion into the queries and gathers latents (MQA form). Both
  forms are the same function of the same weights.
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
    self.cfg = cfg

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
    """Attends from the normed `x`; query t sees the keys start <= s < end.

    Only the rule `random` draws from `key`. Without `shared`, the layer selects for itself. Where
    `mode.rule` names several, `choice` is the number of the one that selects.
    """

    def attend(self, x, start, end, key, shared, choice):
      return spmd.gather_weights(self, x.dtype)._attend(x, start, end, key, mode, shared, choice)

    weights = spmd.weight_specs(self, whole=() if mode.splits_heads else ('tensor',))
    shares = weights, BATCH, BATCH, BATCH, P(), shared and Shared(BATCH, P())
    shares = *shares, None if choice is None else P()
    return spmd.on_each_device(attend, shares, BATCH)(self, x, start, end, key, shared, choice)

  def _attend(self, x, start, end, key, mode: Mode, shared: Shared | None, choice):
    """What each device does for its own tokens; of heads split over devices, for others' too."""
    see = lambda: self.views(x, start, end, zigzag=mode.zigzag)
    seen = see()
    splits_heads = self.wq_b.shape[1] < self.cfg.n_heads
    all_tokens = lambda a: spmd.gather(a, 'tensor', dim=1) if splits_heads else a
    own_tokens = lambda a: spmd.scatter_sum(a, 'tensor', dim=1) if splits_heads else a
    all_heads = lambda a: spmd.exchange(a, 'tensor', split=1, join=2) if splits_heads else a

    def select(seen: Views) -> tuple[IndexInputs, Selections]:
      candidates = seen.candidates(start, end, key, self.cfg, mode.backend, choice)
      chosen = {rule: selected(selection.find_rule(rule)(candidates)) for rule in mode.rules}
      return seen.index, chosen

    def divergence(q, k, lse, index, start, end, indices=None) -> Float[Array, 'B T'] | None:
      loss = lambda index: index_kl(q, k, lse, *index, start, end, indices=indices, **how)
      nothing = jnp.zeros(start.shape)
      if not mode.index_loss:
        return None
      if index is None:
        return nothing
      return jax.lax.cond(shared.is_full, loss, lambda _: nothing, index) if shared else loss(index)

    def absorbed(q_latent, start, end):
      return self._absorbed_queries(*map(all_tokens, (q_latent, _positions(start, end))))

    def compare(rows, keys, q=None):
      (q_latent, start, end, indices, index_rows, lse), (kv, index_k) = rows, keys
      q = all_heads(absorbed(q_latent, start, end) if q is None else q)
      index = index_rows and IndexInputs(index_rows[0], index_k, index_rows[1])
      return divergence(q, kv[:, :, None], lse, index, start, end, indices)

    def read(rows, keys):
      q_latent, start, end, indices, _ = rows
      q, v_dim = absorbed(q_latent, start, end), self.cfg.kv_lora_rank
      out, lse = sparse_attention(q, keys[0], all_tokens(indices), v_dim=v_dim, **how)
      return own_tokens(self.from_latents(out)), compare((*rows, all_heads(lse)), keys, q)

    if shared is None:
      index, selections = select(seen)
    elif self.indexer is None:
      index, selections = None, shared.selections
    else:  # A full layer alone pays for its indexer: it projects again within the branch.
      own = lambda: select(see())
      zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(own)[0])
      index, selections = jax.lax.cond(shared.is_full, own, lambda: (zeros, shared.selections))

    how = {'sm_scale': self.cfg.sm_scale, 'backend': mode.backend}
    indices = None if mode.attention == 'dense' else selections[mode.rule]
    index_rows, index_k = ((index.q, index.weights), index.k) if index else (None, None)
    by_blocks = functools.partial(
        _by_blocks, most=QUERY_CHANNELS // (self.cfg.n_heads * seen.kv.shape[-1])
    )
    if mode.attention == 'sparse':
      rows = seen.q_latent, start, end, indices, index_rows
      out, kl = by_blocks(read, rows, (seen.kv, index_k))
    else:
      rows = tuple(map(all_tokens, (seen.q_latent, start, end)))
      q = jnp.concatenate(self._queries(rows[0], _positions(*rows[1:])), axis=-1)
      chosen = None if indices is None else all_tokens(indices)
      out, lse = dense_attention(q, seen.k, seen.v, *rows[1:], indices=chosen, **how)
      out = own_tokens(self._join_heads(out))
      if splits_heads:  # The queries of all heads are less to send than their keys.
        rows = seen.q_latent, start, end, indices, index_rows, all_heads(lse)
        kl = by_blocks(compare, rows, (seen.kv, index_k))
      else:
        kl = divergence(seen.q, seen.k, lse, index, start, end, indices)

    measured = self._measured(seen, selections, start, end, key, mode) if mode.measure else {}
    return out, selections, AttentionReport(kl, measured)

  def _measured(self, seen: Views, selections: Selections, start, end, key, mode: Mode):
    """What each rule of `mode.measure` selected, against all that the queries see."""
    how = {'sm_scale': self.cfg.sm_scale, 'backend': mode.backend}
    lse_visible = dense_attention(seen.q, seen.k, seen.v, start, end, **how)[1]
    if 'oracle' in selections:
      oracle = selections['oracle']
    else:
      candidates = seen.candidates(start, end, key, self.cfg, mode.backend)
      oracle = selection.RULES['oracle'](candidates)

    def compare(chosen) -> Measures:
      v_dim = self.cfg.kv_lora_rank
      lse = sparse_attention(seen.absorbed_q, seen.kv, chosen, v_dim=v_dim, **how)[1]
      return Measures(
          indices=chosen,
          captured_mass=measures.captured_mass(lse, lse_visible),
          topk_recall=measures.overlap(oracle, chosen),
          neighbour_overlap=_neighbour_overlap(chosen),
          selected_distance=measures.selected_distance(chosen, end),
      )

    rows = jax.lax.map(compare, jnp.stack([selections[rule] for rule in mode.measure]))
    return {rule: jax.tree.map(lambda x: x[i], rows) for i, rule in enumerate(mode.measure)}

  def views(
      self,
      x: Float[Array, 'B T D'],
      start: Int[Array, 'B T'],
      end: Int[Array, 'B T'],
      *,
      zigzag: bool = False,
  ) -> Views:
    """Projects the normed `x` into all that attention and indexer read; unused parts cost nothing."""
    positions = _positions(start, end)
    w_k, w_v = self._expansion(x.dtype)
    q_latent = self.q_norm(x @ self.wq_a[...].astype(x.dtype))
    q_nope, q_rope = self._queries(q_latent, positions)
    kv = _of_all_tokens(jnp.concatenate(self._latents(x, positions), axis=-1), zigzag)
    c_kv, k_rope = jnp.split(kv, [self.cfg.kv_lora_rank], axis=-1)
    k_nope = jnp.einsum('BSC,CHN->BSHN', c_kv, w_k)
    k_rope_of_heads = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    index = None if self.indexer is None else self.indexer(x, q_latent, positions)
    return Views(
        q_latent=q_latent,
        q=jnp.concatenate([q_nope, q_rope], axis=-1),
        k=jnp.concatenate([k_nope, k_rope_of_heads], axis=-1),
        v=jnp.einsum('BSC,CHV->BSHV', c_kv, w_v),
        absorbed_q=self._absorbed_queries(q_latent, positions),
        kv=kv,
        index=index and index._replace(k=_of_all_tokens(index.k, zigzag)),
    )

  def from_latents(self, out: Float[Array, 'B T H C']) -> Float[Array, 'B T D']:
    """Turns what each head read in absorbed form, a mean of latents, into the layer's output."""
    return self._join_heads(jnp.einsum('BTHC,CHV->BTHV', out, self._expansion(out.dtype)[1]))

  def _join_heads(self, out):
    return jnp.einsum('BTHV,HVD->BTD', out, self.wo[...].astype(out.dtype))

  def _expansion(self, dtype):
    """The weights that expand a latent into each head's key [C, H, N] and value [C, H, V]."""
    return jnp.split(self.wkv_b[...].astype(dtype), [self.cfg.qk_nope_head_dim], axis=-1)

  def _queries(self, q_latent, positions):
    q = jnp.einsum('BTQ,QHE->BTHE', q_latent, self.wq_b[...].astype(q_latent.dtype))
    nope, rope = jnp.split(q, [self.cfg.qk_nope_head_dim], axis=-1)
    return nope, apply_rope(rope, positions, rope_frequencies(self.cfg), interleaved=True)

  def _absorbed_queries(self, q_latent, positions):
    nope, rope = self._queries(q_latent, positions)
    absorbed = jnp.einsum('BTHN,CHN->BTHC', nope, self._expansion(q_latent.dtype)[0])
    return jnp.concatenate([absorbed, rope], axis=-1)

  def _latents(self, x, positions):
    """The normed latent and the rotated key of every token."""
    latent, rope = jnp.split(x @ self.wkv_a[...].astype(x.dtype), [self.cfg.kv_lora_rank], axis=-1)
    frequencies = rope_frequencies(self.cfg)
    rope = apply_rope(rope[:, :, None], positions, frequencies, interleaved=True)[:, :, 0]
    return self.kv_norm(latent), rope


def _of_all_tokens(keys, zigzag: bool):
  """The keys of a sequence from all devices that share it, in the order of the text."""
  keys = spmd.gather(keys, *TOKENS, dim=1)
  return spmd.unzigzag(keys, spmd.size(*TOKENS)) if zigzag else keys


def _positions(start, end):
  """Where each token is in its document."""
  return jnp.maximum(end - 1 - start, 0)


def _neighbour_overlap(chosen):
  """Of this device's tokens; the one before its first is another device's."""
  overlap = measures.neighbour_overlap(spmd.gather(chosen, *TOKENS, dim=1))
  here = spmd.index(*TOKENS) * chosen.shape[1]
  return jax.lax.dynamic_slice_in_dim(overlap, here, chosen.shape[1], axis=1)


def _by_blocks(f, rows, keys, most: int):
  """`f(rows, keys)`; more than `most` rows go in blocks, computed again in the backward pass.

  The gradients of the keys add up over the blocks in float32.
  """
  if rows[0].shape[1] <= most:
    return f(rows, keys)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), keys)
  narrow = lambda: jax.tree.map(lambda x, y: x.astype(y.dtype), wide, keys)
  return map_rows(jax.checkpoint(lambda rows: f(rows, narrow())), rows, _power_of_two(most))


def _power_of_two(most: int) -> int:
  return 1 << max(most, 1).bit_length() - 1
