# SPDX-License-Identifier: Apache-2.0
"""The comparison of test_parity.py, live: pip install -e '.[test,parity]'

What we export is read by `transformers` itself, which must find every tensor and give our logits.
"""

import pathlib
import sys

import numpy as np
import pytest
from test_parity import DSA, GOLDEN, forward
from test_parity_dense import DENSE_CASES, FRESH

from dsa_jax.convert.exporter import export_checkpoint, open_checkpoint
from dsa_jax.convert.importer import import_checkpoint, open_source
from dsa_jax.inference.load import load_checkpoint

torch = pytest.importorskip('torch', reason='needs the extra [parity]')
pytest.importorskip('transformers', reason='needs the extra [parity]')


@pytest.fixture(scope='module')
def make_golden():
  sys.path.insert(0, str(GOLDEN))
  import make_golden

  return make_golden


DENSE = 'deepseek_v3', *DENSE_CASES


@pytest.mark.parametrize('case', [*DSA, *DENSE])
def test_transformers_reads_our_export(case, tmp_path: pathlib.Path, make_golden):
  source = open_source(GOLDEN / case, indexer=FRESH if case in DENSE else None)
  import_checkpoint(source, tmp_path / 'ours', advance=lambda n: None)
  export_checkpoint(open_checkpoint(tmp_path / 'ours'), tmp_path / 'out', shard_bytes=100_000)
  theirs = make_golden.load(tmp_path / 'out')  # Raises if a tensor is missing or unexpected.
  ours = load_checkpoint(tmp_path / 'ours')
  for seed in range(100):  # Until no cut is so close that rounding could decide it.
    rng = np.random.default_rng(seed)
    tokens = rng.integers(ours.cfg.vocab_size, size=(1, 64)).astype(np.int32)
    want, watch = make_golden.full_forward(theirs, torch.from_numpy(tokens).long())
    if watch.is_clear():
      break
  else:
    raise AssertionError('no tokens give clear selections')
  attention = 'dense' if case in DENSE else 'sparse'
  logits = forward(ours, tokens, attention, measure=())[0]
  np.testing.assert_allclose(logits, want['logits'], atol=1e-4, rtol=0)


@pytest.mark.parametrize('case', ['deepseek_v32', 'glm_moe_dsa', 'smollm3', 'deepseek_v2_groups', 'axk2_groups'])
def test_golden_numbers_can_be_made_again(case, make_golden):
  """The script beside them gives what is stored."""
  make_golden.check(case, GOLDEN / case)
