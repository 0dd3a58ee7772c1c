# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers that are built as those of released models are."""

import json

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

TRAINED_ON = ['The lightning indexer scores every earlier token. ', 'def f(x):\n  return x * 12345\n', 'naïve 語 🎈']
WORDS = r"(?i:'s|'t)|\s?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def byte_level(marks, split=WORDS, normalizer=None, processor=None):
  """Returns a byte-level BPE, as DeepSeek, Llama 3, Qwen, GLM and SmolLM have it."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  parts = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
  if split:
    parts = [pre_tokenizers.Split(Regex(split), 'isolated'), *parts]
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
  tokenizer.decoder = decoders.ByteLevel()
  if normalizer:
    tokenizer.normalizer = normalizer
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
      vocab_size=320, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator(TRAINED_ON, trainer)
  tokenizer.post_processor = processor or processors.ByteLevel(trim_offsets=False)
  return tokenizer


def byte_fallback(marks):
  """Returns a BPE of characters that falls back to bytes, as Llama 2 and Mistral have it."""
  tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
  tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  steps = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(' ', 1, 0)])
  fallbacks = [f'<0x{i:02X}>' for i in range(256)]
  trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=marks + fallbacks, show_progress=False)
  tokenizer.train_from_iterator(TRAINED_ON[:2], trainer)
  plain = json.loads(tokenizer.to_str())  # The bytes are no marks.
  plain['added_tokens'] = [t for t in plain['added_tokens'] if t['content'] not in fallbacks]
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))
  tokenizer.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
  return tokenizer


def template(single, **ids):
  return processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))


# A tokenizer, its tokenizer_config.json, and what a document begins and ends with.
FAMILIES = {
    'deepseek': (
        lambda: byte_level(['<s>', '<|end|>']),
        {'add_bos_token': True, 'bos_token': '<s>', 'eos_token': '<|end|>'}, ['<s>'], ['<|end|>'],
    ),
    'llama_3': (
        lambda: byte_level(
            ['<s>', '<|end|>'],
            processor=processors.Sequence([processors.ByteLevel(trim_offsets=False), template('<s> $A', **{'<s>': 0})]),
        ),
        {'bos_token': '<s>', 'eos_token': '<|end|>'}, ['<s>'], ['<|end|>'],
    ),
    'qwen': (
        lambda: byte_level(['<|end|>'], normalizer=normalizers.NFC()),
        {'add_bos_token': False, 'bos_token': None, 'eos_token': '<|end|>'}, [], ['<|end|>'],
    ),
    'glm': (
        lambda: byte_level(
            ['[gMASK]', '<sop>', '<|end|>'],
            processor=template('[gMASK] <sop> $A', **{'[gMASK]': 0, '<sop>': 1}),
        ),
        {'eos_token': '<|end|>'}, ['[gMASK]', '<sop>'], ['<|end|>'],
    ),
    'smollm': (
        lambda: byte_level(['<|end|>'], split=None),
        {'bos_token': '<|end|>', 'eos_token': '<|end|>'}, [], ['<|end|>'],
    ),
    'llama_2': (
        lambda: byte_fallback(['<unk>', '<s>', '</s>']),
        {'add_bos_token': True, 'bos_token': '<s>', 'eos_token': '</s>'}, ['<s>'], ['</s>'],
    ),
    'ends_its_texts': (
        lambda: byte_level(['<s>', '<|end|>'], processor=template('<s> $A <|end|>', **{'<s>': 0, '<|end|>': 1})),
        {'bos_token': '<s>', 'eos_token': '<|end|>'}, ['<s>'], ['<|end|>'],
    ),
}  # fmt: skip
