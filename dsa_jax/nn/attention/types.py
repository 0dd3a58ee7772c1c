# SPDX-License-Identifier: Apache-2.0
"""What attention is asked for, what it reads, and what it reports."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dsa_jax import selection
from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.nn.indexer import IndexInputs
from dsa_jax.nn.remat import check_policy
from dsa_jax.parallel import collectives
from dsa_jax.parallel.mesh import SEQUENCES

Attention = Literal['dense', 'sparse', 'masked']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
  """The kind of attention of a forward pass, and what it reports beside its output."""

  attention: Attention  # 'masked' gives the numbers of 'sparse' at the cost of 'dense'.
  backend: str  # Of the kernels.
  # A key of dsa_jax.selection.RULES. With several keys, each call says by number which one selects.
  rule: str | tuple[str, ...] = 'indexer'
  index_loss: bool = False  # Whether to report the divergence of the indexer from the attention.
  measure: tuple[str, ...] = ()  # Rules whose selections are compared with the true attention.
  remat: str = 'none'  # What the backward pass computes again, a key of dsa_jax.nn.remat.POLICIES.
  zigzag: bool = False  # Whether the tokens are in zigzag order instead of the order of the text.

  @property
  def rules(self) -> tuple[str | tuple[str, ...], ...]:
    """The rules that must select, each of them once."""
    used = () if self.attention == 'dense' else (self.rule,)
    return tuple(dict.fromkeys(used + self.measure))

  @property
  def splits_heads(self) -> bool:
    """Whether the heads may lie on several devices. All rules but the indexer need all heads."""
    return set(self.rules) <= {'indexer'} and not self.measure

  def __post_init__(self):
    if self.attention not in ('dense', 'sparse', 'masked'):
      raise ConfigError(f"attention={self.attention!r} must be 'dense', 'sparse' or 'masked'.")
    check_policy(self.remat)
    several = not isinstance(self.rule, str)
    if several and self.measure:
      raise ConfigError(f'measure={self.measure} must be empty where rule={self.rule} is several.')
    for rule in (*(self.rule if several else (self.rule,)), *self.measure):
      selection.check_rule(rule)


class Measures(NamedTuple):
  """The selection of one rule in one layer, compared with the true attention of the layer."""

  indices: Int[Array, 'B T *G K']
  captured_mass: Float[Array, 'B T']
  topk_recall: Float[Array, 'B T']  # The share of the oracle's selection that the rule selects.
  neighbour_overlap: Float[Array, 'B T']
  selected_distance: Float[Array, 'B T']


# By rule. With a selection for each key head, there is an axis G.
Selections = dict[str | tuple[str, ...], Int[Array, 'B T *G K']]


class Shared(NamedTuple):
  """What a layer of a model with IndexShare receives from the layers before it."""

  selections: Selections  # Those of the last layer that has an indexer.
  is_full: Bool[Array, '']  # Whether this layer selects for itself.


class AttentionReport(NamedTuple):
  """What attention reports beside its output."""

  index_kl: Float[Array, 'B T'] | None  # In nats. None if the mode does not ask for it.
  measures: dict[str, Measures]
  # Those of this device's tokens, of a layer that keeps them for later ones; else None.
  rows: Float[Array, 'B T G P'] | None = None


class Views(NamedTuple):
  """The queries and keys of a layer, in the forms that the modes of attention read.

  In MHA form they have E = N + R channels, and as rows P of them; see `Attention`. Queries are those
  of this device's tokens and keys those of all tokens. All but the rows are for this device's heads.
  """

  q_latent: Float[Array, 'B T Q']  # Queries are projected from it, and gates of the output.
  q: Float[Array, 'B T H E']
  k: Float[Array, 'B S G2 E']  # In MLA each head has a key of its own.
  v: Float[Array, 'B S G2 V']
  row_q: Float[Array, 'B T H any']  # As wide as the keys with which rows end.
  rows: Float[Array, 'B S G P']  # A cache holds nothing else of a token.
  index: IndexInputs | None  # None in a layer without an indexer.

  def candidates(
      self,
      start: Int[Array, 'B T'],
      end: Int[Array, 'B T'],
      key: Key[Array, ''],
      cfg: ModelConfig,
      backend: str,
      choice: Int[Array, ''] | None = None,
  ) -> selection.Candidates:
    """Returns what a selection rule may look at, without gradients."""
    index = self.index or (None, None, None)
    arrays = jax.lax.stop_gradient((*index, self.q, self.k))
    n = len(start)
    return selection.Candidates(
        *arrays, start, end, key, choice, cfg.sm_scale, cfg.index_topk, backend, cfg.index_n_selections,
        row=collectives.axis_index(*SEQUENCES) * n + jnp.arange(n, dtype=jnp.int32),
    )  # fmt: skip


def row_keys(
    rows: Float[Array, 'B S G P'], row_q: Float[Array, 'B T H E']
) -> Float[Array, 'B S G E']:
  """Returns the keys with which rows end, as wide as the queries; in MLA the whole rows."""
  return rows[..., rows.shape[-1] - row_q.shape[-1] :]
