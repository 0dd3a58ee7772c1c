# SPDX-License-Identifier: Apache-2.0
"""Every law of `laws` holds; and the rest of what a model must do, whatever its weights."""

import dataclasses

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from dsa_jax.losses import shift_targets
from dsa_jax.nn.mla import Mode
from dsa_jax.optim import OptimConfig

backends = pytest.mark.parametrize('backend', laws.BACKENDS)
sparse_modes = pytest.mark.parametrize('attention', ['sparse', 'masked'])
all_modes = pytest.mark.parametrize('attention', ['dense', 'sparse', 'masked'])


@pytest.fixture(autouse=True, scope='module')
def eager():
  with laws.eager():
    yield


@backends
def test_masked_is_sparse(backend):
  laws.law_masked_is_sparse(backend)


@backends
@sparse_modes
def test_all_selected_is_dense(backend, attention):
  laws.law_all_selected_is_dense(backend, attention)


@backends
@all_modes
def test_packed_is_alone(backend, attention):
  laws.law_packed_is_alone(backend, attention)


def test_positions_restart():
  laws.law_positions_restart()


@backends
@all_modes
def test_no_future(backend, attention):
  laws.law_no_future(backend, attention)


@backends
@all_modes
def test_selection_reaches_output(backend, attention):
  laws.law_selection_reaches_output(backend, attention)


@backends
@all_modes
def test_own_losses_only(backend, attention):
  laws.law_own_losses_only(backend, attention)


@pytest.mark.parametrize('attention', ['dense', 'sparse'])
def test_own_clipping(attention):
  laws.law_own_clipping(attention)


@pytest.mark.parametrize('stage', ['dense', 'warmup', 'sparse'])
def test_only_trained_parts_move(stage):
  laws.law_only_trained_parts_move(stage)


def test_warmup_is_dense():
  laws.law_warmup_is_dense()


@pytest.mark.parametrize('micro_batches, padded', [(2, False), (4, False), (1, True), (2, True)])
def test_loss_scale(micro_batches, padded):
  laws.law_loss_scale(micro_batches, padded, 'sparse')


def test_loss_scale_of_warmup():
  laws.law_loss_scale(2, True, 'dense')


def test_loss_is_a_mean():
  laws.law_loss_is_a_mean()


def test_bias_balances():
  laws.law_bias_balances()


def test_balance_converges():
  laws.law_balance_converges()
