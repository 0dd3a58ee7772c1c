# SPDX-License-Identifier: Apache-2.0
"""Families without indexers against `transformers`: see parity/README.md."""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from test_parity import GOLDEN, close, forward, golden

from dsa_jax.convert.config_json import read_config
from dsa_jax.convert.exporter import export_checkpoint, open_checkpoint
from dsa_jax.convert.importer import import_checkpoint, open_source
from dsa_jax.inference.cache import init_cache
from dsa_jax.inference.extend import extend
from dsa_jax.inference.load import load_checkpoint

sys.path.insert(0, str(GOLDEN))
from dense_cases import DENSE_CASES  # noqa: E402

FRESH = {'index_n_heads': 2, 'index_head_dim': 8, 'index_rope_head_dim': 4, 'index_topk': 16}
quiet = lambda nbytes: None


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
  """A case's checkpoint as one of ours, converted once."""

  @functools.cache
  def convert(case: str) -> pathlib.Path:
    target = tmp_path_factory.mktemp(case) / 'ours'
    import_checkpoint(open_source(GOLDEN / case, indexer=FRESH), target, advance=quiet)
    return target

  return convert


@pytest.mark.parametrize('case', DENSE_CASES)
def test_one_pass(converted, case):
  want, model = golden(case), load_checkpoint(converted(case))
  logits, _, _, load = forward(model, want['tokens'], 'dense', measure=())
  close(logits, want['logits'])
  if 'experts' in want:
    for chosen, count in zip(want['experts'], np.asarray(load['moe_blocks'])):
      np.testing.assert_array_equal(np.bincount(chosen.ravel(), minlength=len(count)), count)
  n_steps = want['incremental_logits'].shape[1]
  close(logits[:, -n_steps:], want['incremental_logits'])


@functools.partial(jax.jit, donate_argnums=1)
def _read(model, cache, tokens):
  n_new = jnp.full(len(tokens), tokens.shape[1], jnp.int32)
  reading = extend(model, cache, tokens, n_new, attention='dense', backend='xla')
  return model.logits(reading.hidden), reading.cache


# One family of each kind of attention is read in pieces by day.
BY_DAY = 'llama', 'qwen3_windows', 'deepseek_v2'


@pytest.mark.parametrize(
    'case', [pytest.param(case, marks=() if case in BY_DAY else pytest.mark.nightly) for case in DENSE_CASES]
)
def test_piece_by_piece(converted, case):
  """A prompt in two pieces, then the last tokens one by one, from a cache."""
  want, model = golden(case), load_checkpoint(converted(case))
  tokens, n_steps = jnp.asarray(want['tokens']), want['incremental_logits'].shape[1]
  n_rows, length = tokens.shape
  cache = init_cache(model.cfg, n_rows, length, fmt='float32')
  cuts = [40, *range(length - n_steps, length)]
  got = []
  for piece in jnp.split(tokens, cuts, axis=1):
    logits, cache = _read(model, cache, piece)
    got.append(logits)
  close(np.concatenate(got, axis=1), want['logits'])
  close(np.concatenate(got[2:], axis=1), want['incremental_logits'])


@pytest.mark.parametrize('case', DENSE_CASES)
def test_round_trip(converted, case, tmp_path):
  """Out again, every tensor has its bytes, and config.json says the same model."""
  export_checkpoint(open_checkpoint(converted(case)), tmp_path / 'out', shard_bytes=30_000)
  assert released.read(tmp_path / 'out') == released.read(GOLDEN / case)
  before, after = (
      json.loads((folder / 'config.json').read_text()) for folder in (GOLDEN / case, tmp_path / 'out')
  )
  assert read_config(after) == read_config(before)
  assert before.items() <= after.items()


@pytest.mark.parametrize('case', DENSE_CASES)
def test_what_transformers_writes_is_the_same_model(case):
  configs = (GOLDEN / case / name for name in ('config.json', 'saved_config.json'))
  released, saved = (read_config(json.loads(path.read_text())) for path in configs)
  assert saved == released


@pytest.mark.parametrize('case', ['llama', 'smollm3', 'qwen3_windows', 'qwen3_moe', 'glm4_moe', 'deepseek_v2'])
def test_sparse_attention_to_all_tokens_is_dense(converted, case):
  """Rows and the queries that meet them are right, too, in every kind of attention."""
  want = golden(case)
  model = load_checkpoint(converted(case), index_topk=want['tokens'].shape[1])
  close(forward(model, want['tokens'], 'sparse', measure=())[0], want['logits'])
