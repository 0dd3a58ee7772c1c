# SPDX-License-Identifier: Apache-2.0
"""A look into one layer holds the numbers of a whole pass."""

import dataclasses

import jax.numpy as jnp
import laws
import numpy as np
import pytest
from test_golden import GLM

from dsa_jax.config import ConfigError
from dsa_jax.data.text import VOCAB_SIZE
from dsa_jax.data.tokenizer import Bytes
from dsa_jax.nn.attention.types import Mode
from dsa_jax.reporting.inspect import _checked, inspect

pytestmark = pytest.mark.usefixtures('eager')

CFG = dataclasses.replace(laws.CFG, vocab_size=VOCAB_SIZE)
TEXT = 'what a model reads'


@pytest.fixture(
    scope='module', params=[0, pytest.param(3, marks=pytest.mark.nightly)], ids=['one stream', 'streams']
)
def model(request):
  cfg = dataclasses.replace(CFG, n_streams=request.param)
  return laws.model_of(laws.weights(cfg), cfg)


@pytest.fixture(scope='module')
def whole_pass(model):
  ids = jnp.asarray([Bytes().encode(TEXT)], jnp.int32)
  end = jnp.arange(1, ids.shape[1] + 1, dtype=jnp.int32)[None]
  mode = Mode(attention='dense', backend='xla', measure=('indexer', 'random'))
  return model(ids, jnp.zeros_like(end), end, mode)


def test_numbers_are_those_of_a_whole_pass(model, whole_pass):
  for rule in ('indexer', 'random'):
    view, measures = inspect(model, TEXT, 1, rule=rule), whole_pass.measures(rule)
    chosen = [np.flatnonzero(row).tolist() for row in view.selection]
    assert chosen == [[i for i in row.tolist() if i >= 0] for row in measures.indices[1, 0]]
    np.testing.assert_allclose(view.captured, measures.captured_mass[1, 0, CFG.index_topk :].mean(), rtol=1e-5)
  np.testing.assert_allclose(view.attention.sum(axis=-1), 1, rtol=1e-5)
  np.testing.assert_array_equal(np.isnan(view.scores), np.triu(np.ones_like(view.scores, bool), 1))
  np.testing.assert_array_equal(inspect(model, Bytes().encode(TEXT), 1).ids, Bytes().encode(TEXT))


@pytest.mark.nightly
def test_each_key_head_captures_what_it_selects():
  """Not what any of them selects."""
  cfg = dataclasses.replace(laws.GQA_EACH, vocab_size=VOCAB_SIZE)
  model = laws.model_of(laws.weights(cfg), cfg)
  view = inspect(model, TEXT, 1)
  ids = jnp.asarray(view.ids)[None]
  end = jnp.arange(1, ids.shape[1] + 1, dtype=jnp.int32)[None]
  mode = Mode(attention='dense', backend='xla', measure=('indexer',))
  measures = model(ids, jnp.zeros_like(end), end, mode).measures('indexer')
  np.testing.assert_allclose(view.mass, measures.captured_mass[1, 0], rtol=1e-5)
  assert np.all(view.selection.sum(axis=-1)[cfg.index_topk :] == pytest.approx(cfg.index_topk))
  assert 0 < np.sum((view.selection > 0) & (view.selection < 1))  # Key heads differ.


def test_it_is_drawn(model):
  figure = inspect(model, TEXT, 0).draw()
  titles = ['index scores', 'selection: 5 tokens', 'true attention (log scale)']
  assert [axes.get_title() for axes in figure.axes] == titles
  assert np.isnan(inspect(model, 'few', 0).captured)


@pytest.mark.parametrize(
    'text, layer, kwargs, message',
    [
        ([], 1, {}, 'has 0 tokens'),
        ('x' * 64, 1, {}, 'has 65 tokens; there must be 1 to model.cfg.max_seq_len=64'),
        ([1, 300], 1, {}, 'ids from 1 to 300; they must be within 0 and 257'),
        ('x', 2, {}, 'layer 2 must be within 0 and 1'),
        ('x', 1, {'rule': 'best'}, "'best' must be one of"),
    ],
)
def test_what_will_not_do_is_named(model, text, layer, kwargs, message):
  with pytest.raises(ConfigError, match=message):
    inspect(model, text, layer, **kwargs)


@pytest.mark.parametrize('ids', [[[1, 2]], [1.5]])
def test_ids_that_are_none(model, ids):  # Type checks of tests would come before those of `inspect`.
  with pytest.raises(ConfigError, match='must be integers in one dimension; got'):
    _checked(model, np.array(ids))


def test_a_layer_without_an_indexer_is_refused():
  cfg = dataclasses.replace(GLM, n_mtp_layers=0)
  shared = next(i for i in range(cfg.n_layers) if not cfg.is_full(i))
  with pytest.raises(ConfigError, match=f'layer={shared} has no indexer; those of layers'):
    inspect(laws.model_of(laws.weights(cfg), cfg), [1, 2, 3], shared)
