# SPDX-License-Identifier: Apache-2.0
"""The scans that run a model's layers: each layer once, in order, and few of them compiled."""

import dataclasses
import itertools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.families import SIZES
from dsa_jax.families.llama import with_heads
from dsa_jax.nn.attention.gqa import GQA
from dsa_jax.nn.layers import STACKS, Kind, kind_of, layers_of_stacks, plan, row_slots
from dsa_jax.nn.scan import cut, in_order, scan
from dsa_jax.params import LayerFact

pytestmark = pytest.mark.usefixtures('eager')

D, M = (Kind(stack) for stack in STACKS[:2])
KINDS = {'d': D, 'm': M, 'w': Kind(M.stack, 16)}


@pytest.mark.parametrize(
    'layers, sections',
    [
        ('d', ['d1']),
        ('dm', ['d1', 'm1']),
        ('dddmmmm', ['d3', 'm4']),
        ('dmdmdm', ['dm3']),
        ('ddmdmdm', ['d1', 'dm3']),
        ('mdmdmmm', ['md2', 'm3']),
        ('mmdmmdmmd', ['mmd3']),
        ('mmmd', ['m3', 'd1']),
        ('wwwmwwwmww', ['wwwm2', 'w2']),
    ],
)
def test_plan(layers, sections):
  letter = {kind: letter for letter, kind in KINDS.items()}
  planned = plan(tuple(KINDS[x] for x in layers))
  assert [''.join(letter[kind] for kind in x.group) + str(x.repeats) for x in planned] == sections


def test_a_plan_has_every_layer_once_and_no_more_programs_than_layers():
  for kinds in itertools.product((D, M), repeat=9):
    sections = plan(kinds)
    assert [i for section in sections for i in section.layers] == list(range(9))
    assert [kind for x in sections for kind in x.group * x.repeats] == list(kinds)
    runs = sum(a != b for a, b in itertools.pairwise(kinds)) + 1
    assert sum(len(x.group) for x in sections) <= runs


def test_dots3_note_has_a_scan_for_the_group_that_repeats():
  """Layer 0 has an MLP. From layer 1 on, a layer that selects comes before three with a window."""
  stacks = {stack: np.array(layers) for stack, layers in layers_of_stacks(SIZES['dots3_note']).items()}
  assert {stack: len(layers) for stack, layers in stacks.items() if len(layers)} == {
      'dense_blocks': 1, 'moe_blocks': 12, 'moe_window_blocks': 33
  }  # fmt: skip
  sections = [section for section, _ in cut(SIZES['dots3_note'], stacks.get)]
  window = Kind('moe_window_blocks', 513)
  assert [(x.group, x.repeats) for x in sections] == [((D,), 1), ((M, *[window] * 3), 11), ((M,), 1)]


def test_rows_leave_their_slot_after_their_last_reader():
  cfg = ModelConfig(n_layers=6, n_dense_layers=0, kv_sources=(0, 0, 2, 2, 4, 4))
  assert row_slots(cfg) == ((0, -1, 0, -1, 0, -1), (576,))
  kinds = [kind_of(cfg, i) for i in range(6)]
  assert kinds[::2] == [Kind('moe_blocks', keeps=0)] * 3
  assert kinds[1::2] == [Kind('moe_reading_blocks', reads=0)] * 3
  assert [(len(x.group), x.repeats) for x in plan(tuple(kinds))] == [(2, 3)]
  crossed = ModelConfig(
      n_layers=6, n_dense_layers=0, kv_sources=(0, 1, 0, 1, 4, 4), nope_layers=(1, 3),
      nope_layers_expand=True,
  )  # fmt: skip
  assert row_slots(crossed) == ((0, 1, -1, -1, 0, -1), (576, 512))


def test_mistral_large4_has_a_scan_for_each_way_that_layers_take_turns():
  """Every fourth layer has no positions. Layer 35 keeps its rows, and the later ones of its kind read them."""
  cfg = SIZES['mistral_large4']
  sections = plan(tuple(kind_of(cfg, i) for i in range(72)))
  nope, reading = Kind('moe_nope_blocks'), Kind('moe_nope_reading_blocks', reads=0)
  kept = nope._replace(keeps=0)
  assert [(x.group, x.repeats) for x in sections] == [
      ((D,), 1), ((M, M, nope, M), 8), ((M,), 2), ((kept,), 1), ((M, M, M, reading), 9)
  ]


@pytest.mark.parametrize('name', [name for name, x in SIZES.items() if not x.window_layers and not x.kv_sources])
def test_released_models_have_a_scan_for_each_stack(name):
  """Leading layers with an MLP, then layers with experts."""
  stacks = {stack: layers for stack, layers in layers_of_stacks(SIZES[name]).items() if layers}
  sections = [section for section, _ in cut(SIZES[name], lambda stack: np.zeros(len(stacks[stack])))]
  assert [(x.group, tuple(x.layers)) for x in sections] == [((Kind(k),), v) for k, v in stacks.items()]


@pytest.mark.parametrize('copies', [True, False])
@pytest.mark.parametrize('mlp_layers', [(1, 3, 4), (2, 5), (3,), (5,), (1, 2, 5, 6), ()], ids=str)
def test_every_layer_has_its_own_weights_and_facts(mlp_layers, copies):
  cfg = ModelConfig(n_layers=7, n_dense_layers=0, mlp_layers=mlp_layers)
  stacks = {name: np.array(layers) for name, layers in layers_of_stacks(cfg).items()}
  layer = lambda carry, weight, fact: (carry + 1, (weight, fact, carry))
  carry, results = 0, []
  for section, weights in cut(cfg, stacks.get, copies=copies):
    facts = section.facts(np.arange(100, 107))
    carry, result = scan(section, layer, carry, weights, facts)
    results.append(in_order(result))
  weights, facts, order = jax.tree.map(lambda *x: np.concatenate(x), *results)
  np.testing.assert_array_equal(weights, range(7))
  np.testing.assert_array_equal(facts, range(100, 107))
  np.testing.assert_array_equal(order, range(7))


@pytest.mark.parametrize('mlp_layers', [(1,), (0,), (2, 2), (4, 3), (6,), (-1,)], ids=str)
def test_layers_that_cannot_be(mlp_layers):
  with pytest.raises(ConfigError, match='must ascend, from 2 to 5: self.n_dense_layers=1 counts'):
    ModelConfig(n_layers=6, n_dense_layers=1, mlp_layers=mlp_layers)


@pytest.mark.parametrize('rotates, rotated', [(None, 4), (True, 4), (False, 0)])
def test_yarn_scales_products_of_rotated_channels_only(rotates, rotated):
  """As cosines and sines do in `transformers`, which multiply by the root of the factor."""
  cfg = with_heads(
      8, rotated=4, vocab_size=8, dim=8, n_layers=1, inter_dim=8, n_heads=2, n_kv_heads=1,
      index_rope_head_dim=4, max_seq_len=64, rope_type='yarn', rope_factor=4.0, original_seq_len=16,
  )  # fmt: skip
  x, ratios = jax.random.normal(jax.random.key(0), (1, 1024, 8)), {}
  for dtype in 'float32', 'bfloat16':
    queries = []
    for each in cfg, dataclasses.replace(cfg, rope_type='default'):
      layer = GQA(each, out_scale=1.0, rngs=nnx.Rngs(0))
      layer.rotates = nnx.data(None if rotates is None else LayerFact(jnp.array(rotates), axes=()))
      of_each = layer.queries(x.astype(dtype), jnp.zeros((1, 1024), int))
      queries.append(of_each.astype(jnp.float32) * each.sm_scale)
    ratios[dtype] = queries[0] / queries[1]
  factor = (0.1 * np.log(4.0) + 1) ** 2
  want = np.where(np.arange(8) < rotated, factor, 1)
  np.testing.assert_allclose(ratios['float32'], np.broadcast_to(want, (1, 1024, 2, 8)), rtol=1e-5)
  # Each is rounded, and all together are not off by the rounding of the factor, 2.3e-3.
  np.testing.assert_allclose(np.mean(ratios['bfloat16'], axis=(0, 1, 2)), want, rtol=5e-4)
