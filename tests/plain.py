# SPDX-License-Identifier: Apache-2.0
"""A DeepSeek-V3.2 model in float64 numpy, written from its description alone: slow and plain.

Nothing here is shared with the package but the names of the sizes. One row of tokens at a time;
every query walks over its own list of keys.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from dsa_jax.config import ModelConfig

Weights = dict[str, Any]  # Arrays by name, nested as the modules are.


class Layer(NamedTuple):
  """What one layer did, [T, ...]."""

  selected: list[list[int]]  # What the indexer chose, ascending.
  oracle: list[list[int]]  # What has the largest attention.
  index_kl: np.ndarray
  captured_mass: np.ndarray
  expert_load: np.ndarray | None
  rows: tuple[np.ndarray, np.ndarray]  # Latents and rotated keys.


class Row(NamedTuple):
  """What the model made of one row."""

  logits: np.ndarray
  mtp_logits: np.ndarray | None
  layers: list[Layer]


def frequencies(cfg: ModelConfig) -> np.ndarray:
  width, length = cfg.qk_rope_head_dim, cfg.original_seq_len
  if not width:
    return np.zeros(0)
  correction = lambda turns: (
      width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))
  )
  low = max(math.floor(correction(cfg.beta_fast)), 0)
  high = min(math.ceil(correction(cfg.beta_slow)), width - 1)
  if low == high:
    high += 0.001
  result = []
  for i in range(width // 2):
    f = cfg.rope_theta ** (-2 * i / width)
    if cfg.uses_yarn:
      ramp = min(max((i - low) / (high - low), 0), 1)
      f = f * (1 - ramp) + f / cfg.rope_factor * ramp
    result.append(f)
  return np.array(result)


def layer_frequencies(w: Weights, cfg: ModelConfig) -> np.ndarray:
  """The same with the learned factors that all layers share."""
  return frequencies(cfg) * np.exp(w.get('rope_factors', 0)) if cfg.qk_rope_head_dim else np.zeros(0)


def softmax_scale(cfg: ModelConfig) -> float:
  scale = 1 / math.sqrt(cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
  if cfg.uses_yarn:
    scale *= (0.1 * cfg.mscale * math.log(cfg.rope_factor) + 1) ** 2
  return scale


def rotate_pairs(x: np.ndarray, position: int, freqs: np.ndarray) -> np.ndarray:
  """Channels (2i, 2i + 1) are a complex number; MLA's order."""
  turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * position * freqs)
  y = np.empty_like(x)
  y[..., 0::2], y[..., 1::2] = turned.real, turned.imag
  return y


def rotate_halves(x: np.ndarray, position: int, freqs: np.ndarray) -> np.ndarray:
  """Channels (i, i + R/2) are a complex number; the indexer's order."""
  half = len(freqs)
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * position * freqs)
  return np.concatenate([turned.real, turned.imag], axis=-1)


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def gated_norm(x: np.ndarray, w: Weights, eps: float) -> np.ndarray:
  """An RMSNorm, whose output a small map of it may scale channel by channel."""
  y = rms_norm(x, w['scale'], eps)
  if 'w_down' not in w:
    return y
  inner = y @ w['w_down']
  return y * sigmoid((inner * sigmoid(inner)) @ w['w_up'])


def stream_weights(x: np.ndarray, w: Weights, cfg: ModelConfig) -> np.ndarray:
  """The logits of reading [T, N], then those of writing, from all streams x [T, N, D]."""
  flat = x.reshape(len(x), -1)
  flat = flat / np.sqrt(np.mean(flat**2, axis=-1, keepdims=True) + cfg.norm_eps)
  z = flat @ w['map'].reshape(flat.shape[1], -1)
  return z * np.repeat(w['scale'], cfg.n_streams) + w['base']


def read_streams(x: np.ndarray, w: Weights | None, cfg: ModelConfig) -> np.ndarray:
  if w is None:
    return x
  weights = sigmoid(stream_weights(x, w, cfg)[:, : cfg.n_streams]) + cfg.streams_eps
  return sum(weights[:, i, None] * x[:, i] for i in range(cfg.n_streams))


def add_to_streams(x: np.ndarray, out: np.ndarray, w: Weights | None, cfg: ModelConfig) -> np.ndarray:
  if w is None:
    return x + out
  weights = sigmoid(stream_weights(x, w, cfg)[:, cfg.n_streams :])
  weights = cfg.streams_magnitude * weights + cfg.streams_eps
  return np.stack([x[:, i] + weights[:, i, None] * out for i in range(cfg.n_streams)], axis=1)


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
  deviation = np.sqrt(x.var(axis=-1, keepdims=True) + eps)
  return (x - x.mean(axis=-1, keepdims=True)) / deviation * scale + bias


def sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
  e = np.exp(x - x.max())
  return e / e.sum()


def swiglu(x: np.ndarray, w1, w3, w2, limit: float = 0) -> np.ndarray:
  gate, up = x @ w1, x @ w3
  if limit:
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
  return (gate * sigmoid(gate) * up) @ w2


def top_k(scores: np.ndarray, keys: range, k: int) -> list[int]:
  """The positions of the k highest, ascending; of equals, the lowest positions."""
  return sorted(sorted(keys, key=lambda s: (-scores[s], s))[:k])


def divergence(target: np.ndarray, scores: np.ndarray) -> float:
  """KL(target || softmax(scores)) in nats."""
  predicted = softmax(scores)
  return sum(p * (math.log(p) - math.log(r)) for p, r in zip(target, predicted) if p > 0)


def sizes_of_windows(cfg: ModelConfig) -> ModelConfig:
  """The sizes of a layer with a window, where it has some of its own."""
  names = 'n_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rope_theta'
  own = {name: getattr(cfg, f'window_{name}') for name in names.split()}
  given = {name: size for name, size in own.items() if size}
  return dataclasses.replace(cfg, **given, **{f'window_{name}': type(own[name])(0) for name in given})


def log_scale(w: Weights, positions) -> np.ndarray:
  """The factor of every query and head, [T, H, 1]."""
  return (np.log(np.array(positions) + 1.0)[:, None] * w['scale'] + w['bias'])[:, :, None]


def index_scores(w: Weights, x, c_q, positions, cfg: ModelConfig) -> np.ndarray:
  """The indexer's opinion of every key for every query, [T, S]."""
  freqs, r = layer_frequencies(w, cfg), cfg.qk_rope_head_dim
  if cfg.index_query_norm:
    c_q = layer_norm(c_q, w['q_norm']['scale'], w['q_norm']['bias'], cfg.index_norm_eps)
  q = np.einsum('tq,qij->tij', c_q, w['wq_b'])
  if cfg.query_log_scale:
    q = q * log_scale(w['q_scale'], positions)
  k = layer_norm(x @ w['wk'], w['k_norm']['scale'], w['k_norm']['bias'], cfg.index_norm_eps)
  here = slice(-r, None) if cfg.index_rope_last and r else slice(r)
  rotate = rotate_pairs if cfg.indexer_rope_interleave else rotate_halves
  for t, position in enumerate(positions):
    q[t, :, here] = rotate(q[t, :, here], position, freqs)
    k[t, here] = rotate(k[t, here], position, freqs)
  head_weights = x @ w['weights_proj'] / math.sqrt(cfg.index_n_heads * cfg.index_head_dim)
  scores = np.zeros((len(x), len(x)))
  for j in range(cfg.index_n_heads):
    scores += head_weights[:, j, None] * np.maximum(q[:, j] @ k.T, 0)
  return scores


def attention(
    w: Weights, x, start, end, cfg: ModelConfig, sparse: bool, earlier=None, window=0, nope=False,
    source=None,
):
  """Multi-head latent attention in its MHA form, over all visible keys or the selected ones.

  A layer without an indexer reuses the `earlier` selection, and has no divergence. One with a window
  sees its latest keys only, all of which it attends to.
  """
  cfg = sizes_of_windows(cfg) if window else cfg
  if nope and cfg.nope_layers_expand:  # All channels of keys come from latents.
    cfg = dataclasses.replace(
        cfg, qk_nope_head_dim=cfg.head_dim, qk_rope_head_dim=0, nope_layers=(), nope_layers_expand=False
    )
  n_tokens, n, r, c = len(x), cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.kv_lora_rank
  freqs, scale = layer_frequencies(w, cfg), softmax_scale(cfg)
  positions = [max(e - 1 - s, 0) for s, e in zip(start, end)]
  eps = cfg.latent_eps or cfg.norm_eps
  c_q, gates = x, 1.0
  if cfg.q_lora_rank:
    c_q = rms_norm(x @ w['wq_a'], w['q_norm']['scale'], eps)
    if cfg.latent_rescale:
      c_q = c_q * math.sqrt(cfg.dim / cfg.q_lora_rank)
  if cfg.output_gate == 'latents':  # The first channels that the projection makes are the query.
    both = np.concatenate([c_q, x @ w['wq_a']], axis=-1)
    q, logits = np.split(np.einsum('tq,qhe->the', both, w['wq_b']), [n + r], axis=-1)
    gates = sigmoid(logits)
  else:
    q = np.einsum('tq,qhe->the', c_q, w['wq_b'])
  if cfg.output_gate == 'hidden':
    gates = sigmoid(np.einsum('td,dhv->thv', x, w['wg']))
  if cfg.output_gate == 'heads':
    gates = sigmoid(x @ w['wg'])[:, :, None]
  turn = rotate_pairs if cfg.rope_interleave else rotate_halves
  for t, position in enumerate(positions):
    q[t, :, n:] = turn(q[t, :, n:], position, freqs)
  if source is None:
    down = x @ w['wkv_a']
    c_kv, k_rope = rms_norm(down[:, :c], w['kv_norm']['scale'], eps), down[:, c:]
    if cfg.latent_rescale:
      c_kv = c_kv * math.sqrt(cfg.dim / c)
    if cfg.rope_key_norm:
      k_rope = rms_norm(k_rope, w['k_rope_norm']['scale'], eps)
    for t, position in enumerate(positions):
      k_rope[t] = turn(k_rope[t], position, freqs)
  else:
    c_kv, k_rope = source
  if cfg.query_log_scale:
    q = q * log_scale(w['q_scale'], positions)
  up = np.einsum('sc,chn->shn', c_kv, w['wkv_b'])
  k_nope, v = up[..., :n], up[..., n:]
  k = np.concatenate([k_nope, np.repeat(k_rope[:, None], cfg.n_heads, axis=1)], axis=-1)
  own = w.get('indexer')
  scores = index_scores(own, x, c_q, positions, cfg) if own else None

  out = np.zeros((n_tokens, cfg.n_heads, cfg.v_head_dim))
  kl, captured, selected, oracle = np.zeros(n_tokens), np.zeros(n_tokens), [], []
  for t in range(n_tokens):
    visible = range(max(start[t], end[t] - window) if window else start[t], end[t])
    if window:
      chosen, keys = list(visible), list(visible)
    else:
      chosen = top_k(scores[t], visible, cfg.index_topk) if own else earlier[t]
      keys = chosen if sparse else list(visible)
    true_mass, target = np.zeros(n_tokens), np.zeros(n_tokens)
    for h in range(cfg.n_heads if keys else 0):
      probs = softmax(scale * k[keys, h] @ q[t, h])
      out[t, h] = probs @ v[keys, h]
      if cfg.attention_sinks:
        logits = np.append(scale * k[keys, h] @ q[t, h], w['sinks'][h])
        out[t, h] = softmax(logits)[:-1] @ v[keys, h]
      target[keys] += probs  # Sum over heads ...
      true_mass[visible] += softmax(scale * k[visible, h] @ q[t, h]) / cfg.n_heads
    if keys and own:
      kl[t] = divergence((target / target.sum())[keys], scores[t, keys])  # ... then to sum one.
    captured[t] = true_mass[chosen].sum()
    selected.append(chosen)
    oracle.append(top_k(true_mass, visible, cfg.index_topk))
  out = np.einsum('thv,hvd->td', gates * out, w['wo'])
  return out, selected, oracle, kl, captured, (c_kv, k_rope)


def route(scores: np.ndarray, bias: np.ndarray, cfg: ModelConfig) -> dict[int, float]:
  """One token's experts and their weights."""
  per_group = cfg.n_routed_experts // cfg.n_expert_groups
  choice = scores + bias
  groups = [list(range(g * per_group, (g + 1) * per_group)) for g in range(cfg.n_expert_groups)]
  best_two = [sum(sorted(choice[group])[-2:]) for group in groups]
  kept = top_k(np.array(best_two), range(len(groups)), cfg.n_limited_groups)
  allowed = [expert for g in kept for expert in groups[g]]
  if cfg.zero_dropped_groups:
    dropped = [expert for expert in range(cfg.n_routed_experts) if expert not in allowed]
    choice[dropped], allowed = 0, range(cfg.n_routed_experts)
  if cfg.n_expert_groups == 1:
    allowed = range(cfg.n_routed_experts)
  experts = top_k(choice, allowed, cfg.n_activated_experts)
  return {e: cfg.route_scale * scores[e] / sum(scores[experts]) for e in experts}


def mixture(w: Weights, x, counted, cfg: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
  out, load = np.zeros_like(x), np.zeros(cfg.n_routed_experts)
  for t, token in enumerate(x):
    scores = {'sigmoid': sigmoid, 'softmax': softmax}[cfg.score_func](token @ w['gate'])
    for e, gate in route(scores, w.get('bias', 0.0), cfg).items():
      out[t] += gate * swiglu(token, w['w1'][e], w['w3'][e], w['w2'][e], cfg.swiglu_limit)
      load[e] += counted[t]
  shared = w['shared']
  return out + swiglu(x, shared['w1'], shared['w3'], shared['w2']), load


def block(
    w: Weights, x, start, end, cfg: ModelConfig, sparse: bool, earlier=None, window=0, nope=False,
    source=None,
) -> tuple[np.ndarray, Layer]:
  of_attn, of_ffn = w.get('attn_streams'), w.get('ffn_streams')
  normed = gated_norm(read_streams(x, of_attn, cfg), w['attn_norm'], cfg.norm_eps)
  out, selected, oracle, kl, captured, rows = attention(
      w['attn'], normed, start, end, cfg, sparse, earlier, window, nope, source
  )
  x = add_to_streams(x, out, of_attn, cfg)
  normed = gated_norm(read_streams(x, of_ffn, cfg), w['ffn_norm'], cfg.norm_eps)
  ffn, load = w['ffn'], None
  if 'gate' in ffn:
    out, load = mixture(ffn, normed, np.asarray(end) > np.asarray(start), cfg)
  else:
    out = swiglu(normed, ffn['w1'], ffn['w3'], ffn['w2'])
  return add_to_streams(x, out, of_ffn, cfg), Layer(selected, oracle, kl, captured, load, rows)


def transformer(
    weights: Weights, tokens, start, end, cfg: ModelConfig, *, sparse: bool, next_tokens=None
) -> Row:
  """Runs one row of tokens; query t sees start[t] <= s < end[t]."""
  w = _float64(weights)
  x, layers, earlier = w['embed'][tokens], [], None
  if cfg.n_streams:
    x = np.stack([x] * cfg.n_streams, axis=1)
  types = cfg.indexer_types or ('full',) * cfg.n_layers
  dense = [i < cfg.n_dense_layers or i in cfg.mlp_layers for i in range(cfg.n_layers)]
  apart = cfg.window_layers if sizes_of_windows(cfg) != cfg else ()  # They have weights of other shapes.
  stacks = [
      ('dense' if dense[i] else 'moe') + ('_window' if i in apart else '')
      + ('_nope' if i in cfg.nope_layers and cfg.nope_layers_expand else '')
      + ('_reading' if cfg.kv_sources and cfg.kv_sources[i] != i else '') + '_blocks'
      for i in range(cfg.n_layers)
  ]
  for i in range(cfg.n_layers):
    stack = w[stacks[i]]
    before = [j for j in range(i) if stacks[j] == stacks[i]]  # Of the same kind.
    attn = dict(stack['attn'])
    indexers = attn.pop('indexer', None)
    weights = _layer({**stack, 'attn': attn}, len(before))
    window = cfg.sliding_window if i in cfg.window_layers else 0
    if types[i] == 'full' and not window:
      full = [j for j in before if types[j] == 'full' and j not in cfg.window_layers]
      weights['attn']['indexer'] = _layer(indexers, len(full))
    if cfg.learned_frequencies:
      for owner in (weights['attn'], weights['attn'].get('indexer', {})):
        owner['rope_factors'] = w['rope_factors']
    reads = cfg.kv_sources and cfg.kv_sources[i] != i
    source = layers[cfg.kv_sources[i]].rows if reads else None
    x, layer = block(
        weights, x, start, end, cfg, sparse, earlier, window, i in cfg.nope_layers, source
    )
    layers.append(layer)
    earlier = earlier if window else layer.selected
  x = read_streams(x, w.get('streams'), cfg)
  final, mtp_logits = rms_norm(x, w['norm']['scale'], cfg.norm_eps), None
  if cfg.n_mtp_layers:
    mtp = w['mtp']
    following = rms_norm(w['embed'][next_tokens], mtp['enorm']['scale'], cfg.norm_eps)
    hidden = rms_norm(final, mtp['hnorm']['scale'], cfg.norm_eps)
    y = np.concatenate([following, hidden], axis=-1) @ mtp['eh_proj']
    y, layer = block(mtp['block'], y, start, end, cfg, sparse)
    layers.append(layer)
    mtp_logits = rms_norm(y, mtp['norm']['scale'], cfg.norm_eps) @ w['head']
  logits = final @ w['head']
  if cfg.logit_softcap:
    logits = cfg.logit_softcap * np.tanh(logits / cfg.logit_softcap)
  return Row(logits, mtp_logits, layers)


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """-ln of each target's probability."""
  return np.array([-np.log(softmax(row)[target]) for row, target in zip(logits, targets)])


def _float64(tree):
  if isinstance(tree, dict):
    return {name: _float64(value) for name, value in tree.items()}
  return np.asarray(tree, np.float64)


def _layer(tree, i: int):
  if isinstance(tree, dict):
    return {name: _layer(value, i) for name, value in tree.items()}
  return tree[i]
