#!/usr/bin/env bash
# tokenizers 0.23.3, 2026-11-30: the text of some ids is not always the beginning of the text of these and more.
# Llama 2, Mistral and others of SentencePiece's kind have no token for a newline, but one for each byte. One
# would expect that a byte which is no character becomes U+FFFD, as in `bytes.decode(errors='replace')`, and that
# what was whole before it stays. But the decoder `ByteFallback` looks at a whole row of such tokens: if the
# row is no UTF-8, *every* byte of it becomes U+FFFD, newlines, tabs and whole characters with it.
#
# Seen, decoded from the tokens
#   a <0x0A> <0x0A>               'a\n\n'
#   a <0x0A> <0x0A> <0x80> b      'a???b', where each ? is U+FFFD
#   a <0x0A> <0x0A> b <0x80>      'a\n\nb?': behind another token the newlines are safe
# `DecodeStream` has written the newlines by the time the byte comes, so a stream cannot be the text of `decode`.
# And where it is not given the prompt's ids, it drops the space with which a continuation begins.
#
# Here: `dsa_jax/data/decoding.py` writes a row of bytes only when it has ended, as the difference of two texts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'tokenizers==0.23.3'
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from tokenizers import Tokenizer, decoders, models

words = ['a', 'b', '\u2581b', '<0x0A>', '<0x80>', '?']
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, '?'))
steps = [decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
tokenizer.decoder = decoders.Sequence(steps)
ids = lambda text: [words.index(word) for word in text.split()]


def stream(text, *before):
  decoding = decoders.DecodeStream(*before, skip_special_tokens=False)
  return ''.join(decoding.step(tokenizer, i) or '' for i in ids(text))


for text, want in {
    'a <0x0A> <0x0A>': 'a\n\n',
    'a <0x0A> <0x0A> <0x80> b': 'a\ufffd\ufffd\ufffdb',
    'a <0x0A> <0x0A> b <0x80>': 'a\n\nb\ufffd',
}.items():
  print(text, '->', ascii(tokenizer.decode(ids(text))))
  assert tokenizer.decode(ids(text)) == want
assert b'a\n\n\x80b'.decode(errors='replace') == 'a\n\n\ufffdb'

print('streamed', ascii(stream('a <0x0A> <0x0A>')), ascii(stream('\u2581b')), ascii(stream('\u2581b', ids('a'))))
assert stream('a <0x0A> <0x0A>') == 'a\n\n'
assert stream('\u2581b') == 'b' and stream('\u2581b', ids('a')) == ' b' == tokenizer.decode(ids('a \u2581b'))[1:]
print('as described above')
PYTHON
