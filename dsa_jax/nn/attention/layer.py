# SPDX-License-Identifier: Apache-2.0
"""What attention layers have in common, whatever their geometry of heads."""

import abc
import functools

from flax import nnx
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key, Shaped

from dsa_jax.config import ModelConfig
from dsa_jax.nn.attention.attend import attend
from dsa_jax.nn.attention.gate import beside_sinks, gated
from dsa_jax.nn.attention.types import (
    AttentionReport,
    Mode,
    Selections,
    Shared,
    Views,
)  # fmt: skip
from dsa_jax.nn.fixed import Configured
from dsa_jax.nn.indexer import LightningIndexer
from dsa_jax.nn.project import project
from dsa_jax.parallel import collectives, shard
from dsa_jax.parallel.mesh import BATCH, TOKENS
from dsa_jax.parallel.zigzag import unzigzag
from dsa_jax.params import BackboneParam, LayerFact


class Attention(Configured):
  """Turns the hidden state into queries and rows, and what heads have read into an output.

  A row is what a token leaves behind: sparse attention gathers rows, and a cache keeps them. For each
  of G key heads it begins with what the head reads as value, and it ends with the key. Dense attention
  expands rows into the keys and values of heads (MHA form). Both forms are the same function of the
  same weights.
  """

  # Whether the layer rotates queries and keys. None stands for yes; see `transformer.one_each`.
  rotates: LayerFact | None = None
  # The logarithms of factors of the frequencies, [R / 2], which all layers share. None: there are none.
  rope_factors: BackboneParam | None = None
  reads: int = -1  # At least 0: the layer is given the rows of an earlier one, and makes none.
  keeps: int = -1  # At least 0: it reports its rows, for later layers.
  window: int = 0  # Queries see the latest so many tokens, and select none. 0: there is no window.
  wo: nnx.Variable  # [H, V, D].
  sinks: nnx.Variable | None = None  # [H]. None: heads have no sinks.

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
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
      rows: Float[Array, 'B T G P'] | None = None,
  ) -> tuple[Float[Array, 'B T D'], Selections, AttentionReport]:
    """Attends from the normed `x`. Query t sees the keys start <= s < end.

    Only the rule `random` uses `key`. Without `shared`, the layer selects for itself. Where
    `mode.rule` names several rules, `choice` is the number of the one that selects. A layer that
    reads an earlier one's rows is given them.
    """

    def attend_here(self, x, start, end, key, shared, choice, rows):
      whole = shard.gather_weights(self, x.dtype)
      return attend(whole, x, start, end, key, mode, shared, choice, rows)

    weights = shard.weight_specs(self, whole=() if mode.splits_heads else ('tensor',))
    shares = weights, BATCH, BATCH, BATCH, P(), shared and Shared(BATCH, P())
    shares = *shares, None if choice is None else P(), None if rows is None else BATCH
    inputs = x, start, end, key, shared, choice, rows
    return shard.shard_mapped(attend_here, shares, BATCH)(self, *inputs)

  @abc.abstractmethod
  def query_latent(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T Q']:
    """Returns what queries are projected from, and the gates of the output."""

  def index_latent(self, q_latent: Float[Array, 'B T Q']) -> Float[Array, 'B T any']:
    """Returns the part of it that the indexer's queries are projected from."""
    return q_latent

  def gate_logits(self, q_latent: Float[Array, 'B T Q']) -> Float[Array, 'B T H any'] | None:
    """Returns the logits of the output's gates for the heads of this device; None without gates.

    A head has one for each channel of its values, or one for all.
    """
    return None

  @abc.abstractmethod
  def queries(
      self, q_latent: Float[Array, 'B T Q'], positions: Int[Array, 'B T']
  ) -> Float[Array, 'B T H E']:
    """Returns queries in MHA form."""

  @abc.abstractmethod
  def row_queries(
      self, q_latent: Float[Array, 'B T Q'], positions: Int[Array, 'B T']
  ) -> Float[Array, 'B T H any']:
    """Returns queries that meet the keys with which rows end; see `types.row_keys`."""

  @abc.abstractmethod
  def rows(
      self, x: Float[Array, 'B T D'], positions: Int[Array, 'B T']
  ) -> Float[Array, 'B T G P']:
    """Returns the row of every token, for all key heads."""

  @abc.abstractmethod
  def own_key_heads(self, x: Shaped[Array, 'B S G any']) -> Shaped[Array, 'B S G2 any']:
    """Returns the part of rows, or of selections, that is for the heads of this device."""

  @abc.abstractmethod
  def expanded(
      self, rows: Float[Array, 'B S G P']
  ) -> tuple[Float[Array, 'B S G2 E'], Float[Array, 'B S G2 V']]:
    """Returns keys and values in MHA form, for the heads of this device."""

  @abc.abstractmethod
  def from_rows(
      self,
      out: Float[Array, 'B T H C'],
      q_latent: Float[Array, 'B T Q'],
      lse: Float[Array, 'B T H'] | None,
  ) -> Float[Array, 'B T D']:
    """Turns what each head has read of rows into the output; see `join_heads`."""

  def join_heads(
      self,
      out: Float[Array, 'B T H V'],
      q_latent: Float[Array, 'B T Q'],
      lse: Float[Array, 'B T H'] | None,
  ) -> Float[Array, 'B T D']:
    """Projects what each head has read in MHA form into the output, through its gates.

    Only sinks need the log-sum-exp of what each head attended to.
    """
    if self.sinks is not None:
      out = beside_sinks(out, lse, self.sinks[...])
    if (logits := self.gate_logits(q_latent)) is not None:
      out = gated(out, logits)
    return project(out, self.wo[...], n_axes=2)

  @property
  def splits_heads(self) -> bool:
    """Whether this device holds some of the heads only."""
    return self.wo.shape[0] < self.cfg.n_heads

  def positions(
      self, start: Int[Array, 'B T'], end: Int[Array, 'B T']
  ) -> Int[Array, 'B T']:
    """Returns the position of each token in its document, which its rotation depends on."""
    positions = jnp.maximum(end - 1 - start, 0)
    return positions if self.rotates is None else jnp.where(self.rotates[...], positions, 0)

  def first_seen(
      self, start: Int[Array, 'B T'], end: Int[Array, 'B T']
  ) -> Int[Array, 'B T']:
    """Returns the first key that each query sees, within the window if there is one."""
    return jnp.maximum(start, end - self.window) if self.window else start

  def views(
      self,
      x: Float[Array, 'B T D'],
      start: Int[Array, 'B T'],
      end: Int[Array, 'B T'],
      rows: Float[Array, 'B T G P'] | None = None,
      *,
      zigzag: bool = False,
      gathers: bool = True,
  ) -> Views:
    """Projects the normed `x` into everything that attention and indexer read.

    The compiler drops whatever is not used.

    Args:
      x: The hidden states.
      start: The first key that each query sees.
      end: One past the last.
      rows: Those of an earlier layer, which take the place of the layer's own.
      zigzag: Whether the tokens of all devices are in zigzag order.
      gathers: Whether the devices along TOKENS hold different tokens, whose keys are all-gathered. With
        a cache they hold the same.
    """
    of_all = functools.partial(_of_all_tokens, zigzag=zigzag) if gathers else lambda keys: keys
    positions, q_latent = self.positions(start, end), self.query_latent(x)
    rows = of_all(self.rows(x, positions) if rows is None else rows)
    k, v = self.expanded(rows)
    index = None
    if self.indexer is not None:
      factors = () if self.rope_factors is None else (self.rope_factors[...],)
      index = self.indexer(x, self.index_latent(q_latent), positions, *factors)
      index = index._replace(k=of_all(index.k))
    return Views(
        q_latent=q_latent,
        q=self.queries(q_latent, positions),
        k=k,
        v=v,
        row_q=self.row_queries(q_latent, positions),
        rows=rows,
        index=index,
    )


def _of_all_tokens(keys, zigzag: bool):
  """All-gathers the keys of a sequence, in the order of the text."""
  keys = collectives.all_gather(keys, *TOKENS, dim=1)
  return unzigzag(keys, collectives.axis_size(*TOKENS)) if zigzag else keys
