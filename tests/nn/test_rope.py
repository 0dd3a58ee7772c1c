# SPDX-License-Identifier: Apache-2.0
"""The radians by which channels turn for each position."""

import dataclasses
import math

import numpy as np
import pytest

from dsa_jax.config import ModelConfig
from dsa_jax.nn.rope import index_rope_frequencies, rope_frequencies

CFG = ModelConfig(rope_type='default', rope_theta=100_000.0, max_seq_len=8192)
LONG = dataclasses.replace(CFG, index_rope_factor=4.0, index_original_seq_len=2048)


def test_an_indexer_keeps_within_the_angles_that_it_has_learned():
  """Pairs that turn often stay as they are; those that never turn once in 2,048 tokens are slowed fourfold."""
  usual, longer = rope_frequencies(CFG, 32), index_rope_frequencies(LONG, 32)
  np.testing.assert_array_equal(index_rope_frequencies(CFG, 32), usual)
  np.testing.assert_array_equal(rope_frequencies(LONG, 32), usual)  # The model's own stay.
  turns = 2048 * usual / (2 * math.pi)
  np.testing.assert_array_equal(longer[turns > 32], usual[turns > 32])
  np.testing.assert_allclose(longer[turns < 1], usual[turns < 1] / 4, rtol=1e-12)
  assert (turns > 32).sum() == 4 and (turns < 1).sum() == 7
  between = (longer / usual)[(turns >= 1) & (turns <= 32)]
  assert np.all(np.diff(between) < 0) and 0.25 < between.min() and between.max() < 1
  assert np.all(8192 * longer[turns < 1] <= 2048 * usual[turns < 1] * (1 + 1e-12))


def test_it_is_what_a_model_with_yarn_does_at_that_length():
  yarn = dataclasses.replace(CFG, rope_type='yarn', rope_factor=4.0, original_seq_len=2048)
  np.testing.assert_array_equal(index_rope_frequencies(LONG, 64), rope_frequencies(yarn, 64))


@pytest.mark.parametrize('length', [2048, 32_768])
@pytest.mark.parametrize('kind', ['default', 'linear', 'llama3', 'yarn'])
def test_it_goes_by_how_often_pairs_turn_in_the_model_at_hand(kind, length):
  """Which may have slowed them down itself, so that more of them never turn once in a row."""
  model = dataclasses.replace(CFG, rope_type=kind, rope_factor=8.0, original_seq_len=4096, max_seq_len=131_072)
  longer = dataclasses.replace(model, index_rope_factor=4.0, index_original_seq_len=length)
  before, after = rope_frequencies(model, 128), index_rope_frequencies(longer, 128)
  turns = length * before / (2 * math.pi)
  assert (turns < 1).any() and (turns > 32).any()
  np.testing.assert_allclose(after[turns < 1], before[turns < 1] / 4, rtol=1e-12)
  np.testing.assert_array_equal(after[turns > 32], before[turns > 32])
  assert np.all((after <= before) & (after >= before / 4))
