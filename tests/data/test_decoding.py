# SPDX-License-Identifier: Apache-2.0
"""Text that is written piece by piece is what all its ids decode to, whatever they are."""

import random

import pytest
from tokenizer_families import FAMILIES
import tokenizers
from tokenizers import decoders, models

from dsa_jax.data.decoding import MOST
from dsa_jax.data.tokenizer import Bytes, Pretrained

WORDS = ['?', '▁', '▁▁▁▁', '▁a', 'a', '▁b', 'b', '##b', '.', ' ', '<0x0A>', '<0xE2>', '<0x82>', '<0xAC>', '<0xF0>']
FALLBACK = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
BROKEN = '\N{REPLACEMENT CHARACTER}'
DECODERS = {
    'byte fallback': decoders.Sequence(FALLBACK), 'metaspace': decoders.Metaspace(),
    'word pieces': decoders.WordPiece(), 'ctc': decoders.CTC('▁', '.'), 'none': None,
}  # fmt: skip


def make(folder, kind: str):
  """Returns a tokenizer, and ids of which random texts are made."""
  if kind == 'bytes':
    return Bytes(), range(257)
  if kind in DECODERS:
    words = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, '?'))
    if DECODERS[kind]:
      tokenizer.decoder = DECODERS[kind]
    tokenizer.add_special_tokens(['<s>'])
  else:
    tokenizer = FAMILIES[kind][0]()
  tokenizer.save(str(folder / 'tokenizer.json'))
  return Pretrained(folder / 'tokenizer.json'), range(tokenizer.get_vocab_size() + 1)  # One is none.


@pytest.mark.parametrize('kind', ['bytes', *DECODERS, *FAMILIES])
def test_pieces_are_the_whole_text_less_that_of_the_prompt(tmp_path, kind):
  tokenizer, every = make(tmp_path, kind)
  n_compared = 0
  for seed in range(60):
    rng = random.Random(seed)
    few = rng.sample(every, rng.choice([2, 4, len(every)]))
    ids = rng.choices(few, k=rng.randrange(8 * MOST))
    split = rng.randrange(len(ids) + 1)
    whole, before = tokenizer.decode(ids), tokenizer.decode(ids[:split])
    text = ''.join(tokenizer.stream(ids[split:], ids[:split]))
    assert whole.endswith(text)
    if whole.startswith(before) and not before.endswith(BROKEN):  # Else it ended within a character.
      assert before + text == whole
      n_compared += 1
  assert n_compared > 10


def test_a_continuation_keeps_its_first_space(tmp_path):
  tokenizer, _ = make(tmp_path, 'byte fallback')
  ids = lambda *words: [WORDS.index(word) for word in words]
  assert list(tokenizer.stream(ids('▁b'), ids('▁a'))) == [' b', '']
  assert list(tokenizer.stream(ids('▁▁▁▁', 'b'), ids('▁a', '<0x0A>'))) == ['    ', 'b', '']
  assert list(tokenizer.stream(ids('▁b'))) == ['b', '']  # A text of its own has none.


def test_a_piece_is_shown_once_no_byte_can_change_it(tmp_path):
  tokenizer, _ = make(tmp_path, 'byte fallback')
  ids = lambda *words: [WORDS.index(word) for word in words]
  euro = ids('<0xE2>', '<0x82>', '<0xAC>')
  assert list(tokenizer.stream([*euro, *ids('a')])) == ['', '', '', '€a', '']
  assert list(tokenizer.stream(ids('a', '<0x0A>'))) == ['a', '', '\n']
  assert list(tokenizer.stream(ids('a', '<0x0A>', '<0xF0>', '▁b'))) == ['a', '', '', 2 * BROKEN + ' b', '']
  assert ''.join(tokenizer.stream(ids('<0x82>', '<0xAC>', 'a'), ids('a', '<0xE2>'))) == '€a'


@pytest.mark.parametrize('kind', ['byte fallback', 'deepseek'])
def test_no_step_decodes_a_long_text(tmp_path, kind, monkeypatch):
  tokenizer, every = make(tmp_path, kind)
  steps = tokenizer.steps([5] * 2000)
  decoding, n_ids = steps.step.__self__, []
  decode = decoding._decode
  monkeypatch.setattr(decoding, '_decode', lambda ids: n_ids.append(len(ids)) or decode(ids))
  for i in random.Random(0).choices(every, k=500):
    steps.step(i)
  assert n_ids and max(n_ids) <= 2 * MOST
