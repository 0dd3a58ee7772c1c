# SPDX-License-Identifier: Apache-2.0
"""What does not fit into memory is said before it is loaded, or before a batch is begun."""

import dataclasses

import jax
from jax.sharding import AbstractMesh
import laws
import numpy as np
import pytest
from saved_run import save_run

from dsa_jax.config import ConfigError
from dsa_jax.data.text import VOCAB_SIZE
from dsa_jax.inference import memory, sampler
from dsa_jax.inference.batching import Batch
from dsa_jax.inference.memory import Texts, text_bytes
from dsa_jax.inference.sampler import SampleConfig, Sampler
from dsa_jax.parallel.mesh import MESH_AXES

CFG = dataclasses.replace(laws.CFG, vocab_size=VOCAB_SIZE, max_seq_len=64)
DRAFTING = dataclasses.replace(CFG, n_mtp_layers=1)
GQA = dataclasses.replace(laws.GQA, vocab_size=VOCAB_SIZE, max_seq_len=64)
nbytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  return save_run(tmp_path_factory.mktemp('run'), CFG)


def test_what_does_not_fit_is_said_before_loading(checkpoint, monkeypatch):
  wide, narrow = (memory.weight_bytes(CFG, fmt, None) for fmt in ('float32', 'int8'))
  of_text = text_bytes(CFG, Texts(n=1, capacity=64), 'float32', None)
  monkeypatch.setattr(memory, 'device_bytes', lambda: wide + of_text)
  Sampler.load(checkpoint)
  monkeypatch.setattr(memory, 'device_bytes', lambda: narrow + of_text)
  Sampler.load(checkpoint, weights='int8')
  monkeypatch.setattr(sampler, 'load_checkpoint', None)
  with pytest.raises(ConfigError, match=r"What may fit: .*weights='int8'.*, about \d devices"):
    Sampler.load(checkpoint)
  with pytest.raises(ConfigError, match='n_texts=-1 must be at least 0'):
    Sampler.load(checkpoint, n_texts=-1)


@pytest.mark.parametrize('cfg', [DRAFTING, GQA], ids=['drafts', 'gqa'])
def test_all_that_a_running_batch_holds_is_counted(cfg):
  engine = Sampler(laws.model_of(laws.weights(cfg), cfg), drafts=cfg is DRAFTING)._engine
  batch = Batch(engine, SampleConfig(), 3, 48)
  held = vars(batch)['_slots'], *(vars(batch._reader)[name] for name in ('_cache', '_drafts', '_logits'))
  texts = Texts(n=3, capacity=48, drafts=cfg is DRAFTING, is_running=True)
  beside = 4 + 8  # How many tokens may follow the text alone, and its random state, are never kept.
  assert text_bytes(cfg, texts, cfg.dtype, None) == nbytes(held) + beside


def test_meshes_split_texts_positions_and_key_heads():
  size = lambda cfg, n, *mesh: text_bytes(
      cfg, Texts(n=n, capacity=32), 'float32', AbstractMesh(mesh, MESH_AXES) if mesh else None
  )
  of_one = size(CFG, 1)
  assert size(CFG, 4) == 4 * of_one == size(CFG, 7, 2, 1, 1, 1)
  beside = 4 * CFG.vocab_size + 8 + 4 + 4  # Logits and numbers of a text are not split.
  assert size(CFG, 1, 1, 4, 1, 1) - beside == (of_one - beside) // 4
  of_index = 4 * GQA.index_head_dim * len(GQA.full_layers) * 32
  split = lambda *mesh: size(GQA, 1, *mesh) - beside - of_index
  assert split(1, 1, 1, 2) == split() // 2


def test_a_batch_that_does_not_fit_is_not_begun(monkeypatch):
  writes = Sampler(laws.model_of(laws.weights(CFG), CFG))
  of_weights = nbytes(writes._engine.weights)
  two = text_bytes(CFG, Texts(n=2, capacity=64, is_running=True), CFG.dtype, None)
  monkeypatch.setattr(memory, 'device_bytes', lambda: of_weights + two)
  prompts, config = [[1, 2], [3], [4]], SampleConfig(max_new_tokens=2)
  assert len(list(writes.complete(prompts, config, slots=2))) == 3
  with pytest.raises(ConfigError, match='for 3 slots of 64 tokens.*What may fit: slots=2'):
    writes.complete(prompts, config, slots=3)
  writes._engine.weights[:] = map(np.asarray, writes._engine.weights)  # A model may hold such arrays.
  writes.complete(prompts, config, slots=2)
  with pytest.raises(ConfigError, match="for a device's share of 4 texts of 64 tokens"):
    mesh = AbstractMesh((2, 1, 1, 1), MESH_AXES)
    memory.check_memory(CFG, Texts(n=4, capacity=64), weights=of_weights + two, cache='float32', mesh=mesh)


def test_prompts_that_have_their_answers_take_no_room(monkeypatch):
  writes, longest = Sampler(laws.model_of(laws.weights(CFG), CFG)), []
  monkeypatch.setattr(Sampler, '_check_memory', lambda self, *sizes: longest.append(sizes[0]))
  writes.complete([[1] * 40, [3]], SampleConfig(max_new_tokens=2), without={(0, 0)})
  assert longest == [3]
