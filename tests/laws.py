# SPDX-License-Identifier: Apache-2.0
"""Facts that hold for any weights, each one a function that asserts it.

The model is tiny, but its budget is several times smaller than the context, its rows hold several
documents and padding, and no weight sits at a value that hides a mistake. `eager` runs it without
compiling whole programs: the second call of any law costs a fraction of a second.
"""

import contextlib
import dataclasses
import functools
import unittest.mock

import by_numpy
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.config import ModelConfig
from dsa_jax.data.batch import Batch
from dsa_jax.kernels import index_kl
from dsa_jax.nn.attention import attend
from dsa_jax.nn.attention.types import Measures, Mode
from dsa_jax.nn.moe import balance, route
from dsa_jax.nn.transformer import Transformer
from dsa_jax.params import BackboneParam, IndexerParam
from dsa_jax.training.losses import next_token_loss, score_targets
from dsa_jax.training.optim import OptimConfig
from dsa_jax.training.stages import STAGES
from dsa_jax.training.state import model_graph, new_state, split_parts
from dsa_jax.training.step import make_train_step

BACKENDS = ('reference', 'xla')
CFG = ModelConfig(
    vocab_size=37, dim=24, n_layers=2, n_dense_layers=1, inter_dim=40,
    n_routed_experts=8, n_activated_experts=3, n_expert_groups=4, n_limited_groups=2,
    moe_inter_dim=12,
    n_heads=3, q_lora_rank=16, kv_lora_rank=12,
    qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5,
    index_n_heads=2, index_head_dim=12, index_topk=5,  # Two heads: many rows of ReLU's zeros.
    max_seq_len=64, original_seq_len=32, rope_theta=20.0, rope_factor=8.0,  # YaRN in all its parts.
    dtype='float32',
)
# The same with grouped-query attention, a tied head, and all else that other families have.
GQA = dataclasses.replace(
    CFG, attention='gqa', n_heads=6, n_kv_heads=2, q_lora_rank=0, kv_lora_rank=0, qk_nope_head_dim=6,
    qk_rope_head_dim=4, rope_interleave=False, qkv_bias=True, qk_norm=True, index_rope_head_dim=8,
    nope_layers=(1,), tie_embeddings=True, rope_type='llama3', topk_method='group_limited_greedy',
    score_func='softmax', norm_topk_prob=False, n_shared_experts=0,
)  # fmt: skip
GQA_EACH = dataclasses.replace(GQA, index_n_heads=6, index_n_selections=2)  # For each key head.
# All that A.X-K2 has and DeepSeek has not.
GATED = dataclasses.replace(
    CFG, output_gate='latents', gated_norm_rank=3, latent_eps=0.03, zero_dropped_groups=True
)
# Much of what Hy4 has and DeepSeek has not.
SINKS = dataclasses.replace(
    CFG, output_gate='hidden', attention_sinks=True, swiglu_limit=0.3, index_rope_last=True,
    index_norm_eps=0.02, rope_interleave=False, n_streams=3, streams_eps=0.01,
)  # fmt: skip
# Experts and an MLP take turns twice, and an MLP follows: two scans.
MIXED = dataclasses.replace(CFG, n_layers=5, n_dense_layers=0, mlp_layers=(1, 3, 4))
# Layer 2 selects. The others have windows, which are longer than its budget.
WINDOWED = dataclasses.replace(
    CFG, n_layers=4, n_dense_layers=2, window_layers=(0, 1, 3), sliding_window=7
)
# Layers of both kinds with windows of other sizes than the layers that select: much of dots3-note.
TWO_SIZES = dataclasses.replace(
    CFG, n_layers=4, n_dense_layers=2, window_layers=(1, 2), sliding_window=7, window_n_heads=2,
    window_q_lora_rank=10, window_kv_lora_rank=14, window_qk_nope_head_dim=4,
    window_qk_rope_head_dim=6, window_v_head_dim=7, window_rope_theta=5.0, shared_inter_dim=10,
    latent_rescale=True, rope_key_norm=True, output_gate='heads',
)
# Queries that grow with their position, from hidden states, which the indexer norms.
GROWING = dataclasses.replace(CFG, q_lora_rank=0, query_log_scale=True, index_query_norm=True)
# And some of them rotate nothing: much of Mistral Large 4. Where a text begins with one word twice, keys
# of these layers tie: the batch of another vocabulary has no such text.
SOME_NOPE = dataclasses.replace(
    GROWING, vocab_size=40, n_layers=4, n_dense_layers=2, nope_layers=(1, 2), nope_layers_expand=True,
    indexer_rope_interleave=True, learned_frequencies=True, logit_softcap=3.0, mscale=0.0,
)  # fmt: skip
# Layers 2 and 3 read the rows of others, each of those of its own kind.
READING = dataclasses.replace(
    SOME_NOPE, kv_sources=(0, 1, 1, 0), score_func='softmax', topk_method='best_two_of_groups',
    zero_dropped_groups=True,
)  # fmt: skip
# Layers 0 and 1 are of one kind, and keep what later ones read: layer 2 reads the earlier one.
TWO_SOURCES = dataclasses.replace(
    READING, n_dense_layers=4, nope_layers=(), nope_layers_expand=False, kv_sources=(0, 1, 0, 1)
)
T = 29
LENGTHS = ((17, 12), (21, 5))  # Documents of each row; the second ends in padding.
RATES = {'backbone': 0.1, 'indexer': 0.1}
OPTIM = OptimConfig(eps=1.0, bias_rate=0.01)  # A small eps divides the gradient's size out.


@contextlib.contextmanager
def eager():
  """Operations run one by one, most of them by NumPy, so that patches are seen and nothing is compiled."""
  with jax.disable_jit(), by_numpy.operations(), _few_optimizations():
    yield


@contextlib.contextmanager
def unmeasured():
  """Within it, `Mode.measure` gives the selections, and 0 for all that is measured of them."""

  def select(layer, views, selections, start, end, key, mode):
    zeros = [jnp.zeros(start.shape)] * (len(Measures._fields) - 1)
    return {rule: Measures(selections[rule], *zeros) for rule in mode.measure}

  with unittest.mock.patch.object(attend, 'measure_selections', select):
    yield


@contextlib.contextmanager
def _few_optimizations():
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', True)
  try:
    yield
  finally:
    jax.config.update('jax_disable_most_optimizations', before)


# Weights and batches.


@functools.cache
def graph_of(cfg: ModelConfig) -> nnx.GraphDef:
  return model_graph(cfg)


@functools.cache
def _weights(cfg: ModelConfig, seed: int) -> nnx.State:
  abstract = nnx.state(nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0))))
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    std, mean = 0.25, 0.0
    if 'scale' in name:
      mean = 1.0
    elif 'embed' in name:
      std = 1.0
    return np.asarray(mean + std * rng.normal(size=leaf.shape), np.float32)

  return jax.tree_util.tree_map_with_path(draw, abstract)


@contextlib.contextmanager
def model(cfg: ModelConfig):
  """Makes this the model of all laws."""
  global CFG
  before, CFG = CFG, cfg
  try:
    yield
  finally:
    CFG = before


def weights(cfg: ModelConfig | None = None, seed: int = 0) -> nnx.State:
  """Weights of which none is zero or one: norms, biases and the router's bias included."""
  return jax.tree.map(jnp.array, _weights(cfg or CFG, seed))


def model_of(params: nnx.State, cfg: ModelConfig | None = None) -> Transformer:
  return nnx.merge(graph_of(cfg or CFG), params)


def with_indexer_of(params: nnx.State, other: nnx.State) -> nnx.State:
  """The backbone of the first, the indexers of the second."""
  _, rest = nnx.split_state(params, IndexerParam, ...)
  indexer, _ = nnx.split_state(other, IndexerParam, ...)
  return nnx.merge_state(indexer, rest)


def scaled(params: nnx.State, factor: float, *names: str) -> nnx.State:
  """Multiplies the weights whose path holds one of the names."""

  def leaf(path, x):
    return factor * x if any(name in jax.tree_util.keystr(path) for name in names) else x

  return jax.tree_util.tree_map_with_path(leaf, params)


def make_batch(lengths: tuple[tuple[int, ...], ...], n_tokens: int = T, seed: int = 0) -> Batch:
  """Rows of documents, then padding; a document's last token has no target."""
  rng = np.random.default_rng(seed)
  shape = len(lengths), n_tokens
  tokens = rng.integers(CFG.vocab_size, size=shape).astype(np.int32)
  targets = np.roll(tokens, -1, axis=1)
  weights = np.zeros(shape, np.float32)
  start = np.broadcast_to(np.arange(n_tokens), shape).astype(np.int32)
  end = start.copy()
  for row, documents in enumerate(lengths):
    at = 0
    for length in documents:
      start[row, at : at + length] = at
      end[row, at : at + length] += 1
      weights[row, at : at + length - 1] = 1
      at += length
  return Batch(*map(jnp.asarray, (tokens, targets, weights, start, end)))


def forward(params, batch: Batch, mode: Mode, cfg: ModelConfig | None = None, **kwargs):
  return model_of(params, cfg)(batch.tokens, batch.start, batch.end, mode, **kwargs)


def head_of(params) -> jax.Array:
  return params['head'][...] if 'head' in params else params['embed'][...].T


def losses(params, batch: Batch, mode: Mode, cfg: ModelConfig | None = None):
  """Sums over what counts: the language model's loss and the indexer's."""
  out = forward(params, batch, mode, cfg)
  softcap = (cfg or CFG).logit_softcap
  lm = next_token_loss(out.hidden, head_of(params), batch.targets, batch.weights, softcap=softcap)
  return lm, jnp.sum(out.index_kl)


def gradients(which: int, params, batch: Batch, mode: Mode, cfg: ModelConfig | None = None):
  """Of the language model's loss (0) or of the indexer's (1)."""
  return jax.grad(lambda p: losses(p, batch, mode, cfg)[which])(params)


def selected(out) -> np.ndarray:
  return np.asarray(out.measures('indexer').indices)


def assert_close(got, want, tolerance: float = 2e-5, floor: float = 0.0):
  """Compares trees, each array relative to its largest value."""
  got, want = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want)
  assert [path for path, _ in got] == [path for path, _ in want]
  for (path, a), (_, b) in zip(got, want):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    limit = tolerance * max(np.abs(b).max(initial=0), floor)
    np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))


def assert_same(got, want):
  """Compares trees to the last bit."""
  jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_zero(tree):
  for path, x in jax.tree.leaves_with_path(tree):
    assert not np.any(np.asarray(x)), jax.tree_util.keystr(path)


def assert_differs(a, b, least: float = 1e-3):
  difference = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()
  assert difference > least, difference


# How attention, selection and documents behave.


def law_masked_is_sparse(backend: str):
  batch, params = make_batch(LENGTHS, seed=1), weights()  # In the batch of seed 0 two scores all but tie.
  modes = [
      Mode(attention=attention, backend=backend, index_loss=True, measure=('indexer',))
      for attention in ('sparse', 'masked')
  ]
  sparse, masked = (forward(params, batch, mode) for mode in modes)
  assert_same(selected(masked), selected(sparse))
  assert_close((masked.logits, masked.index_kl), (sparse.logits, sparse.index_kl))


def law_masked_has_the_gradients_of_sparse(backend: str, which: int):
  batch, params = make_batch(LENGTHS), weights()
  sparse, masked = (
      gradients(which, params, batch, Mode(attention=attention, backend=backend, index_loss=True))
      for attention in ('sparse', 'masked')
  )
  assert_close(masked, sparse, 1e-4, floor=1e-2)


def law_all_selected_is_dense(backend: str, attention: str):
  cfg = dataclasses.replace(CFG, index_topk=T + 3)
  batch, params = make_batch(LENGTHS), weights()
  outs = []
  for how in ('dense', attention):
    outs.append(forward(params, batch, Mode(attention=how, backend=backend, index_loss=True), cfg))
  assert_close(outs[1].logits, outs[0].logits)
  assert_close(outs[1].index_kl, outs[0].index_kl, 1e-4)


def law_packed_is_alone(backend: str, attention: str):
  """A document's numbers do not depend on where it lies, nor on its neighbours."""
  mode = Mode(attention=attention, backend=backend, index_loss=True, measure=('indexer',))
  batch, params = make_batch(LENGTHS), weights()
  packed = forward(params, batch, mode)
  for row, lengths in enumerate(LENGTHS):
    alone = make_batch([(length,) for length in lengths])  # Each in a row of its own.
    tokens, begins = np.array(alone.tokens), np.cumsum((0, *lengths))
    for i, length in enumerate(lengths):
      tokens[i, :length] = batch.tokens[row, begins[i] : begins[i] + length]
    out = forward(params, alone._replace(tokens=jnp.asarray(tokens)), mode)
    for i, length in enumerate(lengths):
      here, there = np.s_[row, begins[i] : begins[i] + length], np.s_[i, :length]
      assert_close(packed.logits[here], out.logits[there])
      assert_close(packed.index_kl[:, *here], out.index_kl[:, *there])
      shifted = selected(packed)[:, *here]
      shifted = np.where(shifted < 0, -1, shifted - begins[i])
      assert_same(shifted, selected(out)[:, *there])


def law_positions_restart():
  """What a cache would hold of a document, to the last bit, wherever it lies in a row."""
  block = model_of(weights()).block(0)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, CFG.dim)), jnp.float32)
  length = 9
  caches = []
  for at in (0, 11):
    lengths = (at, length) if at else (length,)
    batch = make_batch((lengths,))
    moved = jnp.zeros_like(x).at[:, at : at + length].set(x[:, :length])
    views = block.attn.views(moved, batch.start, batch.end)
    caches.append([part[:, at : at + length] for part in (views.rows, views.k, views.index.k)])
  assert_same(caches[1], caches[0])


def law_no_future(backend: str, attention: str):
  """Later tokens change neither earlier logits nor the gradients of earlier losses."""
  mode = Mode(attention=attention, backend=backend, index_loss=True)
  batch, params, cut = make_batch(((T,), (T,))), weights(), 13
  tokens = batch.tokens.at[:, cut:].set((batch.tokens[:, cut:] + 5) % CFG.vocab_size)
  other = batch._replace(tokens=tokens)

  def early_losses(params, batch):
    out = forward(params, batch, mode)
    counts = jnp.broadcast_to(jnp.arange(T) < cut, batch.targets.shape).astype(jnp.float32)
    softcap = CFG.logit_softcap
    loss = next_token_loss(out.hidden, head_of(params), batch.targets, counts, softcap=softcap)
    return loss + jnp.sum(out.index_kl[:, :, :cut]), out

  found = [
      jax.value_and_grad(early_losses, has_aux=True)(params, b) for b in (batch, other)
  ]
  (before, out), grads = found[0]
  (after, other_out), other_grads = found[1]
  assert_close(other_out.logits[:, :cut], out.logits[:, :cut], 1e-6)
  assert_close(other_out.index_kl[:, :, :cut], out.index_kl[:, :, :cut], 1e-5)
  assert_differs(other_out.logits[:, cut:], out.logits[:, cut:])
  assert_close(after, before, 1e-6)
  assert_close(other_grads, grads, 2e-5, floor=1e-2)


def law_selection_reaches_output(backend: str, attention: str):
  """Another indexer changes the logits, except where attention is dense."""
  mode, batch = Mode(attention=attention, backend=backend), make_batch(LENGTHS)
  params = weights()
  outs = [
      forward(with_indexer_of(params, other), batch, mode).logits
      for other in (params, weights(seed=1))
  ]
  if attention == 'dense':
    assert_same(outs[1], outs[0])
  else:
    assert_differs(outs[1], outs[0])
    few = np.asarray(batch.end - batch.start) <= CFG.index_topk  # Nothing to choose yet.
    few &= np.asarray(batch.end > batch.start)
    assert_close(outs[1][few], outs[0][few])


def law_windows_end_where_they_should():
  """A layer with a window hears a token for as long as its window is, and no longer."""
  batch, params = make_batch(((T,),)), weights()
  model, at = model_of(params), 3
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, CFG.dim)), jnp.float32)
  mode = Mode(attention='sparse', backend='xla')
  for i in CFG.window_layers:
    run = lambda x: model.block(i)(x, batch.start, batch.end, jax.random.key(0), mode)[0]
    moved = np.abs(np.asarray(run(x.at[0, at].add(1)) - run(x))).max(axis=-1)[0]
    assert np.flatnonzero(moved).tolist() == list(range(at, at + CFG.sliding_window)), i


# Who trains whom.


def law_own_losses_only(backend: str, attention: str):
  """The divergence moves the indexer only, the language model's loss the backbone only."""
  mode = Mode(attention=attention, backend=backend, index_loss=True)
  batch, params = make_batch(LENGTHS), weights()
  for which, (own, stray) in enumerate(
      [(BackboneParam, IndexerParam), (IndexerParam, BackboneParam)]
  ):
    trained, silent, rest = nnx.split_state(gradients(which, params, batch, mode), own, stray, ...)
    assert_zero(silent)
    assert_zero(rest)  # The router's bias: no loss trains it.
    for path, x in jax.tree.leaves_with_path(trained):
      assert np.isfinite(x).all()
      if which == 1 or 'moe' not in jax.tree_util.keystr(path):
        assert np.any(np.asarray(x)), jax.tree_util.keystr(path)


def law_kl_target_is_constant(backend: str):
  """No gradient of the divergence reaches the attention that it copies."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, k, lse = normal(1, 7, 2, 4), normal(1, 7, 2, 4), normal(1, 7, 2)
  index = normal(1, 7, 2, 4), normal(1, 7, 4), normal(1, 7, 2)
  batch = make_batch(((7,),), 7)

  def loss(q, k, lse, *index):
    kl = index_kl(q, k, lse, *index, batch.start, batch.end, sm_scale=0.5, backend=backend)
    return jnp.sum(kl)

  *stray, own = jax.grad(loss, argnums=(0, 1, 2, 5))(q, k, lse, *index)
  assert_zero(stray)
  assert np.any(np.asarray(own))


@contextlib.contextmanager
def compiled():
  """Whole programs again, where the many shapes of a step's update would cost more."""
  with jax.disable_jit(False):
    yield


def take_step(params, batch: Batch, mode: Mode, *, trains, cfg=None, micro_batches: int = 1):
  """One real step from fresh optimisers; returns the new parameters and the metrics."""
  with compiled():
    state = new_state(jax.tree.map(jnp.array, params), trains, OPTIM, seed=0)
    step = make_train_step(graph_of(cfg or CFG), trains, mode, OPTIM, micro_batches=micro_batches)
    state, metrics = step(state, batch, {part: RATES[part] for part in trains})
  return state.params, metrics


def stage_step(stage: str, **kwargs):
  """How a stage steps: its mode, and `take_step` for it."""
  trains = STAGES[stage].trains
  attention = STAGES[stage].attention[0]
  mode = Mode(attention=attention, backend='xla', index_loss='indexer' in trains)
  return mode, functools.partial(take_step, mode=mode, trains=trains, **kwargs)


def law_own_clipping(attention: str):
  """A huge gradient of one part leaves the other's update as it was, to the last bit."""
  mode = Mode(attention=attention, backend='xla', index_loss=True)
  batch, params = make_batch(LENGTHS), weights()
  step = functools.partial(take_step, batch=batch, mode=mode, trains=('backbone', 'indexer'))
  before, _ = step(params)
  changes = {'indexer': scaled(params, 1024.0, 'weights_proj')}  # A power of two: no new rounding.
  changes['backbone'] = scaled(params, 1024.0, 'head')
  for name, huge in changes.items():
    after, metrics = step(huge)
    other = 'backbone' if name == 'indexer' else 'indexer'
    assert_same(split_parts(after, (other,))[0][other], split_parts(before, (other,))[0][other])
    assert metrics[f'grad_norm_{name}'] > 100, metrics[f'grad_norm_{name}']


def law_only_trained_parts_move(stage: str):
  """Warm-up trains the indexer alone, and so on; the other part stays to the last bit."""
  parts = {'dense': ('backbone',), 'warmup': ('indexer',), 'sparse': ('backbone', 'indexer')}
  params = weights()
  after, _ = stage_step(stage)[1](params, make_batch(LENGTHS))
  for part in ('backbone', 'indexer'):
    old, new = (jax.tree.leaves(split_parts(p, (part,))[0][part]) for p in (params, after))
    if part in parts[stage]:
      assert all(np.any(np.asarray(a != b)) for a, b in zip(old, new)), part
    else:
      assert_same(new, old)


def law_a_frozen_backbone_stays():
  """Where the sparse stage trains the indexer alone, it trains it as it does beside the backbone."""
  params, batch = weights(), make_batch(LENGTHS)
  mode = Mode(attention='sparse', backend='xla', index_loss=True)
  both, _ = take_step(params, batch, mode, trains=('backbone', 'indexer'))
  alone, _ = take_step(params, batch, mode, trains=('indexer',))
  before, after, trained = (
      split_parts(p, ('backbone', 'indexer'))[0] for p in (params, alone, both)
  )
  assert_same(after['backbone'], before['backbone'])
  assert_close(after['indexer'], trained['indexer'])


def law_warmup_is_dense():
  """Warm-up's output is dense attention's, whatever the indexer; its steps leave the loss alone."""
  batch, params = make_batch(LENGTHS), weights()
  warmup, step = stage_step('warmup')
  want = forward(params, batch, Mode(attention='dense', backend='xla')).logits
  for seed in (1, 2):
    mixed = with_indexer_of(params, weights(seed=seed))
    assert_same(forward(mixed, batch, warmup).logits, want)
  history = []
  for _ in range(3):
    params, metrics = step(params, batch)
    history.append((float(metrics['lm_loss']), float(jnp.sum(metrics['index_kl']))))
  lm, kl = zip(*history)
  assert len(set(lm)) == 1, lm
  assert kl[-1] < kl[0], kl


# What counts in a loss.


def law_loss_scale(layout: str, stage: str):
  """The numbers of a step do not depend on how its batch is packed, padded and cut up."""
  micro_batches = {'padded_rows': 2, 'unpacked': 2, 'unpacked_and_padded': 4}[layout]
  batch, params = make_batch(LENGTHS), weights()
  step = stage_step(stage)[1]
  want, want_metrics = step(params, batch)
  got, metrics = step(params, _lay_out(batch, layout), micro_batches=micro_batches)
  names = ['lm_loss', 'index_kl', 'expert_imbalance']
  names += [f'grad_norm_{part}' for part in STAGES[stage].trains]
  for name in names:
    assert_close(metrics[name], want_metrics[name], 1e-4)
  moved, want_moved = (jax.tree.map(jnp.subtract, p, params) for p in (got, want))
  assert_close(moved, want_moved, 1e-3, floor=1e-4)


def _lay_out(batch: Batch, layout: str) -> Batch:
  """The same documents in other rows, each micro-batch of two rows: one shape for all."""
  documents = []  # Row, first token, length.
  for row, lengths in enumerate(LENGTHS):
    documents += [(row, at, n) for at, n in zip(np.cumsum((0, *lengths)), lengths)]
  if layout == 'padded_rows':
    groups = [[d for d in documents if d[0] == row] for row in range(len(LENGTHS))]
  else:
    groups = [[d] for d in documents]
  if 'padded' in layout:
    groups = [g for group in groups for g in (group, [])]
  out = make_batch(tuple(tuple(n for *_, n in group) for group in groups), seed=1)
  out = Batch(*map(np.array, out))
  for new_row, group in enumerate(groups):
    at = 0
    for row, old, n in group:
      for field in ('tokens', 'targets'):
        getattr(out, field)[new_row, at : at + n] = getattr(batch, field)[row, old : old + n]
      at += n
  return Batch(*map(jnp.asarray, out))


def law_loss_is_a_mean(stage: str):
  """The step's losses are plain means over what counts, worked out by hand."""
  mode, step = stage_step(stage)
  batch, params = make_batch(LENGTHS), weights()
  _, metrics = step(params, batch)
  out = forward(params, batch, mode)
  head, softcap = params['head'][...], CFG.logit_softcap
  nats = np.asarray(score_targets(out.hidden, head, batch.targets, softcap=softcap)[0])
  lm = [nats[0, :16], nats[0, 17:28], nats[1, :20], nats[1, 21:25]]
  assert_close(metrics['lm_loss'], np.concatenate(lm).mean())
  kl = np.asarray(out.index_kl)
  assert_close(metrics['index_kl'], (kl[:, 0].sum(-1) + kl[:, 1, :26].sum(-1)) / (29 + 26))
  assert_zero(kl[:, 1, 26:])


# Experts.


def law_bias_balances():
  """The step moves each selection bias by the rate: up where few tokens came, else down."""
  mode, step = stage_step('dense')
  batch, params = make_batch(LENGTHS), weights()
  after, _ = step(params, batch)
  n_tokens = float(np.sum(batch.end > batch.start))
  for stack, load in forward(params, batch, mode).expert_load.items():
    load = np.asarray(load)
    assert_close(load.sum(-1), np.full(len(load), n_tokens * CFG.n_activated_experts))
    old, new = (getattr(model_of(p), stack).ffn.bias[...] for p in (params, after))
    want = OPTIM.bias_rate * np.sign(load.mean(-1, keepdims=True) - load)
    np.testing.assert_allclose(np.asarray(new - old), want, atol=1e-6)


def law_balance_converges():
  """Repeated, the bias spreads the load."""
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(256, 8)) + 2 * rng.normal(size=8), jnp.float32)
  bias, imbalance = jnp.zeros(8), []
  for _ in range(60):
    load = jnp.bincount(route(logits, bias, CFG)[0].ravel(), length=8).astype(jnp.float32)
    imbalance.append(float(load.max() / load.mean()))
    bias = balance(bias, load, 0.02)
  assert imbalance[-1] < 0.5 * (1 + imbalance[0]), (imbalance[0], imbalance[-1])
