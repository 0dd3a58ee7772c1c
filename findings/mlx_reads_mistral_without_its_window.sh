#!/usr/bin/env bash
# mlx-lm 0.32.2 with mlx 0.32.4 on a CPU, 2026-11-30: a Mistral checkpoint whose config.json has a
# `sliding_window`, as Mistral-7B-v0.1 has. With one layer and a window of 8, the logits at position 60
# depend on tokens 53 to 60 alone. mlx-lm reads the model type `mistral` as `llama`, whose windows go by
# `layer_types`, which such a config.json does not have; so all layers attend to everything, without a word.
#
# Seen: another token at position 0 changes the logits at position 60, and all logits are those of the same
#   checkpoint without a window. With "layer_types": ["sliding_attention"], loading fails with
#   "ValueError: 'full_attention' is not in list".
# Texts within the window are the same, so nothing shows until a text is longer than it (4096 tokens in the release).
#
# Here: the window is read for this model type; `tests/parity/mistral_windows` holds what `transformers` computes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2'
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import pathlib

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.utils import load_model
import numpy as np

mx.set_default_device(mx.cpu)
config = {
    'model_type': 'mistral', 'hidden_size': 32, 'num_hidden_layers': 1, 'intermediate_size': 48,
    'num_attention_heads': 4, 'num_key_value_heads': 2, 'rms_norm_eps': 1e-5, 'vocab_size': 64,
    'sliding_window': 8, 'tie_word_embeddings': False, 'architectures': ['MistralForCausalLM'],
}
mx.random.seed(0)
shapes = llama.Model(llama.ModelArgs.from_dict(config)).parameters()
weights = {name: mx.random.normal(x.shape) * x.shape[-1] ** -0.5 for name, x in tree_flatten(shapes)}
tokens = np.arange(61)[None] % 64
other = tokens.copy()
other[0, 0] = 33


def load(name: str, config: dict):
  checkpoint = pathlib.Path(name)
  checkpoint.mkdir()
  (checkpoint / 'config.json').write_text(json.dumps(config))
  mx.save_safetensors(str(checkpoint / 'model.safetensors'), weights, metadata={'format': 'mlx'})
  model, _ = load_model(checkpoint)
  return lambda tokens: np.array(model(mx.array(tokens)))[0]


released = load('released', config)
changed = float(np.abs(released(tokens)[60] - released(other)[60]).max())
print(f'another first token changes the logits at position 60 by {changed:.2g}')
assert changed > 1e-3
without = load('without', {name: x for name, x in config.items() if name != 'sliding_window'})
np.testing.assert_array_equal(released(tokens), without(tokens))
print('all logits are those of a checkpoint without a window')
try:
  load('windows', config | {'layer_types': ['sliding_attention']})
  raise SystemExit('layer_types of windows alone are read now')
except ValueError as error:
  print('with layer_types:', error)
  assert str(error) == "'full_attention' is not in list"
print('as described above')
PYTHON
