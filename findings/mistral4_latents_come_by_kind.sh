#!/usr/bin/env bash
# `transformers` looks up by kind the layer whose latents another layer of Mistral Large 4 reads, and not
# by the number that `kv_source_layers` gives.
#
# Seen on 2026-11-30 with transformers 5.24.0 and torch 2.13.0 on a CPU, for a small random model whose
# layers all rotate, so that they are of one kind.
#
# Expected: layer 3 reads layer 0 where kv_source_layers[3] is 0, and layer 1 where it is 1, so the two
# give other numbers.
# Seen: they do while no other layer's latents are read. As soon as layer 4 reads layer 1, layer 3 reads
# that one, too, whatever its own number says, and no one is told. With one source of each kind, both
# readings are the same.
#
# Here: families/mistral4.py goes by the number, and says how to have the other reading.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers.models.mistral_large4.configuration_mistral_large4 import MistralLarge4TextConfig
from transformers.models.mistral_large4.modeling_mistral_large4 import MistralLarge4TextModel


def output(sources):
  """The hidden states of a model whose weights do not depend on the sources."""
  config = MistralLarge4TextConfig(
      vocab_size=64, hidden_size=32, intermediate_size=40, moe_intermediate_size=12,
      num_hidden_layers=len(sources), num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16,
      qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
      first_k_dense_replace=1, index_topk=8, index_n_heads=16, index_head_dim=16,
      max_position_embeddings=64, no_rope_layers=[1] * len(sources), kv_source_layers=sources,
      rope_parameters={'rope_type': 'default', 'rope_theta': 10000.0}, pad_token_id=0,
  )
  torch.manual_seed(0)
  model = MistralLarge4TextModel(config).eval()
  generator = torch.Generator().manual_seed(1)
  for _, weight in sorted(model.named_parameters()):
    weight.data = torch.randn(weight.shape, generator=generator) * 0.2
  with torch.no_grad():
    return model(torch.arange(1, 21)[None]).last_hidden_state


def difference(one, other):
  return (output(one) - output(other)).abs().max().item()


alone, beside = difference([0, 1, 2, 0], [0, 1, 2, 1]), difference([0, 1, 2, 0, 1], [0, 1, 2, 1, 1])
print(f'layer 3 reads 0 or 1, and no other layer reads another: {alone:.3f} apart')
print(f'layer 3 reads 0 or 1, and layer 4 reads 1: {beside:.3f} apart')
assert alone > 0.01 and beside == 0
PYTHON
