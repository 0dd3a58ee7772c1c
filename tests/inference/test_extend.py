# SPDX-License-Identifier: Apache-2.0
"""Reading with a cache gives the numbers of one whole pass, however the text is cut up."""

import dataclasses
import functools

import cases
from flax import nnx
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from test_golden import GLM

from dsa_jax.config import ModelConfig
from dsa_jax.cost.work import row_bytes
from dsa_jax.inference.cache import init_cache
from dsa_jax.inference.extend import extend
from dsa_jax.inference.storage import QuantizedKeys, QuantizedLatents, rotate
from dsa_jax.nn.attention.types import Mode
from dsa_jax.selection import RULES
from dsa_jax.training.state import abstract_params, model_graph

CONFIGS = {
    'deepseek': laws.CFG,
    'glm': dataclasses.replace(GLM, n_mtp_layers=0),
    # The group of three layers is one with an MLP and two with experts, and comes twice.
    'mixed': dataclasses.replace(
        GLM, n_mtp_layers=0, n_dense_layers=1, mlp_layers=(3,), nope_layers=(1, 3)
    ),
    # Selections cross layers with windows.
    'windows': dataclasses.replace(GLM, n_mtp_layers=0, window_layers=(0, 3), sliding_window=6),
    'gqa_windows': dataclasses.replace(
        laws.GQA, n_layers=3, window_layers=(0, 2), sliding_window=9, index_head_dim=16
    ),
    'gqa': laws.GQA,
    'gated': laws.GATED,
    'sinks': dataclasses.replace(laws.SINKS, window_layers=(0,), sliding_window=6),
    'some_nope': dataclasses.replace(laws.SOME_NOPE, index_head_dim=16),
    'some_nope_all_selected': dataclasses.replace(
        laws.SOME_NOPE, index_head_dim=16, index_topk=27, n_dense_layers=4, query_log_scale=False
    ),
    'reading': dataclasses.replace(laws.READING, index_head_dim=16),
    'two_sizes': dataclasses.replace(laws.TWO_SIZES, index_head_dim=16),
    'two_sizes_all_selected': dataclasses.replace(
        laws.TWO_SIZES, index_head_dim=16, index_topk=27, n_dense_layers=4
    ),
    'gqa_each': laws.GQA_EACH,
    'gqa_each_fp8': dataclasses.replace(laws.GQA_EACH, index_head_dim=16),
    'fp8': dataclasses.replace(laws.CFG, index_head_dim=16),
    'gqa_fp8': dataclasses.replace(laws.GQA, index_head_dim=16, n_dense_layers=2),
    'gqa_fp8_all_selected': dataclasses.replace(
        laws.GQA, index_head_dim=16, index_topk=27, n_dense_layers=2
    ),
    'gqa_odd': dataclasses.replace(
        laws.GQA, index_head_dim=16, index_topk=27, n_dense_layers=2, v_head_dim=5
    ),
    'fp8_all_selected': dataclasses.replace(laws.CFG, index_head_dim=16, index_topk=27),
}
LENGTHS = (27, 16, 5)  # Of three sequences, longer and shorter than the budget of five.
WHOLE = (27, 27, 27)  # What the rest of a row is filled with must not matter.


def tokens_of(cfg: ModelConfig) -> np.ndarray:
  return np.random.default_rng(0).integers(cfg.vocab_size, size=(3, 27)).astype(np.int32)


@functools.cache
def whole_pass(name: str, attention: str, rule: str = 'indexer'):
  """Logits and selections of a pass without a cache."""
  cfg = CONFIGS[name]
  tokens = jnp.asarray(tokens_of(cfg))
  end = jnp.broadcast_to(jnp.arange(1, 28, dtype=jnp.int32), tokens.shape)
  mode = Mode(attention=attention, backend='xla', rule=rule, measure=(rule,))
  with laws.eager():
    out = laws.model_of(laws.weights(cfg), cfg)(tokens, jnp.zeros_like(tokens), end, mode)
  return np.asarray(out.logits), np.asarray(out.measures(rule).indices)


@functools.partial(jax.jit, static_argnames=('cfg', 'attention', 'backend', 'rule'), donate_argnums=1)
def step(params, cache, tokens, n_new, cfg, attention, backend='xla', rule='indexer'):
  model = laws.model_of(params, cfg)
  reading = extend(model, cache, tokens, n_new, attention=attention, backend=backend, rule=rule)
  return model.logits(reading.hidden), reading.selected, reading.cache


def read(
    name, attention, cuts, *, lengths=LENGTHS, capacity=27, rows=(0, 1, 2), fmt='float32',
    whole_lines=False, rule='indexer',
):  # fmt: skip
  """Reads the rows in pieces; returns logits and selections where a row has a token."""
  cfg = CONFIGS[name]
  tokens, lengths = tokens_of(cfg)[list(rows)], np.array(lengths)[list(rows)]
  params = laws.weights(cfg)
  cache = init_cache(cfg, len(rows), capacity, fmt=fmt, whole_lines=whole_lines)
  logits, selected = [], []
  for first, last in zip((0, *cuts), (*cuts, 27)):
    width = next(n for n in (1, 10, 27) if n >= last - first)  # Few programs; the rest is padding.
    piece = np.full((len(rows), width), cfg.vocab_size - 1, np.int32)
    n_new = np.clip(lengths - first, 0, last - first)
    for row, n in enumerate(n_new):
      piece[row, :n] = tokens[row, first : first + n]
    n_new = jnp.asarray(n_new, jnp.int32)
    new_logits, new_selected, cache = step(
        params, cache, jnp.asarray(piece), n_new, cfg, attention, rule=rule
    )
    logits.append(new_logits[:, : last - first])
    selected.append(new_selected[:, :, : last - first])
  np.testing.assert_array_equal(cache.length, lengths)
  return np.concatenate(logits, 1), np.concatenate(selected, 2)


CUTS = {
    'whole': (),
    'token_by_token': tuple(range(1, 27)),
    'chunks_then_tokens': (4, 5, 14, 17, 23, 24, 25, 26),
}


NIGHTLY = pytest.mark.nightly


def chunkings():
  """One model is read in every way; some in chunks, and all in every way at night."""
  by_day_in_chunks = 'gqa', 'sinks', 'two_sizes'
  others = 'glm', 'gqa_each', 'mixed', 'gated', 'windows', 'some_nope', 'reading'
  for name in ('deepseek', *by_day_in_chunks, *others, 'gqa_windows'):
    for attention in ('sparse', 'masked', 'dense'):
      for cuts in CUTS:
        by_day = {
            'deepseek': attention == 'sparse' or (attention, cuts) == ('dense', 'chunks_then_tokens'),
            'gqa_windows': (attention, cuts) == ('dense', 'chunks_then_tokens'),
        }.get(name, name in by_day_in_chunks and (attention, cuts) == ('sparse', 'chunks_then_tokens'))
        yield pytest.param(name, attention, cuts, marks=() if by_day else NIGHTLY)


@pytest.mark.parametrize('name, attention, cuts', list(chunkings()))
def test_any_chunking(name, attention, cuts):
  want, want_selected = whole_pass(name, attention)
  logits, selected = read(name, attention, CUTS[cuts])
  for row, n in enumerate(LENGTHS):
    np.testing.assert_allclose(logits[row, :n], want[row, :n], atol=1e-4, rtol=0)
    if attention != 'dense':
      np.testing.assert_array_equal(selected[:, row, :n], want_selected[:, row, :n])


@pytest.mark.parametrize(
    'name', ['deepseek', *(pytest.param(name, marks=NIGHTLY) for name in ('gqa_each', 'glm', 'some_nope'))]
)
@pytest.mark.parametrize(
    'rule', ['oracle', *(pytest.param(rule, marks=NIGHTLY) for rule in RULES if rule not in ('indexer', 'oracle'))]
)
def test_any_rule(name, rule):
  """Those that draw lots do so by position, and the oracle sees the attention as the cache has it."""
  want, want_selected = whole_pass(name, 'sparse', rule)
  logits, selected = read(name, 'sparse', CUTS['chunks_then_tokens'], capacity=31, rule=rule)
  for row, n in enumerate(LENGTHS):
    np.testing.assert_array_equal(selected[:, row, :n], want_selected[:, row, :n])
    np.testing.assert_allclose(logits[row, :n], want[row, :n], atol=1e-4, rtol=0)


@NIGHTLY
@pytest.mark.parametrize(
    'rule', ['window_sinks', 'random', 'oracle']
)
def test_any_rule_in_a_quantised_cache(rule):
  """Zeros behind the rows, as a TPU keeps them, change nothing; where all is selected, nor do rules."""
  lines = {'fmt': 'fp8', 'lengths': WHOLE, 'whole_lines': True}
  want, _ = read('fp8_all_selected', 'sparse', (8, 9), fmt='fp8', lengths=WHOLE)
  logits, _ = read('fp8_all_selected', 'sparse', (8, 9), rule=rule, **lines)
  np.testing.assert_allclose(logits, want, atol=1e-4, rtol=0)


def test_a_window_in_a_quantised_cache_with_whole_lines():
  """Most of a model's logits move by no more than those of layers that select all."""
  want, _ = whole_pass('gqa_windows', 'dense')
  for cuts in ((), tuple(range(1, 27))):
    logits, _ = read('gqa_windows', 'dense', cuts, lengths=WHOLE, fmt='fp8', whole_lines=True)
    error = np.sqrt(np.mean((logits - want) ** 2)) / want.std()
    assert 1e-3 < error < 0.05, error


@NIGHTLY
def test_values_and_keys_of_unlike_widths_in_a_quantised_cache():
  """Together they are an odd number of channels, which does not halve."""
  cfg = CONFIGS['gqa_odd']
  assert cfg.row_dim % 2 == 1
  want, _ = whole_pass('gqa_odd', 'sparse')
  logits, _ = read('gqa_odd', 'sparse', (8, 9), lengths=WHOLE, fmt='fp8')
  error = np.sqrt(np.mean((logits - want) ** 2)) / want.std()
  assert 1e-3 < error < 0.05, error
  rows = jax.eval_shape(lambda: init_cache(cfg, 1, 1, fmt='fp8')).kv
  n_bytes = sum(x.size * x.dtype.itemsize for x in rows)
  assert n_bytes == cfg.n_layers * row_bytes(cfg, 'fp8')


@pytest.mark.parametrize('name', ['two_sizes', pytest.param('some_nope', marks=NIGHTLY)])
def test_rows_of_two_widths_in_a_quantised_cache_with_whole_lines(name):
  want, _ = whole_pass(f'{name}_all_selected', 'sparse')
  cuts = CUTS['chunks_then_tokens']
  logits, _ = read(
      f'{name}_all_selected', 'sparse', cuts, lengths=WHOLE, fmt='fp8', whole_lines=True
  )
  error = np.sqrt(np.mean((logits - want) ** 2)) / want.std()
  assert 1e-3 < error < 0.05, error
  cache = init_cache(laws.TWO_SIZES, 1, 8)
  assert [x.rows.shape[1:] for x in (cache.kv, cache.index_key, cache.window_kv)] == [
      (2 * 8, 12 + 8), (2 * 8, 12), (2 * 8, 14 + 6)
  ]  # fmt: skip
  assert cache.capacity(laws.TWO_SIZES) == 8


@NIGHTLY
@pytest.mark.parametrize('name', ['deepseek', 'glm', 'gqa', 'gated', 'some_nope'])
def test_many_tokens_by_the_kernels_of_a_tpu(name):
  """Layers that select for themselves do so in one op with attention; others share."""
  cfg, length = CONFIGS[name], 8
  tokens, cache = jnp.asarray(tokens_of(cfg)[:1, :length]), init_cache(cfg, 1, length, fmt='float32')
  with cases.interpreted('tpu'):
    out = step(laws.weights(cfg), cache, tokens, jnp.array([length]), cfg, 'sparse', backend='tpu')
    logits, selected, _ = jax.block_until_ready(out)
  want, want_selected = whole_pass(name, 'sparse')
  np.testing.assert_allclose(logits[0], want[0, :length], atol=1e-4, rtol=0)
  np.testing.assert_array_equal(selected[:, 0], want_selected[:, 0, :length])


@pytest.mark.parametrize('rows', [(1, 1, 2, 0), *(pytest.param(rows, marks=NIGHTLY) for rows in ((0,), (2, 0)))])
def test_any_batch(rows):
  """A sequence does not feel its neighbours, nor how much room there is."""
  want, want_selected = read('deepseek', 'sparse', (26,))
  capacity = 64 if len(rows) == 1 else 31
  logits, selected = read('deepseek', 'sparse', (26,), rows=rows, capacity=capacity)
  for i, row in enumerate(rows):
    n = LENGTHS[row]
    np.testing.assert_allclose(logits[i, :n], want[row, :n], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(selected[:, i, :n], want_selected[:, row, :n])


@pytest.mark.parametrize(
    'name, attention, fmt',
    [*(pytest.param('deepseek', attention, 'float32', marks=NIGHTLY) for attention in ('sparse', 'dense')),
     ('fp8', 'sparse', 'fp8'), pytest.param('gqa', 'sparse', 'float32', marks=NIGHTLY),
     pytest.param('gqa_each_fp8', 'sparse', 'fp8', marks=NIGHTLY)],
)  # fmt: skip
def test_whole_lines_change_nothing(name, attention, fmt):
  """As a TPU keeps a cache: rows end in zeros."""
  want, want_selected = read(name, attention, (26,), fmt=fmt)
  logits, selected = read(name, attention, (26,), fmt=fmt, whole_lines=True)
  for row, n in enumerate(LENGTHS):
    np.testing.assert_allclose(logits[row, :n], want[row, :n], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(selected[:, row, :n], want_selected[:, row, :n])
  cache = jax.eval_shape(lambda: init_cache(ModelConfig(), 1, 8, whole_lines=True))
  assert cache.kv.rows.shape[2] == 640 and cache.index_key.rows.shape[2] == 128


@pytest.mark.parametrize('name', ['fp8', 'gqa_fp8'])
@pytest.mark.parametrize('cuts', [(), tuple(range(1, 27))], ids=['layer_read', 'rows_gathered'])
def test_quantised_cache(cuts, name):
  """FP8: nine of ten selected tokens stay; where all are selected, logits move by 5 % of their spread."""
  _, want_selected = whole_pass(name, 'sparse')
  _, selected = read(name, 'sparse', cuts, lengths=WHOLE, fmt='fp8')
  kept = np.mean([
      len(np.intersect1d(a[a >= 0], b[b >= 0])) / (a >= 0).sum()
      for a, b in zip(want_selected.reshape(-1, 5), selected.reshape(-1, 5))
  ])  # fmt: skip
  assert 0.9 < kept < 1, kept
  want, _ = whole_pass(f'{name}_all_selected', 'sparse')
  logits, _ = read(f'{name}_all_selected', 'sparse', cuts, lengths=WHOLE, fmt='fp8')
  error = np.sqrt(np.mean((logits - want) ** 2)) / want.std()
  assert 1e-3 < error < 0.05, error


def test_quantised_kv_within_half_a_step():
  rng = np.random.default_rng(0)
  rows = jnp.asarray(rng.normal(size=(7, 300)) * 10.0 ** rng.integers(-3, 3, size=(7, 1)), jnp.float32)
  quantised = QuantizedLatents.quantize(rows, 260)
  assert quantised.codes.shape == (7, 260) and quantised.scale.shape == (7, 3)
  assert (np.frexp(quantised.scale)[0] == 0.5).all()  # Powers of two.
  back = np.asarray(quantised.decode(jnp.float32))
  scale = np.repeat(quantised.scale, 128, axis=1)[:, :260]
  limit = np.maximum(np.abs(rows[:, :260]) * 2**-4, scale * 2**-10)
  assert (np.abs(back[:, :260] - rows[:, :260]) <= limit).all()
  np.testing.assert_allclose(back[:, 260:], rows[:, 260:], rtol=2**-8)
  key = QuantizedKeys.quantize(rows)
  assert key.scale.shape == (7, 1)
  largest = np.abs(rows).max(axis=1, keepdims=True)
  assert ((largest <= 448 * key.scale) & (448 * key.scale < 2 * largest)).all()


def test_rotation_keeps_products():
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(50, 128)), jnp.float32) for _ in range(2))
  products = lambda q, k: np.asarray(q, np.float64) @ np.asarray(k, np.float64).T
  np.testing.assert_allclose(products(*map(rotate, (q, k))), products(q, k), atol=1e-4)
  one = rotate(jnp.eye(128)[5])
  np.testing.assert_allclose(np.abs(one), 128**-0.5, rtol=1e-6)
  assert np.sign(one[:8]).tolist() == [1, -1, 1, -1, -1, 1, -1, 1]  # Minus where i & 5 has an odd count.


def test_index_keys_are_rotated_before_fp8():
  cfg = dataclasses.replace(laws.CFG, index_head_dim=128)
  rows = jax.random.normal(jax.random.key(0), (1, 8, 128))
  store = init_cache(cfg, 1, 8, fmt='fp8').index_key
  kept = rotate(store.encode(rows).decode(jnp.float32))
  assert 0 < np.abs(kept - rows).max() < 0.2
  q = jax.random.normal(jax.random.key(1), (1, 8, 2, 128))
  np.testing.assert_array_equal(store.match(q), rotate(q))
  with pytest.raises(ValueError, match='cfg.index_head_dim=96 must be a power of two'):
    init_cache(dataclasses.replace(cfg, index_head_dim=96), 1, 8, fmt='fp8')


def test_bytes_per_token():
  """The arithmetic of what is served: 788 bytes per layer in FP8, 1152 + 256 in bfloat16."""
  cfg = ModelConfig()

  def bytes_per_token(cfg, fmt):
    cache = jax.eval_shape(lambda: init_cache(cfg, 1, 1, fmt=fmt))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.kv, cache.index_key)))

  assert bytes_per_token(cfg, 'fp8') == 48_068 == 61 * (512 + 4 * 4 + 64 * 2 + 128 + 4)
  assert bytes_per_token(cfg, 'bfloat16') == 61 * 2 * (576 + 128)
  shared = dataclasses.replace(cfg, indexer_types=('full', *['shared'] * 60))
  assert bytes_per_token(shared, 'fp8') == 61 * 656 + 132


def test_cache_is_updated_in_place():
  """One row of it is written, and no layer of it is copied: index keys are scored where they lie."""
  cfg = dataclasses.replace(CONFIGS['deepseek'], index_head_dim=32, max_seq_len=20_000)
  cache = init_cache(cfg, 1, 20_000, fmt='float32')
  arguments = laws.weights(cfg), cache, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
  compiled = step.lower(*arguments, cfg, 'sparse').compile()
  memory = compiled.memory_analysis()
  size = sum(x.nbytes for x in jax.tree.leaves(cache))
  assert memory.alias_size_in_bytes >= size
  assert memory.temp_size_in_bytes < 20_000 * cfg.index_head_dim * 4


def test_what_does_not_fit_is_lost_and_harms_nothing():
  want, _ = whole_pass('deepseek', 'sparse')
  cfg = CONFIGS['deepseek']
  cache, tokens = init_cache(cfg, 3, 20, fmt='float32'), jnp.asarray(tokens_of(cfg))
  n_new = jnp.full(3, 27, jnp.int32)
  logits, _, cache = step(laws.weights(cfg), cache, tokens, n_new, cfg, 'sparse')
  np.testing.assert_array_equal(cache.length, [20, 20, 20])
  np.testing.assert_allclose(logits[:, :20], want[:, :20], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    'batch, capacity, fmt, message',
    [(0, 8, 'fp8', 'batch=0'), (1, 0, 'fp8', 'capacity=0'), (1, 8, 'int8', "fmt='int8'"),
     (1, 10**6, 'fp8', 'cfg.max_seq_len')],
)  # fmt: skip
def test_bad_cache(batch, capacity, fmt, message):
  with pytest.raises(ValueError, match=message):
    init_cache(laws.CFG, batch, capacity, fmt=fmt)


@pytest.mark.parametrize('name', ['mixed', pytest.param('windows', marks=NIGHTLY)])
def test_layers_one_by_one(name):
  """As a CPU reads them, without a stack."""
  cfg = CONFIGS[name]
  want, want_selected = whole_pass(name, 'sparse')

  @jax.jit
  def run(params):
    model, cache = laws.model_of(params, cfg), init_cache(cfg, 3, 27, fmt='float32')
    reading = extend(
        model, cache, jnp.asarray(tokens_of(cfg)), jnp.full(3, 27), attention='sparse', backend='xla',
        layers=[model.block(i) for i in range(cfg.n_layers)],
    )  # fmt: skip
    return model.logits(reading.hidden), reading.selected

  logits, selected = run(laws.weights(cfg))
  np.testing.assert_allclose(logits, want, atol=1e-4, rtol=0)
  np.testing.assert_array_equal(selected, want_selected)


def test_unknown_attention_and_rule():
  cfg = CONFIGS['deepseek']
  cache, tokens = init_cache(cfg, 1, 4), jnp.zeros((1, 1), jnp.int32)
  with pytest.raises((ValueError, TypeError), match="'sprase'"):
    step(laws.weights(cfg), cache, tokens, jnp.ones(1, jnp.int32), cfg, 'sprase')
  with pytest.raises(ValueError, match="rule 'best' must be one of"):
    step(laws.weights(cfg), cache, tokens, jnp.ones(1, jnp.int32), cfg, 'sparse', rule='best')


def test_sections_that_share_a_stack_copy_none_of_it():
  sizes = dict(n_layers=9, n_dense_layers=1, nope_layers=(3, 7), kv_sources=(0, 1, 2, 3, 4, 5, 6, 3, 8))
  cfg = dataclasses.replace(laws.READING, **sizes, dim=96, moe_inter_dim=256)
  model = nnx.merge(model_graph(cfg), abstract_params(cfg))
  cache = jax.eval_shape(lambda: init_cache(cfg, 1, 32, fmt='float32'))
  token, n_new = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 1), (1,)))
  read = jax.jit(lambda *args: extend(*args, attention='sparse', backend='xla'))
  compiled = read.lower(model, cache, token, n_new).compile()
  weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model))
  assert compiled.memory_analysis().temp_size_in_bytes < weights / 3  # The copies took most of them.
