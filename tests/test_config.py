# SPDX-License-Identifier: Apache-2.0
"""The sizes of a model, and paths that are no addresses."""

import dataclasses
import pathlib

import pytest

from dsa_jax.config import ConfigError, ModelConfig, local_path


@pytest.mark.parametrize('name', ['gs://bucket/run', 's3://b/x', 'hf://org/model', 'gs:/bucket/run'])
def test_an_address_is_no_local_folder(name):
  with pytest.raises(ConfigError, match=f"workdir='{name}' must be a local path"):
    local_path(name, 'workdir')


@pytest.mark.parametrize('name', ['runs/a', '/runs/a', '../a', 'C:/a', 'a:b/c', pathlib.Path('x')])
def test_other_names_are_paths(name):
  assert local_path(name, 'workdir') == pathlib.Path(name)


def test_home_is_expanded(monkeypatch):
  monkeypatch.setenv('HOME', '/home/someone')
  assert local_path('~/runs', 'workdir') == pathlib.Path('/home/someone/runs')


def test_rotation_does_not_hang_on_the_context_in_use():
  yarn = ModelConfig(rope_type='yarn')
  short = dataclasses.replace(yarn, max_seq_len=yarn.original_seq_len)
  assert short.uses_yarn and short.sm_scale == yarn.sm_scale == ModelConfig().sm_scale
  plain = ModelConfig(rope_type='default')
  assert not plain.uses_yarn and plain.sm_scale == (128 + 64) ** -0.5
  with pytest.raises(ConfigError, match='rope_type'):
    ModelConfig(rope_type='dynamic')


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'window_n_heads': 2}, "must be 0 unless some layers have a window, others have none"),
        ({'sliding_window': 8, 'window_layers': (0, 1, 2, 3), 'window_n_heads': 2}, 'must be 0 unless'),
        ({'sliding_window': 8, 'window_layers': (1,), 'window_n_heads': -1}, 'must be at least 0'),
        ({'sliding_window': 8, 'window_layers': (1,), 'window_qk_rope_head_dim': 3}, 'in layers with a window'),
        ({'nope_layers_expand': True}, 'must be False without nope_layers'),
        ({'nope_layers_expand': True, 'nope_layers': (1, 3), 'window_layers': (1,), 'sliding_window': 4},
         'window_layers=.1,. share a layer'),
        ({'nope_layers': (1,), 'query_log_scale': True}, 'needs nope_layers_expand'),
        ({'kv_sources': (0, 0, 2)}, 'must name, in MLA, for each of 4 layers'),
        ({'kv_sources': (0, 0, 1, 3)}, 'earlier layer that names itself'),
        ({'kv_sources': (0, 0, 2, 3), 'n_mtp_layers': 1}, 'must be .. with an MTP layer'),
        ({'kv_sources': (1, 1, 2, 3)}, 'earlier layer that names itself'),
        ({'kv_sources': (0, 0, 2, 3), 'nope_layers': (1,)}, 'rotates as it does'),
        ({'kv_sources': (0, 0, 2, 3), 'window_layers': (1,), 'sliding_window': 8}, 'has no window'),
        ({'learned_frequencies': True, 'index_rope_head_dim': 32}, 'learned_frequencies=True must be False'),
        ({'learned_frequencies': True, 'n_mtp_layers': 1}, 'learned_frequencies=True must be False'),
        ({'window_layers': (1,)}, 'self.sliding_window=0 must be above 0 with window_layers'),
        ({'sliding_window': 8}, 'self.sliding_window=8 must be above 0 with window_layers, and 0 without'),
        ({'sliding_window': -1, 'window_layers': (1,)}, 'self.sliding_window=-1 must be above 0'),
        ({'sliding_window': 8, 'window_layers': (4,)}, r'window_layers=\(4,\) must be within 0 and 3'),
        ({'sliding_window': 8, 'window_layers': (2, 1)}, r'window_layers=\(2, 1\) must ascend'),
        ({'sliding_window': 8, 'window_layers': (0,), 'indexer_types': ('full', 'shared', 'full', 'full')},
         "the first of them 'full'"),
    ],
    ids=str,
)  # fmt: skip
def test_windows_that_cannot_be(changes, message):
  with pytest.raises(ConfigError, match=message):
    ModelConfig(n_layers=4, **changes)


def test_layers_with_windows_are_neither_full_nor_shared():
  cfg = ModelConfig(n_layers=4, sliding_window=8, window_layers=[0, 2])
  assert cfg.full_layers == (1, 3) and not cfg.shares_indexers
  cfg = dataclasses.replace(cfg, indexer_types=('shared', 'full', 'full', 'shared'))
  assert cfg.full_layers == (1,) and cfg.shares_indexers


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'rope_theta': 0.0}, 'rope_theta=0.0 must be above 1'),
        ({'rope_theta': 1.0}, 'rope_theta=1.0 must be above 1'),
        ({'rope_theta': float('nan')}, 'rope_theta=nan must be above 1'),
        ({'rope_factor': 0.0}, "rope_factor=0.0 must be at least 1, and finite, with 'yarn' positions"),
        ({'rope_type': 'linear', 'rope_factor': float('inf')}, "rope_factor=inf must be .* 'linear'"),
        ({'beta_fast': 0.0}, 'beta_slow=1.0 must be above 0 and at most self.beta_fast=0.0'),
        ({'beta_slow': 0.0}, 'beta_slow=0.0 must be above 0'),
        ({'mscale': float('inf')}, 'mscale=inf must be finite'),
        ({'rope_type': 'llama3', 'low_freq_factor': 4.0}, 'low_freq_factor=4.0 must be .* below'),
        ({'norm_eps': -1.0}, 'norm_eps=-1.0 must be at least 0'),
        ({'route_scale': -1.0}, 'route_scale=-1.0 must be above 0'),
        ({'moe_inter_dim': 0}, 'moe_inter_dim=0 must be at least 1'),
        ({'inter_dim': 0}, r'inter_dim=0 must be at least 1: layers .0,'),
        ({'index_rope_factor': 0.5}, 'index_rope_factor=0.5 must be at least 1, and finite'),
        ({'index_rope_factor': 2.0}, 'index_original_seq_len=0 must be the length of the rows'),
        ({'index_original_seq_len': -8}, 'index_original_seq_len=-8 must be the length of the rows'),
        ({'window_rope_theta': 0.5}, 'window_rope_theta=0.5 must be 0, or above 1'),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_cannot_be(changes, message):
  with pytest.raises(ConfigError, match=message):
    ModelConfig(**changes)


def test_numbers_that_nothing_reads_do_not_count():
  ModelConfig(rope_type='default', rope_factor=0.0, beta_fast=0.0, low_freq_factor=9.0)
  ModelConfig(beta_fast=1.0)  # As in Kimi K2.
  ModelConfig(inter_dim=0, n_dense_layers=0)
  ModelConfig(moe_inter_dim=0, n_layers=2, n_dense_layers=2)
