# SPDX-License-Identifier: Apache-2.0
"""Every law of `laws` holds; and the rest of what a model must do, whatever its weights."""

import dataclasses

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.nn import moe
from dsa_jax.nn.attention import attend
from dsa_jax.nn.attention.types import Mode
from dsa_jax.training import step as train_step
from dsa_jax.training.losses import shift_targets
from dsa_jax.training.state import abstract_params, split_parts

backends = pytest.mark.parametrize('backend', laws.BACKENDS)
two_modes = pytest.mark.parametrize('attention', ['dense', 'sparse'])
all_modes = pytest.mark.parametrize('attention', ['dense', 'sparse', 'masked'])

NIGHTLY = pytest.mark.nightly

pytestmark = pytest.mark.usefixtures('eager')


@backends
def test_masked_is_sparse(backend):
  laws.law_masked_is_sparse(backend)


@pytest.mark.parametrize(
    'which', [pytest.param(0, marks=NIGHTLY), 1], ids=['language model', 'indexer']
)
def test_masked_has_the_gradients_of_sparse(which):
  laws.law_masked_has_the_gradients_of_sparse('xla', which)


def test_all_selected_is_dense():
  laws.law_all_selected_is_dense('xla', 'sparse')


@pytest.mark.parametrize(
    'law, arguments',
    [
        pytest.param(laws.law_masked_is_sparse, ('xla',), marks=NIGHTLY),
        pytest.param(laws.law_masked_has_the_gradients_of_sparse, ('xla', 0), marks=NIGHTLY),
        pytest.param(laws.law_masked_has_the_gradients_of_sparse, ('xla', 1), marks=NIGHTLY),
        pytest.param(laws.law_all_selected_is_dense, ('xla', 'sparse'), marks=NIGHTLY),
        pytest.param(laws.law_packed_is_alone, ('xla', 'sparse'), marks=NIGHTLY),
        (laws.law_positions_restart, ()),
        pytest.param(laws.law_no_future, ('xla', 'sparse'), marks=NIGHTLY),
        pytest.param(laws.law_selection_reaches_output, ('xla', 'sparse'), marks=NIGHTLY),
        pytest.param(laws.law_own_losses_only, ('xla', 'sparse'), marks=NIGHTLY),
        pytest.param(laws.law_only_trained_parts_move, ('sparse',), marks=NIGHTLY),
        pytest.param(laws.law_warmup_is_dense, (), marks=NIGHTLY),
    ],
    ids=lambda x: getattr(x, '__name__', None),
)
def test_grouped_query_attention(law, arguments):
  with laws.model(laws.GQA):
    law(*arguments)


@pytest.mark.parametrize(
    'law, arguments',
    [
        pytest.param(laws.law_masked_has_the_gradients_of_sparse, ('xla', 1), marks=NIGHTLY),
        pytest.param(laws.law_all_selected_is_dense, ('xla', 'sparse'), marks=NIGHTLY),
        pytest.param(laws.law_packed_is_alone, ('xla', 'sparse'), marks=NIGHTLY),
        pytest.param(laws.law_own_losses_only, ('xla', 'sparse'), marks=NIGHTLY),
        pytest.param(laws.law_only_trained_parts_move, ('warmup',), marks=NIGHTLY),
    ],
    ids=lambda x: getattr(x, '__name__', None),
)
def test_a_selection_for_each_key_head(law, arguments):
  with laws.model(laws.GQA_EACH):
    law(*arguments)


# What holds whatever the kinds of layers are, and their order.
ANY_LAYERS = [
    pytest.param(laws.law_masked_is_sparse, ('xla',), marks=NIGHTLY),
    pytest.param(laws.law_masked_has_the_gradients_of_sparse, ('xla', 0), marks=NIGHTLY),
    pytest.param(laws.law_masked_has_the_gradients_of_sparse, ('xla', 1), marks=NIGHTLY),
    pytest.param(laws.law_all_selected_is_dense, ('xla', 'sparse'), marks=NIGHTLY),
    pytest.param(laws.law_packed_is_alone, ('xla', 'sparse'), marks=NIGHTLY),
    pytest.param(laws.law_no_future, ('xla', 'sparse'), marks=NIGHTLY),
    pytest.param(laws.law_selection_reaches_output, ('xla', 'sparse'), marks=NIGHTLY),
    pytest.param(laws.law_own_losses_only, ('xla', 'sparse'), marks=NIGHTLY),
    pytest.param(laws.law_loss_scale, ('unpacked', 'sparse'), marks=NIGHTLY),
]


@pytest.mark.parametrize(
    'law, arguments',
    [
        *ANY_LAYERS,
        pytest.param(laws.law_only_trained_parts_move, ('sparse',), marks=NIGHTLY),
        pytest.param(laws.law_bias_balances, (), marks=NIGHTLY),
    ],
    ids=lambda x: getattr(x, '__name__', None),
)
def test_layers_of_unlike_kinds(law, arguments):
  with laws.model(laws.MIXED):
    law(*arguments)


@pytest.mark.parametrize(
    'law, arguments',
    [
        *ANY_LAYERS,
        pytest.param(laws.law_only_trained_parts_move, ('sparse',), marks=NIGHTLY),
        pytest.param(laws.law_only_trained_parts_move, ('warmup',), marks=NIGHTLY),
        pytest.param(laws.law_warmup_is_dense, (), marks=NIGHTLY),
        pytest.param(laws.law_bias_balances, (), marks=NIGHTLY),
    ],
    ids=lambda x: getattr(x, '__name__', None),
)
@pytest.mark.parametrize('cfg', [laws.GATED, laws.SINKS], ids=['gated', 'sinks'])
def test_gates_sinks_and_streams(cfg, law, arguments):
  with laws.model(cfg):
    law(*arguments)


@pytest.mark.parametrize(
    'law, arguments',
    [
        *ANY_LAYERS,
        pytest.param(laws.law_only_trained_parts_move, ('sparse',), marks=NIGHTLY),
        pytest.param(laws.law_only_trained_parts_move, ('warmup',), marks=NIGHTLY),
        pytest.param(laws.law_warmup_is_dense, (), marks=NIGHTLY),
        pytest.param(laws.law_windows_end_where_they_should, (), marks=NIGHTLY),
        pytest.param(laws.law_bias_balances, (), marks=NIGHTLY),
    ],
    ids=lambda x: getattr(x, '__name__', None),
)
def test_layers_of_two_sizes(law, arguments):
  with laws.model(laws.TWO_SIZES):
    law(*arguments)


@pytest.mark.parametrize(
    'law, arguments',
    [*ANY_LAYERS, pytest.param(laws.law_only_trained_parts_move, ('sparse',), marks=NIGHTLY)],
    ids=lambda x: getattr(x, '__name__', None),
)
def test_layers_that_read_the_rows_of_others(law, arguments):
  with laws.model(laws.READING):
    law(*arguments)


@pytest.mark.parametrize(
    'law, arguments',
    [
        *ANY_LAYERS,
        pytest.param(laws.law_only_trained_parts_move, ('warmup',), marks=NIGHTLY),
        pytest.param(laws.law_warmup_is_dense, (), marks=NIGHTLY),
        (laws.law_windows_end_where_they_should, ()),
    ],
    ids=lambda x: getattr(x, '__name__', None),
)
def test_layers_with_windows(law, arguments):
  with laws.model(laws.WINDOWED):
    law(*arguments)


def test_a_model_of_windows_alone_has_no_indexer_to_train():
  cfg = dataclasses.replace(laws.CFG, window_layers=(0, 1), sliding_window=4)
  params, batch = laws.weights(cfg), laws.make_batch(laws.LENGTHS)
  mode = Mode(attention='dense', backend='xla', index_loss=True)
  _, metrics = laws.take_step(params, batch, mode, trains=('backbone',), cfg=cfg)
  assert metrics['layer_grad_norm_backbone'].shape == (2,)
  with pytest.raises(ConfigError, match='window_layers=.0, 1. names all layers'):
    laws.take_step(params, batch, mode, trains=('indexer',), cfg=cfg)


@pytest.mark.parametrize('part, layers', [('backbone', range(5)), ('indexer', (0, 1, 3))])
def test_norms_of_gradients_are_in_the_order_of_layers(part, layers):
  kinds = 'full', 'full', 'shared', 'full', 'shared'
  cfg = dataclasses.replace(laws.MIXED, indexer_types=kinds)
  of_layers = {
      'dense_blocks': [i for i in (1, 3, 4) if i in layers],
      'moe_blocks': [i for i in (0, 2) if i in layers],
  }
  params = laws.weights(cfg)
  grads = split_parts(params, (part,))[0][part]
  for stack, numbers in of_layers.items():
    alone = np.array(numbers) + 1.0  # Layer i has a single gradient, which is i + 1.
    fill = lambda x: jnp.zeros_like(x).at[(slice(None), *[0] * (x.ndim - 1))].set(alone)
    first, *rest = jax.tree.leaves(grads[stack])
    leaves = [fill(first), *map(jnp.zeros_like, rest)]
    grads[stack] = jax.tree.unflatten(jax.tree.structure(grads[stack]), leaves)
  norms = train_step._layer_grad_norm(laws.graph_of(cfg), params, grads)
  np.testing.assert_allclose(norms, np.array(layers) + 1.0)


@two_modes
def test_packed_is_alone(attention):
  laws.law_packed_is_alone('xla', attention)


def test_positions_restart():
  laws.law_positions_restart()


@two_modes
def test_no_future(attention):
  laws.law_no_future('xla', attention)


@backends
@all_modes
def test_selection_reaches_output(backend, attention):
  laws.law_selection_reaches_output(backend, attention)


@all_modes
def test_own_losses_only(attention):
  laws.law_own_losses_only('xla', attention)


@backends
def test_kl_target_is_constant(backend):
  laws.law_kl_target_is_constant(backend)


def test_own_clipping():
  laws.law_own_clipping('sparse')


@pytest.mark.parametrize(
    'cfg',
    [laws.CFG, laws.GQA, laws.GQA_EACH, laws.GATED, laws.SINKS, laws.MIXED, laws.WINDOWED, laws.TWO_SIZES, laws.READING],
)
def test_every_weight_is_of_the_part_that_its_name_says(cfg):
  """So what holds of a part's weights in one model holds of every kind of layer."""
  parts, rest = split_parts(abstract_params(cfg), ('backbone', 'indexer'))
  names = lambda tree: [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]
  assert names(parts['indexer']) and all("'indexer'" in name for name in names(parts['indexer']))
  assert not any("'indexer'" in name for name in names(parts['backbone']))
  assert all(name.endswith("['ffn']['bias'].value") for name in names(rest))  # The router's.


@pytest.mark.parametrize('stage', ['dense', 'warmup', 'sparse'])
def test_only_trained_parts_move(stage):
  laws.law_only_trained_parts_move(stage)


def test_a_frozen_backbone_stays():
  laws.law_a_frozen_backbone_stays()


def test_warmup_is_dense():
  laws.law_warmup_is_dense()


@pytest.mark.parametrize(
    'layout',
    ['unpacked_and_padded', *(pytest.param(x, marks=NIGHTLY) for x in ('padded_rows', 'unpacked'))],
)
def test_loss_scale(layout):
  laws.law_loss_scale(layout, 'sparse')


def test_loss_is_a_mean():
  laws.law_loss_is_a_mean('sparse')


def test_bias_balances():
  laws.law_bias_balances()


def test_balance_converges():
  laws.law_balance_converges()


def test_shift_targets():
  targets = jnp.asarray([[11, 12, 13, 21, 22, 23, 0]])
  counts = jnp.asarray([[1, 1, 0, 1, 1, 0, 0]], jnp.float32)  # Two documents, then padding.
  shifted, weights = shift_targets(targets, counts)
  np.testing.assert_array_equal(weights, [[1, 0, 0, 1, 0, 0, 0]])
  np.testing.assert_array_equal(shifted[weights > 0], [12, 22])


@NIGHTLY
def test_mtp_layer_trains():
  cfg = dataclasses.replace(laws.CFG, n_mtp_layers=1)
  batch, params = laws.make_batch(laws.LENGTHS), laws.weights(cfg)
  losses = []
  for _ in range(2):
    params, metrics = laws.stage_step('sparse', cfg=cfg)[1](params, batch)
    losses.append(float(metrics['mtp_loss']))
  assert metrics['index_kl'].shape == (cfg.n_layers + 1,)
  assert losses[-1] < losses[0], losses


def test_bfloat16_is_close():
  cfg = dataclasses.replace(laws.CFG, dtype='bfloat16')
  batch, params = laws.make_batch(laws.LENGTHS), laws.weights()
  mode = Mode(attention='sparse', backend='xla', index_loss=True)
  exact, rounded = (laws.forward(params, batch, mode, c) for c in (laws.CFG, cfg))
  assert rounded.logits.dtype == jnp.float32
  assert np.isfinite(rounded.logits).all() and np.isfinite(rounded.index_kl).all()
  error = np.linalg.norm(rounded.logits - exact.logits, axis=-1)
  error /= np.linalg.norm(exact.logits, axis=-1)
  assert np.median(error) < 0.05, np.median(error)  # A few rows select another token.


def test_remat_is_invisible():  # The other policies: test_meshes.py.
  batch, params = laws.make_batch(laws.LENGTHS), laws.weights()
  mode = Mode(attention='dense', backend='xla', index_loss=True)
  grads = [
      laws.gradients(0, params, batch, dataclasses.replace(mode, remat=remat))
      for remat in ('none', 'layer')
  ]
  laws.assert_close(grads[1], grads[0], 1e-5)


def test_remat_can_keep_the_selection(monkeypatch):
  # Of the loops that are counted, none shall be the experts'.
  monkeypatch.setattr(moe, 'grouped_matmul', lambda *x, backend: jax.lax.ragged_dot(*x))
  batch, params = laws.make_batch(laws.LENGTHS), laws.weights()

  def loops(remat: str) -> int:  # Of the backend's searches for thresholds.
    mode = Mode(attention='sparse', backend='xla', index_loss=True, remat=remat)
    return str(jax.make_jaxpr(lambda p: laws.gradients(0, p, batch, mode))(params)).count('while[')

  assert loops('selection') == loops('none') == loops('layer') / 2 > 0


def test_remat_by_a_name_that_is_none():
  with pytest.raises(ValueError, match="remat='all' must be one of .'none', 'layer', 'selection', "):
    Mode(attention='dense', backend='xla', remat='all')


@pytest.mark.parametrize('types', [pytest.param((), marks=NIGHTLY), ('full', 'shared')], ids=str)
@pytest.mark.parametrize(
    'which', [pytest.param(0, marks=NIGHTLY), 1], ids=['language model', 'indexer']
)
def test_blocks_of_queries_are_invisible(types, which, monkeypatch):
  cfg = dataclasses.replace(laws.CFG, indexer_types=types)
  batch, params = laws.make_batch(laws.LENGTHS), laws.weights(cfg)
  mode = Mode(attention='sparse', backend='xla', index_loss=True)
  run = lambda: laws.gradients(which, params, batch, mode, cfg)
  whole = run()
  blocks, map_rows = [], attend.map_rows
  monkeypatch.setattr(attend, 'map_rows', lambda *x: blocks.append(x[2]) or map_rows(*x))
  channels = cfg.n_heads * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)
  monkeypatch.setattr(attend, 'QUERY_CHANNELS', 9 * channels)  # The last block has rows to spare.
  laws.assert_close(run(), whole, 1e-5)
  assert set(blocks) == {8}
