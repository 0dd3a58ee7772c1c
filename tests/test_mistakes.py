# SPDX-License-Identifier: Apache-2.0
"""The classic mistakes, seeded one at a time: a law or a golden test must catch each."""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from dsa_jax import selection
from dsa_jax.config import ModelConfig
from dsa_jax.kernels import index_scores
from dsa_jax.kernels.index_kl import op as index_kl_op, reference as index_kl_reference
from dsa_jax.kernels.index_topk import xla as index_topk_xla
from dsa_jax.kernels.mean_attention import mean_attention
from dsa_jax.kernels.visibility import selected_keys, visible_keys
from dsa_jax.nn import indexer, layers, moe, norms, scan, transformer
from dsa_jax.nn.attention import attend, divergence, mla
from dsa_jax.params import IndexerParam
from dsa_jax.selection import lightning
from dsa_jax.training import stages, step as train_step

check = functools.partial(golden.check_forward, measured=False)  # Measures are no part of the model.
sparse, masked, dense = (functools.partial(check, attention, 'xla') for attention in ('sparse', 'masked', 'dense'))


pytestmark = pytest.mark.usefixtures('eager')


MISTAKES = {}


def mistake(*caught_by):
  """Registers a function that breaks the package; each of these checks must notice."""

  def register(seed):
    MISTAKES[seed.__name__] = seed, caught_by
    return seed

  return register


def law(name: str, *args):
  return functools.partial(getattr(laws, f'law_{name}'), *args)


def wrap(patch, owner, name: str, make):
  """Replaces `owner.name` by `make(the original)`."""
  patch.setattr(owner, name, make(getattr(owner, name)))


class Overlay:
  """A module with some of its names replaced, for one importer only."""

  def __init__(self, module, **names):
    self._module = module
    self.__dict__.update(names)

  def __getattr__(self, name):
    return getattr(self._module, name)


def without_stop_gradient(patch, *modules):
  lax = Overlay(jax.lax, stop_gradient=lambda x: x)
  for module in modules:
    patch.setattr(module, 'jax', Overlay(jax, lax=lax))


# Selection.


@mistake(sparse)
def budget_smaller_by_one(patch):
  def make(index_topk):
    def wrong(*args, topk, **kwargs):
      indices = index_topk(*args, topk=topk - 1, **kwargs)
      return jnp.pad(indices, ((0, 0), (0, 0), (0, 1)), constant_values=-1)

    return wrong

  wrap(patch, lightning, 'index_topk', make)


@mistake(sparse, law('all_selected_is_dense', 'xla', 'sparse'))
def row_shorter_than_budget_loses_a_key(patch):
  make = lambda index_topk: lambda *args, **kwargs: index_topk(*args, **kwargs).at[..., 0].set(-1)
  wrap(patch, lightning, 'index_topk', make)


@mistake(sparse)
def ties_to_the_highest(patch):
  def make(best_positions):
    def wrong(values, k, **kwargs):
      n = values.shape[-1]
      positions = best_positions(values[..., ::-1], k, **kwargs)
      positions = jnp.sort(jnp.where(positions < 0, n, n - 1 - positions), axis=-1)
      return jnp.where(positions < n, positions, -1)

    return wrong

  wrap(patch, index_topk_xla, 'best_positions', make)


@mistake(sparse)
def own_position_is_forced(patch):
  def make(score):
    def wrong(q, k, weights, first, step):
      found = score(q, k, weights, first, step)  # [B, T, size, step], of one block of rows.
      size = found.shape[2]
      position = (first + jnp.arange(step)) * size + jnp.arange(size)[:, None]
      own = position == jnp.arange(q.shape[1])[:, None, None]
      return jnp.where(own, 1e9, found)

    return wrong

  wrap(patch, index_topk_xla, '_score_interleaved', make)


@mistake(law('selection_reaches_output', 'xla', 'sparse'), sparse)
def selection_is_dead(patch):
  rules = {**selection.RULES, 'indexer': selection.RULES['window_sinks']}
  patch.setattr(selection, 'RULES', rules)  # Setting an item would forget all that is compiled.


@mistake(law('selection_reaches_output', 'xla', 'masked'), masked)
def mask_is_ignored(patch):
  make = lambda attend: lambda *args, indices=None, **kwargs: attend(*args, **kwargs)
  wrap(patch, attend, 'dense_attention', make)


@mistake(law('no_future', 'xla', 'sparse'), sparse)
def future_visible_to_the_indexer(patch):
  def make(index_topk):
    def wrong(q, k, weights, start, end, **kwargs):
      return index_topk(q, k, weights, start, jnp.full_like(end, k.shape[1]), **kwargs)

    return wrong

  wrap(patch, lightning, 'index_topk', make)


@mistake(law('no_future', 'xla', 'dense'), dense)
def future_visible_to_attention(patch):
  def make(attend):
    def wrong(q, k, v, start, end, **kwargs):
      return attend(q, k, v, start, jnp.full_like(end, k.shape[1]), **kwargs)

    return wrong

  wrap(patch, attend, 'dense_attention', make)


@mistake(law('packed_is_alone', 'xla', 'sparse'), sparse)
def document_ignored_by_the_indexer(patch):
  def make(index_topk):
    def wrong(q, k, weights, start, end, **kwargs):
      return index_topk(q, k, weights, jnp.zeros_like(start), end, **kwargs)

    return wrong

  wrap(patch, lightning, 'index_topk', make)


@mistake(law('packed_is_alone', 'xla', 'dense'), dense)
def document_ignored_by_attention(patch):
  def make(attend):
    def wrong(q, k, v, start, end, **kwargs):
      return attend(q, k, v, jnp.zeros_like(start), end, **kwargs)

    return wrong

  wrap(patch, attend, 'dense_attention', make)


# The indexer.


@mistake(sparse)
def relu_dropped(patch):
  patch.setattr(jax.nn, 'relu', lambda x: x)


@mistake(sparse)
def relu_after_the_sum(patch):
  patch.setattr(jax.nn, 'relu', lambda x: x)
  make = lambda weigh: lambda *args, **kwargs: jnp.maximum(weigh(*args, **kwargs), 0)
  wrap(patch, index_topk_xla, 'weigh', make)


@mistake(sparse)
def index_rope_interleaved(patch):
  make = lambda rope: lambda *args, interleaved: rope(*args, interleaved=True)
  wrap(patch, indexer, 'apply_rope', make)


@mistake(sparse)
def index_rope_on_the_last_channels(patch):
  def wrong(self, x, positions):
    width = self.cfg.index_rope_dim
    nope, rope = jnp.split(x, [x.shape[-1] - width], axis=-1)
    frequencies = indexer.index_rope_frequencies(self.cfg, width)
    rope = indexer.apply_rope(rope, positions, frequencies, interleaved=False)
    return jnp.concatenate([nope, rope], axis=-1)

  patch.setattr(indexer.LightningIndexer, '_rotate', wrong)


@mistake(sparse)
def rms_norm_on_index_keys(patch):
  def wrong(self, x):
    y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
    return y * self.scale[...] + self.bias[...]

  patch.setattr(norms.LayerNorm, '__call__', wrong)


@mistake(sparse)
def layer_norm_without_bias(patch):
  make = lambda norm: lambda self, x: norm(self, x) - self.bias[...]
  wrap(patch, norms.LayerNorm, '__call__', make)


@mistake(sparse, dense)
def index_query_from_the_raw_latent(patch):
  last = {}

  def keep(norm):
    def wrong(self, x):
      last[x.shape[-1]] = x
      return norm(self, x)

    return wrong

  def swap(index):
    return lambda self, x, q_latent, positions: index(self, x, last[q_latent.shape[-1]], positions)

  wrap(patch, norms.RMSNorm, '__call__', keep)
  wrap(patch, indexer.LightningIndexer, '__call__', swap)


@mistake(functools.partial(check, 'sparse', 'xla', laws.TWO_SIZES))
def the_indexer_reads_the_latent_before_it_is_rescaled(patch):
  """All scores shrink alike, so the divergence alone can tell."""
  shorter = lambda self, q_latent: q_latent[..., : self.cfg.q_latent_dim] * (16 / 24) ** 0.5
  patch.setattr(mla.MLA, 'index_latent', shorter)


@mistake(functools.partial(check, 'sparse', 'xla', laws.SINKS))
def index_keys_have_the_usual_eps(patch):
  """All keys shrink alike, so again only the divergence can tell."""

  def make(norm):
    def wrong(self, x):
      usual = norms.LayerNorm(x.shape[-1], kind=IndexerParam, eps=1e-6)
      usual.scale, usual.bias = self.scale, self.bias
      return norm(usual, x)

    return wrong

  wrap(patch, norms.LayerNorm, '__call__', make)


def named_sources():
  with laws.model(laws.TWO_SOURCES):
    check('sparse', 'xla', laws.TWO_SOURCES)


@mistake(named_sources)
def layers_read_the_last_rows_of_their_kind(patch):
  """As `transformers` 5.24 does in Mistral Large 4; layer 2 then reads layer 1."""

  def make(kind_of):
    return lambda cfg, i: kind_of(dataclasses.replace(cfg, kv_sources=(0, 1, 1, 1)), i)

  for module in (layers, scan, transformer):
    wrap(patch, module, 'kind_of', make)


def _with_weights(patch, change):
  def make(index):
    def wrong(self, x, q_latent, positions):
      out = index(self, x, q_latent, positions)
      return out._replace(weights=change(out.weights, self.cfg))

    return wrong

  wrap(patch, indexer.LightningIndexer, '__call__', make)


@mistake(sparse, dense)
def index_scale_missing(patch):
  # The selection cannot tell: only the divergence does.
  _with_weights(patch, lambda w, cfg: w * (cfg.index_n_heads * cfg.index_head_dim) ** 0.5)


@mistake(sparse)
def softmax_on_head_weights(patch):
  _with_weights(patch, lambda w, cfg: jax.nn.softmax(w, axis=-1))


# The indexer's loss.


def _kl(patch, change):
  """Replaces the loss by `change(target, log_probs over the same keys, scores, visible)`."""

  def wrong(q, k, lse, *index, sm_scale, indices=None, n_selections, backend):
    assert n_selections == 1
    *index, start, end = index
    visible = visible_keys(start, end, jnp.arange(k.shape[1]))
    seen = visible if indices is None else visible & selected_keys(indices, k.shape[1])
    target = jax.lax.stop_gradient(mean_attention(q, k, lse, seen, sm_scale))
    scores = index_scores(*index)
    log_probs = lambda where: scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True, where=where)
    return change(target, log_probs, seen, visible)

  patch.setattr(divergence, 'index_kl', wrong)


def _divergence(p, log_p, log_q, where):
  return jnp.sum(jnp.where(where, p * (log_p - log_q), 0), axis=-1)


def _log(p):
  return jnp.log(jnp.where(p > 0, p, 1))


def kl_as_it_is(patch):
  """No mistake: `_kl` itself must pass what its mistakes fail."""
  _kl(patch, lambda p, log_q, seen, _: _divergence(p, _log(p), log_q(seen), p > 0))


@mistake(sparse, dense)
def kl_direction_swapped(patch):
  def change(p, log_q, seen, _):
    return _divergence(jnp.exp(log_q(seen)), log_q(seen), _log(p), p > 0)

  _kl(patch, change)


@mistake(sparse)
def kl_over_all_keys_in_sparse_training(patch):
  _kl(patch, lambda p, log_q, _, visible: _divergence(p, _log(p), log_q(visible), p > 0))


@mistake(sparse)
def kl_target_summed_over_heads(patch):
  heads = laws.CFG.n_heads
  _kl(patch, lambda p, log_q, seen, _: _divergence(heads * p, _log(heads * p), log_q(seen), p > 0))


@mistake(sparse)
def kl_target_is_a_softmax_of_the_mean(patch):
  def change(p, log_q, seen, _):
    p = jnp.where(seen, jax.nn.softmax(jnp.where(seen, p, -jnp.inf), axis=-1), 0)
    return _divergence(p, _log(p), log_q(seen), p > 0)

  _kl(patch, change)


@mistake(law('own_losses_only', 'xla', 'dense'), law('own_losses_only', 'xla', 'sparse'))
def indexer_leaks_into_the_backbone(patch):
  without_stop_gradient(patch, indexer)


@mistake(law('kl_target_is_constant', 'reference'))
def kl_target_not_constant(patch):
  without_stop_gradient(patch, index_kl_op, index_kl_reference)


# Attention.


@mistake(sparse, dense)
def mla_rope_in_halves(patch):
  make = lambda rope: lambda *args, interleaved: rope(*args, interleaved=False)
  wrap(patch, mla, 'apply_rope', make)


@mistake(law('positions_restart'))
def positions_run_on(patch):
  # Rotations are relative: no output can tell, but a cache of keys could not be shared.
  def make(rope):
    def wrong(x, positions, *args, **kwargs):
      return rope(x, jnp.broadcast_to(jnp.arange(x.shape[1]), positions.shape), *args, **kwargs)

    return wrong

  wrap(patch, mla, 'apply_rope', make)
  wrap(patch, indexer, 'apply_rope', make)


@mistake(sparse)
def softmax_scale_of_the_absorbed_width(patch):
  scale = lambda self: (self.kv_lora_rank + self.qk_rope_head_dim) ** -0.5
  patch.setattr(ModelConfig, 'sm_scale', property(scale))


@mistake(law('masked_is_sparse', 'xla'), sparse)
def softmax_scale_of_the_absorbed_width_in_sparse_only(patch):
  def make(attend):
    return lambda q, *args, sm_scale, **kwargs: attend(
        q, *args, sm_scale=q.shape[-1] ** -0.5, **kwargs
    )

  wrap(patch, attend, 'sparse_attention', make)


@mistake(sparse)
def yarn_factor_missing_from_the_scale(patch):
  scale = lambda self: (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
  patch.setattr(ModelConfig, 'sm_scale', property(scale))


@mistake(sparse)
def frequencies_without_yarn(patch):
  def wrong(cfg, width):
    return cfg.rope_theta ** (-np.arange(0, width, 2) / width)

  patch.setattr(mla, 'rope_frequencies', wrong)


# Experts.


def _route(patch, change):
  wrap(patch, moe, 'route', lambda route: functools.partial(change, route))


@mistake(dense)
def router_bias_in_the_gates(patch):
  def change(route, logits, bias, cfg):
    experts, _ = route(logits, bias, cfg)
    gates = jnp.take_along_axis(jax.nn.sigmoid(logits) + bias, experts, axis=-1)
    return experts, cfg.route_scale * gates / gates.sum(axis=-1, keepdims=True)

  _route(patch, change)


@mistake(dense)
def router_bias_ignored(patch):
  _route(patch, lambda route, logits, bias, cfg: route(logits, 0 * bias, cfg))


@mistake(dense)
def groups_ignored(patch):
  def change(route, logits, bias, cfg):
    return route(logits, bias, dataclasses.replace(cfg, n_expert_groups=1, n_limited_groups=1))

  _route(patch, change)


@mistake(dense)
def gates_not_normalised(patch):
  def change(route, logits, bias, cfg):
    experts, _ = route(logits, bias, cfg)
    gates = jnp.take_along_axis(jax.nn.sigmoid(logits), experts, axis=-1)
    return experts, cfg.route_scale * gates

  _route(patch, change)


@mistake(law('bias_balances'))
def bias_moves_towards_the_crowd(patch):
  wrap(patch, train_step, 'balance', lambda move: lambda bias, load, rate: move(bias, load, -rate))


# Layers of unlike kinds.

mixed = functools.partial(dense, cfg=laws.MIXED)


@mistake(mixed)
def layers_run_in_the_order_of_their_stacks(patch):
  wrap(patch, scan, 'plan', lambda plan: lambda kinds: plan(tuple(sorted(kinds))))


@mistake(mixed)
def reports_are_in_the_order_of_the_group(patch):
  concatenate = lambda *x: jnp.concatenate(x)
  patch.setattr(transformer, 'in_order', lambda results: jax.tree.map(concatenate, *results))


@mistake(mixed)
def every_section_has_the_first_layers_of_a_stack(patch):
  def wrong(blocks, sizes, copies):
    return (jax.tree.map(lambda x: x[:size], blocks) for size in sizes)

  patch.setattr(scan, '_split', wrong)


# The training step.


@mistake(law('own_clipping', 'dense'))
def gradients_clipped_together(patch):
  def value_and_grad(f, **kwargs):
    inner = jax.value_and_grad(f, **kwargs)

    def clipped(*args):
      value, grads = inner(*args)
      norm = jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(grads)))
      return value, jax.tree.map(lambda g: g / jnp.maximum(norm, 1), grads)

    return clipped

  patch.setattr(train_step, 'jax', Overlay(jax, value_and_grad=value_and_grad))


@mistake(law('loss_scale', 'unpacked', 'warmup'))
def mean_of_each_micro_batch(patch):
  def make(losses):
    def wrong(out, head, rows, totals, *others):
      return losses(out, head, rows, train_step._count(rows), *others)

    return wrong

  wrap(patch, train_step, '_losses', make)


@mistake(law('loss_is_a_mean', 'warmup'))
def padding_counts(patch):
  make = lambda count: lambda rows: count(rows) | {'kl': float(rows.batch.tokens.size)}
  wrap(patch, train_step, '_count', make)


@mistake(law('loss_is_a_mean', 'warmup'))
def targets_across_documents(patch):
  def make(count):
    def wrong(rows):
      batch = rows.batch._replace(weights=jnp.ones_like(rows.batch.weights))
      return count(rows._replace(batch=batch))

    return wrong

  wrap(patch, train_step, '_count', make)


@mistake(law('warmup_is_dense'))
def warmup_is_sparse(patch):
  patch.setitem(stages.STAGES, 'warmup', stages.Stage(('sparse',), ('indexer',)))


@mistake(law('only_trained_parts_move', 'warmup'))
def warmup_trains_everything(patch):
  patch.setitem(stages.STAGES, 'warmup', stages.Stage(('dense',), ('indexer', 'backbone')))


ALL = {id(check): check for _, checks in MISTAKES.values() for check in checks}
GOLDEN = [check for check in ALL.values() if not getattr(check, 'func', check).__name__.startswith('law_')]


@pytest.mark.parametrize('check', GOLDEN)
def test_without_a_mistake(check):
  """A check that fails anyway catches nothing. Laws have tests of their own."""
  check()


@pytest.mark.parametrize('check', [sparse, dense], ids=['sparse', 'dense'])
def test_loss_by_hand_is_no_mistake(check, monkeypatch):
  kl_as_it_is(monkeypatch)
  check()


CASES = [
    pytest.param(seed, check, id=f'{name}-{i}')
    for name, (seed, checks) in MISTAKES.items()
    for i, check in enumerate(checks)
]


@pytest.mark.parametrize('seed, check', CASES)
def test_caught(seed, check, monkeypatch):
  train_step.make_train_step.cache_clear()  # Compiled before the mistake; and with it, below.
  seed(monkeypatch)
  with pytest.raises(AssertionError):
    check()
  train_step.make_train_step.cache_clear()
