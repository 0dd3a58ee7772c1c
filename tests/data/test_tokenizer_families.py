# SPDX-License-Identifier: Apache-2.0
"""Documents in the ids of tokenizers that are built as those of released models are."""

import json

import numpy as np
import pytest
from tokenizer_families import FAMILIES

from dsa_jax.config import ConfigError
from dsa_jax.data.tokenizer import Pretrained
from dsa_jax.data.tokenizer_files import open_tokenizer

TEXTS = [
    'The indexer of 2,048 tokens',
    '  two spaces,\n\n\tand a tab ',
    'naïve 語 🎈 \u0301e\u0301',
    'a mark <s> or <|end|> or [gMASK] in a text',
    'x',
    '\n',
]


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
  make, config, before, after = FAMILIES[request.param]
  tokenizer = make()
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  ids = lambda names: [tokenizer.token_to_id(name) for name in names]
  return tmp_path, tokenizer, ids(before), ids(after)


def encoded(folder):
  ours = open_tokenizer(str(folder))
  assert isinstance(ours, Pretrained)
  return ours, ours.encode_documents([text.encode() for text in TEXTS])


def test_documents_begin_and_end_once_and_hold_no_marks(family):
  folder, tokenizer, before, after = family
  ours, documents = encoded(folder)
  marks = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
  for text, ids in zip(TEXTS, documents, strict=True):
    assert ids[: len(before)].tolist() == before and ids[len(ids) - len(after) :].tolist() == after
    inside = ids[len(before) : len(ids) - len(after)].tolist()
    assert not marks & set(inside) and max(inside) < ours.vocab_size
    if not text.startswith('a mark'):
      assert inside == tokenizer.encode(text, add_special_tokens=False).ids
    assert ours.encode(text)[: len(before)] == before


def test_names_of_special_tokens_may_stand_for_their_ids(family):
  folder, tokenizer, before, after = family
  name = lambda ids: ''.join(map(tokenizer.id_to_token, ids))
  plain, ours = (open_tokenizer(str(folder), kind) for kind in ('text', 'ids'))
  texts = f'a {name(after)} b', f'{name(before)}x{name(after)}'
  inside, around = ours.encode_documents([text.encode() for text in texts])
  assert inside.tolist().count(after[0]) == 2 and inside.tolist()[-1:] == after
  assert around.tolist() == plain.encode_documents([b'x'])[0].tolist()
  assert ours.digest != plain.digest
  with pytest.raises(ConfigError, match='bytes have no special tokens'):
    open_tokenizer('bytes', 'ids')


def test_documents_are_those_of_transformers(family):
  transformers = pytest.importorskip('transformers')
  folder, _, before, after = family
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'))
  for text, ids in zip(TEXTS, encoded(folder)[1], strict=True):
    want = theirs(text, add_special_tokens=False, split_special_tokens=True)['input_ids']
    np.testing.assert_array_equal(ids, [*before, *want, *after])


def test_many_documents_are_as_one_by_one(family):
  ours = open_tokenizer(str(family[0]))
  texts = [text.encode() for text in TEXTS]
  for one, among in zip([ours.encode_documents([x])[0] for x in texts], ours.encode_documents(texts)):
    np.testing.assert_array_equal(one, among)


def test_settings_of_other_uses_do_not_count(family):
  folder, tokenizer, *_ = family
  ours, documents = encoded(folder)
  tokenizer.enable_truncation(max_length=2)
  tokenizer.enable_padding(length=50)
  tokenizer.save(str(folder / 'tokenizer.json'))
  for a, b in zip(documents, encoded(folder)[1], strict=True):
    np.testing.assert_array_equal(a, b)
  assert ours.digest != open_tokenizer(str(folder)).digest  # Though the file is another.
