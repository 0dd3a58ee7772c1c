# SPDX-License-Identifier: Apache-2.0
"""The families of released checkpoints, as data, and their config.json read in both directions."""

import dataclasses
from typing import Any

from dsa_jax.config import ConfigError, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """What tells the checkpoints of one `model_type` from those of another."""

  architecture: str
  has_indexer: bool = True
  indexer_rope_interleave: bool = False
  # Where an import does not say:
  norms: str = 'BF16'  # What norm weights are stored in.
  repeats_embedding: bool = True  # Whether the MTP layer has copies of embedding and head.


FAMILIES = {
    'deepseek_v32': Family(architecture='DeepseekV32ForCausalLM', norms='F32'),
    'deepseek_v3': Family(architecture='DeepseekV3ForCausalLM', has_indexer=False),
    'glm_moe_dsa': Family(
        architecture='GlmMoeDsaForCausalLM', indexer_rope_interleave=True, repeats_embedding=False
    ),
}

# Their key -> our field, where the value is the same.
FIELDS = {
    'vocab_size': 'vocab_size',
    'hidden_size': 'dim',
    'num_hidden_layers': 'n_layers',
    'intermediate_size': 'inter_dim',
    'rms_norm_eps': 'norm_eps',
    'n_routed_experts': 'n_routed_experts',
    'n_shared_experts': 'n_shared_experts',
    'num_experts_per_tok': 'n_activated_experts',
    'n_group': 'n_expert_groups',
    'topk_group': 'n_limited_groups',
    'moe_intermediate_size': 'moe_inter_dim',
    'routed_scaling_factor': 'route_scale',
    'num_attention_heads': 'n_heads',
    'q_lora_rank': 'q_lora_rank',
    'kv_lora_rank': 'kv_lora_rank',
    'qk_nope_head_dim': 'qk_nope_head_dim',
    'qk_rope_head_dim': 'qk_rope_head_dim',
    'v_head_dim': 'v_head_dim',
    'max_position_embeddings': 'max_seq_len',
}
INDEXER_FIELDS = {
    'index_n_heads': 'index_n_heads',
    'index_head_dim': 'index_head_dim',
    'index_topk': 'index_topk',
}
YARN_FIELDS = {
    'factor': 'rope_factor',
    'original_max_position_embeddings': 'original_seq_len',
    'beta_fast': 'beta_fast',
    'beta_slow': 'beta_slow',
    'mscale': 'mscale',
}
# What the model is built for; a config that says otherwise is of another model.
FIXED = {
    'hidden_act': 'silu',
    'attention_bias': False,
    'tie_word_embeddings': False,
    'norm_topk_prob': True,
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'moe_layer_freq': 1,
    'mlp_bias': False,
}


def read_config(config: Any) -> tuple[str, ModelConfig]:
  """Turns a released config.json into a family's name and our sizes.

  Raises:
    ValueError: It lacks keys, or is of another model; every reason is named.
  """
  name = config.get('model_type') if isinstance(config, dict) else None
  if name not in FAMILIES:
    raise ConfigError(f'config.json: model_type={name!r} must be one of {tuple(FAMILIES)}.')
  family, problems = FAMILIES[name], list[str]()
  for key, value in FIXED.items():
    if config.get(key, value) != value:
      problems.append(f'{key}={config[key]!r} must be {value!r}.')
  names = FIELDS | (INDEXER_FIELDS if family.has_indexer else {})
  sizes = {}
  for key, field in names.items():
    if key not in config:
      problems.append(f'{key} is missing.')
    else:
      sizes[field] = _number(key, config[key], float if field in _REALS else int, problems)
  rope = _read_rope(config, sizes, problems)
  if problems:
    raise ConfigError('config.json:\n  ' + '\n  '.join(problems))
  depth, stored = sizes['n_layers'], config.get('dtype', config.get('torch_dtype'))
  fields = {
      **sizes,
      **rope,
      'n_dense_layers': _leading_layers(config, depth, problems),
      'n_mtp_layers': config.get('num_nextn_predict_layers') or 0,
      'indexer_rope_interleave': config.get(
          'indexer_rope_interleave', family.indexer_rope_interleave
      ),
      'indexer_types': _indexer_types(config, depth, problems) if family.has_indexer else (),
      'dtype': 'float32' if stored == 'float32' else 'bfloat16',
  }
  if problems:
    raise ConfigError('config.json:\n  ' + '\n  '.join(problems))
  try:
    return name, ModelConfig(**fields)
  except (TypeError, ValueError) as error:
    raise ConfigError(f'config.json: {error}') from error


_REALS = ('norm_eps', 'route_scale')
_LARGEST = 2**31  # No size of a model comes near it.


def _number(key: str, value: Any, kind: type, problems: list[str]) -> Any:
  if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
    problems.append(f'{key}={value!r} must be a number.')
  elif not 0 < value < _LARGEST:
    problems.append(f'{key}={value!r} must be positive.')
  else:
    return kind(value)


def _read_rope(config: dict, sizes: dict, problems: list[str]) -> dict[str, Any]:
  """Reads rotary positions, as older files (rope_scaling) and newer ones (rope_parameters) put it."""
  rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
  if not isinstance(rope, dict):
    problems.append(f'rope_scaling={rope!r} must be an object.')
    return {}
  theta = rope.get('rope_theta', config.get('rope_theta'))
  found = {'rope_theta': _number('rope_theta', theta, float, problems)}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return found | {'original_seq_len': sizes.get('max_seq_len')}  # No YaRN.
  if kind != 'yarn':
    problems.append(f"rope_scaling: type={kind!r} must be 'yarn' or 'default'.")
    return found
  for key, field in YARN_FIELDS.items():
    default = getattr(ModelConfig, field) if key.startswith('beta') else None
    real = float if field != 'original_seq_len' else int
    found[field] = _number(f'rope_scaling: {key}', rope.get(key, default), real, problems)
  if rope.get('mscale_all_dim') != found['mscale']:
    problems.append(
        f"rope_scaling: mscale_all_dim={rope.get('mscale_all_dim')!r} must be mscale="
        f"{found['mscale']!r}: other ratios scale the rotary channels, which DeepSeek never does."
    )
  return found


def _leading_layers(config: dict, depth: int, problems: list[str]) -> int:
  """How many leading layers have an MLP in place of experts."""
  types = config.get('mlp_layer_types')
  leading = config.get('first_k_dense_replace', types.count('dense') if isinstance(types, list) else 0)
  if isinstance(leading, bool) or not isinstance(leading, int) or not 0 <= leading <= depth:
    problems.append(f'first_k_dense_replace={leading!r} must be within 0 and {depth}.')
  elif types and types != ['dense'] * leading + ['sparse'] * (depth - leading):
    problems.append(f"mlp_layer_types={types} must be {leading} 'dense', then 'sparse' only.")
  return leading


def _indexer_types(config: dict, depth: int, problems: list[str]) -> tuple[str, ...]:
  """Which layers share another's selection: listed, or by GLM-5.2's pattern, frequency and offset."""
  types = config.get('indexer_types')
  if types is None and (pattern := config.get('index_topk_pattern')):
    types = [{'F': 'full', 'S': 'shared'}.get(c, c) for c in pattern]
  if types is None:
    every = config.get('index_topk_freq') or 1
    offset = config.get('index_skip_topk_offset', 2)
    if not isinstance(every, int) or not isinstance(offset, int) or every < 1:
      problems.append(f'index_topk_freq={every!r} and index_skip_topk_offset={offset!r} must be counts.')
      return ()
    types = ['shared' if max(i - offset + 1, 0) % every else 'full' for i in range(depth)]
  if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
    problems.append(f"indexer_types={types!r} must be a list of 'full' and 'shared'.")
    return ()
  return () if set(types) == {'full'} and len(types) == depth else tuple(types)


def write_config(name: str, cfg: ModelConfig, base: dict[str, Any]) -> dict[str, Any]:
  """Returns the config.json of a model for its family's own loaders.

  Args:
    name: A key of FAMILIES.
    cfg: The model.
    base: The config.json it once came with, whose other keys are kept; {} if there is none.
  """
  family = FAMILIES[name]
  config = FIXED | {'bos_token_id': 0, 'eos_token_id': 1} | base
  config |= {'architectures': [family.architecture], 'model_type': name}
  names = FIELDS | (INDEXER_FIELDS if family.has_indexer else {})
  config |= {key: getattr(cfg, field) for key, field in names.items()}
  config['num_key_value_heads'] = cfg.n_heads
  if not {'dtype', 'torch_dtype'} & config.keys():
    config['torch_dtype'] = cfg.dtype  # Of activations.
  config['first_k_dense_replace'] = cfg.n_dense_layers
  config['num_nextn_predict_layers'] = cfg.n_mtp_layers
  if family.indexer_rope_interleave:
    config['indexer_rope_interleave'] = cfg.indexer_rope_interleave
    config['indexer_types'] = list(cfg.indexer_types or ('full',) * cfg.n_layers)
  if 'rope_parameters' in base or 'rope_scaling' in base or 'rope_theta' in base:
    return config  # As it came: sizes may change in fine-tuning, rotation does not.
  if cfg.uses_yarn:
    yarn = {key: getattr(cfg, field) for key, field in YARN_FIELDS.items()}
    config['rope_scaling'] = {'type': 'yarn', 'mscale_all_dim': cfg.mscale, **yarn}
    config['rope_theta'] = cfg.rope_theta
  else:
    config['rope_parameters'] = {'rope_type': 'default', 'rope_theta': cfg.rope_theta}
  return config
