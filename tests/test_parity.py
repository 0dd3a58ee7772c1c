# SPDX-License-Identifier: Apache-2.0
"""The package against `transformers`: see parity/README.md."""

import dataclasses
import functools
import json
import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.config import ModelConfig
from dsa_jax.convert.importer import import_checkpoint, open_source
from dsa_jax.families.mistral4 import MISTRAL_LARGE_4
from dsa_jax.inference.cache import init_cache
from dsa_jax.inference.extend import extend
from dsa_jax.inference.load import load_checkpoint
from dsa_jax.nn.attention.types import Mode
from dsa_jax.nn.layers import layers_of_stacks
from dsa_jax.nn.transformer import Transformer
from dsa_jax.training.state import model_graph

GOLDEN = pathlib.Path(__file__).parent / 'parity'
NIGHTLY = pytest.mark.nightly


@functools.cache
def golden(case: str) -> dict[str, np.ndarray]:
  with np.load(GOLDEN / case / 'golden.npz') as arrays:
    return dict(arrays)


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
  """A case's checkpoint as our model, converted once."""

  @functools.cache
  def load(case: str) -> Transformer:
    target = tmp_path_factory.mktemp(case) / 'converted'
    import_checkpoint(open_source(GOLDEN / case), target, advance=lambda _: None)
    return load_checkpoint(target)

  return load


@functools.partial(jax.jit, static_argnames='mode')
def _forward(model, tokens, start, end, mode):
  out = model(tokens, start, end, mode, next_tokens=jnp.roll(tokens, -1, axis=1))
  indices = out.measures('indexer').indices if mode.measure else None
  return out.logits, out.mtp_logits, indices, out.expert_load


def forward(model, tokens, attention: str, backend: str = 'xla', measure=('indexer',)):
  n_rows, length = tokens.shape
  start = jnp.zeros(tokens.shape, jnp.int32)
  end = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.int32), (n_rows, length))
  mode = Mode(attention=attention, backend=backend, measure=measure)
  return _forward(model, jnp.asarray(tokens), start, end, mode)


def close(got, want):
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


DSA = (
    'deepseek_v32', 'glm_moe_dsa', 'glm_moe_dsa_full', 'glm_moe_dsa_mixed', 'axk2', 'axk2_groups',
    'hy_v4', 'hy_v4_vl', 'dots3_note', 'mistral_large4',
)  # fmt: skip


def parities():
  for attention, backend, by_day in (
      ('sparse', 'xla', DSA), ('sparse', 'reference', ('deepseek_v32',)), ('masked', 'xla', ('hy_v4',))
  ):
    for case in DSA:
      marks = () if case in by_day else pytest.mark.nightly
      yield pytest.param(case, attention, backend, marks=marks)


@pytest.mark.parametrize('case, attention, backend', list(parities()))
def test_parity(converted, case, attention, backend):
  """Logits, and the selected set of every layer and query; in one pass and token by token."""
  want, model = golden(case), converted(case)
  assert want['tokens'].shape[1] == 12 * model.cfg.index_topk
  logits, _, selected, _ = forward(model, want['tokens'], attention, backend)
  np.testing.assert_array_equal(selected, want['selected'])
  close(logits, want['logits'])
  n_steps = want['incremental_logits'].shape[1]
  close(logits[:, -n_steps:], want['incremental_logits'])
  np.testing.assert_array_equal(selected[:, :, -n_steps:], want['incremental_selected'])


def by_kind(cfg: ModelConfig) -> tuple[int, ...]:
  """Returns what `transformers` reads in place of `kv_sources`: what the last layer of a kind has kept."""
  kept, sources = dict[bool, int](), []
  for i, source in enumerate(cfg.kv_sources):
    kind = i in cfg.nope_layers
    sources.append(i if source == i else kept[kind])
    if source == i and cfg.kv_sources.count(i) > 1:
      kept[kind] = i
  return tuple(sources)


@NIGHTLY
def test_sources_of_latents_by_number_and_by_kind(converted):
  """We read the layer that config.json names, and transformers that of its kind: families/mistral4.py."""
  case = 'mistral_large4_sources'
  want, named = golden(case), converted(case)
  assert named.cfg.kv_sources == (0, 1, 2, 0, 1) and by_kind(named.cfg) == (0, 1, 2, 1, 1)
  logits, _, selected, _ = forward(named, want['tokens'], 'sparse')
  assert np.abs(logits - want['logits']).max() > 0.01
  np.testing.assert_array_equal(selected[:3], want['selected'][:3])
  cfg = dataclasses.replace(named.cfg, kv_sources=by_kind(named.cfg))
  as_theirs = nnx.merge(model_graph(cfg), nnx.state(named))
  logits, _, selected, _ = forward(as_theirs, want['tokens'], 'sparse')
  np.testing.assert_array_equal(selected, want['selected'])
  close(logits, want['logits'])
  assert by_kind(MISTRAL_LARGE_4) == MISTRAL_LARGE_4.kv_sources  # One source of each kind.


@functools.partial(jax.jit, donate_argnums=1)
def _read(model, cache, tokens):
  n_new = jnp.full(len(tokens), tokens.shape[1], jnp.int32)
  reading = extend(model, cache, tokens, n_new, attention='sparse', backend='xla')
  return model.logits(reading.hidden), reading.selected, reading.cache


@pytest.mark.parametrize(
    'case',
    [
        'axk2_groups',
        *(pytest.param(case, marks=NIGHTLY) for case in ('axk2', 'hy_v4', 'hy_v4_vl', 'dots3_note', 'mistral_large4')),
    ],
)
def test_from_a_cache(converted, case):
  """A prompt in two pieces, then the last tokens one by one."""
  want, model = golden(case), converted(case)
  tokens, n_steps = jnp.asarray(want['tokens']), want['incremental_logits'].shape[1]
  n_rows, length = tokens.shape
  cache = init_cache(model.cfg, n_rows, length, fmt='float32')
  logits, selected = [], []
  for piece in jnp.split(tokens, [40, *range(length - n_steps, length)], axis=1):
    of_piece, chosen, cache = _read(model, cache, piece)
    logits.append(of_piece)
    selected.append(chosen)
  close(np.concatenate(logits, axis=1), want['logits'])
  close(np.concatenate(logits[2:], axis=1), want['incremental_logits'])
  np.testing.assert_array_equal(np.concatenate(selected, axis=2), want['selected'])


@pytest.mark.parametrize(
    'case',
    [
        'deepseek_v32', 'glm_moe_dsa', 'glm_moe_dsa_mixed', 'axk2', 'axk2_groups', 'hy_v4', 'dots3_note',
        'mistral_large4',
    ],
)
def test_expert_choice(converted, case):
  want, model = golden(case), converted(case)
  of_stacks = forward(model, want['tokens'], 'sparse')[3]
  layers = layers_of_stacks(model.cfg)
  loads = {i: x for name, load in of_stacks.items() if name != 'mtp' for i, x in zip(layers[name], load)}
  assert len(loads) == len(want['experts'])
  for chosen, i in zip(want['experts'], sorted(loads)):
    count = np.asarray(loads[i])
    np.testing.assert_array_equal(np.bincount(chosen.ravel(), minlength=len(count)), count)


def test_dense_model(converted):
  """DeepSeek-V3, which a warm-up makes a DSA model, is dense whatever its indexers are."""
  want, model = golden('deepseek_v3'), converted('deepseek_v3')
  close(forward(model, want['tokens'], 'dense', measure=())[0], want['logits'])


def test_mtp(converted):
  want, model = golden('deepseek_v32_mtp'), converted('deepseek_v32_mtp')
  logits, mtp_logits, selected, _ = forward(model, want['tokens'], 'sparse')
  close(logits, want['logits'])
  n = want['mtp_logits'].shape[1]
  close(mtp_logits[:, :n], want['mtp_logits'])
  np.testing.assert_array_equal(selected[-1][:, :n], want['mtp_selected'])


@functools.cache
def deviations() -> dict[str, np.ndarray]:
  with np.load(GOLDEN / 'deviations.npz') as arrays:
    return dict(arrays)


def source_of(entry: str, folder: pathlib.Path) -> pathlib.Path:
  """The checkpoint of a deviation: a case's weights under another config.json."""
  case, config = (str(deviations()[f'{entry}/{name}']) for name in ('case', 'config'))
  shutil.copytree(GOLDEN / case, folder)
  whole = json.loads((folder / 'config.json').read_text()) | json.loads(config)
  (folder / 'config.json').write_text(json.dumps(whole))
  return folder


@pytest.mark.parametrize('entry, ours', [('latent_eps', 'spec'), ('short_context_yarn', 'as_is')])
def test_where_transformers_leaves_the_specification(entry, ours, tmp_path):
  """We follow the specification, as `transformers` would with its constants put right.

  The exception is YaRN in a short context: config.json asks for it by its type, and the
  specification, whose own configs have no type, goes by the length.
  """
  source = source_of(entry, tmp_path / 'source')
  import_checkpoint(open_source(source), tmp_path / 'ours', advance=lambda _: None)
  names = 'tokens', 'spec_logits', 'as_is_logits'
  want = {name: deviations()[f'{entry}/{name}'] for name in names}
  model = load_checkpoint(tmp_path / 'ours')
  logits, _, selected, _ = forward(model, want['tokens'], 'sparse')
  close(logits, want[f'{ours}_logits'])
  np.testing.assert_array_equal(selected, deviations()[f'{entry}/{ours}_selected'])
  assert np.abs(want['as_is_logits'] - want['spec_logits']).max() > 0.1


@pytest.mark.parametrize('entry', ['mscale_unequal', 'mscale_all_dim_absent'])
def test_rope_that_deepseek_never_released_is_refused(entry, tmp_path):
  with pytest.raises(ValueError, match='mscale_all_dim=.* must be mscale=1.0'):
    open_source(source_of(entry, tmp_path / 'source'))
