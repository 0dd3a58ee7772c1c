#!/usr/bin/env bash
# transformers 5.24.0 beside 4.57.3, 2026-11-30: the same files of a tokenizer give a text another first id.
# DeepSeek's releases (V3, R1, V3.2) have a byte-level tokenizer.json which adds no beginning of text, and a
# tokenizer_config.json with `tokenizer_class: LlamaTokenizerFast` and `add_bos_token: true`. One would expect
# `AutoTokenizer` to obey `add_bos_token`, as it did for years. Version 5 recognises that tokenizer.json is not of
# Llama's kind, takes another class in its place, says so in a line, and then ignores `add_bos_token`:
# prompts of these models begin without the id that they were trained with. `false` is ignored as well.
#
# Seen, of the text 'a text'                     4.57.3         5.24.0
#   add_bos_token: true                         <s> a text     a text
#   no such key                                 <s> a text     a text
#   false, where tokenizer.json adds <s>        a text         <s> a text
#
# Here: `dsa_jax/data/tokenizer_files.py` obeys `add_bos_token` both ways, and a text begins once.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >ids.py <<'PYTHON'
import json
import pathlib
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, __version__

folder = pathlib.Path('tokenizer')
folder.mkdir(exist_ok=True)
merges = [('t', 'e'), ('x', 't'), ('te', 'xt'), ('\u0120', 'text')]
words = ['<s>', *sorted(pre_tokenizers.ByteLevel.alphabet()), *map(''.join, merges)]
ids = {word: i for i, word in enumerate(words)}


def read(adds_itself, **settings):
  """Returns whether a text begins with <s>, by files with these settings."""
  tokenizer = Tokenizer(models.BPE(ids, merges))
  tokenizer.add_special_tokens(['<s>'])
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
  if adds_itself:
    tokenizer.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', ids['<s>'])])
  tokenizer.save(str(folder / 'tokenizer.json'))
  settings |= {'tokenizer_class': 'LlamaTokenizerFast', 'bos_token': '<s>', 'legacy': True}
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  (folder / 'config.json').write_text(json.dumps({'model_type': 'deepseek_v3'}))
  got = AutoTokenizer.from_pretrained(folder).encode('a text')
  assert got[-2:] == [ids['a'], ids['\u0120text']], got
  return got[:-2] == [ids['<s>']]


begins = [read(False, add_bos_token=True), read(False), read(True, add_bos_token=False)]
print(__version__, 'begins with <s>: asked for, not said, declined:', begins)
want = [True, True, False] if __version__.startswith('4.') else [False, False, True]
sys.exit(begins != want)
PYTHON
export HF_HUB_OFFLINE=1
for version in 4.57.3 5.24.0; do
  python3 -m venv "$version"
  "$version/bin/pip" install -q "transformers==$version"
  "$version/bin/python" ids.py 2>messages || { cat messages; exit 1; }
done
echo 'as described above'
