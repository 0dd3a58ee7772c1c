# SPDX-License-Identifier: Apache-2.0
"""The whole model equals the one of `plain`; and the constants of the released one."""

import dataclasses

from flax import nnx
import golden
import jax
import laws
import numpy as np
import pytest

from dsa_jax.config import ModelConfig
from dsa_jax.nn.attention.types import Mode
from dsa_jax.nn.rope import rope_frequencies
from dsa_jax.nn.transformer import Transformer
from dsa_jax.params import IndexerParam

pytestmark = pytest.mark.usefixtures('eager')


@pytest.mark.parametrize('backend', laws.BACKENDS)
@pytest.mark.parametrize('attention', ['dense', 'sparse', 'masked'])
def test_forward(attention, backend):
  golden.check_forward(attention, backend)


@pytest.mark.parametrize('attention', ['dense', 'sparse'])
def test_gradients(attention):
  golden.check_gradients(attention, 'xla')


@pytest.mark.parametrize(
    'changes',
    [
        dict(n_mtp_layers=1),
        # No YaRN, no groups, and expert layers only.
        pytest.param(
            dict(max_seq_len=32, n_expert_groups=1, n_limited_groups=1, n_layers=3, n_dense_layers=0),
            marks=pytest.mark.nightly,
        ),
        # No indexer at all among the expert layers.
        pytest.param(dict(indexer_types=('full', 'shared')), marks=pytest.mark.nightly),
        dict(n_layers=5, n_dense_layers=0, mlp_layers=(1, 3, 4)),  # As laws.MIXED.
        # A group of three layers, two of them of one kind, which selections cross; and the MTP layer.
        pytest.param(
            dict(
                n_layers=6, n_dense_layers=1, mlp_layers=(3,), n_mtp_layers=1,
                indexer_types=('full', 'shared', 'full', 'full', 'shared', 'shared'),
            ),
            marks=pytest.mark.nightly,
        ),
        dict(n_layers=4, n_dense_layers=2, window_layers=(0, 1, 3), sliding_window=7),  # As laws.WINDOWED.
        # Selections cross layers with windows.
        dict(
            n_layers=4, n_dense_layers=3, window_layers=(0, 2), sliding_window=2,
            indexer_types=('shared', 'full', 'full', 'shared'),
        ),
        dict(window_layers=(0, 1), sliding_window=4),  # No indexer at all.
    ],
    ids=['mtp', 'plain', 'shared_experts', 'mixed', 'mixed_shared', 'windows', 'windows_shared', 'windows_only'],
)
def test_other_configs(changes):
  golden.check_forward('sparse', 'xla', dataclasses.replace(laws.CFG, **changes))


# GLM-5.2: IndexShare, and rotation of neighbouring channels in the indexer too.
GLM = dataclasses.replace(
    laws.CFG, max_seq_len=32, n_expert_groups=1, n_limited_groups=1, indexer_rope_interleave=True,
    n_layers=6, n_dense_layers=2, n_mtp_layers=1,
    indexer_types=('full', 'full', 'shared', 'shared', 'full', 'shared'),
)


@pytest.mark.parametrize(
    'attention', ['sparse', *(pytest.param(x, marks=pytest.mark.nightly) for x in ('dense', 'masked'))]
)
def test_index_share(attention):
  types = 'full', 'shared', 'full', 'shared'
  cfg = dataclasses.replace(GLM, n_layers=4, n_dense_layers=1, indexer_types=types)
  golden.check_forward(attention, 'xla', cfg)


@pytest.mark.nightly
@pytest.mark.parametrize('remat', ['none', 'layer'])
def test_gradients_of_mixed_layers(remat):
  with laws.compiled():
    golden.check_gradients('sparse', 'xla', laws.MIXED, remat=remat)


@pytest.mark.nightly
@pytest.mark.parametrize('attention', ['dense', 'sparse'])
def test_gradients_with_windows(attention):
  with laws.compiled():
    golden.check_gradients(attention, 'xla', laws.WINDOWED, remat='layer')


@pytest.mark.parametrize('attention', ['dense', pytest.param('masked', marks=pytest.mark.nightly)])
def test_windows(attention):
  golden.check_forward(attention, 'xla', laws.WINDOWED)


@pytest.mark.nightly
def test_index_share_gradients():
  cfg = dataclasses.replace(GLM, n_mtp_layers=0)
  with laws.compiled():
    golden.check_gradients('sparse', 'xla', cfg, remat='layer')


GATES = pytest.mark.parametrize('cfg', [laws.GATED, laws.SINKS], ids=['gated', 'sinks'])


@GATES
@pytest.mark.parametrize('attention', ['dense', 'sparse', pytest.param('masked', marks=pytest.mark.nightly)])
def test_gates(attention, cfg):
  golden.check_forward(attention, 'xla', cfg)


@GATES
@pytest.mark.parametrize('attention', [pytest.param('dense', marks=pytest.mark.nightly), 'sparse'])
def test_gradients_of_gates(attention, cfg):
  golden.check_gradients(attention, 'xla', cfg)


@pytest.mark.parametrize('attention', ['dense', 'sparse', pytest.param('masked', marks=pytest.mark.nightly)])
def test_layers_of_two_sizes(attention):
  golden.check_forward(attention, 'xla', laws.TWO_SIZES)


def test_other_readings_of_dots3_note():
  """What engines disagree about: see families/dots3.py. The golden case has what transformers reads."""
  other = dict(
      latent_rescale=False, latent_eps=0.03, index_rope_last=True, indexer_rope_interleave=True,
      n_layers=2, n_dense_layers=1, window_layers=(1,),
  )  # fmt: skip
  golden.check_forward('sparse', 'xla', dataclasses.replace(laws.TWO_SIZES, **other))


@pytest.mark.nightly
@pytest.mark.parametrize('attention', ['dense', 'sparse'])
def test_gradients_of_layers_of_two_sizes(attention):
  golden.check_gradients(attention, 'xla', laws.TWO_SIZES)


def test_layers_without_a_rotary_key():
  """And queries that grow, and learned factors of frequencies."""
  with laws.model(laws.SOME_NOPE):
    golden.check_forward('sparse', 'xla', laws.SOME_NOPE)


@pytest.mark.nightly
@pytest.mark.parametrize('attention', ['dense', 'sparse'])
def test_gradients_of_layers_without_a_rotary_key(attention):
  with laws.model(laws.SOME_NOPE):
    golden.check_gradients(attention, 'xla', laws.SOME_NOPE)


@pytest.mark.parametrize(
    'cfg', [laws.READING, pytest.param(laws.TWO_SOURCES, marks=pytest.mark.nightly)], ids=['one', 'two_of_a_kind']
)
def test_layers_that_read_the_rows_of_others(cfg):
  with laws.model(cfg):
    golden.check_forward('sparse', 'xla', cfg)


@pytest.mark.nightly
@pytest.mark.parametrize('attention', ['dense', 'sparse'])
def test_gradients_of_layers_that_read_the_rows_of_others(attention):
  with laws.model(laws.READING):  # In the usual batch two keys tie.
    golden.check_gradients(attention, 'xla', laws.READING, remat='layer')


def test_gates_without_a_query_latent():
  """And with pairs of neighbours, as the released weights of Hy4 are said to want."""
  pairs = dict(rope_interleave=True, indexer_rope_interleave=True)
  golden.check_forward('sparse', 'xla', dataclasses.replace(laws.SINKS, q_lora_rank=0, **pairs))


def test_gates_leave_the_target_alone():
  """A layer's divergence depends on the gates of the layers before it only."""
  batch, params = laws.make_batch(laws.LENGTHS), laws.weights(laws.GATED)
  width = laws.GATED.head_dim
  wq_b = params['moe_blocks']['attn']['wq_b']
  changed = wq_b.at[..., width:].multiply(3.0)
  mode = Mode(attention='sparse', backend='xla', index_loss=True, measure=('indexer',))
  before = laws.forward(params, batch, mode, laws.GATED)
  params['moe_blocks']['attn']['wq_b'] = changed
  after = laws.forward(params, batch, mode, laws.GATED)
  laws.assert_same(after.index_kl, before.index_kl)  # The last layer is the one with these gates.
  laws.assert_same(after.measures('indexer'), before.measures('indexer'))
  laws.assert_differs(after.logits, before.logits)


def test_shared_layers_own_no_indexer():
  params = laws.weights(GLM)
  assert params['dense_blocks']['attn']['indexer']['wk'].shape[0] == 2
  assert params['moe_blocks']['attn']['indexer']['wk'].shape[0] == 1
  model = laws.model_of(params, GLM)
  assert [i for i in range(6) if model.block(i).attn.indexer is not None] == [0, 1, 4]
  laws.assert_same(model.block(4).attn.indexer.wk[...], params['moe_blocks']['attn']['indexer']['wk'][0])


def test_a_layer_on_its_own_is_that_of_its_number():
  params = laws.weights(laws.MIXED)
  model = laws.model_of(params, laws.MIXED)
  for stack, layers in {'dense_blocks': (1, 3, 4), 'moe_blocks': (0, 2)}.items():
    for at, i in enumerate(layers):
      laws.assert_same(model.block(i).attn.wo[...], params[stack]['attn']['wo'][at])


# Spec: DeepSeek's inference/config_671B_v3.2.json with the formulas of its inference/model.py.
FREQUENCIES = [
    1, 0.74989421, 0.56234133, 0.4216965, 0.31622777, 0.23713737, 0.17782794, 0.13335214, 0.1,
    0.074989421, 0.056234133, 0.039006927, 0.02687936, 0.018378146, 0.012447956, 0.008334509,
    0.0055, 0.0035619975, 0.0022493653, 0.0013705136, 0.00079056942, 0.0004149904, 0.00017782794,
    3.3338036e-05, 2.5e-05, 1.8747355e-05, 1.4058533e-05, 1.0542413e-05, 7.9056942e-06,
    5.9284343e-06, 4.4456985e-06, 3.3338036e-06,
]


def test_frequencies_of_the_released_model():
  np.testing.assert_allclose(rope_frequencies(ModelConfig(), 64), FREQUENCIES, rtol=1e-7)


def test_softmax_scale_of_the_released_model():
  cfg = ModelConfig()
  assert cfg.sm_scale == pytest.approx(0.1352337789, rel=1e-9)
  assert cfg.sm_scale != pytest.approx((cfg.kv_lora_rank + cfg.qk_rope_head_dim) ** -0.5, rel=0.1)
  short = dataclasses.replace(cfg, max_seq_len=cfg.original_seq_len)
  assert short.sm_scale == pytest.approx(192**-0.5)


def test_parameter_counts_of_the_released_model():
  cfg = ModelConfig()
  with jax.disable_jit(False):
    params = nnx.state(nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0))))
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  indexer, _ = nnx.split_state(params, IndexerParam, ...)
  assert count(params) == 671_877_944_064
  assert count(indexer) == 61 * 13_959_424
