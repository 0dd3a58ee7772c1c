# SPDX-License-Identifier: Apache-2.0
"""python -m dsa_jax.evaluate: dense beside sparse for any checkpoint, and what it refuses."""

import dataclasses
import datetime
import hashlib
import json
import math
import pathlib
import shutil
import subprocess
import sys

import laws
import numpy as np
import pytest
from saved_run import save_run
import tokenizers

from dsa_jax import evaluate
from dsa_jax.config import ConfigError
from dsa_jax.data.text import VOCAB_SIZE
from dsa_jax.evaluation import arms, page
from dsa_jax.evaluation.settings import Settings
from dsa_jax.evaluation.subject import keep_settings, open_subject
from dsa_jax.reporting.progress import StepProgress

CFG = dataclasses.replace(
    laws.CFG, vocab_size=VOCAB_SIZE, n_layers=1, n_dense_layers=1, max_seq_len=48, index_topk=16
)
FAST = {'rows': 4, 'batch_size': 2, 'rules': ('indexer', 'window_sinks')}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A run, and a text."""
  folder = tmp_path_factory.mktemp('run')
  save_run(folder, CFG)
  words = np.random.default_rng(0).integers(97, 123, 4000, dtype=np.uint8)
  (folder / 'text.txt').write_bytes(words.tobytes())
  return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))  # Of tokens.


def settings(place, out, **changes):
  checkpoint = str(place / 'checkpoints' / 'sparse')
  fields = {'files': (str(place / 'text.txt'),)} | FAST | changes
  return Settings(checkpoint=checkpoint, out=out, **fields)


def describe(place) -> dict[str, str]:
  return open_subject(settings(place, place / 'none')).data.describe()


def test_dense_beside_sparse(place, tmp_path, monkeypatch, capsys, caplog):
  out = tmp_path / 'out'
  results = evaluate.evaluate(settings(place, out))
  assert json.loads((out / 'evaluate.json').read_text())['arms'].keys() == results['arms'].keys()
  assert list(results['arms']) == ['dense', 'indexer@16', 'window_sinks@16']
  assert 'training reads' not in caplog.text  # Nothing is trained.
  assert results['context'] == 48 and results['targets'] == 4 * 48
  assert results['seen'] == {'mean': 24.5, 'most': 48}
  assert 'queries see 24 tokens on average and 48 at most' in (out / 'evaluate.md').read_text()
  dense = results['arms']['dense']
  np.testing.assert_allclose(dense['bits_per_byte'], dense['nats_per_token'] / math.log(2))
  for name in 'indexer@16', 'window_sinks@16':
    about = results['acted'][name]
    assert about['verdict'] == 'acted' and about['left_out'] == (48 - 16) / 48
    assert results['measures']['16']['everywhere'][name[:-3]]['left_out'] == [pytest.approx(2 / 3)]
    assert results['arms'][name]['dense_nats_beyond_budget'] > 0
  assert results['measures']['16']['beyond']['indexer']['captured_mass'][0] < 1
  worse = {'16': {'beyond': {r: {'captured_mass': [x]} for r, x in (('indexer', 0.2), ('random', 0.3))}}}
  [warning] = set(page.warnings(results | {'measures': worse})) - set(page.warnings(results))
  assert warning == 'indexer@16: it captures no more of the attention than random tokens do.'
  text, printed = (out / 'evaluate.md').read_text(), capsys.readouterr().out
  for words in 'Did selection act?', 'Self-test of indexer@16':
    assert words in text and words in printed
  assert (out / 'bits.png').exists() and (out / 'selection.png').exists()

  # The same command, stopped before its last arm, scores that one alone.
  (out / 'scores' / 'window_sinks@16.npz').unlink()
  scored, score = [], arms._score
  monkeypatch.setattr(arms, '_score', lambda s, arm, bar: scored.append(arm.name) or score(s, arm, bar))
  again = evaluate.evaluate(settings(place, out))
  assert scored == ['window_sinks@16']
  assert again['bits_by_visible'] == results['bits_by_visible']

  # An earlier version did not tell the order of documents.
  kept = json.loads((out / 'settings.json').read_text())
  described = {name: text.split(', in the order')[0] for name, text in describe(place).items()}
  kept['data'] = hashlib.sha256(json.dumps([described, 0], sort_keys=True).encode()).hexdigest()
  (out / 'settings.json').write_text(json.dumps(kept))
  open_subject(settings(place, out))
  with pytest.raises(ConfigError, match='of another evaluation(.|\n)*rows: 4 there, 6 here'):
    evaluate.evaluate(settings(place, out, rows=6))


def test_other_rules_are_measured_beside_those_of_before(place, tmp_path, monkeypatch):
  measured, measure = [], arms.measure
  note = lambda *args, **kwargs: measured.append(args[3].measure) or measure(*args, **kwargs)
  monkeypatch.setattr(arms, 'measure', note)
  subjects = [
      open_subject(settings(place, tmp_path / 'out', rows=2, rules=rules))
      for rules in (('window_sinks',), ('indexer',), ('window_sinks',), ('indexer', 'window_sinks'))
  ]
  results = [arms.measure_budgets(subject, StepProgress(quiet=True))[16] for subject in subjects]
  assert measured == [('window_sinks',), ('indexer', 'window_sinks')]
  first, both, *again = results
  assert both['everywhere'].keys() == {'indexer', 'window_sinks'} and again == [both, both]
  mass = lambda kept, rule: kept['beyond'][rule]['captured_mass']
  assert mass(both, 'window_sinks') == pytest.approx(mass(first, 'window_sinks'))
  assert mass(both, 'indexer') != pytest.approx(mass(both, 'window_sinks'))


def test_results_are_of_the_weights_of_one_step(tmp_path):
  save_run(tmp_path, CFG)
  (tmp_path / 'text.txt').write_text('The quick brown fox jumps over the lazy dog. ' * 20)
  given = settings(tmp_path, tmp_path / 'out')
  subject = dataclasses.replace(open_subject(given), moment=datetime.datetime(2024, 2, 29))
  save_run(tmp_path, CFG, step=2, weights=7)  # Training goes on meanwhile.
  assert subject.identity['step'] == 1
  np.testing.assert_array_equal(subject.params['embed'][...], laws.weights(CFG)['embed'][...])
  keep_settings(subject)

  shutil.rmtree(tmp_path / 'checkpoints')
  save_run(tmp_path, CFG)  # The same weights, saved anew.
  again = open_subject(given)
  assert again.identity == subject.identity and again.moment == subject.moment  # Of chat templates.
  shutil.rmtree(tmp_path / 'checkpoints')
  save_run(tmp_path, CFG, weights=1)
  with pytest.raises(ConfigError, match='the weights: another model(.|\n)*Name another folder'):
    open_subject(given)
  kept = json.loads((tmp_path / 'out' / 'settings.json').read_text())
  assert kept.pop('weights')
  (tmp_path / 'out' / 'settings.json').write_text(json.dumps(kept))  # As of an earlier version.
  open_subject(given)


def test_grouped_queries_and_several_budgets(tmp_path):
  save_run(tmp_path, dataclasses.replace(laws.GQA, vocab_size=VOCAB_SIZE, n_layers=2, n_dense_layers=2))
  (tmp_path / 'text.txt').write_text('The quick brown fox jumps over the lazy dog. ' * 20)
  changes = {'rules': ('indexer',), 'index_topk': (8, 24), 'context': 32}
  results = evaluate.evaluate(settings(tmp_path, tmp_path / 'out', **changes))
  assert {x['verdict'] for x in results['acted'].values()} == {'acted'}
  assert all(x['differs_within_budget'] < 1e-5 for x in results['acted'].values())
  small, large = (results['measures'][k]['beyond']['indexer']['captured_mass'] for k in ('8', '24'))
  assert len(small) == 2 and max(small) < min(large) < 1


def test_layers_with_a_window_have_no_measures(tmp_path):
  windows = {'n_layers': 2, 'n_dense_layers': 2, 'window_layers': (0,), 'sliding_window': 8}
  save_run(tmp_path, dataclasses.replace(CFG, **windows))
  (tmp_path / 'text.txt').write_text('The quick brown fox jumps over the lazy dog. ' * 20)
  given = settings(tmp_path, tmp_path / 'out', rules=('indexer',))
  results = evaluate.evaluate(given)
  again = evaluate.evaluate(given)  # From what the first one has kept.
  kept = again['measures']['16']['everywhere']
  assert results['measures']['16']['everywhere'] == kept
  means = kept['indexer']
  assert means['left_out'] == [None, pytest.approx(2 / 3)] and means['layer_overlap'] == [None]
  assert json.loads((tmp_path / 'out' / 'evaluate.json').read_text())['window_layers'] == [0]
  text = (tmp_path / 'out' / 'evaluate.md').read_text()
  mass = results['measures']['16']['beyond']['indexer']['captured_mass'][1]
  assert '| indexer | 0 | window | window | window | window | window |' in text
  assert f'| indexer | 1 | {mass:.3f} |' in text
  assert '| indexer@16 | 66.7% | 66.7% |' in text and 'Layers with a window select nothing' in text


def test_a_budget_that_leaves_nothing_out_is_said_loudly(place, tmp_path, capsys):
  changes = {'index_topk': (48,), 'rules': ('window_sinks',)}
  results = evaluate.evaluate(settings(place, tmp_path / 'out', **changes))
  assert results['acted']['window_sinks@48']['verdict'] == 'nothing to leave out'
  assert results['equal_arms'] == [('dense', 'window_sinks@48')]
  assert results['measures']['48']['beyond'] is None
  printed = ' '.join(capsys.readouterr().out.split())
  assert 'WARNING: window_sinks@48: selection never acted, because no query sees more than 48' in printed


def test_bits_per_byte_count_the_bytes_of_tokens(tmp_path):
  folder = save_run(tmp_path, dataclasses.replace(CFG, vocab_size=8), stages={'sparse': {'stage': 'dense'}})
  words = {'[UNK]': 0, 'ab': 1, 'abcd': 2}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, '[UNK]'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / 'tokenizer.json'))
  (tmp_path / 'text.txt').write_text('ab abcd ' * 200)  # 400 tokens of 1600 bytes.
  results = evaluate.evaluate(settings(tmp_path, tmp_path / 'out', rules=()))
  length = results['bytes_per_target']
  assert length == pytest.approx(4, rel=0.01) and results['unit'] == 'token'
  dense = results['arms']['dense']
  np.testing.assert_allclose(dense['bits_per_byte'], dense['nats_per_token'] / math.log(2) / length)
  assert not results['has_trained_indexer'] and 'indexer@16' not in results['arms']
  assert results['measures']['16']['attention'] == 'dense'


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'rules': ('best',)}, r"names \['best'\]; the rules are"),
        ({'rules': ('oracle', 'oracle')}, 'must name each of its values once'),
        ({'rows': 5}, 'rows=5 must be a multiple of batch_size=2'),
        ({'rows': 0}, 'rows=0 must be at least 1'),
        ({'context': 49}, 'context=49 exceeds the cfg.max_seq_len=48'),
        ({'context': 1}, 'context=1 must be at least 2'),
        ({'index_rope_factor': 1.0, 'rules': ('oracle',)}, 'would change nothing: the rules are'),
        ({'index_topk': (49,)}, r'index_topk=\[49\] must be within 1 and'),
        ({'files': ()}, 'is of no run, so it has no data of its own: give --files'),
        ({'files': ('nothing/*.txt',)}, 'nothing'),
        ({'rows': 1000}, '1000 different rows'),
        ({'dtype': 'float16'}, "dtype='float16' must be one of"),
        ({'format': 'flat'}, "format='flat' must be one of"),
        ({'min_tokens': -1}, 'min_tokens=-1 must not be negative'),
        ({'tasks': ('needle',)}, r"names \['needle'\]; the kinds are"),
        ({'tasks': ('single',)}, 'length=48 is too short'),
        ({'tasks': ('single',), 'lengths': (49,)}, r'lengths=\[49\] must be within 2 and'),
        ({'lengths': (32,)}, 'would change nothing without tasks'),
        ({'tasks': ('single',), 'prompt': 'instruct'}, 'needs the marks of the model'),
        ({'tasks': ('single',), 'prompt': 'instruct', 'chat': 'User:'}, "must hold '{prompt}'"),
        ({'chat': 'User: {prompt}'}, "needs prompt='instruct'"),
        ({'backend': 'cuda'}, "backend='cuda' must be one of"),
    ],
)
def test_what_will_not_do_is_said_before_anything_is_written(place, tmp_path, changes, message):
  with pytest.raises(ConfigError, match=message):
    evaluate.evaluate(settings(place, tmp_path / 'out', **changes))
  assert not (tmp_path / 'out').exists()


def test_other_folders_are_left_alone(place, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='is a file: name a folder'):
    settings(place, tmp_path / 'file')
  with pytest.raises(ConfigError, match='holds something else'):
    evaluate.evaluate(settings(place, tmp_path))


def test_a_vocabulary_of_another_alphabet(tmp_path):
  (tmp_path / 'text.txt').write_text('abc' * 1000)
  save_run(tmp_path, dataclasses.replace(CFG, vocab_size=1000))
  with pytest.raises(ConfigError, match='of another alphabet than .* Give the tokenizer'):
    evaluate.evaluate(settings(tmp_path, tmp_path / 'out'))
  save_run(tmp_path, dataclasses.replace(CFG, vocab_size=100))
  with pytest.raises(ConfigError, match='vocab_size=100 is too small for the mixture data: it needs 258. Give the tokenizer'):
    evaluate.evaluate(settings(tmp_path, tmp_path / 'out'))


def test_only_a_vocabulary_is_mended_by_a_tokenizer(place, tmp_path):
  (tmp_path / 'tokenizer.json').write_text('{')
  with pytest.raises(ConfigError, match='tokenizer.json') as error:
    evaluate.evaluate(settings(place, tmp_path / 'out', tokenizer=str(tmp_path)))
  assert '--tokenizer' not in str(error.value)


def test_the_command_prints_a_mistake_in_one_line(place, tmp_path):
  command = [sys.executable, '-m', 'dsa_jax.evaluate', str(place / 'checkpoints' / 'sparse'), str(tmp_path)]
  done = subprocess.run([*command, '--index_topk=8,x'], capture_output=True, text=True,
                        cwd=pathlib.Path(__file__).parents[2])  # fmt: skip
  assert done.returncode == 1 and 'Traceback' not in done.stderr
  assert "error: --index_topk=['8', 'x'] must be numbers" in done.stderr
