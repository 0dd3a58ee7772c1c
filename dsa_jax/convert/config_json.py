# SPDX-License-Identifier: Apache-2.0
"""Reads the config.json of a released model, and writes one."""

import dataclasses
from typing import Any

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.families import FAMILIES
from dsa_jax.families.family import Family

# The type of each field of ModelConfig.
_TYPES = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
_LARGEST = 2**31  # No size of a model comes near it.


def read_config(config: Any) -> tuple[str, ModelConfig]:
  """Returns the name of a released config.json's family, and the model's sizes.

  Raises:
    ConfigError: Keys are missing, or the file is of another model; the message names every reason.
  """
  name = config.get('model_type') if isinstance(config, dict) else None
  if name not in FAMILIES:
    raise ConfigError(f'config.json: model_type={name!r} must be one of {tuple(FAMILIES)}.')
  family, problems = FAMILIES[name], list[str]()
  for key, value in family.fixed.items():
    if config.get(key, value) != value:
      problems.append(f'{key}={config[key]!r} must be {value!r}.')
  sizes = {}
  for key, field in _fields(family).items():
    if key not in config:
      problems.append(f'{key} is missing.')
    else:
      sizes[field] = _number(key, config[key], _TYPES[field], problems)
  rope = _read_rope(config, family, sizes, problems)
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


def _fields(family: Family) -> dict[str, str]:
  return {**family.fields, **(family.indexer_fields if family.has_indexer else {})}


def _number(key: str, value: Any, kind: type, problems: list[str]) -> Any:
  if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
    problems.append(f'{key}={value!r} must be a number.')
  elif not 0 < value < _LARGEST:
    problems.append(f'{key}={value!r} must be positive.')
  else:
    return kind(value)


def _read_rope(
    config: dict, family: Family, sizes: dict, problems: list[str]
) -> dict[str, Any]:
  """Returns the fields of rotary positions, from `rope_parameters` or the older `rope_scaling`."""
  rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
  if not isinstance(rope, dict):
    problems.append(f'rope_scaling={rope!r} must be an object.')
    return {}
  theta = rope.get('rope_theta', config.get('rope_theta'))
  fields = {'rope_theta': _number('rope_theta', theta, float, problems)}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return fields | {'original_seq_len': sizes.get('max_seq_len')}  # No YaRN.
  if kind != 'yarn':
    problems.append(f"rope_scaling: type={kind!r} must be 'yarn' or 'default'.")
    return fields
  for key, field in family.yarn_fields.items():
    default = getattr(ModelConfig, field) if key.startswith('beta') else None
    fields[field] = _number(f'rope_scaling: {key}', rope.get(key, default), _TYPES[field], problems)
  if rope.get('mscale_all_dim') != fields['mscale']:
    problems.append(
        f"rope_scaling: mscale_all_dim={rope.get('mscale_all_dim')!r} must be mscale="
        f"{fields['mscale']!r}: other ratios scale the rotary channels, which DeepSeek never does."
    )
  return fields


def _leading_layers(config: dict, depth: int, problems: list[str]) -> int:
  """Returns the number of leading layers that have an MLP in place of experts."""
  types = config.get('mlp_layer_types')
  listed = types.count('dense') if isinstance(types, list) else 0
  leading = config.get('first_k_dense_replace', listed)
  if isinstance(leading, bool) or not isinstance(leading, int) or not 0 <= leading <= depth:
    problems.append(f'first_k_dense_replace={leading!r} must be within 0 and {depth}.')
  elif types and types != ['dense'] * leading + ['sparse'] * (depth - leading):
    problems.append(f"mlp_layer_types={types} must be {leading} 'dense', then 'sparse' only.")
  return leading


def _indexer_types(config: dict, depth: int, problems: list[str]) -> tuple[str, ...]:
  """Returns the kind of each layer: as listed, by GLM-5.2's pattern, or by its frequency."""
  types = config.get('indexer_types')
  if types is None and (pattern := config.get('index_topk_pattern')):
    types = [{'F': 'full', 'S': 'shared'}.get(c, c) for c in pattern]
  if types is None:
    every = config.get('index_topk_freq') or 1
    offset = config.get('index_skip_topk_offset', 2)
    if not isinstance(every, int) or not isinstance(offset, int) or every < 1:
      problems.append(
          f'index_topk_freq={every!r} and index_skip_topk_offset={offset!r} must be counts.'
      )
      return ()
    types = ['shared' if max(i - offset + 1, 0) % every else 'full' for i in range(depth)]
  if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
    problems.append(f"indexer_types={types!r} must be a list of 'full' and 'shared'.")
    return ()
  return () if set(types) == {'full'} and len(types) == depth else tuple(types)


def write_config(name: str, cfg: ModelConfig, base: dict[str, Any]) -> dict[str, Any]:
  """Returns the config.json that the loaders of a model's family read.

  Args:
    name: A key of FAMILIES.
    cfg: The model.
    base: The config.json that the model was imported with, whose other keys are kept; {} if there
      is none.
  """
  family = FAMILIES[name]
  config = {**family.fixed, 'bos_token_id': 0, 'eos_token_id': 1} | base
  config |= {'architectures': [family.architecture], 'model_type': name}
  config |= {key: getattr(cfg, field) for key, field in _fields(family).items()}
  config['num_key_value_heads'] = cfg.n_heads
  if not {'dtype', 'torch_dtype'} & config.keys():
    config['torch_dtype'] = cfg.dtype
  config['first_k_dense_replace'] = cfg.n_dense_layers
  config['num_nextn_predict_layers'] = cfg.n_mtp_layers
  if family.lists_indexers:
    config['indexer_rope_interleave'] = cfg.indexer_rope_interleave
    config['indexer_types'] = list(cfg.indexer_types or ('full',) * cfg.n_layers)
  if 'rope_parameters' in base or 'rope_scaling' in base or 'rope_theta' in base:
    return config  # Rotation stays as it came: fine-tuning may change sizes, but never this.
  if cfg.uses_yarn:
    yarn = {key: getattr(cfg, field) for key, field in family.yarn_fields.items()}
    config['rope_scaling'] = {'type': 'yarn', 'mscale_all_dim': cfg.mscale, **yarn}
    config['rope_theta'] = cfg.rope_theta
  else:
    config['rope_parameters'] = {'rope_type': 'default', 'rope_theta': cfg.rope_theta}
  return config
