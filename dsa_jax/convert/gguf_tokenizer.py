# SPDX-License-Identifier: Apache-2.0
"""Makes the tokenizer.json and tokenizer_config.json of the tokenizer inside a GGUF file.

Source:
  ggml-org/llama.cpp: src/llama-vocab.cpp for the names of pre-tokenizers and what is usual in each;
  the tokenizer.json files of Llama 2, Llama 3, Qwen2, SmolLM2 and GPT-2 for their steps.
"""

import json
from typing import Any

import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # Types of tokens.
PREFIX = 'tokenizer.ggml.'
SPACE = '▁'

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'


def _byte_level(use_regex: bool) -> dict[str, Any]:
  return {
      'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': use_regex
  }  # fmt: skip


def _split(numbers: str) -> list[dict[str, Any]]:
  pattern = {'Regex': f'{CONTRACTIONS}|{numbers}|{REST}'}
  split = {'type': 'Split', 'pattern': pattern, 'behavior': 'Isolated', 'invert': False}
  return [split, _byte_level(use_regex=False)]


LLAMA3 = _split(r'\p{N}{1,3}')
PRE_TOKENIZERS = {
    'llama3': LLAMA3,
    'llama-v3': LLAMA3,
    'llama-bpe': LLAMA3,
    'qwen2': _split(r'\p{N}'),
    'smollm': [{'type': 'Digits', 'individual_digits': True}, _byte_level(use_regex=True)],
    'gpt-2': [_byte_level(use_regex=True)],
}
NORMALIZERS = {'qwen2': {'type': 'NFC'}}
SPECIAL = {
    'bos_token': 'bos_token_id',
    'eos_token': 'eos_token_id',
    'unk_token': 'unknown_token_id',
    'pad_token': 'padding_token_id',
}


def read_tokenizer(
    fields: dict[str, Any], vocab_size: int, problems: list[str]
) -> tuple[dict[str, str], dict[str, Any]]:
  """Returns the files of the tokenizer, and the ids that config.json has of it.

  Args:
    fields: The fields of the GGUF file.
    vocab_size: The number of rows of the embedding.
    problems: The list that takes a line for all that is wrong.
  """
  fields = {k.removeprefix('tokenizer.'): v for k, v in fields.items()}
  fields = {k.removeprefix('ggml.'): v for k, v in fields.items()}
  if fields.get('model') is None:
    return {}, {}  # There is none.
  if fields['model'] == 'llama':
    fields = {'bos_token_id': 1, 'eos_token_id': 2, 'unknown_token_id': 0} | fields
  before = len(problems)
  _check(fields, vocab_size, problems)
  if len(problems) > before:
    return {}, {}
  texts = fields['tokens']
  ids = {name: fields[key] for name, key in SPECIAL.items() if key in fields}
  usual = fields['model'] == 'llama' or PRE_TOKENIZERS[fields['pre']] is LLAMA3
  adds = {
      'bos_token': bool(fields.get('add_bos_token', usual)),
      'eos_token': bool(fields.get('add_eos_token', False)),
  }
  for name in adds:
    if adds[name] and name not in ids:
      problems.append(f'{PREFIX}{SPECIAL[name]} is missing, which add_{name} asks for.')
      return {}, {}
  tokenizer = _byte_level_bpe(fields) if fields['model'] == 'gpt2' else _sentencepiece(fields)
  around = [texts[ids[name]] if adds[name] else None for name in ('bos_token', 'eos_token')]
  tokenizer |= {
      'version': '1.0',
      'added_tokens': _added_tokens(fields),
      'post_processor': _template(*around, ids),
  }
  settings = {f'add_{name}': value for name, value in adds.items()}
  settings |= {name: texts[i] for name, i in ids.items()}
  settings |= {'clean_up_tokenization_spaces': False, 'tokenizer_class': 'PreTrainedTokenizerFast'}
  if isinstance(fields.get('chat_template'), str):
    settings['chat_template'] = fields['chat_template']
  files = {'tokenizer.json': tokenizer, 'tokenizer_config.json': settings}
  made = {name: json.dumps(content, ensure_ascii=False) for name, content in files.items()}
  try:
    tokenizers.Tokenizer.from_str(made['tokenizer.json'])
  except Exception as error:  # The library raises no narrower one.
    problems.append(f'{PREFIX}* are no tokenizer: {error}')
  return made, _config_ids(fields, ids)


def _check(fields: dict[str, Any], vocab_size: int, problems: list[str]):
  """Notes fields that are missing, unknown or of another length than others."""
  model, pre = fields['model'], fields.get('pre')
  if model not in ('gpt2', 'llama'):
    problems.append(f"{PREFIX}model={model!r} must be 'gpt2' or 'llama'.")
  elif model == 'gpt2' and pre not in PRE_TOKENIZERS:
    problems.append(
        f'{PREFIX}pre={pre!r} must be one of {", ".join(PRE_TOKENIZERS)}: convert the release that '
        'the file was made of, which has a tokenizer.json.'
    )
  needs = ['tokens', 'token_type', 'merges' if model == 'gpt2' else 'scores']
  lists = {name: fields.get(name) for name in needs}
  for name, values in lists.items():
    kind = str if name in ('tokens', 'merges') else (int, float)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
      problems.append(f'{PREFIX}{name} must be a list, and is missing or of another type.')
      return
  length = len(lists['tokens'])
  if length > vocab_size:
    problems.append(f'{PREFIX}tokens has {length} entries, more than {vocab_size} embeddings.')
  for name in needs[1:]:
    if name != 'merges' and len(lists[name]) != length:
      problems.append(f'{PREFIX}{name} has {len(lists[name])} entries, not {length}.')
  for merge in lists.get('merges', []):
    if len(merge.split(' ')) != 2:
      problems.append(f'{PREFIX}merges: {merge!r} must be two tokens with a space between them.')
      break
  for key in (*SPECIAL.values(), 'eot_token_id'):
    i = fields.get(key, 0)
    if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < length:
      problems.append(f'{PREFIX}{key}={i!r} must be the id of a token.')


def _config_ids(fields: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
  """Returns the ids in config.json: what ends a turn ends a text, too."""
  config: dict[str, Any] = {
      f'{name}_id': ids[name] for name in ('bos_token', 'pad_token') if name in ids
  }
  stop = [i for i in (ids.get('eos_token'), fields.get('eot_token_id')) if i is not None]
  stop = list(dict.fromkeys(stop))
  return config | ({'eos_token_id': stop if len(stop) > 1 else stop[0]} if stop else {})


def _vocab(fields: dict[str, Any]) -> dict[str, int]:
  """Returns the ids of tokens, without those that only fill the embedding up."""
  kinds = fields['token_type']
  return {text: i for i, text in enumerate(fields['tokens']) if kinds[i] != UNUSED}


def _added_tokens(fields: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the tokens that are taken out of a text before all else."""
  rest = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
  return [
      {'id': i, 'content': text, **rest, 'special': kind != USER_DEFINED}
      for i, (text, kind) in enumerate(zip(fields['tokens'], fields['token_type']))
      if kind in (UNKNOWN, CONTROL, USER_DEFINED)
  ]


def _byte_level_bpe(fields: dict[str, Any]) -> dict[str, Any]:
  pre = fields['pre']
  model = {
      'type': 'BPE',
      'vocab': _vocab(fields),
      'merges': [merge.split(' ') for merge in fields['merges']],
      'ignore_merges': PRE_TOKENIZERS[pre] is LLAMA3,
  }
  return {
      'model': model,
      'normalizer': NORMALIZERS.get(pre),
      'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': PRE_TOKENIZERS[pre]},
      'decoder': _byte_level(use_regex=True),
  }


def _sentencepiece(fields: dict[str, Any]) -> dict[str, Any]:
  """Returns a BPE of characters that falls back to bytes, as Llama 2 and Mistral have it.

  Every stretch of text between special tokens begins with a space more, as in those models and in
  llama.cpp. Other files of `transformers` add one only where a text begins, and only if none is
  there; a GGUF file cannot say so.
  """
  model = {
      'type': 'BPE',
      'vocab': _vocab(fields),
      'merges': _merges(fields),
      'unk_token': fields['tokens'][fields['unknown_token_id']],
      'fuse_unk': True,
      'byte_fallback': True,
  }
  replace = lambda a, b: {'type': 'Replace', 'pattern': {'String': a}, 'content': b}
  steps: list[dict[str, Any]] = [replace(' ', SPACE)]
  decoders: list[dict[str, Any]] = [replace(SPACE, ' '), {'type': 'ByteFallback'}, {'type': 'Fuse'}]
  if fields.get('add_space_prefix', True):
    steps = [{'type': 'Prepend', 'prepend': SPACE}, *steps]
    decoders = [*decoders, {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}]
  return {
      'model': model,
      'normalizer': {'type': 'Sequence', 'normalizers': steps},
      'pre_tokenizer': None,
      'decoder': {'type': 'Sequence', 'decoders': decoders},
  }


def _merges(fields: dict[str, Any]) -> list[list[str]]:
  """Returns every pair of tokens that makes a third one, that of the highest score first.

  Of pairs that make the same token, the one with the longest first token comes first, as in the
  files that `transformers` converts.
  """
  scores = {
      text: score
      for text, score, kind in zip(fields['tokens'], fields['scores'], fields['token_type'])
      if kind == NORMAL
  }
  merges = [
      (-score, -cut, cut - len(text), text)
      for text, score in scores.items()
      for cut in range(1, len(text))
      if text[:cut] in scores and text[cut:] in scores
  ]
  return [[text[:-cut], text[-cut:]] for _, cut, _, text in sorted(merges, key=lambda m: m[:3])]


def _template(begin: str | None, end: str | None, ids: dict[str, int]) -> dict[str, Any] | None:
  """Returns what puts tokens before and behind a text, None if nothing does."""
  if begin is None and end is None:
    return None
  mark = lambda text, kind: [{'SpecialToken': {'id': text, 'type_id': kind}}] if text else []
  around = lambda name, kind: [
      *mark(begin, kind), {'Sequence': {'id': name, 'type_id': kind}}, *mark(end, kind)
  ]  # fmt: skip
  marks = {text: ids[name] for text, name in ((begin, 'bos_token'), (end, 'eos_token')) if text}
  return {
      'type': 'TemplateProcessing',
      'single': around('A', 0),
      'pair': around('A', 0) + around('B', 1),
      'special_tokens': {
          text: {'id': text, 'ids': [i], 'tokens': [text]} for text, i in marks.items()
      },
  }
