# SPDX-License-Identifier: Apache-2.0
"""Mistakes in what tells families apart, seeded one at a time: parity must catch each."""

import dataclasses
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from test_parity import GOLDEN, close, golden

from dsa_jax.config import ModelConfig
from dsa_jax.convert.importer import import_checkpoint, open_source
from dsa_jax.inference.load import load_checkpoint
from dsa_jax.nn import block, indexer, log_scale, mlp, moe, norms, rope, streams, transformer
from dsa_jax.nn.attention import attend, gate, gqa, layer, mla
from dsa_jax.nn.attention.types import Mode
from dsa_jax.nn.transformer import Transformer

FRESH = {'index_n_heads': 2, 'index_head_dim': 8, 'index_rope_head_dim': 4, 'index_topk': 16}
SHORT = 48  # Tokens that are compared: the first ones of a text do not depend on the others.
# Cases with indexers, whose selections are compared, too.
SPARSE = 'axk2', 'axk2_groups', 'hy_v4', 'dots3_note', 'mistral_large4'
NIGHTLY = set()  # Pairs of a mistake and a case.
MISTAKES = {}


def mistake(*cases, nightly=()):
  """Registers a function that breaks the package; parity of each of these cases must notice."""

  def register(seed):
    MISTAKES[seed.__name__] = seed, (*cases, *nightly)
    NIGHTLY.update((seed.__name__, case) for case in nightly)
    return seed

  return register


def wrap(patch, owner, name: str, make):
  """Replaces `owner.name` by `make(the original)`."""
  patch.setattr(owner, name, make(getattr(owner, name)))


@functools.cache
def model_of(case: str) -> Transformer:
  with tempfile.TemporaryDirectory() as folder:
    target = pathlib.Path(folder) / 'ours'
    source = open_source(GOLDEN / case, indexer=None if case in SPARSE else FRESH)
    import_checkpoint(source, target, advance=lambda nbytes: None)
    return load_checkpoint(target)


def check(case: str):
  """Compares logits and selections."""
  want, model = golden(case), model_of(case)
  tokens = jnp.asarray(want['tokens'])[:, :SHORT]
  end = jnp.broadcast_to(jnp.arange(1, SHORT + 1, dtype=jnp.int32), tokens.shape)
  with laws.eager(), laws.unmeasured():
    mode = Mode(attention='dense', backend='xla')
    if case in SPARSE:  # The plain backend has fewer operations.
      mode = Mode(attention='sparse', backend='reference', measure=('indexer',))
    out = model(tokens, jnp.zeros_like(end), end, mode)
  close(out.logits, want['logits'][:, :SHORT])
  if case in SPARSE:
    selected = out.measures('indexer').indices
    np.testing.assert_array_equal(selected, want['selected'][:, :, :SHORT])


# Heads.


@mistake('llama', 'qwen3')
def heads_of_a_group_lie_apart(patch):
  def make(attend):
    def wrong(q, k, v, *args, **kwargs):
      tile = lambda x: jnp.tile(x, (1, 1, q.shape[2] // x.shape[2], 1))
      return attend(q, tile(k), tile(v), *args, **kwargs)

    return wrong

  wrap(patch, attend, 'dense_attention', make)


@mistake('qwen3', 'glm4_moe')
def heads_are_normed_after_their_rotation(patch):
  def queries(self, q_latent, positions):
    return self.q_norm(self._rotate(gqa._project(q_latent, self.wq, self.bq), positions))

  def rows(self, x, positions):
    k = self.k_norm(self._rotate(gqa._project(x, self.wk, self.bk), positions))
    return jnp.concatenate([gqa._project(x, self.wv, self.bv), k], axis=-1)

  patch.setattr(gqa.GQA, 'queries', queries)
  patch.setattr(gqa.GQA, 'rows', rows)


@mistake('qwen3', 'glm4_moe')
def keys_are_not_normed(patch):
  def rows(self, x, positions):
    k = self._rotate(gqa._project(x, self.wk, self.bk), positions)
    return jnp.concatenate([gqa._project(x, self.wv, self.bv), k], axis=-1)

  patch.setattr(gqa.GQA, 'rows', rows)


@mistake('qwen2', 'glm4_moe')
def biases_are_dropped(patch):
  wrap(patch, gqa, '_project', lambda project: lambda x, weight, bias: project(x, weight, None))


@mistake('llama_tied', 'smollm3')
def head_is_untied(patch):
  other = lambda self: 0.02 * jax.random.normal(jax.random.key(0), self.embed.shape[::-1])
  patch.setattr(Transformer, 'head_weight', property(other))


@mistake('llama', 'qwen2')
def norms_have_the_usual_eps(patch):
  def wrong(self, x):
    return norms._rms_norm(x, self.scale[...], 1e-6)

  patch.setattr(norms.RMSNorm, '__call__', wrong)


@mistake('mistral_windows', 'qwen3_windows', 'dots3_note')
def windows_are_longer_by_one(patch):
  wrong = lambda self, start, end: jnp.maximum(start, end - self.window - 1) if self.window else start
  patch.setattr(layer.Attention, 'first_seen', wrong)


@mistake('qwen3_windows')
def all_layers_have_windows(patch):
  wrong = lambda self, start, end: jnp.maximum(start, end - self.cfg.sliding_window)
  patch.setattr(layer.Attention, 'first_seen', wrong)


# Rotation.


@mistake('llama', 'glm4_moe')
def neighbours_are_rotated(patch):
  make = lambda rope: lambda *args, interleaved: rope(*args, interleaved=True)
  wrap(patch, gqa, 'apply_rope', make)


@mistake('deepseek_v2', 'moonlight', nightly=['mistral_large4'])
def halves_are_rotated_in_mla(patch):
  make = lambda rope: lambda *args, interleaved: rope(*args, interleaved=False)
  wrap(patch, mla, 'apply_rope', make)


@mistake('llama')
def llama3_wavelengths_lack_two_pi(patch):
  slowness = rope.SLOWNESS['llama3']
  wrong = lambda cfg, frequencies: slowness(cfg, 2 * np.pi * frequencies)
  patch.setitem(rope.SLOWNESS, 'llama3', wrong)


@mistake('llama')
def llama3_does_not_blend(patch):
  make = lambda slowness: lambda *args: np.round(slowness(*args))
  patch.setitem(rope.SLOWNESS, 'llama3', make(rope.SLOWNESS['llama3']))


@mistake('llama', 'llama_tied', 'qwen2', 'deepseek_v2', nightly=['mistral_large4'])
def positions_are_not_scaled(patch):
  zero = lambda cfg, frequencies: np.zeros_like(frequencies)
  for kind in rope.SLOWNESS:
    patch.setitem(rope.SLOWNESS, kind, zero)


@mistake('qwen2', 'deepseek_v2')
def yarn_leaves_the_softmax_scale(patch):
  patch.setattr(ModelConfig, 'sm_scale', property(lambda self: self.head_dim**-0.5))


@mistake('deepseek_v2_groups')
def mscale_is_one(patch):
  make = lambda scale: property(lambda self: scale.fget(dataclasses.replace(self, mscale=1.0)))
  wrap(patch, ModelConfig, 'sm_scale', make)


@mistake('smollm3')
def all_layers_rotate(patch):
  positions = lambda self, start, end: jnp.maximum(end - 1 - start, 0)
  patch.setattr(layer.Attention, 'positions', positions)


@mistake('glm4_moe')
def the_last_channels_are_rotated(patch):
  def make(rotate):
    return lambda self, x, positions: rotate(self, x[..., ::-1], positions)[..., ::-1]

  wrap(patch, gqa.GQA, '_rotate', make)


@mistake('glm4_moe')
def frequencies_are_those_of_whole_heads(patch):
  make = lambda of: lambda cfg, width: of(cfg, cfg.head_dim)[: width // 2]
  wrap(patch, gqa, 'rope_frequencies', make)


# Experts.


def _route(patch, **fields):
  """Routes as a model with other fields would."""
  make = lambda route: lambda logits, bias, cfg: route(logits, bias, dataclasses.replace(cfg, **fields))
  wrap(patch, moe, 'route', make)


@mistake('qwen3_moe_plain', 'deepseek_v2')
def softmax_comes_after_the_choice(patch):
  def make(route):
    def wrong(logits, bias, cfg):
      experts, _ = route(logits, bias, cfg)
      return experts, cfg.route_scale * jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1))

    return wrong

  wrap(patch, moe, 'route', make)


@mistake('deepseek_v2_groups')
def groups_score_by_two_experts(patch):
  _route(patch, topk_method='noaux_tc')


@mistake('glm4_moe', nightly=['mistral_large4'])
def groups_score_by_one_expert(patch):
  _route(patch, topk_method='group_limited_greedy')


@mistake('deepseek_v2_groups', 'glm4_moe', nightly=['mistral_large4'])
def groups_limit_nothing(patch):
  _route(patch, topk_method='greedy')


@mistake('qwen3_moe', 'moonlight', nightly=['mistral_large4'])
def gates_do_not_add_up_to_one(patch):
  _route(patch, norm_topk_prob=False)


@mistake('qwen3_moe_plain', 'deepseek_v2')
def gates_add_up_to_one(patch):
  _route(patch, norm_topk_prob=True)


@mistake('moonlight', 'glm4_moe')
def router_has_a_softmax(patch):
  _route(patch, score_func='softmax')


@mistake('qwen3_moe', 'deepseek_v2', nightly=['mistral_large4'])
def router_has_sigmoids(patch):
  _route(patch, score_func='sigmoid')


@mistake('deepseek_v2', 'moonlight')
def gates_are_not_scaled(patch):
  _route(patch, route_scale=1.0)


@mistake('axk2_groups')
def experts_of_dropped_groups_cannot_be_chosen(patch):
  _route(patch, zero_dropped_groups=False)


# Gates.


@mistake('axk2')
def gates_are_from_the_normed_latent_alone(patch):
  def query_latent(self, x):
    latent = self.q_norm(x @ self.wq_a[...])
    return jnp.concatenate([latent, latent], axis=-1)

  patch.setattr(mla.MLA, 'query_latent', query_latent)


@mistake('axk2')
def the_raw_latent_comes_first(patch):
  def query_latent(self, x):
    raw = x @ self.wq_a[...]
    return jnp.concatenate([raw, self.q_norm(raw)], axis=-1)

  patch.setattr(mla.MLA, 'query_latent', query_latent)
  last = lambda self, q_latent: q_latent[..., self.cfg.q_latent_dim :]
  patch.setattr(mla.MLA, 'index_latent', last)  # The indexer reads the normed one as before.


@mistake('axk2')
def the_indexer_reads_the_raw_latent(patch):
  last = lambda self, q_latent: q_latent[..., self.cfg.q_latent_dim :]
  patch.setattr(mla.MLA, 'index_latent', last)


@mistake('axk2')
def the_indexer_rotates_neighbours(patch):
  make = lambda rope: lambda *args, interleaved: rope(*args, interleaved=True)
  wrap(patch, indexer, 'apply_rope', make)


@mistake('axk2')
def gates_come_before_their_queries(patch):
  def _query_weights(self, dtype):
    gates, queries = jnp.split(self.wq_b[...].astype(dtype), [self.cfg.v_head_dim], axis=-1)
    return queries, gates

  patch.setattr(mla.MLA, '_query_weights', _query_weights)


@mistake('axk2')
def latents_are_gated_in_place_of_values(patch):
  def from_rows(self, out, q_latent, lse):
    logits = self.gate_logits(q_latent)
    wide = jnp.resize(logits, (*logits.shape[:-1], out.shape[-1]))  # There are fewer values.
    values = jnp.einsum('BTHC,CHV->BTHV', gate.gated(out, wide), self._expansion(out.dtype)[1])
    return jnp.einsum('BTHV,HVD->BTD', values, self.wo[...])

  patch.setattr(mla.MLA, 'from_rows', from_rows)


@mistake('axk2', nightly=['dots3_note'])
def outputs_have_no_gates(patch):
  patch.setattr(layer, 'gated', lambda out, logits: out)


@mistake('axk2')
def norms_have_no_gates(patch):
  patch.setattr(norms, '_through_gates', lambda y, w_down, w_up: y)


@mistake('axk2')
def gates_of_norms_are_linear_inside(patch):
  def wrong(y, w_down, w_up):
    return y * jax.nn.sigmoid(y @ w_down @ w_up)

  patch.setattr(norms, '_through_gates', wrong)


def _more_gates(patch, applies):
  """Gates the plain norms that `applies` is true of."""

  def make(call):
    def wrong(self, x):
      y = call(self, x)
      if type(self) is not norms.RMSNorm or not applies(self, x):
        return y
      keys = jax.random.split(jax.random.key(0))
      w_down = jax.random.normal(keys[0], (x.shape[-1], 4)) * x.shape[-1] ** -0.5
      return norms._through_gates(y, w_down, jax.random.normal(keys[1], w_down.shape[::-1]))

    return wrong

  wrap(patch, norms.RMSNorm, '__call__', make)


@mistake('axk2_groups')
def the_final_norm_has_gates(patch):
  _more_gates(patch, lambda norm, x: x.shape[-1] == 32)  # No layer of this case has an MLP.


@mistake('axk2')
def norms_before_an_mlp_have_gates(patch):
  def make(feed_forward):
    def wrong(self, x, counted, backend):
      if isinstance(self.ffn, moe.MoE):
        return feed_forward(self, x, counted, backend)
      with pytest.MonkeyPatch.context() as inside:
        _more_gates(inside, lambda norm, x: norm is self.ffn_norm)
        return feed_forward(self, x, counted, backend)

    return wrong

  wrap(patch, block.Block, 'feed_forward', make)


@mistake('axk2')
def latents_have_the_eps_of_all_norms(patch):
  make = lambda norm: lambda x, scale, eps: norm(x, scale, max(eps, 1e-3))
  wrap(patch, norms, '_rms_norm', make)


@mistake('hy_v4')
def gates_come_from_the_query_latent(patch):
  def gate_logits(self, q_latent):
    latent = jnp.resize(q_latent[..., : self.cfg.q_latent_dim], (*q_latent.shape[:2], self.cfg.dim))
    return jnp.einsum('BTD,DHV->BTHV', latent, self.wg[...])

  patch.setattr(mla.MLA, 'gate_logits', gate_logits)


@mistake('hy_v4')
def heads_have_no_sinks(patch):
  patch.setattr(layer, 'beside_sinks', lambda out, lse, sinks: out)


@mistake('hy_v4')
def sinks_add_to_the_sum_as_they_are(patch):
  """The sum of exponentials grows by the sink in place of its exponential."""
  patch.setattr(layer, 'beside_sinks', lambda out, lse, sinks: gate.beside_sinks(out, lse, jnp.log(sinks)))


@mistake('hy_v4')
def the_indexer_rotates_its_first_channels(patch):
  wrong = lambda self: dataclasses.replace(self._cfg, index_rope_last=False)
  patch.setattr(indexer.LightningIndexer, 'cfg', property(wrong))


@mistake('hy_v4')
def neighbours_are_rotated_in_mla(patch):
  make = lambda rope: lambda *args, interleaved: rope(*args, interleaved=True)
  wrap(patch, mla, 'apply_rope', make)


@mistake('hy_v4')
def experts_have_no_limit(patch):
  def make(apply):
    def wrong(*args):
      *arrays, cfg, backend = args
      return apply(*arrays, dataclasses.replace(cfg, swiglu_limit=0.0), backend)

    return wrong

  wrap(patch, moe, '_apply', make)


@mistake('hy_v4')
def every_mlp_has_the_limit(patch):
  def make(swiglu):
    return lambda gate, up: swiglu(jnp.minimum(gate, 0.4), jnp.clip(up, -0.4, 0.4))

  wrap(patch, mlp, 'swiglu', make)


@mistake('hy_v4')
def streams_are_mapped_without_their_norm(patch):
  def _logits(self, x, kind):
    n = x.shape[2]
    own = slice(kind * n, (kind + 1) * n)
    logits = jnp.einsum('BTND,NDM->BTM', x, self.map[...][..., own])
    return logits * self.scale[...][kind] + self.base[...][own]

  patch.setattr(streams.Streams, '_logits', _logits)


@mistake('hy_v4')
def streams_take_the_same_of_an_output(patch):
  patch.setattr(streams.Streams, 'add', lambda self, x, out: x + out[:, :, None])


@mistake('hy_v4')
def streams_are_added_up_at_the_end(patch):
  patch.setattr(Transformer, 'final', lambda self, x: self.norm(x.mean(axis=2)))


@mistake('hy_v4')
def weights_for_writing_come_first(patch):
  make = lambda logits: lambda self, x, kind: logits(self, x, (1 - kind) % self.scale.shape[0])
  wrap(patch, streams.Streams, '_logits', make)


# Two geometries, and what dots3-note does to latents and rotary keys.


@mistake('dots3_note')
def windows_rotate_as_other_layers_do(patch):
  make = lambda of: lambda cfg, width: of(dataclasses.replace(cfg, rope_theta=500.0), width)
  wrap(patch, mla, 'rope_frequencies', make)


@mistake(nightly=['dots3_note'])
def windows_have_the_softmax_scale_of_other_layers(patch):
  patch.setattr(ModelConfig, 'sm_scale', property(lambda self: 20**-0.5))


@mistake('dots3_note')
def latents_are_not_rescaled(patch):
  patch.setattr(mla.MLA, '_rescaled', lambda self, latent: latent)


@mistake(nightly=['dots3_note'])
def rotary_keys_are_not_normed(patch):
  make = lambda norm: lambda self, x: x if x.shape[-1] in (6, 8) else norm(self, x)
  wrap(patch, norms.RMSNorm, '__call__', make)


@mistake('dots3_note')
def rotary_keys_are_normed_after_their_rotation(patch):
  def rows(self, x, positions):
    latent, rope = jnp.split(x @ self.wkv_a[...], [self.cfg.kv_lora_rank], axis=-1)
    rope = self.k_rope_norm(self._rotate(rope[:, :, None], positions))
    return jnp.concatenate([self._rescaled(self.kv_norm(latent))[:, :, None], rope], axis=-1)

  patch.setattr(mla.MLA, 'rows', rows)


@mistake(nightly=['dots3_note', 'mistral_large4'])
def latents_have_an_eps_of_their_own(patch):
  make = lambda norm: lambda x, scale, eps: norm(x, scale, eps if x.shape[-1] == 32 else 1e-6)
  wrap(patch, norms, '_rms_norm', make)


@mistake('dots3_note')
def all_heads_have_one_gate(patch):
  mean = lambda logits: jnp.broadcast_to(logits.mean(axis=2, keepdims=True), logits.shape)
  patch.setattr(layer, 'gated', lambda out, logits: gate.gated(out, mean(logits)))


@mistake('dots3_note', nightly=['mistral_large4'])
def the_indexer_rotates_halves(patch):
  make = lambda rope: lambda *args, interleaved: rope(*args, interleaved=False)
  wrap(patch, indexer, 'apply_rope', make)


@mistake(nightly=['dots3_note'])
def the_indexer_rotates_its_last_channels(patch):
  wrong = lambda self: dataclasses.replace(self._cfg, index_rope_last=True)
  patch.setattr(indexer.LightningIndexer, 'cfg', property(wrong))


# What Mistral Large 4 does to queries, frequencies and logits.


@mistake('mistral_large4')
def logits_are_not_capped(patch):
  patch.setattr(transformer, 'softcapped', lambda products, limit: products)


@mistake('mistral_large4')
def yarn_scales_attention(patch):
  make = lambda scale: property(lambda self: scale.fget(dataclasses.replace(self, mscale=1.0)))
  wrap(patch, ModelConfig, 'sm_scale', make)


def _same_length(patch, n_heads: int):
  """Leaves queries of so many heads as long as they are."""
  make = lambda grow: lambda self, q, positions: q if q.shape[2] == n_heads else grow(self, q, positions)
  wrap(patch, log_scale.LogScale, '__call__', make)


@mistake('mistral_large4')
def index_queries_do_not_grow(patch):
  _same_length(patch, 16)


@mistake(nightly=['mistral_large4'])
def queries_do_not_grow(patch):
  _same_length(patch, 4)


@mistake(nightly=['mistral_large4'])
def queries_grow_from_position_one_on(patch):
  make = lambda grow: lambda self, q, positions: grow(self, q, jnp.maximum(positions - 1, 0))
  wrap(patch, log_scale.LogScale, '__call__', make)


@mistake('mistral_large4')
def index_queries_come_from_what_is_not_normed(patch):
  make = lambda norm: lambda self, x: x if x.shape[-1] == 32 else norm(self, x)
  wrap(patch, norms.LayerNorm, '__call__', make)


@mistake('mistral_large4')
def frequencies_have_no_learned_factors(patch):
  patch.setattr(mla, 'scaled', lambda frequencies, log_factors: frequencies)


@mistake(nightly=['mistral_large4'])
def frequencies_of_the_indexer_have_no_learned_factors(patch):
  patch.setattr(indexer, 'scaled', lambda frequencies, log_factors: frequencies)


@mistake('mistral_large4')
def the_indexer_rotates_in_all_layers(patch):
  def make(rotate):
    def wrong(self, x, positions, *factors):
      if self.cfg.index_rope_dim:
        return rotate(self, x, positions, *factors)
      rope, nope = jnp.split(x, [8], axis=-1)
      rope = indexer.apply_rope(rope, positions, rope_of(8), interleaved=True)
      return jnp.concatenate([rope, nope], axis=-1)

    return wrong

  rope_of = functools.partial(rope.rope_frequencies, model_of('mistral_large4').cfg)
  wrap(patch, indexer.LightningIndexer, '_rotate', make)


@mistake(nightly=['mistral_large4'])
def queries_rotate_in_all_layers(patch):
  """Those of layers without positions, whose last channels are where others rotate."""

  def make(queries):
    def wrong(self, q_latent, positions):
      plain, rotated = queries(self, q_latent, positions)
      if self.cfg.qk_rope_head_dim:
        return plain, rotated
      first, last = jnp.split(plain, [6], axis=-1)
      last = rope.apply_rope(last, positions, rope_of(8), interleaved=True)
      return jnp.concatenate([first, last], axis=-1), rotated

    return wrong

  rope_of = functools.partial(rope.rope_frequencies, model_of('mistral_large4').cfg)
  wrap(patch, mla.MLA, '_queries', make)


def marks(name: str, case: str):
  return [pytest.mark.nightly] if (name, case) in NIGHTLY else []


CASES = [
    pytest.param(seed, c, id=f'{name}-{c}', marks=marks(name, c))
    for name, (seed, cs) in MISTAKES.items()
    for c in cs
]


ALL = {case for _, cases in MISTAKES.values() for case in cases}


# Dense cases first: they share what a process does once.
@pytest.mark.parametrize('case', sorted(ALL))
def test_without_a_mistake(case):
  check(case)


@pytest.mark.parametrize('seed, case', CASES)
def test_caught(seed, case, monkeypatch):
  model_of(case)  # Loaded before the mistake.
  seed(monkeypatch)
  with pytest.raises(AssertionError):
    check(case)
