# SPDX-License-Identifier: Apache-2.0
"""Golden numbers of a DeepSeek-V3.2 checkpoint with an MTP layer.

  python tests/parity/make_mtp_golden.py    # Writes deepseek_v32_mtp/ beside this file.

transformers runs MTP layers for deepseek_v3 only, in `MtpModel`. Here its `MtpLayer` is put round
the decoder layer of deepseek_v32, as `MtpModel` would. Its arrays are those of make_golden.py and
  mtp_logits, mtp_selected          from the hidden state after the final norm: transformers' choice
  mtp_logits_before_norm, mtp_selected_before_norm    from the one before it
where row t reads the hidden state of token t and the embedding of token t + 1.
"""

import itertools
import json
import pathlib
import tempfile

import make_golden
import numpy as np
from safetensors.torch import load_file, save_file
import torch
import transformers
from transformers.modeling_layers import MtpLayer

NAME = 'deepseek_v32_mtp'
CONFIG = make_golden.DEEPSEEK | make_golden.INDEXER | dict(
    architectures=['DeepseekV32ForCausalLM'],
    model_type='deepseek_v32',
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
)


def released_names(layer, prefix):
  """A layer's tensors under the names of released checkpoints, expert by expert."""
  tensors = {}
  for name, x in layer.state_dict().items():
    name = name.replace('mtp_block.', '').replace('post_norm.', 'shared_head.norm.')
    if name == 'mlp.experts.gate_up_proj':
      for i, gate_up in enumerate(x):
        gate, up = gate_up.chunk(2)
        tensors[f'{prefix}mlp.experts.{i}.gate_proj.weight'] = gate
        tensors[f'{prefix}mlp.experts.{i}.up_proj.weight'] = up
    elif name == 'mlp.experts.down_proj':
      for i, down in enumerate(x):
        tensors[f'{prefix}mlp.experts.{i}.down_proj.weight'] = down
    else:
      tensors[prefix + name] = x
  return {name: x.contiguous() for name, x in tensors.items()}


@torch.no_grad()
def mtp_forward(model, mtp, tokens, *, after_norm):
  """Logits [B, T - 1, W] and selections of the MTP layer, and its Watch."""
  hidden = []
  hook = model.model.norm.register_forward_hook(
      lambda module, args, out: hidden.append(out if after_norm else args[0])
  )
  model(tokens, use_cache=False)
  hook.remove()
  embeddings = model.model.embed_tokens(tokens[:, 1:])
  length = embeddings.shape[1]
  positions = torch.arange(1, length + 1)[None]
  mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
  with make_golden.Watch([mtp.mtp_block]) as watch:
    out = mtp(
        embeddings, hidden[0][:, :-1], model.model.rotary_emb(embeddings, positions),
        mask.expand(len(tokens), 1, -1, -1), positions, None,
    )
  return model.lm_head(out).numpy(), make_golden.visible(watch.selected[0]), watch


def make(folder):
  folder.mkdir(parents=True, exist_ok=True)
  config_json = folder / 'config.json'
  config_json.write_text(json.dumps(CONFIG, indent=2) + '\n')
  for seed in itertools.count():
    model, tokens = make_golden.build(config_json, seed)
    decoder, norm = type(model.model.layers[-1]), type(model.model.norm)
    mtp = MtpLayer(model.config, decoder, norm, layer_idx=len(model.model.layers) - 1).eval()
    make_golden.randomize(mtp)
    results = [mtp_forward(model, mtp, tokens, after_norm=x) for x in (True, False)]
    watches = [watch for *_, watch in results]
    if all(w.is_clear() for w in [make_golden.full_forward(model, tokens)[1], *watches]):
      break

  with tempfile.TemporaryDirectory() as scratch:
    model.save_pretrained(scratch)
    tensors = load_file(pathlib.Path(scratch) / 'model.safetensors')
  last = released_names(model.model.layers[-1], f'model.layers.{len(model.model.layers) - 1}.')
  for name, x in last.items():
    assert torch.equal(tensors[name], x), name
  prefix = f'model.layers.{len(model.model.layers)}.'
  tensors |= released_names(mtp, prefix)
  tensors[f'{prefix}embed_tokens.weight'] = tensors['model.embed_tokens.weight'].clone()
  tensors[f'{prefix}shared_head.head.weight'] = tensors['lm_head.weight'].clone()
  save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})

  arrays = make_golden.golden(make_golden.load(folder), tokens)
  for suffix, (logits, selected, _) in zip(('', '_before_norm'), results):
    arrays |= {f'mtp_logits{suffix}': logits, f'mtp_selected{suffix}': selected}
  np.savez_compressed(folder / 'golden.npz', seed=seed, **arrays)
  apart = np.abs(arrays['mtp_logits'] - arrays['mtp_logits_before_norm']).max()
  size = sum(path.stat().st_size for path in folder.iterdir())
  print(f'{NAME}: seed {seed}; after and before the norm {apart:.2f} apart; {size} B')


if __name__ == '__main__':
  make_golden.quiet()
  make(make_golden.HERE / NAME)
