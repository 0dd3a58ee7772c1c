#!/usr/bin/env bash
# tokenizers 0.23.3 beside sentencepiece 0.2.3, 2026-12-01: `SentencePieceUnigramTokenizer.from_spm` reads a
# SentencePiece model. The model says whether several spaces are one (`remove_extra_whitespaces`) and whether a
# space begins every text (`add_dummy_prefix`); models for code turn both off. One would expect the ids that
# SentencePiece gives. `from_spm` takes the vocabulary and the table of characters, and obeys neither: it makes
# one space of several, and puts one before every text, without a word.
#
# Seen, as pieces of the same model   sentencepiece      from_spm
#   'a  b'                            a _ _b             _a _b
#   'if a:\n    b'                    4 spaces stay      1 space
# Each text comes back from SentencePiece as it was, and changed from the tokenizer made by `from_spm`.
#
# Here: only tokenizer.json and GGUF files are read; of the latter's `add_space_prefix` is obeyed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'tokenizers==0.23.3' 'sentencepiece==0.2.3' 'protobuf==7.36.2'
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import SentencePieceUnigramTokenizer

sys.modules['sentencepiece_model_pb2'] = sentencepiece_model_pb2  # `from_spm` wants it beside the script.
lines = [f'if {a}:\n    {b}  {c}' for a in 'abcdefgh' for b in 'abcdefgh' for c in 'abcdefgh']
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_prefix='m', model_type='unigram', vocab_size=40, hard_vocab_limit=False,
    add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name='identity',
    user_defined_symbols=['\n'], minloglevel=2,
)  # fmt: skip
theirs = sentencepiece.SentencePieceProcessor(model_file='m.model')
spec = sentencepiece_model_pb2.ModelProto.FromString(theirs.serialized_model_proto()).normalizer_spec
assert not spec.remove_extra_whitespaces and not spec.add_dummy_prefix and spec.escape_whitespaces
made = SentencePieceUnigramTokenizer.from_spm('m.model')

for text in 'a  b', 'if a:\n    b':
  a, b = theirs.encode(text), made.encode(text).ids
  print(repr(text))
  print('  sentencepiece', ascii([theirs.id_to_piece(i) for i in a]), repr(theirs.decode(a)))
  print('  from_spm     ', ascii([made.id_to_token(i) for i in b]), repr(made.decode(b)))
  spaces = lambda pieces: ''.join(pieces).count('\u2581')
  assert theirs.decode(a) == text != made.decode(b)
  n = spaces([theirs.id_to_piece(i) for i in a])
  assert n == text.count(' ') and spaces([made.id_to_token(i) for i in b]) < n + 1
print('as described above')
PYTHON
