# SPDX-License-Identifier: Apache-2.0
"""Continuing texts: the same whatever the batch, the chunks and the cache; and clear errors."""

import dataclasses
import itertools
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import cases
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
import tokenizers

from configs import quickstart
from dsa_jax import sample
from dsa_jax.config import ConfigError
from dsa_jax.data.text import BOS, VOCAB_SIZE
from dsa_jax.data.tokenizer import Bytes, Pretrained
from dsa_jax.inference.draw import draw
from dsa_jax.inference.extend import extend
from dsa_jax.inference.load import StoredModel, config_of, find_checkpoint, load_checkpoint, load_model, warn_of_length
from dsa_jax.inference.programs import read_chunk
from dsa_jax.inference.sampler import SampleConfig, Sampler
from dsa_jax.inference.slots import write
from dsa_jax.nn.attention.types import Mode
from dsa_jax.parallel.mesh import MeshConfig
from dsa_jax.reporting.inspect import inspect
from dsa_jax.selection import RULES
from dsa_jax.training.checkpoint import Checkpoints, Progress
from dsa_jax.training.optim import OptimConfig
from dsa_jax.training.state import new_state
from dsa_jax.training.workdir import write_config

CFG = dataclasses.replace(laws.CFG, vocab_size=VOCAB_SIZE, max_seq_len=48)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7], [1, 8, 2, 8, 1, 8]]


@pytest.fixture(scope='module')
def model():
  return laws.model_of(laws.weights(CFG), CFG)


@pytest.fixture(scope='module')
def sampler(model):
  return Sampler(model, capacity=40, chunk=4)


def greedy(model, prompts, n):
  """The definition: the whole text again for every token."""
  mode = Mode(attention='sparse', backend='xla')
  forward = jax.jit(lambda tokens, end: model(tokens, jnp.zeros_like(end), end, mode).logits)
  for prompt in prompts:
    ids = list(prompt)
    for _ in range(n):
      tokens, position = np.zeros((1, 40), np.int32), np.arange(40, dtype=np.int32)
      tokens[0, : len(ids)] = ids
      end = np.where(position < len(ids), position + 1, 0).astype(np.int32)[None]
      ids.append(int(forward(tokens, end)[0, len(ids) - 1].argmax()))
    yield ids[len(prompt) :]


def test_greedy_is_the_likeliest_of_whole_passes(model, sampler):
  config = SampleConfig(max_new_tokens=12)
  assert sampler.generate(PROMPTS, config) == list(greedy(model, PROMPTS, 12))


def test_neither_batches_nor_chunks_nor_masks_change_a_text(model, sampler):
  config = SampleConfig(max_new_tokens=12)
  other = Sampler(model, capacity=24, chunk=512, attention='masked')
  alone = [other.generate([prompt], config)[0] for prompt in PROMPTS]
  assert alone == sampler.generate(PROMPTS, config)


def test_short_contexts_change_nothing():
  """A chunk that sees few tokens attends under a mask; later ones gather what they selected."""
  cfg, text = dataclasses.replace(CFG, index_topk=12), PROMPTS[0] * 3
  model = laws.model_of(laws.weights(cfg), cfg)
  short, plain = (Sampler(model, capacity=40, chunk=chunk) for chunk in (10, 4))
  assert [short._engine.visible(before, 10, 40) for before in (0, 10, 20)] == [12, 24, 0]
  for n in 10, 20, 30:
    want = plain.read([text[:n]]).logits
    np.testing.assert_allclose(short.read([text[:n]]).logits, want, atol=1e-5)


def test_one_prefix_many_times(sampler):
  prefix = sampler.read(PROMPTS, 12)
  config = SampleConfig(max_new_tokens=12, temperature=1.0)
  take = lambda **kw: list(sampler.steps(prefix, dataclasses.replace(config, **kw)))
  assert take() == take()
  assert take(seed=1) != take()
  longer = sampler.read([[7, 7, 7]] * 3, 12, after=prefix)
  whole = sampler.read([prompt + [7, 7, 7] for prompt in PROMPTS], 12)
  np.testing.assert_array_equal(longer.lengths, whole.lengths)
  np.testing.assert_allclose(longer.logits, whole.logits, atol=1e-5)
  np.testing.assert_array_equal(prefix.lengths, [len(prompt) for prompt in PROMPTS])


def test_draws_do_not_feel_the_batch(sampler):
  config = SampleConfig(max_new_tokens=10, temperature=1.5, seed=3)
  assert sampler.generate(PROMPTS[:1], config)[0] == sampler.generate(PROMPTS, config)[0]


def test_stop(sampler):
  [[*ids]] = sampler.generate(PROMPTS[:1], SampleConfig(max_new_tokens=12))
  at = next(i for i in range(1, 12) if ids[i] not in ids[:i])
  stopped = sampler.generate(PROMPTS, SampleConfig(max_new_tokens=12, stop=(ids[at],)))
  assert stopped[0] == ids[:at]
  alone = [sampler.generate([p], SampleConfig(max_new_tokens=12, stop=(ids[at],)))[0] for p in PROMPTS]
  assert stopped == alone


def test_streaming_yields_as_it_goes(model):
  sampler = Sampler(model, capacity=40)
  pieces = sampler.stream('hello', max_new_tokens=20, stop=())
  first = list(itertools.islice(pieces, 3))
  whole = sampler('hello', max_new_tokens=20, stop=())
  assert ''.join([*first, *pieces]) == whole


def n_programs() -> tuple[int, int]:
  return read_chunk._cache_size(), write._cache_size()


def test_no_compilation_as_the_context_grows(model):
  before = n_programs()
  sampler = Sampler(model, capacity=38, chunk=4)  # No other test has this capacity.
  prefix = sampler.read([list(range(1, 12))], 20)
  list(sampler.steps(prefix, SampleConfig(max_new_tokens=20)))
  sampler.read([list(range(1, 30))], 1)
  assert n_programs() == (before[0] + 1, before[1] + 1)


def test_a_second_sampler_compiles_nothing(sampler):
  config = SampleConfig(max_new_tokens=3)
  [want] = sampler.generate(PROMPTS[:1], config)
  before = n_programs()
  model = laws.model_of(laws.weights(CFG), CFG)
  assert Sampler(model, capacity=40, chunk=4).generate(PROMPTS[:1], config) == [want]
  drawn = dataclasses.replace(config, temperature=1.0, top_p=0.9, seed=1)
  Sampler(model, capacity=40, chunk=4).generate(PROMPTS[:1], drawn)
  assert n_programs() == before


def test_a_cache_is_copied_only_for_a_prefix_that_stays(sampler, monkeypatch):
  config, prefixes = SampleConfig(max_new_tokens=3), []
  prefix = sampler.read(PROMPTS, 3)
  list(sampler.steps(prefix, config))
  assert not any(x.is_deleted() for x in jax.tree.leaves(prefix))
  read = sampler.read
  monkeypatch.setattr(sampler, 'read', lambda *args: prefixes.append(read(*args)) or prefixes[-1])
  sampler.generate(PROMPTS, config)
  sampler('hello', max_new_tokens=3)
  for prefix in prefixes:
    assert all(x.is_deleted() for x in jax.tree.leaves(prefix.cache))
  assert len(prefixes) == 2


# Drawing.

LOGITS = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))


def frequencies(**kwargs):
  n = 4000
  keys = jax.random.split(jax.random.key(0), n)
  ids = draw(jnp.tile(LOGITS, (n, 1)), keys, **({'temperature': 1.0, 'top_k': 0, 'top_p': 1.0} | kwargs))
  return np.bincount(ids, minlength=4) / n


@pytest.mark.parametrize(
    'kwargs, want',
    [
        ({}, [0.1, 0.5, 0.15, 0.25]),
        ({'temperature': 0.0}, [0, 1, 0, 0]),
        ({'temperature': 0.5}, np.array([0.01, 0.25, 0.0225, 0.0625]) / 0.345),
        ({'top_k': 2}, [0, 2 / 3, 0, 1 / 3]),
        ({'top_p': 0.75}, [0, 2 / 3, 0, 1 / 3]),
        ({'top_p': 0.76}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        ({'top_p': 1e-6}, [0, 1, 0, 0]),
        ({'top_p': 1e-46}, [0, 1, 0, 0]),  # It is 0 in float32.
        ({'top_k': 3, 'top_p': 0.6}, [0, 2 / 3, 0, 1 / 3]),
    ],
)
def test_draw(kwargs, want):
  np.testing.assert_allclose(frequencies(**kwargs), want, atol=0.03)


def test_logits_that_are_not_finite_end_a_text(model):
  """A draw from them went on for ever; the likeliest of them is no token of the model's."""
  broken = jax.tree.map(lambda x: x, model)
  broken.norm.scale = jax.tree.map(lambda x: x * jnp.nan, model.norm.scale)
  sampler = Sampler(broken, capacity=40, chunk=4)
  for temperature in 0.0, 1.0:
    config = SampleConfig(max_new_tokens=3, temperature=temperature)
    for generate in sampler.generate, lambda *args: list(sampler.complete(*args)):
      with pytest.raises(ConfigError, match='the logits behind prompt 0 are not finite'):
        generate(PROMPTS, config)


def test_likeliest_tie_goes_to_the_lowest_id():
  logits = jnp.array([[0.0, 2.0, 2.0, 1.0]])
  keys = jax.random.split(jax.random.key(0), 1)
  assert draw(logits, keys, 0.0, 0, 1.0)[0] == 1
  assert draw(logits, keys, 1.0, 1, 1.0)[0] == 1
  assert draw(logits, keys, 1.0, 0, 1e-6)[0] == 1


@pytest.mark.parametrize('top_k', [0, 2])
def test_no_draw_sorts_the_vocabulary(top_k):
  keys = jax.random.split(jax.random.key(0), 1)
  jaxpr = jax.make_jaxpr(lambda t, p: draw(LOGITS, keys, t, top_k, p))(0.0, 0.9)
  assert not re.search(r'\bsort\b', str(jaxpr)) and 'argmax' in str(jaxpr)


def test_a_draw_from_a_large_vocabulary():
  """Ids of several blocks, of weights that are equal, tiny or zero; none of no weight is drawn."""
  logits = jnp.full((1, 1000), -jnp.inf).at[0, jnp.array([3, 300, 301, 999])].set(jnp.log(
      jnp.array([0.4, 0.3, 0.3, 1e-9])
  ))  # fmt: skip
  keys = jax.random.split(jax.random.key(0), 2000)
  for top_p, want in {1.0: {3: 0.4, 300: 0.3, 301: 0.3}, 0.6: {3: 4 / 7, 300: 3 / 7}}.items():
    ids = draw(jnp.tile(logits, (2000, 1)), keys, 1.0, 0, top_p)
    values, counts = np.unique(ids, return_counts=True)
    assert values.tolist() == list(want)
    np.testing.assert_allclose(counts / 2000, list(want.values()), atol=0.04)


# Text.


def test_bytes_stream_whole_characters():
  ids = Bytes().encode('aß日')
  assert ids == [BOS, 97, 0xC3, 0x9F, 0xE6, 0x97, 0xA5]
  assert list(Bytes().stream(ids)) == ['', 'a', '', 'ß', '', '', '日', '']
  assert ''.join(Bytes().stream([0xE6, 97])) == '\N{REPLACEMENT CHARACTER}a'


def save_run(folder, **changes):
  """A run's checkpoint of the model under test."""
  state = new_state(laws.weights(CFG), ('backbone',), OptimConfig(), seed=0)
  with Checkpoints(folder / 'checkpoints' / 'sparse') as checkpoints:
    checkpoints.save(1, state, Progress({}, 0.0))
  record = {'model': dataclasses.asdict(CFG) | changes}
  (folder / 'config.json').write_text(json.dumps(record))
  return folder / 'checkpoints' / 'sparse'


def test_load_with_a_tokenizer(model, tmp_path):
  folder = save_run(tmp_path)
  assert isinstance(Sampler.load(folder).tokenizer, Bytes)
  words = {word: i for i, word in enumerate('[UNK] a b c'.split())}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, '[UNK]'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / 'tokenizer.json'))
  loaded = Sampler.load(folder, capacity=24)
  assert isinstance(loaded.tokenizer, Pretrained)
  assert loaded.tokenizer.encode('a b x') == [1, 2, 0]
  assert ''.join(loaded.tokenizer.stream([1, 2, 3])) == 'a b c'
  prompt = loaded.tokenizer.encode('a b c')
  [want] = Sampler(model, capacity=24).generate([prompt], SampleConfig(max_new_tokens=5))
  assert loaded.generate([prompt], SampleConfig(max_new_tokens=5)) == [want]


def test_bytes_of_a_model_of_other_ids_are_told(tmp_path, caplog):
  state = new_state(laws.weights(laws.CFG), ('backbone',), OptimConfig(), seed=0)
  with Checkpoints(tmp_path / 'checkpoints' / 'sparse') as checkpoints:
    checkpoints.save(1, state, Progress({}, 0.0))
  (tmp_path / 'config.json').write_text(json.dumps({'model': dataclasses.asdict(laws.CFG)}))
  Sampler.load(tmp_path / 'checkpoints' / 'sparse')
  assert 'has no tokenizer.json' in caplog.text and 'the model has 37 ids' in caplog.text
  caplog.clear()
  Sampler.load(save_run(tmp_path / 'bytes'))
  assert 'tokenizer.json' not in caplog.text


def test_the_command_says_how_fast_it_was():
  assert sample.describe([0.0, 2.0, 2.5, 3.0]) == '3 tokens in 3.0 s: 2.0 s to the first, then 2.0 tokens/s'
  assert sample.describe([0.0, 2.0]) == '1 tokens in 2.0 s'
  assert sample.describe([0.0]) == '0 tokens in 0.0 s'


def test_prompt_from_a_file(tmp_path):
  (tmp_path / 'prompt.txt').write_text('text\n')
  assert sample.read_prompt(f'@{tmp_path}/prompt.txt') == 'text\n'
  assert sample.read_prompt('text') == 'text'
  (tmp_path / 'prompt.txt').write_bytes('\ufeffa\r\nb'.encode())
  assert sample.read_prompt(f'@{tmp_path}/prompt.txt') == 'a\r\nb'  # As a document of that file is read.
  (tmp_path / 'no.txt').write_bytes(b'a\xff')
  with pytest.raises(ValueError, match='no.txt is no UTF-8 text'):
    sample.read_prompt(f'@{tmp_path}/no.txt')


@pytest.mark.parametrize('stage, want', [('dense', 'dense'), ('warmup', 'sparse'), ('sparse', 'sparse')])
def test_an_untrained_indexer_selects_nothing(tmp_path, stage, want):
  folder = save_run(tmp_path)
  record = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(record | {'stages': {'sparse': {'stage': stage}}}))
  assert Sampler.load(folder, capacity=24).attention == want
  assert Sampler.load(folder, capacity=24, attention='masked').attention == 'masked'


def test_a_dense_entry_stays_one_under_any_name(tmp_path):
  folder = tmp_path / 'run' / 'checkpoints' / 'base'
  state = new_state(laws.weights(CFG), ('backbone',), OptimConfig(), seed=0)
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, state, Progress({}, 0.0, 'dense'))
  stages = {'base': {'stage': 'dense'}, 'sparse': {'stage': 'sparse'}}
  record = json.dumps({'model': dataclasses.asdict(CFG), 'stages': stages})
  (tmp_path / 'run' / 'config.json').write_text(record)
  copy = shutil.copytree(folder, tmp_path / 'mine')
  (copy / 'config.json').write_text(record)
  link = folder.with_name('best')
  link.symlink_to('base')
  for place in folder, copy, copy / '1', link:
    assert Sampler.load(place, capacity=24).attention == 'dense'
  renamed = folder.rename(folder.with_name('sparse'))
  assert Sampler.load(renamed, capacity=24).attention == 'dense'


def test_a_converted_model_without_indexers_is_dense():
  names = {'embed': 'BF16', 'blocks/attn/wkv_a': 'BF16'}
  trained = [
      StoredModel(pathlib.Path('v3'), None, {'source': {'dtypes': dtypes}}).has_trained_indexer
      for dtypes in (names, names | {'blocks/attn/indexer/wk': 'BF16'})
  ]
  assert trained == [False, True]


COMMAND = [sys.executable, '-m', 'dsa_jax.sample']


def command(*flags: str) -> subprocess.CompletedProcess:
  return subprocess.run([*COMMAND, *flags], capture_output=True, text=True)


@pytest.mark.nightly
def test_command(tmp_path):
  """It prints what the sampler returns, up to a stop token."""
  folder = save_run(tmp_path)
  (tmp_path / 'prompt.txt').write_text('hello')
  sampler = Sampler.load(folder, capacity=40, rule='random', index_topk=2)
  drawing = {'max_new_tokens': 20, 'temperature': 1.0}
  [ids] = sampler.generate([Bytes().encode('hello')], SampleConfig(**drawing))
  stop = next(i for i in ids[5:] if i not in ids[:5])
  flags = f'--checkpoint={folder}', '--capacity=40', '--max_new_tokens=20', '--temperature=1'
  flags += '--rule=random', '--index_topk=2'
  done = command(*flags, f'--prompt=@{tmp_path}/prompt.txt', f'--stop={stop}')
  assert done.returncode == 0, done.stderr
  assert done.stdout == sampler('hello', **drawing, stop=(stop,))
  assert done.stdout != sampler('hello', **drawing, stop=())
  assert 'sparse attention]' in done.stderr


@pytest.mark.nightly
def test_a_killed_command_goes_on_and_loses_no_answer(tmp_path):
  """It is killed three times; then every prompt has its answers, each of them once."""
  prompts, out, total = tmp_path / 'prompts.jsonl', tmp_path / 'answers.jsonl', 120
  prompts.write_text('\n'.join(json.dumps({'prompt': f'hello {i}'}) for i in range(total // 2)))
  flags = [f'--checkpoint={save_run(tmp_path)}', '--max_new_tokens=30', '--temperature=1', '--slots=2']
  flags += [f'--prompts={prompts}', '--samples=2']
  n_lines = lambda: out.read_bytes().count(b'\n') if out.exists() else 0
  for most in 5, 25, 60:
    process = subprocess.Popen([*COMMAND, *flags, f'--out={out}'], stderr=subprocess.DEVNULL)
    while n_lines() < most:
      assert process.poll() is None
      time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert most <= n_lines() < total
  done = [command(*flags, f'--out={path}') for path in (out, tmp_path / 'whole.jsonl')]
  assert [x.returncode for x in done] == [0, 0], done
  files = out.read_text(), (tmp_path / 'whole.jsonl').read_text()
  lines = [[json.loads(line) for line in text.splitlines()] for text in files]
  answers = [{(x['prompt'], x['sample']): x['ids'] for x in of_file} for of_file in lines]
  assert answers[0] == answers[1] and len(lines[0]) == len(answers[0]) == total


def test_the_command_prints_a_mistake_in_one_line(tmp_path):
  flags = f'--checkpoint={save_run(tmp_path)}', '--capacity=40', '--max_new_tokens=20'
  flags += '--rule=random', '--index_topk=2', '--compilation_cache=off'
  done = command(*flags, '--prompt=' + 'x' * 30)
  assert done.returncode == 1 and 'Traceback' not in done.stderr
  assert 'error: prompt 0 has 31 tokens and 20 are to follow' in done.stderr


# Errors.


@pytest.mark.parametrize(
    'prompts, room, message',
    [
        ([[]], 1, 'prompt 0 is empty'),
        ([[1], []], 1, 'prompt 1 is empty'),
        ([], 1, '0 prompts'),
        ([list(range(40))], 1, '41 do not fit into a cache of 40'),
        ([[1, VOCAB_SIZE]], 1, f'holds id {VOCAB_SIZE}; ids must be within 0 and {VOCAB_SIZE - 1}'),
        ([[1, -1]], 1, 'holds id -1'),
        ([[1]], -1, 'room=-1 must be 0 or more'),
    ],
)
def test_bad_prompts(sampler, prompts, room, message):
  with pytest.raises(ValueError, match=message):
    sampler.read(prompts, room)


def test_text_instead_of_ids(sampler):
  with pytest.raises((ValueError, TypeError), match='text'):  # Type checks of tests come first.
    sampler.read(['text'])


def test_numbers_that_are_no_ids(sampler):
  """One that was no whole number was cut to one."""
  with cases.unchecked():
    assert {SampleConfig(stop=x).stop for x in (5, [5], np.array([5.0]))} == {(5,)}
    assert SampleConfig(seed=1.0, top_k=False) == SampleConfig(seed=1)
    whole = [sampler.read([list(kind(x) for x in PROMPTS[0])]).logits for kind in (int, float)]
    np.testing.assert_array_equal(*whole)
    with pytest.raises(ConfigError, match='must be ids; texts that end a text belong into stop_texts'):
      SampleConfig(stop=('.',))
    with pytest.raises(ConfigError, match='max_new_tokens=2.5 must be a whole number'):
      SampleConfig(max_new_tokens=2.5)
    for read in sampler.read, lambda prompts: list(sampler.complete(prompts)):
      with pytest.raises(ConfigError, match='prompt 0 must be a row of whole numbers; got float64'):
        read([[1.5, 2]])


def test_empty_text(sampler):
  with pytest.raises(ValueError, match="prompt='' is empty"):
    sampler('')


def test_prefixes_that_do_not_match(model, sampler):
  prefix = sampler.read([[1, 2]], 1)
  with pytest.raises(ValueError, match='2 prompts for 1 texts'):
    sampler.read([[1], [2]], 1, after=prefix)
  with pytest.raises(ValueError, match='do not fit into a cache of 40'):
    sampler.steps(prefix, SampleConfig(max_new_tokens=39))
  larger = Sampler(model, capacity=41)
  for misuse in (
      lambda: larger.steps(prefix, SampleConfig(max_new_tokens=1)),
      lambda: larger.read([[1]], after=prefix),
  ):
    with pytest.raises(ValueError, match='a cache of 40 tokens(.|\n)*capacity, 41'):
      misuse()
  elsewhere = dataclasses.replace(prefix, mesh=MeshConfig(context=2))
  with pytest.raises(ValueError, match="on the mesh .*'context': 2.* on this one, .*'context': 1"):
    sampler.steps(elsewhere, SampleConfig(max_new_tokens=1))


@pytest.mark.parametrize(
    'changes',
    [{'max_new_tokens': 0}, {'temperature': -1.0}, {'top_k': -1}, {'top_p': 0.0}, {'top_p': 1.1},
     {'seed': -1}, {'seed': 2**32}],
)  # fmt: skip
def test_bad_config(changes):
  [(name, value)] = changes.items()
  with pytest.raises(ValueError, match=f'{name}={value} must be'):
    SampleConfig(**changes)


def test_bad_sampler(model, sampler):
  with pytest.raises(ValueError, match='capacity=49'):
    Sampler(model, capacity=49)
  with pytest.raises(ValueError, match='chunk=-1'):
    Sampler(model, chunk=-1)
  with pytest.raises(ValueError, match="cache='int8' must be one of"):
    Sampler(model, cache='int8')
  with pytest.raises(ValueError, match="backend='cuda' must be one of"):
    Sampler(model, backend='cuda')
  with pytest.raises(ValueError, match='top_k=10000 must be at most the vocabulary'):
    sampler.steps(sampler.read([[1]], 1), SampleConfig(top_k=10000, max_new_tokens=1))
  with pytest.raises(ValueError, match='top_k=10000'):
    sampler('hello', top_k=10000)


def test_checkpoint_of_another_config(tmp_path):
  with pytest.raises(ValueError, match='holds another model(.|\n)*wkv_a'):
    Sampler.load(save_run(tmp_path, kv_lora_rank=16))
  with pytest.raises(ValueError, match='is a run: choose .*/checkpoints/ENTRY, ENTRY one of sparse'):
    Sampler.load(tmp_path)
  with pytest.raises(ConfigError, match='is a run: choose .*/checkpoints/ENTRY, ENTRY one of sparse'):
    Sampler.load(tmp_path / 'checkpoints')
  with pytest.raises(ConfigError, match='there is no checkpoint folder .*/nothing'):
    Sampler.load(tmp_path / 'nothing')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ConfigError, match='empty is neither a converted checkpoint nor'):
    Sampler.load(tmp_path / 'empty')
  (tmp_path / 'empty' / 'config.json').write_text('{"model_type": "deepseek_v32"}')
  with pytest.raises(ConfigError, match='in its released form. Convert it first: python -m'):
    Sampler.load(tmp_path / 'empty')
  for folder in 'gs://bucket/run/checkpoints/sparse', pathlib.Path('s3://bucket/run'):
    with pytest.raises(ConfigError, match='must be a local path'):
      Sampler.load(folder)


def test_a_checkpoint_is_the_same_however_it_is_spelled(tmp_path, monkeypatch):
  folder = save_run(tmp_path / 'run')
  (tmp_path / 'link').symlink_to(folder)
  moved = tmp_path / 'run' / 'checkpoints' / 'moved'
  folder.rename(tmp_path / 'elsewhere')
  folder.symlink_to(tmp_path / 'elsewhere')
  moved.symlink_to(tmp_path / 'elsewhere')
  spellings = {
      '.': ('run/checkpoints/sparse', 'run/checkpoints/sparse/', './run/../run/checkpoints/sparse', 'link',
            str(folder), folder, 'run/checkpoints/sparse/1', 'run/checkpoints/moved'),
      'run/checkpoints': ('sparse', './sparse', 'sparse/1', '../checkpoints/sparse'),
  }  # fmt: skip
  for place, paths in spellings.items():
    monkeypatch.chdir(tmp_path / place)
    for path in paths:
      assert load_checkpoint(path).cfg == CFG, path
      assert find_checkpoint(path).folder.name in ('sparse', 'moved'), path


def test_loading_says_nothing(tmp_path, caplog):
  load_checkpoint(save_run(tmp_path))
  assert not [record for record in caplog.records if record.levelname != 'INFO']


def test_an_earlier_step_is_loaded_by_its_folder(tmp_path):
  folder = save_run(tmp_path)
  params = jax.tree.map(lambda x: x + 1, laws.weights(CFG))
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(2, new_state(params, ('backbone',), OptimConfig(), seed=0), Progress({}, 0.0))
  first, latest = (load_checkpoint(path).norm.scale[...] for path in (folder / '1', folder))
  np.testing.assert_array_equal(first + 1, latest)


def test_damaged_tokenizer(tmp_path):
  folder = save_run(tmp_path)
  (folder / 'tokenizer.json').write_text('{')
  with pytest.raises(ValueError, match='tokenizer.json is no tokenizer'):
    Sampler.load(folder)


def test_several_tokens_of_decoding_at_once(model, sampler):
  """As speculative decoding verifies drafts: three tokens in a step, on what was read."""
  prefix = sampler.read(PROMPTS, 12)
  drafts = jnp.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], jnp.int32)
  step = jax.jit(lambda cache: extend(
      model, cache, drafts, jnp.full(3, 3, jnp.int32), attention='sparse', backend='xla'
  ).hidden)  # fmt: skip
  logits = model.logits(step(prefix.cache))[:, -1]
  whole = sampler.read([p + d for p, d in zip(PROMPTS, drafts.tolist())], 1)
  np.testing.assert_allclose(logits, whole.logits, atol=1e-5)


# What selects, and how much.


@pytest.mark.parametrize(
    'rule', ['indexer', *(pytest.param(rule, marks=pytest.mark.nightly) for rule in RULES if rule != 'indexer')]
)
def test_rule_and_budget_are_those_of_a_whole_pass(tmp_path, rule):
  folder, tokens = save_run(tmp_path), jnp.asarray([PROMPTS[0] * 3], jnp.int32)
  sampler = Sampler.load(folder, index_topk=3, rule=rule, capacity=40, chunk=4)
  assert sampler.cfg.index_topk == 3 and sampler.rule == rule
  end = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.int32)[None]
  mode = Mode(attention='sparse', backend='xla', rule=rule)
  model = laws.model_of(laws.weights(CFG), dataclasses.replace(CFG, index_topk=3))
  want = jax.jit(lambda x: model(x, jnp.zeros_like(end), end, mode).logits[0, -1])(tokens)
  np.testing.assert_allclose(sampler.read(tokens.tolist()).logits[0], want, atol=1e-5)
  assert np.abs(Sampler.load(folder, capacity=40).read(tokens.tolist()).logits[0] - want).max() > 1e-3


def test_a_run_is_sampled_in_longer_texts_than_it_has_learned_from(tmp_path, caplog):
  entry = lambda stage, seq_len, init_from: dict(stage=stage, seq_len=seq_len, init_from=init_from)
  stages = {'warmup': entry('warmup', 12, 'dense'), 'sparse': entry('sparse', 9, 'warmup')}
  stages |= {'dense': entry('dense', 48, ''), 'later': entry('sparse', 48, 'sparse')}
  folder, tokens = save_run(tmp_path), jnp.asarray([PROMPTS[0] * 3], jnp.int32)
  with pytest.raises(ConfigError, match='does not say how long the rows were from which its indexer learned'):
    load_checkpoint(folder, index_rope_factor=4.0)
  record = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(record | {'stages': stages}))
  backbone = stages | {'sparse': stages['sparse'] | {'trains': ['backbone'], 'init_from': 'dense'}}
  for entries, length in ({}, 0), (backbone, 0), (stages, 12):  # Of the entries that led here.
    (tmp_path / 'config.json').write_text(json.dumps(record | {'stages': entries}))
    assert find_checkpoint(folder).index_seq_len == length
  for factor, length, known in (1.0, 8, 12), (1.0, 16, 16), (2.0, 8, 8):  # An import may have learned before.
    changes = {'index_rope_factor': factor, 'index_original_seq_len': length}
    (tmp_path / 'config.json').write_text(json.dumps({'model': record['model'] | changes, 'stages': stages}))
    assert find_checkpoint(folder).index_seq_len == known
  (tmp_path / 'config.json').write_text(json.dumps(record | {'stages': stages}))
  saved = load_checkpoint(folder)
  cfg = dataclasses.replace(saved.cfg, index_rope_factor=4.0, index_original_seq_len=12)
  model = load_checkpoint(folder, index_rope_factor=4.0)
  assert model.cfg == cfg and load_checkpoint(folder, index_rope_factor=1.0).cfg.index_rope_factor == 1
  end = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.int32)[None]
  run = jax.jit(lambda m, mode: m(tokens, jnp.zeros_like(end), end, mode).logits[0], static_argnums=1)
  dense, sparse = (Mode(attention=attention, backend='xla') for attention in ('dense', 'sparse'))
  np.testing.assert_array_equal(run(model, dense), run(saved, dense))
  assert np.abs(run(model, sparse) - run(saved, sparse)).max() > 1e-3
  sampler = Sampler.load(folder, index_rope_factor=4.0, capacity=40, chunk=4)
  np.testing.assert_allclose(sampler.read(tokens.tolist()).logits[0], run(model, sparse)[-1], atol=1e-5)
  with pytest.raises(ConfigError, match="would change nothing: what selects is the rule 'oracle'"):
    Sampler.load(folder, index_rope_factor=4.0, rule='oracle')
  for known, n_tokens in (saved.cfg, 12), (cfg, 48):
    warn_of_length(find_checkpoint(folder), known, n_tokens)
  assert not caplog.text
  warn_of_length(find_checkpoint(folder), saved.cfg, 48)
  assert 'learned from rows of 12, and selects badly beyond 12. index_rope_factor=4 would help' in caplog.text
  with pytest.raises(ConfigError, match='would change nothing, because attention is dense'):
    Sampler.load(folder, index_rope_factor=4.0, attention='dense')


def test_a_run_is_sampled_by_its_own_rule(tmp_path):
  folder = save_run(tmp_path)
  record = json.loads((tmp_path / 'config.json').read_text())
  stages = {'sparse': {'stage': 'sparse'}}
  (tmp_path / 'config.json').write_text(json.dumps(record | {'selection': 'random', 'stages': stages}))
  assert Sampler.load(folder).rule == 'random'
  assert Sampler.load(folder, rule='oracle').rule == 'oracle'
  stages = {'sparse': {'stage': 'dense'}}  # An indexer that was never trained; others need no training.
  (tmp_path / 'config.json').write_text(json.dumps(record | {'stages': stages}))
  assert Sampler.load(folder).attention == 'dense'
  assert Sampler.load(folder, rule='window_sinks').attention == 'sparse'
  for ignored in {'index_topk': 3}, {'rule': 'indexer'}, {'rule': 'random', 'attention': 'dense'}:
    with pytest.raises(ConfigError, match='would change nothing, because attention is dense'):
      Sampler.load(folder, **ignored)


def test_a_run_is_loaded_with_another_rule_and_budget(tmp_path):
  config = quickstart.get_config('tiny')
  config.workdir = str(tmp_path)
  config.model.update(dataclasses.asdict(dataclasses.replace(CFG, max_seq_len=64)))
  write_config(config, tmp_path)
  state = new_state(laws.weights(CFG), ('backbone',), OptimConfig(), seed=0)
  with Checkpoints(tmp_path / 'checkpoints' / 'sparse') as checkpoints:
    checkpoints.save(1, state, Progress({}, 0.0))
  model, recipe = load_model(tmp_path, 'sparse', index_topk=3, rule='oracle')
  assert recipe.selection == 'oracle' and recipe.model == model.cfg
  assert model.cfg.index_topk == model.block(1).attn.cfg.index_topk == 3
  assert load_model(tmp_path, 'sparse')[1].selection == 'indexer'
  with pytest.raises(ConfigError, match="rule 'best' must be one of"):
    load_model(tmp_path, 'sparse', rule='best')


def test_a_model_of_words_takes_ids_alone_until_it_has_a_tokenizer():
  cfg = dataclasses.replace(CFG, vocab_size=600)
  words = laws.model_of(laws.weights(cfg), cfg)
  sampler = Sampler(words, capacity=24)
  for ask in lambda: sampler('def'), lambda: list(sampler.complete(['def'])), lambda: inspect(words, 'def', 1):
    with pytest.raises(ConfigError, match="'def': no tokenizer was given, and the 600 ids of the model are no bytes"):
      ask()
  [completion] = sampler.complete([[3, 1, 4]], SampleConfig(max_new_tokens=2))
  assert len(completion.ids) == 2 and completion.text == ''
  assert sampler.of_text(SampleConfig()).stop == ()  # No id of bytes ends a text.
  assert inspect(words, [3, 1, 4], 1).ids.tolist() == [3, 1, 4]
  assert isinstance(Sampler(words, Bytes()).tokenizer, Bytes)


def test_what_would_be_ignored_is_refused(model, tmp_path):
  folder = save_run(tmp_path)
  for module in model, model.block(1).attn, model.block(1).attn.indexer, model.block(1).ffn:
    with pytest.raises(ConfigError, match=r'load_model\(..., index_topk=8\)'):
      module.cfg = dataclasses.replace(CFG, index_topk=8)
    with pytest.raises(ConfigError, match='index_topk of a model is fixed'):
      module.index_topk = 8
    with pytest.raises(ConfigError, match=r'rule of a model is fixed.* Sampler.load\(..., rule=...\)'):
      module.rule = 'oracle'
    assert module.cfg == CFG
  sampler = Sampler(model, capacity=40)
  with pytest.raises(ConfigError, match='rule of a sampler is fixed'):
    sampler.rule = 'oracle'
  with pytest.raises(ConfigError, match='a sampler has no temperature: .* an argument of the call'):
    sampler.temperature = 1.0
  for topk in 0, -1, CFG.max_seq_len + 1:
    with pytest.raises(ConfigError, match=f'index_topk={topk} must be within 1 and cfg.max_seq_len=48'):
      load_checkpoint(folder, index_topk=topk)
  with pytest.raises(ConfigError, match="rule 'best' must be one of"):
    Sampler.load(folder, rule='best')
  with pytest.raises(ConfigError, match="rule='random' selects nothing under attention='dense'"):
    Sampler(model, rule='random', attention='dense')
  with pytest.raises(ConfigError, match='index_topk=0 must be within 1'):
    config_of(find_checkpoint(folder), 0)  # As the command asks, before it loads weights.


def test_a_rule_under_a_known_name_takes_its_place(model, monkeypatch):
  """Programs of the earlier rule are forgotten, as a notebook expects that defines it again."""
  read = lambda: Sampler(model, rule='mine', capacity=40).read(PROMPTS[:1]).logits
  monkeypatch.setitem(RULES, 'mine', RULES['window_sinks'])
  before = read()
  monkeypatch.setitem(RULES, 'mine', RULES['random'])
  assert np.abs(read() - before).max() > 1e-3
