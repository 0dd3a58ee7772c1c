# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer.json and the files beside it say of a text's beginning and end."""

import json

import pytest
import tokenizers

from dsa_jax.config import ConfigError
from dsa_jax.data.tokenizer import Absent, Bytes, Rendered, check_tokenizer, usual_tokenizer
from dsa_jax.data.tokenizer_files import find_tokenizer

BOS, EOS, UNK, A, B = range(5)
WORDS = {'<s>': BOS, '</s>': EOS, '[UNK]': UNK, 'a': A, 'b': B}
NAMED = {'as a string': '<s>', 'as an object': {'__type': 'AddedToken', 'content': '<s>'}}


def write(folder, *, template: str = '', change=lambda tokenizer: None, **files):
  """Writes tokenizer.json and, from keyword arguments, the JSON files beside it."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, '[UNK]'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(['<s>', '</s>'])
  if template:
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[('<s>', BOS), ('</s>', EOS)]
    )
  change(tokenizer)
  tokenizer.save(str(folder / 'tokenizer.json'))
  for name, values in files.items():
    (folder / f'{name}.json').write_text(json.dumps(values))


def load(folder, **config):
  (folder / 'config.json').write_text(json.dumps({'source': {'config': config}}))
  return find_tokenizer(folder)


def test_bytes_where_there_is_no_tokenizer(tmp_path, caplog):
  assert isinstance(load(tmp_path), Bytes)
  assert 'has no tokenizer.json: texts are read and written as bytes' in caplog.text


@pytest.mark.parametrize('bos', NAMED.values(), ids=NAMED)
@pytest.mark.parametrize('template', ['', '<s> $A'], ids=['', 'template'])
@pytest.mark.parametrize('prompt', ['a b', '<s>a b', '<s> <s>a b'])
def test_a_text_begins_once_where_the_config_asks_for_it(tmp_path, bos, template, prompt):
  write(tmp_path, template=template, tokenizer_config={'add_bos_token': True, 'bos_token': bos})
  assert load(tmp_path).encode(prompt) == [BOS, A, B]


@pytest.mark.parametrize('config', [{}, {'add_bos_token': None, 'bos_token': '<s>'}], ids=repr)
def test_where_the_config_does_not_ask_the_template_decides(tmp_path, config):
  write(tmp_path, tokenizer_config=config)
  assert load(tmp_path).encode('a b') == [A, B]
  assert load(tmp_path).encode('<s>a b') == [BOS, A, B]
  write(tmp_path, template='<s> $A', tokenizer_config=config)
  assert load(tmp_path).encode('a b') == load(tmp_path).encode('<s>a b') == [BOS, A, B]
  (tmp_path / 'tokenizer_config.json').unlink()
  assert load(tmp_path).encode('<s>a b') == [BOS, A, B]


def test_what_the_config_declines_is_not_added(tmp_path):
  declined = {'add_bos_token': False, 'bos_token': '<s>'}
  write(tmp_path, template='<s> $A </s>', tokenizer_config=declined)
  assert load(tmp_path).encode('a b') == [A, B, EOS]
  assert load(tmp_path).encode('<s>a b') == [BOS, A, B, EOS]


@pytest.mark.parametrize('template, n', [('<s> $A </s>', 1), ('<s> $A </s> </s>', 2), ('$A', 0)])
def test_nothing_ends_a_text_that_goes_on(tmp_path, template, n):
  write(tmp_path, template=template, tokenizer_config={'bos_token': '<s>'})
  tokenizer = load(tmp_path)
  for text in 'a b', 'a </s>', '':
    assert tokenizer.encode(text) == tokenizer.encode_prompt(text) + [EOS] * n
  assert Bytes().encode_prompt('a') == Bytes().encode('a')


def test_a_beginning_of_two_marks_is_kept_whole(tmp_path):
  write(tmp_path, template='</s> <s> $A')
  assert load(tmp_path).encode('a') == load(tmp_path).encode('</s><s>a') == [EOS, BOS, A]
  write(tmp_path, template='</s> $A', tokenizer_config={'add_bos_token': True, 'bos_token': '<s>'})
  assert load(tmp_path).encode('a') == [BOS, EOS, A]
  for adds in None, True:  # Where the beginning stands is the tokenizer's matter.
    write(tmp_path, template='</s> <s> $A', tokenizer_config={'add_bos_token': adds, 'bos_token': '<s>'})
    for text in 'a', '<s>a', '</s><s>a':
      assert load(tmp_path).encode(text) == load(tmp_path).encode_prompt(text) == [EOS, BOS, A]
    assert load(tmp_path).encode_documents([b'a'])[0].tolist() == [EOS, BOS, A]


def test_the_name_of_the_beginning_may_stand_elsewhere(tmp_path):
  write(tmp_path, tokenizer_config={'add_bos_token': True}, special_tokens_map={'bos_token': '<s>'})
  assert load(tmp_path).encode('a') == [BOS, A]
  (tmp_path / 'special_tokens_map.json').unlink()
  assert load(tmp_path, bos_token_id=BOS).encode('a') == [BOS, A]
  with pytest.raises(ConfigError, match='bos_token=None is no token of tokenizer.json'):
    load(tmp_path, bos_token_id=A)


def test_an_ordinary_id_is_never_taken_for_the_beginning(tmp_path):
  """Many config.json files have a bos_token_id that no tokenizer gave them."""
  write(tmp_path)
  assert load(tmp_path, bos_token_id=A).encode('a a b') == [A, A, B]


def test_a_beginning_that_is_no_token(tmp_path):
  write(tmp_path, tokenizer_config={'add_bos_token': True, 'bos_token': '<bos>'})
  with pytest.raises(ConfigError, match="add_bos_token is true, but bos_token='<bos>' is no token"):
    load(tmp_path)
  write(tmp_path, tokenizer_config={'add_bos_token': 'yes', 'bos_token': '<s>'})
  with pytest.raises(ConfigError, match="add_bos_token='yes' must be true or false"):
    load(tmp_path)


@pytest.mark.parametrize(
    'change',
    [
        lambda tokenizer: tokenizer.enable_truncation(2),
        lambda tokenizer: tokenizer.enable_truncation(2, direction='left'),
        lambda tokenizer: tokenizer.enable_padding(length=40),
        lambda tokenizer: tokenizer.enable_padding(direction='left', pad_to_multiple_of=32),
    ],
    ids=['truncation', 'from the left', 'padding', 'padding on the left'],
)
def test_what_the_file_was_used_for_does_not_change_what_is_read(tmp_path, change):
  write(tmp_path, change=change, template='<s> $A')
  assert load(tmp_path).encode('a b ' * 9) == [BOS] + [A, B] * 9


def test_bytes_are_no_ids_of_a_larger_vocabulary(tmp_path):
  check_tokenizer(Bytes(), 384)
  write(tmp_path)
  check_tokenizer(load(tmp_path), 1000)  # A tokenizer may leave ids over.
  for tokenizer, vocab_size in (Bytes(), 1000), (Bytes(), 200), (load(tmp_path), 4):
    with pytest.raises(ConfigError, match=f'model.vocab_size={vocab_size} is'):
      check_tokenizer(tokenizer, vocab_size)


def test_tokens_that_stand_beside_the_file_are_read(tmp_path):
  """As loaders do, which add them; tokenizer.json decides on ids where it knows a token."""
  token = {'content': '<x>', 'special': True, 'normalized': False}
  write(tmp_path)
  write(tmp_path, tokenizer_config={'added_tokens_decoder': {'5': token, '1': {'content': '<s>'}}})
  assert load(tmp_path).encode('a<x>b') == [A, 5, B] and load(tmp_path).vocab_size == 6
  write(tmp_path, tokenizer_config={}, added_tokens={'<x>': 5, '<s>': 3})
  assert load(tmp_path).encode('<s>a<x>b') == [BOS, A, 5, B]
  assert load(tmp_path, vocab_size=5).vocab_size == 5  # The model has no such id.
  write(tmp_path, tokenizer_config={'added_tokens_decoder': {'7': token}}, added_tokens={})
  with pytest.raises(ConfigError, match='Save the tokenizer again'):
    load(tmp_path)


@pytest.mark.parametrize(
    'settings',
    [
        {'added_tokens_decoder': {'5': {'content': '<x>', 'special': True}}},
        {'additional_special_tokens': ['<x>']},
        {'extra_special_tokens': {'image_token': '<x>'}},
        {'eos_token': '<x>'},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_mark_that_the_vocabulary_holds_as_a_word_is_not_cut(settings, tmp_path):
  def change(tokenizer):
    tokenizer.model = tokenizers.models.WordLevel(WORDS | {'<x>': 5}, '[UNK]')

  write(tmp_path, change=change, tokenizer_config={})
  before = load(tmp_path)
  assert before.encode('a<x>b') == [A, UNK, UNK, UNK, B]  # Whitespace and punctuation cut it.
  write(tmp_path, change=change, tokenizer_config=settings)
  tokenizer = load(tmp_path)
  assert tokenizer.encode('a<x>b') == [A, 5, B] and tokenizer.vocab_size == 6
  tokenizer.special_tokens = before.special_tokens = 'ids'
  assert tokenizer.digest != before.digest


@pytest.mark.parametrize('name', ['a mark', 'the beginning'])
def test_flags_of_a_mark_are_those_beside_the_file(name, tmp_path):
  """tokenizer.json says that spaces before the mark are text, and the file beside it that they are its own."""
  mark, i = ('<x>', 5) if name == 'a mark' else ('<s>', BOS)
  change = lambda tokenizer: tokenizer.add_tokens([tokenizers.AddedToken(mark, normalized=False)])
  write(tmp_path, change=change)
  before = load(tmp_path)
  flags = {'content': mark, 'lstrip': True, 'normalized': False, 'special': name == 'a mark'}
  settings = {'added_tokens_decoder': {str(i): flags}, 'bos_token': '<s>'}
  write(tmp_path, change=change, tokenizer_config=settings)
  tokenizer = load(tmp_path)
  assert tokenizer.marks_alike(tokenizers.AddedToken(mark, lstrip=True, normalized=False, special=True))
  assert tokenizer.is_special(i) and not before.is_special(i)
  assert tokenizer.encode(f'a  {mark}b')[-3:] == [A, i, B]
  tokenizer.special_tokens = before.special_tokens = 'ids'
  assert tokenizer.digest != before.digest
  (tmp_path / 'tokenizer_config.json').unlink()
  assert load(tmp_path).digest != tokenizer.digest


def test_a_mark_may_be_no_special_token_beside_the_file(tmp_path):
  """As words of a model's thoughts, which a reader wants to see."""
  change = lambda tokenizer: tokenizer.add_special_tokens([tokenizers.AddedToken('<x>', normalized=False)])
  write(tmp_path, change=change)
  assert load(tmp_path).decode([A, 5, B]) == 'a b'
  described = {'5': {'content': '<x>', 'normalized': False, 'special': False}}
  write(tmp_path, change=change, tokenizer_config={'added_tokens_decoder': described})
  tokenizer = load(tmp_path)
  assert tokenizer.decode([A, 5, B]) == 'a <x> b' and tokenizer.encode('a<x>b') == [A, 5, B]
  assert tokenizer.encode_documents([b'a<x>b'])[0].tolist() == [A, 5, B]  # It is a word as any other.


def test_ids_that_end_a_text_are_of_the_tokenizer(tmp_path, caplog):
  """A tokenizer of one's own may stand beside the config.json of another model."""
  write(tmp_path, tokenizer_config={'eos_token': '</s>'})
  with pytest.raises(ConfigError, match=r'eos_token_id=\[128001\], but its tokenizer has ids below 5 only'):
    load(tmp_path, eos_token_id=128001)
  assert load(tmp_path, eos_token_id=[128001, EOS]).stop == (EOS,)  # The model may have more ids.
  more, fewer = (load(tmp_path, eos_token_id=ids) for ids in ([EOS, 128001], [EOS]))  # Documents are the same.
  assert more.stop == fewer.stop and more.named_stops == (EOS, 128001) and fewer.named_stops == (EOS,)
  assert load(tmp_path, eos_token_id=[128001, EOS]).digest == fewer.digest
  assert load(tmp_path, eos_token_id=[A, EOS]).stop == (A, EOS) and not caplog.text
  assert load(tmp_path, eos_token_id=A).stop == (A,)
  assert f"eos_token_id=[{A}], which is no special token" in caplog.text and "'</s>' is 1" in caplog.text


def test_a_digest_knows_added_tokens_that_a_document_can_hold(tmp_path):
  write(tmp_path)
  plain = load(tmp_path).digest
  write(tmp_path, tokenizer_config={'bos_token': '<x>'}, added_tokens={'<x>': 5})
  special = load(tmp_path)
  assert special.digest == plain
  special.special_tokens = 'ids'
  as_ids = special.digest
  write(tmp_path, tokenizer_config={})
  assert len({plain, as_ids, load(tmp_path).digest}) == 3


def test_marks_in_a_prompt_are_text_where_the_config_says_so(tmp_path):
  write(tmp_path, tokenizer_config={'split_special_tokens': True})
  tokenizer = load(tmp_path)
  assert tokenizer.encode('a<s>') != [A, BOS]
  tokenizer.encode_documents([b'a'])
  assert tokenizer.encode('a<s>') != [A, BOS]


def test_a_space_in_front_is_a_choice_of_one_file(tmp_path, caplog):
  def change(tokenizer):
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)

  for wanted in False, None:
    write(tmp_path, change=change, tokenizer_config={'add_prefix_space': wanted})
    load(tmp_path)
  assert not caplog.text
  write(tmp_path, change=change, tokenizer_config={'add_prefix_space': True})
  assert load(tmp_path).begins_with_space is False
  assert 'add_prefix_space=True of tokenizer_config.json contradicts False' in caplog.text


def test_random_merges_are_off(tmp_path):
  vocab, merges = {'a': 0, 'b': 1, 'ab': 2}, [('a', 'b')]
  model = tokenizers.models.BPE(vocab, merges, dropout=1.0)
  tokenizers.Tokenizer(model).save(str(tmp_path / 'tokenizer.json'))
  assert load(tmp_path).encode('abab') == [2, 2]


@pytest.mark.parametrize(
    'here, there, stop',
    [
        (None, 1, (1,)),
        (1, None, (1,)),
        (1, [1, 3], (1, 3)),
        ([2, 1], 3, (2, 1, 3)),
        ([1], [], (1,)),
        (None, None, ()),
    ],
)
def test_stop_ids_are_united(tmp_path, here, there, stop):
  write(tmp_path, generation_config={'eos_token_id': there, 'temperature': 0.6})
  assert load(tmp_path, eos_token_id=here).stop == stop
  assert load(tmp_path, text_config={'eos_token_id': here}, eos_token_id=None).stop == stop


def test_stop_ids_by_name_where_no_file_has_them(tmp_path):
  write(tmp_path, tokenizer_config={'eos_token': '</s>'})
  assert load(tmp_path).stop == (EOS,)
  assert load(tmp_path, eos_token_id=4).stop == (4,)


@pytest.mark.parametrize(
    'name, content, message',
    [
        ('generation_config.json', '{', 'generation_config.json is no JSON'),
        ('generation_config.json', '{"eos_token_id": "</s>"}', 'must be an id or a list'),
        ('tokenizer_config.json', '[]', 'must hold a JSON object; it holds a list'),
        ('tokenizer.json', 'version https://git-lfs.github.com/spec/v1\noid', 'git lfs pull'),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
  write(tmp_path)
  (tmp_path / name).write_text(content)
  with pytest.raises(ConfigError, match=message):
    load(tmp_path)


@pytest.mark.parametrize(
    'template, config, want',
    [
        ('', {}, [A, B]),
        ('<s> $A', {}, [BOS, A, B]),
        ('<s> $A </s>', {}, [BOS, A, B, EOS]),  # Only the template says what ends a text.
        ('<s> $A </s>', {'eos_token': '</s>'}, [BOS, A, B, EOS]),
        ('$A </s>', {'eos_token': '</s>', 'add_bos_token': True, 'bos_token': '<s>'}, [BOS, A, B, EOS]),
        ('<s> $A </s>', {'add_bos_token': False, 'bos_token': '<s>', 'eos_token': '</s>'}, [A, B, EOS]),
        ('</s> $A', {'bos_token': '</s>', 'eos_token': '</s>'}, [EOS, A, B, EOS]),  # As in GPT-2.
        ('</s> $A <s>', {'eos_token': '</s>'}, [EOS, A, B, BOS, EOS]),
    ],
)
def test_a_document_begins_and_ends_once(tmp_path, template, config, want):
  write(tmp_path, template=template, tokenizer_config=config)
  [ids] = load(tmp_path).encode_documents([b'a b'])
  assert ids.tolist() == want


def test_any_of_several_ends_ends_a_document(tmp_path):
  write(tmp_path, template='$A </s>')
  [ids] = load(tmp_path, eos_token_id=[B, EOS]).encode_documents([b'a'])
  assert ids.tolist() == [A, EOS]


@pytest.mark.parametrize('vocab_size, kind', [(258, Bytes), (384, Bytes), (513, Bytes), (514, Absent), (129_280, Absent)])
def test_bytes_stand_in_only_where_the_vocabulary_is_that_of_bytes(vocab_size, kind):
  assert type(usual_tokenizer(vocab_size)) is kind


@pytest.mark.parametrize('template', ['', '<s> $A', '<s> $A </s>'])
@pytest.mark.parametrize('adds', [None, True, False])
def test_nothing_is_added_to_what_a_chat_template_has_written(tmp_path, template, adds):
  write(tmp_path, template=template, tokenizer_config={'add_bos_token': adds, 'bos_token': '<s>'})
  tokenizer = load(tmp_path)
  assert tokenizer.encode_prompt(Rendered('a b')) == [A, B]
  assert tokenizer.encode_prompt(Rendered('<s>a b')) == tokenizer.encode_prompt(Rendered('<s>{b}').replace('{b}', 'a b')) == [BOS, A, B]


@pytest.mark.parametrize('text', ['a </s> b', '</s>', 'x</s>', '</s></s>', '<</s>s>', 'a <unk> b'])
@pytest.mark.parametrize('kind', ['unigram', 'words'])
def test_a_document_that_names_a_mark_has_none(tmp_path, kind, text):
  """Although such models find the name in their own vocabulary."""
  marks = ['<unk>', '</s>', '<s>']
  words = [*marks, *'ab<>/sxunk', '\u2581', '\u2581a', '\u2581b']
  if kind == 'unigram':
    model = tokenizers.models.Unigram([(word, -1.0 * (word not in marks)) for word in words], 0)
    pre = tokenizers.pre_tokenizers.Metaspace()
  else:
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, '<unk>')
    pre = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre
  tokenizer.add_special_tokens(marks)
  tokenizer.encode_special_tokens = True
  assert '</s>' not in text or words.index('</s>') in tokenizer.encode('</s>').ids  # The library's way.
  tokenizer.encode_special_tokens = False
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '</s>', 'unk_token': '<unk>'}))
  [ids] = find_tokenizer(tmp_path).encode_documents([text.encode()])
  assert ids[-1] == words.index('</s>') and not {1, 2} & {*ids[:-1].tolist()}
  if kind == 'unigram':
    assert 0 not in ids and ''.join(words[i] for i in ids[:-1]).replace('\u2581', '') == text.replace(' ', '')
