# SPDX-License-Identifier: Apache-2.0
"""The side of transformers: makes a random checkpoint, or measures it. `peer.py` starts this file.

python peer_torch.py make FOLDER CONFIG_JSON
python peer_torch.py run FOLDER CONTEXT N_TOKENS CORE
"""

import json
import os
import pathlib
import resource
import sys
import time

import numpy as np
import torch
import transformers


def make(folder: pathlib.Path, config: str):
  """Writes a random model whose routing, selection and logits differ from token to token."""
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(config)
  torch.manual_seed(0)
  config = transformers.AutoConfig.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
  with torch.no_grad():
    for name, x in model.state_dict().items():
      if name.endswith('e_score_correction_bias'):
        x.normal_(std=0.03)
      elif x.ndim == 1:
        x.uniform_(0.5, 1.5)
      elif 'embed_tokens' in name:
        x.normal_()
      else:
        x.normal_(std=x.shape[-1] ** -0.5)
  model.save_pretrained(folder)
  (folder / 'config.json').write_text(json.dumps(json.loads((folder / 'config.json').read_text())))


@torch.no_grad()
def run(folder: str, context: int, n_tokens: int):
  """Prints what `peer.ours` returns, of this model."""
  torch.set_num_threads(1)
  load = transformers.AutoModelForCausalLM.from_pretrained
  model = load(folder, dtype=torch.float32, attn_implementation='sdpa').eval()
  tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=(1, context))
  tokens = torch.from_numpy(tokens)
  model(tokens[:, :64], use_cache=True, logits_to_keep=1)
  began = time.process_time(), time.perf_counter()
  out = model(tokens, use_cache=True, logits_to_keep=1)
  prefill = time.process_time() - began[0], time.perf_counter() - began[1]
  first_logits, ids, decode = out.logits[0, -1].numpy(), [], []
  for _ in range(n_tokens):
    began = time.process_time(), time.perf_counter()
    word = out.logits[:, -1:].argmax(-1)
    ids.append(int(word))
    out = model(word, past_key_values=out.past_key_values, use_cache=True)
    decode.append((time.process_time() - began[0], time.perf_counter() - began[1]))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(json.dumps({
      'prefill': prefill, 'decode': np.median(decode, axis=0).tolist(), 'peak_bytes': peak,
      'ids': ids, 'logits': first_logits[:64].tolist(),
  }))  # fmt: skip


if __name__ == '__main__':
  if sys.argv[1] == 'make':
    make(pathlib.Path(sys.argv[2]), sys.argv[3])
  else:
    os.sched_setaffinity(0, {int(sys.argv[5])})
    run(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
