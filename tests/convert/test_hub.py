# SPDX-License-Identifier: Apache-2.0
"""A source is a folder, or a name on the hub; the hub itself is not asked here."""

import pathlib

import huggingface_hub
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.convert.building import KEPT_FILES
from dsa_jax.convert.hub import UNWANTED, WANTED, find_source


@pytest.fixture
def asked(monkeypatch, tmp_path):
  calls = []

  def download(name, *, revision, allow_patterns, ignore_patterns):
    assert (allow_patterns, ignore_patterns) == (WANTED, UNWANTED)
    calls.append((name, revision))
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  monkeypatch.chdir(tmp_path)
  return calls


def test_a_folder_that_is_there_comes_first(asked, tmp_path):
  (tmp_path / 'deepseek-ai' / 'DeepSeek-V3').mkdir(parents=True)
  assert find_source('deepseek-ai/DeepSeek-V3') == pathlib.Path('deepseek-ai/DeepSeek-V3')
  assert find_source('/no/such/folder') == pathlib.Path('/no/such/folder')
  assert find_source('no-such-folder') == pathlib.Path('no-such-folder')
  assert not asked


def test_a_name_is_downloaded(asked, tmp_path):
  assert find_source('deepseek-ai/DeepSeek-V3.2') == tmp_path
  assert find_source('zai-org/GLM-5@refs/pr/7') == tmp_path
  assert asked == [('deepseek-ai/DeepSeek-V3.2', None), ('zai-org/GLM-5', 'refs/pr/7')]


def test_all_that_is_kept_is_downloaded_and_no_weight_twice():
  weights = ['model-00001-of-00002.safetensors', 'model.safetensors.index.json', 'config.json']
  twice = ['consolidated.safetensors', 'consolidated.safetensors.index.json', 'original/model.safetensors', 'onnx/config.json']
  weights += ['modeling_deepseek.py']
  files = [*KEPT_FILES, *weights, *twice, 'pytorch_model.bin']
  chosen = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=WANTED, ignore_patterns=UNWANTED)
  assert [*chosen] == [*KEPT_FILES, *weights]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path):
  def fail(*_, **__):
    raise ConnectionError('no route to the hub\nand more')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', fail)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError) as raised:
    find_source('runs/gone')
  message = str(raised.value)
  assert "SOURCE='runs/gone' is no folder here" in message and message.endswith('no route to the hub')
