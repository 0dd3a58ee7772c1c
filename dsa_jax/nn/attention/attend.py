# SPDX-License-Identifier: Apache-2.0
"""From views to outputs: dense, masked and sparse attention.

This file knows modes, ops, the indexer's loss and measures. It does not know the geometry of heads:
the layer, such as `mla.MLA` or `gqa.GQA`, makes the views, queries and outputs that are asked for here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dsa_jax import selection
from dsa_jax.kernels import dense_attention, sparse_attention
from dsa_jax.kernels.xla.rows import map_rows
from dsa_jax.nn.attention.divergence import Divergence
from dsa_jax.nn.attention.head_layout import HeadLayout
from dsa_jax.nn.attention.measured import measure_selections, measure_window
from dsa_jax.nn.attention.types import (
    AttentionReport,
    Mode,
    Selections,
    Shared,
    Views,
    row_keys,
)  # fmt: skip
from dsa_jax.nn.indexer import IndexInputs
from dsa_jax.nn.remat import selected

QUERY_CHANNELS = 2**29  # Channels of queries that meet rows at one time; more go in blocks.


def attend(
    layer,
    x: Float[Array, 'B T D'],
    start: Int[Array, 'B T'],
    end: Int[Array, 'B T'],
    key: Key[Array, ''],
    mode: Mode,
    shared: Shared | None,
    choice: Int[Array, ''] | None,
    rows: Float[Array, 'B T G P'] | None = None,
) -> tuple[Float[Array, 'B T D'], Selections, AttentionReport]:
  """Runs a layer's attention on each device: for its own tokens and, of split heads, for others' too.

  Args:
    layer: An attention module with whole weights but for heads that are split.
    x: The normed hidden states.
    start: The first key that each query sees.
    end: One past the last.
    key: For rules that draw lots.
    mode: How to attend.
    shared: The selection of an earlier layer, in models with IndexShare. A layer with a window does
      not use it, and hands it on.
    choice: Which rule selects, where `mode.rule` names several.
    rows: Those of this device's tokens by an earlier layer, if the layer reads them.
  """
  project = lambda: layer.views(x, start, end, rows, zigzag=mode.zigzag)
  views = project()
  inputs = start, end, key, mode, choice
  if layer.window:
    index, selections = None, shared.selections if shared else {}
  elif shared is None:
    index, selections = select(layer, views, *inputs)
  elif layer.indexer is None:
    index, selections = None, shared.selections
  else:  # A full layer alone pays for its indexer: it projects again within the branch.
    own = lambda: select(layer, project(), *inputs)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(own)[0])
    index, selections = jax.lax.cond(shared.is_full, own, lambda: (zeros, shared.selections))
  cfg = layer.cfg
  divergence = Divergence(mode, cfg.sm_scale, cfg.index_n_selections, shared and shared.is_full)
  is_dense = mode.attention == 'dense' or layer.window
  indices = None if is_dense else selections[mode.rule]
  run = attend_sparse if mode.attention == 'sparse' and not is_dense else attend_dense
  out, kl = run(layer, views, index, start, end, indices, divergence)
  measured = {}
  if mode.measure and layer.window:
    measured = measure_window(layer, start, end, mode)
  elif mode.measure:
    measured = measure_selections(layer, views, selections, start, end, key, mode)
  kept = layer.rows(x, layer.positions(start, end)) if layer.keeps >= 0 else None
  return out, selections, AttentionReport(kl, measured, kept)


def select(
    layer, views: Views, start, end, key, mode: Mode, choice
) -> tuple[IndexInputs | None, Selections]:
  """Returns what the indexer reads, and what every rule of the mode selects."""
  candidates = views.candidates(start, end, key, layer.cfg, mode.backend, choice)
  chosen = {rule: selected(selection.find_rule(rule)(candidates)) for rule in mode.rules}
  return views.index, chosen


def attend_sparse(
    layer, views: Views, index: IndexInputs | None, start, end, indices, divergence: Divergence
) -> tuple[Float[Array, 'B T D'], Float[Array, 'B T'] | None]:
  """Attends to selected rows; returns the output and the indexer's divergence."""
  heads = HeadLayout(layer.splits_heads)

  def attend_block(rows, keys):
    (q_latent, start, end, indices, index_rows), (key_rows, index_k) = rows, keys
    q_latent, positions = _of_all_tokens(layer, heads, q_latent, start, end)
    q = layer.row_queries(q_latent, positions)
    out, lse = sparse_attention(
        q, layer.own_key_heads(key_rows), None, _own_selections(layer, heads, indices),
        v_dim=layer.cfg.row_value_dim, sm_scale=divergence.sm_scale, backend=divergence.mode.backend,
    )  # fmt: skip
    constants = heads.all_heads(q), row_keys(key_rows, q), heads.all_heads(lse)
    kl = divergence(*constants, _join(index_rows, index_k), start, end, indices)
    return heads.own_tokens(layer.from_rows(out, q_latent, lse)), kl

  index_rows, index_k = _split(index)
  rows = views.q_latent, start, end, indices, index_rows
  return _by_blocks(layer, attend_block, rows, (views.rows, index_k))


def attend_dense(
    layer, views: Views, index: IndexInputs | None, start, end, indices, divergence: Divergence
) -> tuple[Float[Array, 'B T D'], Float[Array, 'B T'] | None]:
  """Attends to all visible keys in the window, or to `indices` of them; else as `attend_sparse`."""
  heads = HeadLayout(layer.splits_heads)
  q_latent, start_of_all, end_of_all = map(heads.all_tokens, (views.q_latent, start, end))
  out, lse = dense_attention(
      layer.queries(q_latent, layer.positions(start_of_all, end_of_all)), views.k, views.v,
      layer.first_seen(start_of_all, end_of_all), end_of_all,
      indices=None if indices is None else _own_selections(layer, heads, indices),
      sm_scale=divergence.sm_scale, backend=divergence.mode.backend,
  )  # fmt: skip
  out = heads.own_tokens(layer.join_heads(out, q_latent, lse))
  compares_rows = heads.is_split or (indices is not None and layer.cfg.attention == 'mla')
  if not compares_rows:
    return out, divergence(views.q, views.k, lse, index, start, end, indices)

  # The queries of all heads are less to send than their keys; and of a token that a query selects, its
  # row is less to read than the keys of all heads.
  def compare_block(rows, keys):
    (q_latent, start, end, indices, index_rows, lse), (key_rows, index_k) = rows, keys
    q = heads.all_heads(layer.row_queries(*_of_all_tokens(layer, heads, q_latent, start, end)))
    return divergence(q, row_keys(key_rows, q), lse, _join(index_rows, index_k), start, end, indices)

  index_rows, index_k = _split(index)
  rows = views.q_latent, start, end, indices, index_rows, heads.all_heads(lse)
  return out, _by_blocks(layer, compare_block, rows, (views.rows, index_k))


def _own_selections(layer, heads: HeadLayout, indices):
  """Returns the selections of this device's heads for the tokens of all that share them."""
  indices = heads.all_tokens(indices)
  return indices if indices.ndim == 3 else layer.own_key_heads(indices)


def _of_all_tokens(layer, heads: HeadLayout, q_latent, start, end):
  """Returns the query latents and positions of the tokens of all devices that share their heads."""
  return map(heads.all_tokens, (q_latent, layer.positions(start, end)))


def _split(index: IndexInputs | None):
  """Takes apart what there is of each query, which goes in blocks, and the keys, which do not."""
  return ((index.q, index.weights), index.k) if index else (None, None)


def _join(index_rows, index_k) -> IndexInputs | None:
  return index_rows and IndexInputs(index_rows[0], index_k, index_rows[1])


def _by_blocks(layer, f: Callable, rows: Any, keys: Any):
  """Returns `f(rows, keys)`, in blocks of tokens where their queries would be too wide for one.

  Blocks are computed again in the backward pass. The gradients of the keys add up over the blocks in
  float32.
  """
  most = QUERY_CHANNELS // (layer.cfg.n_heads * keys[0].shape[-1])
  if rows[0].shape[1] <= most:
    return f(rows, keys)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), keys)
  narrow = lambda: jax.tree.map(lambda x, y: x.astype(y.dtype), wide, keys)
  return map_rows(jax.checkpoint(lambda rows: f(rows, narrow())), rows, _power_of_two(most))


def _power_of_two(most: int) -> int:
  return 1 << max(most, 1).bit_length() - 1
