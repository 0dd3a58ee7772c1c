#!/usr/bin/env bash
# transformers 5.24.0 beside 4.57.3, 2026-11-30: a space at the beginning of a text is lost with Llama 2's kind of
# tokenizer (Mistral 7B and others have it, too). Their tokenizer.json puts one space before every text, so that
# ' text' begins with two. One would expect `AutoTokenizer` to read by that file, as the `tokenizers` library
# does by itself. But for `LlamaTokenizerFast` version 5 takes the vocabulary and the merges alone, and makes a
# pipeline of its own: the normalizer of the file is gone, and a text that has a space gets no other one. So
# 'text' and ' text' have the same ids, the indentation of a first line is one short, and so is the text behind
# every special token.
#
# Seen, as pieces                4.57.3, tokenizers      5.24.0
#   'text'                       _text                   _text
#   ' text'                      _ _text                 _text
#   '</s> text'                  </s> _ _text            </s> _text
#
# Here: `dsa_jax/data/tokenizer.py` reads tokenizer.json by the `tokenizers` library.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >pieces.py <<'PYTHON'
import json
import pathlib
import sys

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, __version__

space = '\u2581'
folder = pathlib.Path('tokenizer')
folder.mkdir(exist_ok=True)
merges = [('t', 'e'), ('x', 't'), ('te', 'xt'), (space, 'text')]
words = ['<unk>', '<s>', '</s>', space, 't', 'e', 'x', *map(''.join, merges)]
tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token='<unk>'))
tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(' ', space)])
tokenizer.decoder = decoders.Sequence(
    [decoders.Replace(space, ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
)
tokenizer.add_special_tokens(words[:3])
tokenizer.save(str(folder / 'tokenizer.json'))
settings = {'tokenizer_class': 'LlamaTokenizerFast', 'add_bos_token': False, 'legacy': True}
settings |= {'clean_up_tokenization_spaces': False, 'unk_token': '<unk>', 'bos_token': '<s>', 'eos_token': '</s>'}
(folder / 'tokenizer_config.json').write_text(json.dumps(settings))
(folder / 'config.json').write_text(json.dumps({'model_type': 'llama'}))

loaded = AutoTokenizer.from_pretrained(folder)
pieces = lambda ids: ' '.join(words[i] for i in ids).replace(space, '_')
of_file = [pieces(tokenizer.encode(text).ids) for text in ('text', ' text', '</s> text')]
assert of_file == ['_text', '_ _text', '</s> _ _text'], of_file
of_class = [pieces(loaded.encode(text)) for text in ('text', ' text', '</s> text')]
print(__version__, of_class, ascii(loaded.decode(loaded.encode(' text'))))
want = of_file if __version__.startswith('4.') else ['_text', '_text', '</s> _text']
sys.exit(of_class != want)
PYTHON
export HF_HUB_OFFLINE=1
for version in 4.57.3 5.24.0; do
  python3 -m venv "$version"
  "$version/bin/pip" install -q "transformers==$version"
  "$version/bin/python" pieces.py 2>messages || { cat messages; exit 1; }
done
echo 'as described above'
