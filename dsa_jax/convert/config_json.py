# SPDX-License-Identifier: Apache-2.0
"""Reads the config.json of a released model, and writes one."""

import dataclasses
from typing import Any

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.convert.config_keys import check_keys, check_quantization
from dsa_jax.convert.problems import first_ten
from dsa_jax.convert.rope_json import KEYS as ROPE_KEYS, read_rope, rotation, write_rope
from dsa_jax.families import FAMILIES
from dsa_jax.families.family import Family

# The type of each field of ModelConfig.
_TYPES = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
LARGEST_SIZE = 2**31  # No size of a model comes near it.

# The keys that are read beside those that a family lists.
LAYER_KEYS = (
    'model_type', 'dtype', 'torch_dtype', 'quantization_config', 'compression_config',
    'num_nextn_predict_layers', 'first_k_dense_replace', 'mlp_layer_types',
)  # fmt: skip
INDEXER_KEYS = (
    'indexer_rope_interleave', 'indexer_types', 'index_topk_pattern', 'index_topk_freq',
    'index_skip_topk_offset',
)  # fmt: skip


def read_config(config: Any) -> tuple[str, ModelConfig]:
  """Returns the name of a released config.json's family, and the model's sizes.

  Every key is read, is known to change nothing, or is refused by its name.

  Raises:
    ConfigError: Keys are missing or unknown, or the file is of another model; the message names
      every reason.
  """
  name = config.get('model_type') if isinstance(config, dict) else None
  if name not in FAMILIES:
    raise ConfigError(f'config.json: model_type={name!r} must be one of {tuple(FAMILIES)}.')
  check_quantization(config)
  family, problems = FAMILIES[name], list[str]()
  for key, value in family.fixed.items():
    if config.get(key) not in (None, value):
      problems.append(f'{key}={config[key]!r} must be {value!r}.')
  number = lambda key, value, field: _number(key, value, _TYPES[field], problems)
  sizes = {}
  for key, field in _fields(family).items():
    if key not in config:
      problems.append(f'{key} is missing.')
    else:
      sizes[field] = number(key, config[key], field)
  rope = read_rope(config, family, sizes, number, problems)
  check_keys(
      config, _known(family), sizes, has_indexer=family.has_indexer, problems=problems
  )
  _refuse(problems)
  depth = sizes['n_layers']
  fields = {
      **sizes,
      **rope,
      'n_dense_layers': _leading_layers(config, depth, problems),
      'n_mtp_layers': _mtp_layers(config, problems),
      'indexer_rope_interleave': family.indexer_rope_interleave,
      'dtype': _dtype(config, problems),
  }
  if family.has_indexer:
    fields['indexer_types'] = _indexer_types(config, depth, problems)
    fields['indexer_rope_interleave'] = _interleave(config, family, problems)
  _refuse(problems)
  try:
    return name, ModelConfig(**fields)
  except (TypeError, ValueError) as error:
    raise ConfigError(f'config.json: {error}') from error


def _refuse(problems: list[str]):
  if problems:
    raise ConfigError('config.json:\n  ' + '\n  '.join(first_ten(problems)))


def _fields(family: Family) -> dict[str, str]:
  return {**family.fields, **(family.indexer_fields if family.has_indexer else {})}


def _known(family: Family) -> set[str]:
  indexer = INDEXER_KEYS if family.has_indexer else ()
  return {*_fields(family), *family.fixed, *ROPE_KEYS, *LAYER_KEYS, *indexer}


def _number(key: str, value: Any, kind: type, problems: list[str]) -> Any:
  if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
    problems.append(f'{key}={value!r} must be a number.')
  elif not 0 < value < LARGEST_SIZE:
    problems.append(f'{key}={value!r} must be positive and below {LARGEST_SIZE}.')
  else:
    return kind(value)


def _dtype(config: dict, problems: list[str]) -> str:
  """Returns the dtype of activations: bfloat16, unless the weights are of float32."""
  stored = {config[key] for key in ('dtype', 'torch_dtype') if isinstance(config.get(key), str)}
  if len(stored) > 1:
    problems.append(f"dtype={config['dtype']!r} contradicts torch_dtype={config['torch_dtype']!r}.")
  return 'float32' if 'float32' in stored else 'bfloat16'


def _mtp_layers(config: dict, problems: list[str]) -> int:
  layers = config.get('num_nextn_predict_layers') or 0
  if isinstance(layers, bool) or not isinstance(layers, int):
    problems.append(f'num_nextn_predict_layers={layers!r} must be 0 or 1.')
    return 0
  return layers


def _interleave(config: dict, family: Family, problems: list[str]) -> bool:
  value = config.get('indexer_rope_interleave')
  if isinstance(value, bool):
    return value
  if value is not None:
    problems.append(f'indexer_rope_interleave={value!r} must be true or false.')
  return family.indexer_rope_interleave


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
  schedules: dict[str, list[str]] = {}
  types = config.get('indexer_types')
  if types is not None:
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
      problems.append(f"indexer_types={types!r} must be a list of 'full' and 'shared'.")
      return ()
    schedules['indexer_types'] = types
  if pattern := config.get('index_topk_pattern'):
    schedules['index_topk_pattern'] = [{'F': 'full', 'S': 'shared'}.get(c, c) for c in pattern]
  if (every := config.get('index_topk_freq')) is not None:
    offset = config.get('index_skip_topk_offset', 2)
    if not isinstance(every, int) or not isinstance(offset, int) or every < 1:
      problems.append(
          f'index_topk_freq={every!r} and index_skip_topk_offset={offset!r} must be counts.'
      )
      return ()
    schedules['index_topk_freq'] = [
        'shared' if max(i - offset + 1, 0) % every else 'full' for i in range(depth)
    ]
  (first, types), *others = schedules.items() or [('', ['full'] * depth)]
  for other, theirs in others:
    if theirs != types:
      problems.append(f'{other}={config[other]!r} contradicts {first}={config[first]!r}.')
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
  config = {**family.fixed, **base, 'architectures': [family.architecture], 'model_type': name}
  config |= {key: getattr(cfg, field) for key, field in _fields(family).items()}
  config['num_key_value_heads'] = cfg.n_heads
  if not {'dtype', 'torch_dtype'} & config.keys():
    config['torch_dtype'] = cfg.dtype
  config['first_k_dense_replace'] = cfg.n_dense_layers
  config['num_nextn_predict_layers'] = cfg.n_mtp_layers
  if family.lists_indexers:
    config['indexer_rope_interleave'] = cfg.indexer_rope_interleave
    config['indexer_types'] = list(cfg.indexer_types or ('full',) * cfg.n_layers)
  if not family.has_indexer:
    indexer = {*INDEXER_KEYS, *family.indexer_fields, 'index_share_for_mtp_iteration'}
    config = {key: value for key, value in config.items() if key not in indexer}
  if _rotates_as(base, cfg):
    return config  # What it says of rotation stays as it came.
  config = {key: value for key, value in config.items() if key not in ROPE_KEYS}
  return config | write_rope(cfg, family)


def _rotates_as(base: dict[str, Any], cfg: ModelConfig) -> bool:
  """Returns whether a config.json describes the model's rotary positions."""
  if not set(ROPE_KEYS) & base.keys():
    return False
  try:
    return rotation(read_config(base)[1]) == rotation(cfg)
  except ConfigError:
    return True  # An earlier version imported it; its model has never been another.
