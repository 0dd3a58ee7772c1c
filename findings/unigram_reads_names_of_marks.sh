#!/usr/bin/env bash
# tokenizers 0.23.3 beside sentencepiece 0.2.3, 2026-12-01: a Unigram model of SentencePiece's, such as T5's, whose
# vocabulary holds marks (<s>, </s>) and bytes (<0x41>). SentencePiece never finds these in a text: `</s>` there,
# as in HTML's struck-out text, is four ordinary pieces. `tokenizers` promises the same for
# `encode_special_tokens = True` (`split_special_tokens` of transformers), and keeps it for BPE. But its Unigram
# has no types of pieces: after the mark was not cut out as a mark, the search for the best pieces takes it from
# the vocabulary, where its score of 0 is the best of all. Nor does it need a flag to read '<0x41>' as the byte A.
#
# Seen, as pieces of the same vocabulary  sentencepiece            tokenizers
#   '<s>x</s>'                            < s > x < / s >          <s> x </s>
#   '<0x41>'                              < 0 x 4 1 >              <0x41>, which is decoded as 'A'
# So documents end in their middle, and texts about bytes do not come back.
#
# Here: `dsa_jax/data/tokenizer.py` cuts a document within such names, and reads its parts by themselves.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'tokenizers==0.23.3' 'sentencepiece==0.2.3'
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import io

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models

lines = [' '.join(f'{a}{b}' for b in 'x014s<>/ABef') for a in '<>/sx014ABghijklm' for _ in range(9)]
made = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=made, model_type='unigram', vocab_size=330, byte_fallback=True,
    add_dummy_prefix=False, normalization_rule_name='identity', remove_extra_whitespaces=False,
    hard_vocab_limit=False, minloglevel=2,
)  # fmt: skip
theirs = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
words = [theirs.id_to_piece(i) for i in range(theirs.vocab_size())]
scores = [theirs.get_score(i) for i in range(theirs.vocab_size())]
ours = Tokenizer(models.Unigram(list(zip(words, scores)), theirs.unk_id(), byte_fallback=True))
ours.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
ours.add_special_tokens([AddedToken(mark, normalized=False) for mark in ('<s>', '</s>')])
ours.encode_special_tokens = True

assert ours.encode('ghs1x0').ids == theirs.encode('ghs1x0')
for text, marks in {'<s>x</s>': ['<s>', '</s>'], '<0x41>': ['<0x41>']}.items():
  a, b = theirs.encode(text), ours.encode(text).ids
  print(text, [words[i] for i in a], theirs.decode(a), '|', [words[i] for i in b], ours.decode(b))
  assert not {*marks} & {words[i] for i in a} and theirs.decode(a) == text
  assert {*marks} <= {words[i] for i in b} and ours.decode(b) != text

merges = Tokenizer(models.BPE({w: i for i, w in enumerate(['<s>', '<', 's', '>'])}, []))
merges.add_special_tokens(['<s>'])
assert merges.encode('<s>').ids == [0]
merges.encode_special_tokens = True
assert merges.encode('<s>').ids == [1, 2, 3]
print('as described above')
PYTHON
