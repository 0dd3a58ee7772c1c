# SPDX-License-Identifier: Apache-2.0
"""Costs against arithmetic by hand, at DeepSeek-V3.2's sizes; and against the published curves."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dsa_jax import cost
from dsa_jax.config import ModelConfig
from dsa_jax.cost import __main__ as cost_command, attention_flops, published, work
from dsa_jax.convert.tensors import weight_shapes
from dsa_jax.cost.layer import layer_parts
from dsa_jax.families import SIZES
from dsa_jax.families.deepseek import DEEPSEEK_V32

ROOT = pathlib.Path(__file__).parents[2]
EXPERIMENT = ROOT / 'experiments' / 'cost_claim'
V32 = DEEPSEEK_V32
NO_KERNELS = 'scale', 'bias', 'bq', 'bk', 'bv', 'sinks', 'base', 'rope_factors'  # Added or multiplied by channel.
ONE = dataclasses.replace(V32, n_layers=1, n_dense_layers=1)
TINY = 'configs/deepseek_v32.py:tiny'
CONTEXTS = 1, 1000, 2048, 2049, 7000, 32_768, 131_072

# Context: dense MHA, indexer plus sparse absorbed, MFLOP per token and layer.
TABLE = {4096: (168, 33.6 + 428), 32_768: (1342, 268 + 553), 131_072: (5369, 1074 + 566)}


@pytest.mark.parametrize('context', TABLE)
def test_matches_the_published_arithmetic(context):
  for sparse, expected in zip((False, True), TABLE[context]):
    per_layer = attention_flops(V32, context, sparse=sparse) / V32.n_layers / 1e6
    assert per_layer == pytest.approx(expected, rel=2e-3)


def test_counts_every_key_below_the_budget():
  indexer = 2 * ONE.index_n_heads * ONE.index_head_dim
  absorbed = 2 * ONE.n_heads * (2 * ONE.kv_lora_rank + ONE.qk_rope_head_dim)
  visible = sum(range(1, 101)) / 100
  assert attention_flops(ONE, 100, sparse=True) == pytest.approx((indexer + absorbed) * visible)


def test_flops_per_pair():
  assert work.index_flops(V32) == 16_384
  assert work.row_flops(V32) == 278_528
  assert work.mha_flops(V32) == 81_920


def test_bytes_of_the_caches():
  assert work.row_bytes(V32, 'fp8') == 656
  assert work.index_key_bytes(V32, 'fp8') == 132
  assert cost.cache_bytes(V32, 'fp8') == 48_068
  assert work.row_bytes(V32, 'bf16') == 1152
  assert work.index_key_bytes(V32, 'bf16') == 256


def test_grouped_queries_by_hand():
  """Llama 3 8B: 32 heads of 128 channels share 8 key heads, in 32 layers of width 4096."""
  llama = SIZES['llama3_8b']
  assert work.row_flops(llama) == work.mha_flops(llama) == 2 * 32 * (128 + 128)
  assert work.row_bytes(llama, 'bf16') == 2 * 8 * (128 + 128)
  assert work.row_bytes(llama, 'fp8') == 8 * (128 + 128) + 16 * 4
  weights = 4096 * 32 * 128 + 2 * 4096 * 8 * 128 + 32 * 128 * 4096
  assert of('projections', llama, sparse=False).flops == 2 * 32 * weights


def test_gates_by_hand():
  """A.X-K2-Light: 32 heads of 64 + 32 + 64 channels of two latents of 384; 95 norms of rank 16."""
  light = SIZES['axk2_light']
  assert work.row_bytes(light, 'bf16') + work.index_key_bytes(light, 'bf16') == 576
  latents = 2048 * 384 + 2048 * (128 + 32) + 128 * 32 * (64 + 64)
  weights = latents + 2 * 384 * 32 * (64 + 32 + 64) + 32 * 64 * 2048
  assert of('projections', light, sparse=False).flops == 2 * 48 * weights
  assert of('gated norms', light, sparse=False).flops == 2 * (48 + 47) * 2 * 2048 * 16


def test_layers_of_two_sizes_by_hand():
  """dots3-note: 13 layers of 128 heads select, and 33 of 64 heads have windows of 513 tokens."""
  dots, n = SIZES['dots3_note'], 131_072
  assert cost.cache_bytes(dots, 'bf16') == 2 * (13 * (512 + 64 + 128) + 33 * (1024 + 64))
  windows = of('windows', dots, sparse=True, cache='bf16', context=n)
  assert windows.flops == 33 * 513 * 2 * 64 * (1024 + 64 + 1024)
  assert windows.bytes == 33 * 513 * 2 * (1024 + 64)
  assert of('attention', dots, sparse=True, context=n).flops == 13 * 2048 * 2 * 128 * (512 + 64 + 512)
  selecting = 5120 * (1024 + 576 + 128) + 128 * (1024 * 192 + 512 * 256 + 128 * 5120)
  near = 5120 * (1024 + 1088 + 64) + 64 * (1024 * 256 + 1024 * 320 + 128 * 5120)
  assert of('projections', dots, sparse=True).flops == 2 * (13 * selecting + 33 * near)
  used = sum(w.flops for w in work.token_work(dots, 1, sparse=True, form='mqa') if w.kind == 'weights')
  assert round(used / 2e9 + dots.vocab_size * dots.dim / 1e9) == 16  # Billions, as the card says.


def test_layers_without_rotary_keys_and_layers_without_rows_by_hand():
  """Of 61 layers, four rotate nothing, and one of these and one of the others read earlier rows."""
  sources = [{60: 50, 59: 49}.get(i, i) for i in range(61)]
  nope = dict(nope_layers=(10, 20, 50, 60), nope_layers_expand=True)
  cfg = dataclasses.replace(V32, **nope, kv_sources=sources)
  key = 132  # Every layer selects for itself.
  assert cost.cache_bytes(cfg, 'fp8') == 61 * key + 59 * 656
  layer = lambda *parts: 2 * sum(parts)
  of_all, of_cfg = (of('projections', x, sparse=True).flops for x in (V32, cfg))
  expansion = 512 * 128 * 64  # Keys of heads have 64 channels more, which latents make.
  assert of_cfg - of_all == 4 * layer(expansion - 7168 * 64) - layer(7168 * 576, 7168 * 512)


def test_latents_that_nine_layers_read_by_hand():
  """Mistral Large 4: nine of 72 layers keep an index key alone. 18 have keys of latents alone."""
  large = SIZES['mistral_large4']
  assert cost.cache_bytes(large, 'bf16') == 2 * (63 * (512 + 64) + 72 * 128)
  assert cost.cache_bytes(large, 'fp8') == 63 * 656 + 72 * 132
  shared = dataclasses.replace(large, indexer_types=('full', *['shared'] * 3) * 18)
  assert cost.cache_bytes(shared, 'fp8') == 63 * 656 + 18 * 132
  both = 6144 * 64 * 128 + 64 * 128 * 6144  # Queries and outputs.
  layers = 54 * (6144 * 576 + 512 * 64 * 192) + 18 * 512 * 64 * 256 + 9 * 6144 * 512
  assert of('projections', large, sparse=True).flops == 2 * (72 * both + layers)
  pairs = 2048 * 2 * 64 * (54 * (576 + 512) + 18 * (512 + 512))  # Caches have room for a rotary key in all rows.
  attention = of('attention', large, sparse=True, context=131_072)
  assert (attention.flops, attention.bytes) == (pairs, 72 * 2048 * 656)
  used = sum(w.flops for w in work.token_work(large, 1, sparse=True, form='mqa') if w.kind == 'weights')
  assert round(used / 2e9) == 52  # Billions, as its name says.


@pytest.mark.parametrize('name', SIZES)
def test_weights_are_those_of_the_model(name):
  """All matrices of a model of one layer of each kind, against what a token multiplies with."""
  cfg = SIZES[name]
  both = cfg.n_dense_layers < cfg.n_layers
  windows = (1,) if cfg.window_layers else ()
  cfg = dataclasses.replace(
      cfg, n_layers=2 if both else 1, n_dense_layers=1, indexer_types=(), nope_layers=(),
      nope_layers_expand=False, kv_sources=(),
      n_activated_experts=cfg.n_routed_experts, n_limited_groups=cfg.n_expert_groups,
      window_layers=windows,
  )  # fmt: skip
  kernels = [shape for path, shape in weight_shapes(cfg).items() if path[-1] not in NO_KERNELS]
  embedding = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.dim
  wanted = sum(map(math.prod, kernels)) - embedding
  flops = sum(w.flops for w in work.token_work(cfg, 1, form='mha', sparse=True))
  pairs = len(cfg.full_layers) * (work.mha_flops(cfg) + work.index_flops(cfg))
  pairs += len(windows) * work.mha_flops(cfg.of_windows)
  assert flops - pairs == 2 * wanted


@pytest.mark.parametrize('n_mtp_layers', [0, 1])
def test_an_mlp_costs_the_same_wherever_it_stands(n_mtp_layers):
  leading = dataclasses.replace(V32, n_layers=6, n_dense_layers=3, n_mtp_layers=n_mtp_layers)
  mixed = dataclasses.replace(leading, n_dense_layers=0, mlp_layers=(1, 3, 5))
  for cfg in (leading, mixed):
    shapes = weight_shapes(cfg)
    assert shapes['dense_blocks', 'ffn', 'w1'] == (3, 7168, 18_432)
    assert shapes['moe_blocks', 'ffn', 'w1'] == (3, 256, 7168, 2048)
  works = [work.token_work(cfg, 9, form='mha', sparse=True) for cfg in (leading, mixed)]
  assert works[0] == works[1]
  steps = [
      cost.training_flops(cfg, ('backbone',), np.arange(1, 9), sparse=True) for cfg in (leading, mixed)
  ]
  assert steps[0] == steps[1]


def test_windows_cost_what_they_see():
  """Of 61 layers, 10 have a window of 4096 tokens. Those of neighbouring readers overlap."""
  cfg = dataclasses.replace(V32, window_layers=range(10), sliding_window=4096)
  rest = dataclasses.replace(V32, n_layers=51)
  n = 131_072
  for sparse in (False, True):
    windows = of('windows', cfg, sparse=sparse)
    assert windows.flops == 10 * 4096 * work.row_flops(cfg)
    assert windows.bytes == 10 * 4096 * work.row_bytes(cfg, 'fp8')
    assert of('windows', cfg, sparse=sparse, readers=2).bytes == 10 * 4097 * work.row_bytes(cfg, 'fp8') / 2
    assert of('windows', cfg, sparse=sparse, context=100).flops == 10 * 100 * work.row_flops(cfg)
    assert of('attention', cfg, sparse=sparse) == of('attention', rest, sparse=sparse)
    near = sum(min(i, 4096) for i in range(1, n + 1)) / n
    both = attention_flops(rest, n, sparse=sparse) + 10 * work.mha_flops(cfg) * near
    assert attention_flops(cfg, n, sparse=sparse) == pytest.approx(both)
    seen = np.arange(1, n + 1)
    pairs = lambda cfg: cost.training_flops(cfg, ('backbone',), seen, sparse=sparse)
    weights = {w.part: w.flops for w in work.token_work(V32, 1, sparse=False, form='mha')}
    moe = sum(weights[part] for part in ('router', 'shared experts', 'routed experts')) / 58 * 10
    layers = weights['projections'] / 61 * 10 + moe
    assert pairs(cfg) - pairs(rest) == pytest.approx(3 * n * (layers + 10 * work.mha_flops(cfg) * near))
  assert of('index scores', cfg, sparse=True) == of('index scores', rest, sparse=True)


def test_a_model_of_windows_alone_has_a_paragraph():
  cfg = dataclasses.replace(V32, window_layers=range(61), sliding_window=4096)
  text = ' '.join(cost_command.paragraph(cfg, cost.Serving(), 8192, price=2.0, output_share=0.1, hit_share=0.0).split())
  assert 'scoring and selecting are 0% of the sparse time' in text
  assert 'one of 144 that share the experts, prefill of a token' in text


@pytest.mark.parametrize('phase', ['prefill', 'decode'])
def test_what_sparsity_does_not_touch_costs_the_same(phase):
  """Layers with a window, and all products but the indexer's, at every length."""
  for cfg in SIZES['dots3_note'], SIZES['qwen3_30b_a3b'], V32:
    for context in 1000, 4096, 40_000:
      dense, sparse = (cost.token_parts(cfg, context, phase, sparse=sparse) for sparse in (False, True))
      others = sparse.keys() - {'attention', 'index projections', 'index scores', 'selection'}
      assert {name: sparse[name] for name in others} == {name: dense[name] for name in dense.keys() - {'attention'}}
  assert 'windows' in cost.token_parts(SIZES['dots3_note'], 9, phase, sparse=True)


def test_no_more_chips_share_the_experts_than_there_are():
  cfg = dataclasses.replace(V32, n_routed_experts=16, n_expert_groups=1, n_limited_groups=1)
  at = lambda n: cost.token_parts(cfg, 4096, 'decode', sparse=True, serving=cost.Serving(expert_chips=n))
  assert at(16) == at(144) != at(1)
  say = lambda n: cost_command._of_experts(cfg, cost.Serving(expert_chips=n))
  assert say(144) == ', one of 16 that share the experts' and say(1) == ''


def test_key_heads_that_select_have_scores_of_their_own():
  each = dataclasses.replace(SIZES['qwen3_0_6b'], index_n_heads=16, index_n_selections=8)
  shared = dataclasses.replace(each, index_n_selections=1)
  assert of('selection', each, sparse=True).bytes == 8 * of('selection', shared, sparse=True).bytes


def of(part: str, cfg: ModelConfig, *, context=131_072, form='mqa', **kwargs) -> work.Work:
  return next(w for w in work.token_work(cfg, context, form=form, **kwargs) if w.part == part)


def test_decode_at_128k_per_layer():
  dense = of('attention', ONE, sparse=False)
  assert dense.flops == pytest.approx(36.5e9, rel=2e-3)
  assert dense.bytes == pytest.approx(86.0e6, rel=1e-3)
  assert of('attention', ONE, sparse=False, cache='bf16').bytes == pytest.approx(151e6, rel=1e-3)
  scores, attention = (of(p, ONE, sparse=True) for p in ('index scores', 'attention'))
  assert (scores.flops, attention.flops) == pytest.approx((2.15e9, 0.57e9), rel=2e-3)
  assert (scores.bytes, attention.bytes) == pytest.approx((17.3e6, 1.34e6), rel=3e-3)
  assert scores.unit == 'fp8' and attention.unit == 'bf16'


def test_two_readers_share_what_both_need_and_nothing_else():
  for sparse, part, share in ((False, 'attention', 2), (True, 'index scores', 2),
                              (True, 'attention', 1), (True, 'selection', 1)):  # fmt: skip
    alone, together = (of(part, V32, sparse=sparse, readers=n).bytes for n in (1, 2))
    assert alone == share * together


def test_activated_parameters():
  """37.48 billion, the indexers and the head among them, the embedding not."""
  works = work.token_work(V32, 1, sparse=True, form='mqa')
  flops = sum(w.flops for w in works if w.kind == 'weights')
  assert flops / 2 == pytest.approx(37.48e9, rel=2e-4)
  assert of('index projections', V32, sparse=True).flops / 2 / 61 == 13_959_424 - 2 * 128
  assert of('head', V32, sparse=True).flops == 2 * 129_280 * 7168


def test_training_is_three_forward_passes_of_what_learns():
  """Of one document: its products and pairs are those of `token_work` and `attention_flops`."""
  n, visible = 5000, np.arange(1, 5001)
  flops = {w.part: w.flops for w in work.token_work(V32, 1, sparse=True, form='mqa') if w.kind == 'weights'}
  index_products = flops.pop('index projections')
  weights, layers = sum(flops.values()), V32.n_layers
  index = layers * work.index_flops(V32) * (n + 1) / 2
  dense, sparse = (attention_flops(V32, n, sparse=sparse) for sparse in (False, True))
  chosen = (sparse - index) / work.row_flops(V32)  # Pairs of all layers for one query.
  of = lambda *trains: cost.training_flops(V32, trains, visible, sparse=len(trains) == 2) / n
  assert of('backbone') == pytest.approx(3 * (weights + dense))
  assert of('indexer') == pytest.approx(weights + dense + 2 * index_products + 3 * index)
  learns = 3 * (weights + sparse - index)
  scores = index + 3 * chosen * work.index_flops(V32)
  assert of('backbone', 'indexer') == pytest.approx(learns + 2 * index_products + scores)
  masked = cost.training_flops(V32, ('backbone', 'indexer'), visible, sparse=True, form='mha') / n
  fewer = 3 * chosen * (work.row_flops(V32) - work.mha_flops(V32))  # Of the same pairs.
  assert masked == pytest.approx(of('backbone', 'indexer') - fewer)


def test_an_mtp_layer_costs_a_layer_a_projection_and_a_head():
  of = lambda cfg: cost.training_flops(cfg, ('backbone',), np.arange(1, 101), sparse=False)
  mtp, longer = (dataclasses.replace(V32, **{k: v}) for k, v in (('n_mtp_layers', 1), ('n_layers', 62)))
  extra = 3 * 100 * 2 * V32.dim * (V32.vocab_size + 2 * V32.dim)
  assert of(mtp) == pytest.approx(of(longer) + extra)
  dense = dataclasses.replace(ONE, n_mtp_layers=1)  # Without experts, and so is its MTP layer.
  assert of(dense) == pytest.approx(2 * of(ONE) + 3 * 100 * 2 * V32.dim * 2 * V32.dim)


LAYER = dataclasses.replace(V32, n_layers=1, n_dense_layers=0)
PRODUCTS = {'projections': 'projections', 'router': 'router', 'shared experts': 'shared expert',
            'routed experts': 'routed experts', 'index projections': 'index projections'}  # fmt: skip


def layer(*trains, n=4096):
  return {part.part: part for part in layer_parts(V32, trains, n)}


def test_a_layer_has_the_products_of_token_work_three_times_if_it_learns():
  n, works = 4096, {w.part: w.flops for w in work.token_work(LAYER, 1, sparse=True, form='mqa')}
  for name, part in PRODUCTS.items():
    forward, both = (layer(*trains)[part].flops / n for trains in (('indexer',), ('backbone', 'indexer')))
    times = (2, 2) if name == 'index projections' else (1, 3)  # Their inputs have no gradient.
    assert (forward, both) == pytest.approx([t * works[name] for t in times]), name


def test_a_layer_has_the_pairs_of_queries_and_keys():
  n = 4096
  dense, sparse = (n * attention_flops(LAYER, n, sparse=sparse) for sparse in (False, True))
  warmup, both = layer('indexer'), layer('backbone', 'indexer')
  assert warmup['attention'].flops == pytest.approx(dense)
  forward = both['attention'].flops * (576 + 512) / (4 * 576 + 3 * 512)
  assert both['selection'].flops + forward == pytest.approx(sparse)
  pairs = n * (n + 1) / 2
  assert warmup['divergence'].flops == pytest.approx(pairs * (2 * 2 * 128 * 192 + 4 * 2 * 64 * 128))


def test_experts_read_and_write_each_array_once():
  """Of one token: forward each matrix and row, and backward also their gradients."""
  d, f, experts, rows = 7168, 2048, 256, 8
  weights, ends = 3 * experts * d * f, 2 * rows * (d + f) + rows * (f + d)
  assert layer('indexer', n=1)['routed experts'].bytes == 2 * (weights + ends)
  inputs = rows * (2 * d + f)
  both = layer('backbone', 'indexer', n=1)['routed experts'].bytes
  assert both == 2 * (3 * weights + 2 * ends + inputs)


def test_a_prompt_token_needs_no_logits():
  assert 'head' not in cost.token_parts(V32, 100, 'prefill', sparse=True)
  assert 'head' in cost.token_parts(V32, 100, 'decode', sparse=True)


def test_one_token_reads_its_experts_and_a_crowd_all_of_them():
  size = 3 * 7168 * 2048
  alone = of('routed experts', V32, sparse=False)
  assert alone.bytes == pytest.approx(58 * 8 * size)
  crowd = of('routed experts', V32, sparse=False, pass_tokens=1000)
  assert crowd.bytes * 1000 == pytest.approx(58 * 256 * size)
  spread = of('routed experts', V32, sparse=False, pass_tokens=1000, chips=32)
  assert spread.bytes * 32 == pytest.approx(crowd.bytes)
  assert alone.flops == crowd.flops == spread.flops == 2 * 58 * 8 * size
  # Two chips of one token each wake 256 * (1 - (1 - 8 / 256)²) = 15.75 experts between them.
  pair = of('routed experts', V32, sparse=False, chips=2)
  assert pair.bytes == pytest.approx(58 * 15.75 * size / 2)


def test_only_quantised_rows_are_dequantised():
  assert of('attention', V32, sparse=True, cache='fp8').kind == 'gather'
  assert of('attention', V32, sparse=True, cache='bf16').kind == 'context'
  assert of('attention', V32, sparse=False, cache='fp8').kind == 'context'


def test_shared_indexers_cost_nothing():
  types = ['full' if max(i - 2, 0) % 4 == 0 else 'shared' for i in range(61)]
  glm = dataclasses.replace(V32, indexer_types=types)
  full = types.count('full')
  for part in ('index scores', 'index projections', 'selection'):
    many, few = of(part, V32, sparse=True), of(part, glm, sparse=True)
    assert few.flops * 61 == many.flops * full
    assert few.bytes * 61 == pytest.approx(many.bytes * full)
  assert of('attention', glm, sparse=True) == of('attention', V32, sparse=True)
  assert cost.cache_bytes(glm, 'fp8') == 61 * 656 + full * 132


def test_seconds_are_the_longer_of_arithmetic_and_memory():
  chip = cost.Chip(name='toy', bf16=2e12, fp8=4e12, bandwidth=1e9, memory=1e9)
  shares = cost.Efficiency(weights=0.25, context=0.5, bandwidth=0.5, gather=0.1)
  serving = cost.Serving(chip=chip, decode=shares, batch=1, queries=1)
  dense = cost.token_parts(V32, 1000, 'decode', sparse=False, serving=serving)
  assert dense['attention'].seconds == pytest.approx(61 * 1000 * 656 / 0.5e9)
  assert dense['attention'].bound == 'memory'
  serving = dataclasses.replace(serving, chip=dataclasses.replace(chip, bandwidth=1e18))
  dense, sparse = (
      cost.token_parts(V32, 1000, 'decode', sparse=kind, serving=serving) for kind in (False, True)
  )
  assert dense['attention'].seconds == pytest.approx(61 * 1000 * 278_528 / 1e12)
  assert sparse['attention'].seconds == pytest.approx(61 * 1000 * 278_528 / 0.1e12)  # Gathers.
  assert sparse['index scores'].seconds == pytest.approx(61 * 1000 * 16_384 / 2e12)
  assert sparse['head'].seconds == pytest.approx(2 * 129_280 * 7168 / 0.5e12)
  assert dense['attention'].bound == 'compute'


def test_sparse_prefill_takes_the_faster_form():
  """Masked MHA up to 2048 * 278528 / 81920 keys, gathered MQA beyond. Published kink: 6.6K."""
  flops = [
      cost.token_parts(V32, n, 'prefill', sparse=True)['attention'].flops for n in (6900, 7000)
  ]
  assert flops == [61 * 6900 * 81_920, 61 * 2048 * 278_528]


@pytest.mark.parametrize('chip', cost.CHIPS)
@pytest.mark.parametrize('sparse', [False, True])
@pytest.mark.parametrize('phase', ['prefill', 'decode'])
def test_more_context_costs_more_and_a_better_chip_less(phase, sparse, chip):
  serving = cost.Serving(chip=cost.CHIPS[chip])
  seconds = [cost.token_seconds(V32, n, phase, sparse=sparse, serving=serving) for n in CONTEXTS]
  assert np.all(np.diff(seconds) > 0)
  chip = serving.chip
  better = dataclasses.replace(
      chip, bf16=2 * chip.bf16, fp8=2 * chip.fp8, bandwidth=2 * chip.bandwidth
  )
  half = cost.token_seconds(
      V32, 7000, phase, sparse=sparse, serving=dataclasses.replace(serving, chip=better)
  )
  assert half == pytest.approx(seconds[4] / 2)


def test_a_larger_batch_is_never_dearer():
  seconds = [
      cost.token_seconds(V32, 4096, 'decode', sparse=True, serving=cost.Serving(batch=n))
      for n in (1, 8, 64, 512)
  ]
  assert seconds == sorted(seconds, reverse=True) and seconds[0] > 3 * seconds[-1]


def test_dollars():
  assert cost.dollars_per_million(1.8e-3, 2.0) == pytest.approx(1.0)


# Published curves


def test_published_curves_are_the_published_table():
  """The nine rows of the report's reading, in dollars per million tokens."""
  rows = {
      ('prefill', 'dense'): [0.053, 0.063, 0.072, 0.091, 0.130, 0.206, 0.359, 0.513, 0.666],
      ('prefill', 'sparse'): [0.061, 0.073, 0.085, 0.101, 0.107, 0.118, 0.141, 0.164, 0.187],
      ('decode', 'dense'): [0.070, 0.103, 0.136, 0.201, 0.331, 0.592, 1.112, 1.633, 2.154],
      ('decode', 'sparse'): [0.095, 0.144, 0.147, 0.151, 0.157, 0.170, 0.197, 0.223, 0.249],
  }
  for key, expected in rows.items():
    curve = published.CURVES[key]
    dollars = cost.dollars_per_million(curve.at(published.POSITIONS), published.PRICE)
    np.testing.assert_allclose(dollars, expected, atol=6e-4)
  averages = [c.total(0, c.limit) / c.limit / 1800e-6 * 1e6 for c in published.CURVES.values()]
  np.testing.assert_allclose(np.array(averages) / 1e6, [0.359, 0.140, 1.112, 0.196], atol=6e-4)


@pytest.mark.parametrize(
    'phase, bound, ratio, crossover',
    [('prefill', 0.082, 3.28, 8910), ('decode', 0.146, 8.37, 3630)],
)
def test_fits_the_published_curves(phase, bound, ratio, crossover):
  """As fitted by experiments/cost_claim: within 15 % everywhere, with the crossovers too early."""
  curves = {}
  for kind in ('dense', 'sparse'):
    curves[kind] = cost.model_curve(V32, phase, sparse=kind == 'sparse')
    there = published.CURVES[phase, kind].at(published.POSITIONS)
    errors = curves[kind].at(published.POSITIONS) / there - 1
    assert np.abs(errors).max() < bound
  end = published.POSITIONS[-1]
  assert curves['dense'].at(end) / curves['sparse'].at(end) == pytest.approx(ratio, rel=0.01)
  assert cost.crossover(*curves.values()) == pytest.approx(crossover, rel=0.01)


def test_experiment_finds_the_shipped_shares(tmp_path):
  """The whole command: it fits again, and its files say what the committed ones say."""
  done = subprocess.run(
      [sys.executable, EXPERIMENT / 'run.py', tmp_path], capture_output=True, text=True, check=True
  )
  report = json.loads((tmp_path / 'cost_claim.json').read_text())
  for phase, shares in cost.FITTED.items():
    fitted = report['phases'][phase]['model']
    assert (fitted['weights'], fitted['context']) == (shares.weights, shares.context)
  committed = json.loads((EXPERIMENT / 'cost_claim.json').read_text())
  assert report['answer'] == committed['answer'] and report['verdict'] == committed['verdict']
  assert (tmp_path / 'table.md').read_text() == (EXPERIMENT / 'table.md').read_text()
  readme = ' '.join((EXPERIMENT / 'README.md').read_text().replace('> ', '').split())
  assert report['answer'] in readme and report['verdict'] in readme
  assert report['answer'] in done.stdout
  assert {'curves.png', 'half_cost.png'} <= {p.name for p in tmp_path.iterdir()}


def test_measured_table_is_of_the_measured_figures():
  """And the readme has its growth from 4K to 64K, and the indexer's share of it."""
  sys.path.insert(0, str(EXPERIMENT))
  import measure

  report = json.loads((EXPERIMENT / 'measured.json').read_text())
  assert measure.table(report) == (EXPERIMENT / 'measured.md').read_text()
  readme = ' '.join((EXPERIMENT / 'README.md').read_text().split())
  for phase, kinds in report['measured'].items():
    dense, sparse = (kinds[kind][-1] / kinds[kind][0] for kind in ('dense', 'sparse'))
    assert f"| {phase}, dense / sparse | {dense:.1f} x / {sparse:.1f} x |" in readme
  share = measure.residual(report['measured']['decode']).split()[-3]
  assert f"{share.rstrip('%')} % of what a token's time grows by" in readme


@pytest.mark.parametrize('name', ['measured', 'one_device', 'one_device_gqa', 'mesh', 'mesh_gqa'])
def test_predictions_beside_what_was_measured_are_those_of_today(name):
  sys.path.insert(0, str(EXPERIMENT))
  import measure

  report = json.loads((EXPERIMENT / f'{name}.json').read_text())
  peak = 1e9 * report['gflops']
  chip = cost.Chip(name='', bf16=peak, fp8=peak, bandwidth=1e9 * report['gbytes'], memory=0.0)
  case = measure.Case('small', report['model']['attention'], report['contexts'], report['batch'], None)
  for phase, kinds in measure.predict(case, chip).items():
    for kind, seconds in kinds.items():
      assert seconds == pytest.approx(report['predicted'][phase][kind]), (phase, kind)


# Calls


FLAT = {'prefill': cost.Curve([0, 100], [1, 1]), 'decode': cost.Curve([0, 100], [3, 3])}
RISING = {p: cost.Curve([0, 100], [0, 2]) for p in FLAT}


def test_curve_adds_up():
  curve = cost.Curve([0, 10, 30], [0, 10, 10])
  assert curve.at(5) == 5 and curve.total(0, 10) == 50 and curve.total(5, 20) == 37.5 + 100
  assert curve.total(3, 7) + curve.total(7, 30) == pytest.approx(curve.total(3, 30))


def test_a_call_by_hand():
  assert cost.call_seconds(**FLAT, inputs=50, outputs=10) == 80
  assert cost.call_seconds(**FLAT, inputs=50, outputs=10, hit_share=0.8) == 40
  # Its last positions are the dear ones: a hit saves the cheap ones.
  assert cost.call_seconds(**RISING, inputs=50, outputs=0, hit_share=0.5) == 18.75
  assert cost.call_seconds(**RISING, inputs=50, outputs=50) == pytest.approx(100)


def test_half_as_expensive_by_hand():
  """Dense 2 p / 100 per token, sparse 0.5: a call of n costs n² / 100 and n / 2."""
  sparse = {p: cost.Curve([0, 100], [0.5, 0.5]) for p in FLAT}
  for output_share in (0.0, 0.3, 1.0):
    assert cost.cheaper_from(RISING, sparse, output_share, 0.0) == pytest.approx(100, rel=0.01)
    assert cost.cheaper_from(RISING, sparse, output_share, 0.0, 1.0) == pytest.approx(50, rel=0.01)
  # With hits, only positions h n .. n count: their mean cost is (1 + h) n / 100.
  assert cost.cheaper_from(RISING, sparse, 0.0, 0.6) == pytest.approx(100 / 1.6, rel=0.01)
  assert np.isnan(cost.cheaper_from(RISING, sparse, 0.0, 0.0, 0.4))
  assert cost.crossover(RISING['decode'], sparse['decode']) == pytest.approx(25, rel=0.01)


def test_more_hits_halve_a_prompt_sooner():
  dense, sparse = ({p: published.CURVES[p, kind] for p in FLAT} for kind in ('dense', 'sparse'))
  lengths = [cost.cheaper_from(dense, sparse, 0.02, h) for h in (0.0, 0.3, 0.6, 0.9)]
  assert lengths == sorted(lengths, reverse=True)


def test_price_cuts():
  prices = published.PRICES_BEFORE, published.PRICES_AFTER
  ratios = [cost.price_ratio(*prices, o, h) for o, h in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0))]
  assert ratios == pytest.approx([0.5, 0.4, 0.25])
  assert cost.price_ratio(*prices, 0.5, 0.0) == pytest.approx((0.28 + 0.42) / (0.56 + 1.68))


# Errors


@pytest.mark.parametrize('context', [0, -1, 163_841])
def test_refuses_a_context_the_model_does_not_have(context):
  with pytest.raises(ValueError, match=f'context={context} .* max_seq_len=163840'):
    cost.token_seconds(V32, context, 'decode', sparse=True)


def test_refuses_nonsense():
  with pytest.raises(ValueError, match="phase='train' must be 'prefill' or 'decode'"):
    cost.token_seconds(V32, 1, 'train', sparse=True)
  with pytest.raises(ValueError, match='batch=0 must be at least 1'):
    cost.Serving(batch=0)
  with pytest.raises(ValueError, match="cache='int8' must be one of .'fp8', 'bf16'"):
    cost.Serving(cache='int8')
  with pytest.raises(ValueError, match=r'weights=1.2 must be in \(0, 1\]'):
    cost.Efficiency(weights=1.2, context=0.5)
  with pytest.raises(ValueError, match='hit_share=1.5 must be within 0 and 1'):
    cost.call_seconds(**FLAT, inputs=1, outputs=1, hit_share=1.5)
  with pytest.raises(ValueError, match='position=120 must be at most 100'):
    cost.call_seconds(**FLAT, inputs=100, outputs=20)
  with pytest.raises(ValueError, match='must start at 0 and increase'):
    cost.Curve([0, 5, 5], [1, 1, 1])


# The command


def command(*flags: str) -> subprocess.CompletedProcess:
  return subprocess.run(
      [sys.executable, '-m', 'dsa_jax.cost', *flags], capture_output=True, text=True, cwd=ROOT
  )


def test_command_prints_tables_and_words():
  done = command('--model=configs/deepseek_v32.py', '--chip=h200', '--context=131072', '--price=3')
  assert done.returncode == 0, done.stderr
  text = ' '.join(done.stdout.split())
  for part in cost.token_parts(V32, 131_072, 'decode', sparse=True):
    assert part in text
  serving = cost.Serving(chip=cost.CHIPS['h200'])
  for phase in ('prefill', 'decode'):
    for sparse in (False, True):
      seconds = cost.token_seconds(V32, 131_072, phase, sparse=sparse, serving=serving)
      assert f'{1e6 * seconds:,.0f} µs' in text
      assert f'${cost.dollars_per_million(seconds, 3.0):.3f}' in text
  assert '48,068 bytes' in text


def test_command_takes_the_name_of_a_family():
  done = command('--model=llama', '--context=8192', '--batch=8')
  assert done.returncode == 0, done.stderr
  per_token = 32 * (8 * (128 + 128) + 16 * 4 + 64 + 4)
  assert f'{per_token:,} bytes' in ' '.join(done.stdout.split()) and 'model: llama\n' in done.stdout


def test_weights_of_two_bytes_are_read_and_multiplied_as_such():
  """All but what is bfloat16 anyway: router, head, and attention, which reads the cache."""
  def parts(**options):
    return {work.part: work for work in cost.token_work(V32, 4096, sparse=True, form='mqa', **options)}

  narrow, wide = parts(), parts(weights='bf16')
  twice = {'projections', 'dense MLPs', 'shared experts', 'routed experts', 'index projections'}
  assert narrow.keys() == wide.keys() and twice < narrow.keys()
  for name, work in wide.items():
    unit, factor = ('bf16', 2) if name in twice else (narrow[name].unit, 1)
    assert work == narrow[name]._replace(bytes=factor * narrow[name].bytes, unit=unit)
  with pytest.raises(ValueError, match="weights='int4' must be one of .'fp8', 'bf16'"):
    cost.Serving(weights='int4')
  serving = cost.Serving(weights='bf16', cache='bf16', queries=1, batch=8)
  text = cost_command.paragraph(V32, serving, 4096, price=2.0, output_share=0.1, hit_share=0.0)
  wanted = 'Weights are in bfloat16, stored keys in bfloat16; a decode step has 8 x 1 tokens (sequences x tokens of each).'
  assert text.startswith(wanted)


def test_command_says_small_numbers():
  done = command(f'--model={TINY}', '--chip=v6e', '--context=64', '--output_share=0.5')
  assert done.returncode == 0, done.stderr
  assert ' 0 µs' not in done.stdout and '$0.000' not in done.stdout and ' 0 GB' not in done.stdout
  assert '…' not in done.stdout  # No number is cut off, where there is no terminal either.
  assert '50% of its tokens generated' in ' '.join(done.stdout.split())


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--chip=a100'], 'should be one of <h100|h800|h200|v5p|v6e|tpu7x>'),
        (['--model=gpt'], '--model=gpt must be a file such as configs/deepseek_v32.py, a model (v32, '),
        ([f'--model={ROOT}/configs/quickstart.py:foo'], "--model="),
        (['--context=0'], 'context=0 must be within 1 and max_seq_len=163840'),
        ([f'--model={TINY}', '--context=65'], 'context=65 must be within 1 and max_seq_len=64'),
        (['--output_share=2'], 'output_share=2.0 must be within 0 and 1'),
        (['--hit_share=2'], 'hit_share=2.0 must be within 0 and 1'),
        (['qwen3_8b', '--context=4096'], "'qwen3_8b' are words that no flag takes: a flag is --name=value"),
    ],
)
def test_command_says_what_is_wrong(flags, message):
  done = command(*flags)
  assert done.returncode and message in done.stdout + done.stderr
  assert 'Traceback' not in done.stderr
