# SPDX-License-Identifier: Apache-2.0
"""Counts the FLOPs and bytes of a layer with experts, forward and backward, part by part.

Every product and every op reads its arguments from memory once and writes its results once, forward
and again backward. What a kernel computes again in the backward pass counts; a layer that is
computed again for want of memory does not. Numbers are bfloat16, but for the float32 weights of index
heads, log-sum-exps and divergences, and int32 selections.
"""

from collections.abc import Collection
from typing import NamedTuple

from dsa_jax.config import ModelConfig
from dsa_jax.cost.work import index_flops, mha_flops, row_flops

HALF, WHOLE = 2, 4  # Bytes of a bfloat16 number, and of a float32 or int32 one.


class LayerPart(NamedTuple):
  """What one part of a layer does for a sequence."""

  part: str
  flops: int
  bytes: int


def layer_parts(cfg: ModelConfig, trains: Collection[str], n_tokens: int) -> list[LayerPart]:
  """Returns the parts of a layer in a stage that trains these parts, for one causal sequence.

  In a warm-up the indexer alone learns, so all else runs forward only, and attention is dense. If
  both parts learn, attention is sparse.
  """
  learns, d = 'backbone' in trains, cfg.dim
  product = lambda *sizes, **options: _product(n_tokens, *sizes, learns=learns, **options)
  expert, chosen = cfg.moe_inter_dim, cfg.n_activated_experts
  routed = dict(rows=chosen, matrices=cfg.n_routed_experts)
  shared = cfg.shared_experts_dim
  sums = {
      'projections': [product(*sizes, matrices=n, rows=n) for sizes, n in _projections(cfg, learns)],
      'router': [product(d, cfg.n_routed_experts)],
      'shared expert': [product(d, shared), product(d, shared), product(shared, d)],
      'routed experts': [*[product(d, expert, **routed)] * 2, product(expert, d, **routed)],
      'index projections': [
          _product(n_tokens, inward, outward, learns=True, input_learns=False)
          for inward, outward in (
              (cfg.q_latent_dim, cfg.index_n_heads * cfg.index_head_dim),
              (d, cfg.index_head_dim),
              (d, cfg.index_n_heads),
          )
      ],
  }
  if cfg.gated_norm_rank:  # Of attention and of the experts.
    sums['gated norms'] = [product(d, cfg.gated_norm_rank), product(cfg.gated_norm_rank, d)] * 2
  if n := cfg.n_streams:  # Both halves of the layer read streams and write them.
    sums['streams'] = [product(n * d, 2 * n)] * 2
  ops = _sparse_ops(cfg, n_tokens) if learns else _dense_ops(cfg, n_tokens)
  totals = {part: [sum(x) for x in zip(*products)] for part, products in sums.items()} | ops
  return [LayerPart(part, *total) for part, total in totals.items()]


def _projections(cfg: ModelConfig, absorbed: bool) -> list[tuple[tuple[int, int], int]]:
  """Returns the width before and after each projection, and how many there are side by side."""
  heads, nope, latent, value = cfg.n_heads, cfg.qk_nope_head_dim, cfg.kv_lora_rank, cfg.v_head_dim
  projections = [
      ((cfg.query_input_dim, heads * cfg.query_output_dim), 1),
      ((cfg.dim, cfg.row_heads * cfg.row_dim), 1),
      ((heads * value, cfg.dim), 1),
  ]
  if cfg.output_gate in ('hidden', 'heads'):
    projections.append(((cfg.dim, heads * (value if cfg.output_gate == 'hidden' else 1)), 1))
  if cfg.q_lora_rank:
    projections.append(((cfg.dim, cfg.q_lora_rank), 1))
  if cfg.attention == 'gqa':
    return projections
  if absorbed:  # Of each head: its queries into latents, and its output out of them.
    return [*projections, ((nope, latent), heads), ((latent, value), heads)]
  return [*projections, ((latent, heads * (nope + value)), 1)]


def _product(
    n_tokens: int,
    inward: int,
    outward: int,
    *,
    learns: bool,
    input_learns: bool = True,
    rows: int = 1,
    matrices: int = 1,
) -> tuple[int, int]:
  """Returns FLOPs and bytes of a product, with its gradients if it learns.

  Args:
    n_tokens: The tokens of the sequence.
    inward: The width of an input row.
    outward: The width of an output row.
    learns: Whether the weights have a gradient.
    input_learns: Whether the input has one, too, if they do.
    rows: The rows of each token.
    matrices: The weights are this many matrices.
  """
  n_rows, weights = n_tokens * rows, matrices * inward * outward
  forward = 2 * n_rows * inward * outward
  moved = weights + n_rows * (inward + outward)
  if not learns:
    return forward, HALF * moved
  moved += weights + n_rows * (inward + outward)  # Reads input and its output's gradient.
  if not input_learns:
    return 2 * forward, HALF * moved
  return 3 * forward, HALF * (moved + weights + n_rows * inward)


def _sparse_ops(cfg: ModelConfig, n: int) -> dict[str, tuple[int, int]]:
  topk = min(cfg.index_topk, n)
  seen, chosen = n * (n + 1) // 2, topk * (topk + 1) // 2 + (n - topk) * topk
  heads, value = cfg.n_heads, cfg.row_value_dim
  key = cfg.row_dim if cfg.attention == 'mla' else cfg.head_dim
  queries, outputs = HALF * heads * key, HALF * heads * value
  keys = HALF * cfg.row_heads * cfg.row_dim
  lse, selection = WHOLE * heads, WHOLE * topk * cfg.index_n_selections
  index, index_key = _index_bytes(cfg)
  scores = 2 * heads * key  # FLOPs of the target, for each pair.
  return {
      'selection': (seen * index_flops(cfg), n * (index + index_key + selection)),
      'attention': (  # Backward, three products are as wide as keys, and two as values.
          chosen * (row_flops(cfg) + 2 * heads * (3 * key + 2 * value)),
          n * (3 * (queries + keys) + 3 * outputs + 2 * lse + 2 * selection),
      ),
      'divergence': (
          chosen * (scores + 4 * index_flops(cfg)),
          n * (queries + keys + lse + 2 * selection + 3 * (index + index_key) + 2 * WHOLE),
      ),
  }


def _dense_ops(cfg: ModelConfig, n: int) -> dict[str, tuple[int, int]]:
  seen, heads = n * (n + 1) // 2, cfg.n_heads
  key = cfg.head_dim
  rows, outputs, lse = HALF * heads * key, HALF * heads * cfg.v_head_dim, WHOLE * heads
  index, index_key = _index_bytes(cfg)
  scores = 2 * heads * key
  return {
      'attention': (seen * mha_flops(cfg), n * (2 * rows + 2 * outputs + lse)),
      'divergence': (  # The target is computed again in the backward pass.
          seen * (2 * scores + 4 * index_flops(cfg)),
          n * (2 * (2 * rows + lse) + 3 * (index + index_key) + 2 * WHOLE),
      ),
  }


def _index_bytes(cfg: ModelConfig) -> tuple[int, int]:
  """Returns the bytes of a token's index queries with their weights, and of its index key."""
  queries = cfg.index_n_heads * (HALF * cfg.index_head_dim + WHOLE)
  return queries, HALF * cfg.index_head_dim
