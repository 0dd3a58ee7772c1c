# SPDX-License-Identifier: Apache-2.0
"""Golden numbers of where transformers leaves the specification, and of where one might think so.

  python tests/parity/deviations.py    # After make_golden.py; writes deviations.npz beside it.

The models are those of make_golden.py with another config or a few constants changed; README.md
says what each entry shows. Of an entry `e`, deviations.npz holds
  e/case                            the folder that holds the weights
  e/config                          JSON: what config.json has to say instead
  e/tokens                          int32 [B, T]
  e/as_is_logits, e/as_is_selected  what transformers gives
  e/spec_logits, e/spec_selected    what it gives once its constants are the specification's
and of 'negative_bias' and 'ties' the arrays that their functions below return.
"""

import json
import math

import make_golden
import numpy as np
import torch
import transformers
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.deepseek_v32 import modeling_deepseek_v32
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa

SEQ_LEN = 48


def mscale(factor, scale):
  return 0.1 * scale * math.log(factor) + 1.0


def latent_eps_as_configured(model):
  """q_a_layernorm and kv_a_layernorm with the config's rms_norm_eps, as every other norm."""
  for layer in model.model.layers:
    for norm in (layer.self_attn.q_a_layernorm, layer.self_attn.kv_a_layernorm):
      norm.variance_epsilon = model.config.rms_norm_eps


def scale_by_mscale(model):
  """The softmax scale times m**2 with m of `mscale`; sines and cosines as they are."""
  rope = model.config.rope_parameters
  model.model.rotary_emb.attention_scaling = 1.0
  for layer in model.model.layers:
    attention = layer.self_attn
    attention.scaling = attention.qk_head_dim**-0.5 * mscale(rope['factor'], rope['mscale'])**2


def without_yarn(model):
  """Plain rotary frequencies, plain softmax scale."""
  rotary, dim = model.model.rotary_emb, model.config.qk_rope_head_dim
  base = model.config.rope_parameters['rope_theta']
  rotary.inv_freq.copy_(1.0 / base ** (torch.arange(0, dim, 2) / dim))
  rotary.attention_scaling = 1.0
  for layer in model.model.layers:
    layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5


def yarn(**changes):
  rope = make_golden.DEEPSEEK['rope_scaling'] | changes
  return {key: value for key, value in rope.items() if value is not None}


ENTRIES = {
    # name: (case, changes of config.json, changes of the model that follow the specification)
    'latent_eps': ('glm_moe_dsa', dict(rms_norm_eps=1e-2), latent_eps_as_configured),
    'mscale_unequal': (
        'deepseek_v32', dict(rope_scaling=yarn(mscale=1.0, mscale_all_dim=0.5)), scale_by_mscale,
    ),
    'mscale_all_dim_absent': (
        'deepseek_v32', dict(rope_scaling=yarn(mscale_all_dim=None)), scale_by_mscale,
    ),
    'short_context_yarn': ('deepseek_v32', dict(max_position_embeddings=64), without_yarn),
}

# Keys of released config.json files that these models never read: any value, the same logits.
IGNORED = {
    'deepseek_v32': dict(
        scoring_func='softmax', topk_method='greedy', moe_layer_freq=2, num_nextn_predict_layers=1,
        ep_size=2,
    ),
    'glm_moe_dsa': dict(
        indexer_rope_interleave=False, rope_interleave=False, scoring_func='softmax',
        topk_method='greedy', moe_layer_freq=2, index_topk_freq=1, qk_head_dim=99,
    ),
}


def configured(case, changes):
  """A case's model with other values in its config.json."""
  folder = make_golden.HERE / case
  config = json.loads((folder / 'config.json').read_text()) | changes
  config = transformers.AutoConfig.for_model(**config)
  return make_golden.load(folder, config=config)


def entry(case, changes, follow_spec):
  """Both readings of one config, on tokens for which every selection is clear in both."""
  as_is, spec = configured(case, changes), configured(case, changes)
  follow_spec(spec)
  for seed in range(10_000):
    torch.manual_seed(seed)
    tokens = torch.randint(as_is.config.vocab_size, (1, SEQ_LEN))
    results = [make_golden.full_forward(model, tokens) for model in (as_is, spec)]
    if all(watch.is_clear() for _, watch in results):
      break
  else:
    raise RuntimeError(f'{case} with {changes}: no tokens with clear selections.')
  arrays = {'case': case, 'config': json.dumps(changes), 'tokens': tokens.numpy().astype(np.int32)}
  for name, (result, _) in zip(('as_is', 'spec'), results):
    arrays |= {f'{name}_{key}': result[key] for key in ('logits', 'selected')}
  return arrays


def negative_bias():
  """Routers whose sigmoid + bias is negative everywhere: dropped groups must stay dropped.

  Returns x [N, D], weight [X, D], bias [X]; experts [N, A] ascending and their weights [N, A],
  equal in all three families' routers; experts_zero_mask, the choice of a router that masks
  dropped groups with 0.0 rather than -inf: the mistake that this is to catch.
  """
  config = configured('deepseek_v32', {}).config
  torch.manual_seed(0)
  x = torch.randn(64, config.hidden_size)
  weight = torch.randn(config.n_routed_experts, config.hidden_size) * config.hidden_size**-0.5
  bias = torch.randn(config.n_routed_experts) * 0.05 - 1.5
  found = []
  for router_type in (
      modeling_deepseek_v32.DeepseekV32TopkRouter,
      modeling_deepseek_v3.DeepseekV3TopkRouter,
      modeling_glm_moe_dsa.GlmMoeDsaTopkRouter,
  ):
    router = router_type(config)
    router.weight.data.copy_(weight)
    router.e_score_correction_bias.copy_(bias)
    with torch.no_grad():
      _, weights, experts = router(x)
    experts, order = experts.sort(-1)
    found.append((experts, weights.gather(-1, order)))
    assert torch.equal(experts, found[0][0]) and torch.equal(found[-1][1], found[0][1])

  scores = (torch.sigmoid(x @ weight.T) + bias).unflatten(-1, (config.n_group, -1))
  groups = scores.topk(2, -1).values.sum(-1).topk(config.topk_group, -1).indices
  kept = torch.zeros(scores.shape[:2], dtype=torch.bool).scatter(-1, groups, True)[..., None]
  zero_mask = scores.where(kept, torch.zeros(())).flatten(1).topk(config.num_experts_per_tok, -1)
  arrays = dict(
      x=x, weight=weight, bias=bias, experts=found[0][0].int(), expert_weights=found[0][1],
      experts_zero_mask=zero_mask.indices.sort(-1).values.int(),
  )
  assert not torch.equal(arrays['experts'], arrays['experts_zero_mask'])
  return {key: value.numpy() for key, value in arrays.items()}


def ties():
  """What torch.topk takes of equal scores: every head weight of the indexers is zero."""
  model = configured('deepseek_v32', {})
  for layer in model.model.layers:
    layer.self_attn.indexer.weights_proj.weight.data.zero_()
  torch.manual_seed(0)
  tokens = torch.randint(model.config.vocab_size, (1, SEQ_LEN))
  selected = make_golden.full_forward(model, tokens)[0]['selected']
  return {'case': 'deepseek_v32', 'tokens': tokens.numpy().astype(np.int32), 'selected': selected}


def check_ignored():
  for case, changes in IGNORED.items():
    with np.load(make_golden.HERE / case / 'golden.npz') as file:
      tokens, logits = torch.from_numpy(file['tokens']).long(), file['logits']
    found = make_golden.full_forward(configured(case, changes), tokens)[0]['logits']
    np.testing.assert_array_equal(found, logits)
    print(f'{case}: {", ".join(changes)} change nothing.')


def main():
  make_golden.quiet()
  arrays = {}
  for name, arguments in ENTRIES.items():
    arrays[name] = entry(*arguments)
    apart = np.abs(arrays[name]['as_is_logits'] - arrays[name]['spec_logits']).max()
    rows = (arrays[name]['as_is_selected'] != arrays[name]['spec_selected']).any(-1).mean()
    print(f'{name}: logits up to {apart:.2e} apart; {rows:.0%} of rows select otherwise.')
  arrays['negative_bias'] = negative_bias()
  arrays['ties'] = ties()
  check_ignored()
  np.savez_compressed(
      make_golden.HERE / 'deviations.npz',
      **{f'{name}/{key}': value for name, entry in arrays.items() for key, value in entry.items()},
  )


if __name__ == '__main__':
  main()
