#!/usr/bin/env bash
# tokenizers 0.23.3 and transformers 5.24.0, 2026-12-01: a token that is special in tokenizer.json, such as <think>,
# and is not in tokenizer_config.json, whose flags transformers gives to `Tokenizer.add_tokens`. The flags that
# the tokenizer then reports are the new ones (special=False), but it goes on to treat the token as special: decoding
# without special tokens drops it, and `encode_special_tokens` cuts it into pieces. Its set of special tokens only
# grows. A tokenizer that is saved and loaded again has a set of its own, so the same ids give another text.
#
# Seen                                       loaded        saved, loaded again
#   flags of <think>                         not special   not special
#   decode, without special tokens           'a b'         'a <think> b'
# So what a model is seen to write depends on whether its tokenizer was ever saved.
#
# Here: `dsa_jax/data/tokenizer.py` reads the tokenizer again where a flag was taken back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'tokenizers==0.23.3' 'transformers==5.24.0' 'jinja2==3.1.6'
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import pathlib

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

plain = Tokenizer(models.WordLevel({'a': 0, 'b': 1, '[UNK]': 2}, unk_token='[UNK]'))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
plain.add_special_tokens([AddedToken('<think>', normalized=False)])
folder = pathlib.Path('first')
folder.mkdir()
plain.save(str(folder / 'tokenizer.json'))
described = {'3': {'content': '<think>', 'special': False, 'normalized': False}}
settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'unk_token': '[UNK]', 'added_tokens_decoder': described}
(folder / 'tokenizer_config.json').write_text(json.dumps(settings))

loaded = PreTrainedTokenizerFast.from_pretrained('first')
loaded.save_pretrained('second')
again = PreTrainedTokenizerFast.from_pretrained('second')
for tokenizer in loaded, again:
  assert not tokenizer.added_tokens_decoder[3].special
texts = [tokenizer.decode([0, 3, 1], skip_special_tokens=True) for tokenizer in (loaded, again)]
print(texts)
assert texts == ['a b', 'a <think> b']

plain.add_tokens([AddedToken('<think>', normalized=False, special=False)])
again = Tokenizer.from_str(plain.to_str())
for tokenizer, text, pieces in (plain, 'a b', ['a', '[UNK]', '[UNK]', '[UNK]', 'b']), (again, 'a <think> b', ['a', '<think>', 'b']):
  assert not tokenizer.get_added_tokens_decoder()[3].special
  tokenizer.encode_special_tokens = True
  print(tokenizer.decode([0, 3, 1]), tokenizer.encode('a<think>b').tokens)
  assert tokenizer.decode([0, 3, 1]) == text and tokenizer.encode('a<think>b').tokens == pieces
print('as described above')
PYTHON
