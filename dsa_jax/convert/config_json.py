# SPDX-License-Identifier: Apache-2.0
"""Reads the config.json of a released model, and writes one."""

import dataclasses
from typing import Any

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.convert.config_keys import check_keys, check_quantization
from dsa_jax.convert.layers_json import (
    ADDED_INDEX_KEYS,
    INDEXER_KEYS,
    read_layers,
    write_indexers,
    write_layers,
)  # fmt: skip
from dsa_jax.convert.plain_json import plain_keys, usual_name
from dsa_jax.convert.problems import first_ten
from dsa_jax.convert.rope_json import (
    KEYS as ROPE_KEYS,
    Check,
    read_rope,
    rotation,
    write_rope,
)  # fmt: skip
from dsa_jax.families import FAMILIES
from dsa_jax.families.family import Family

# The type of each field of ModelConfig.
_TYPES = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
LARGEST_SIZE = 2**31  # No size of a model comes near it.
DTYPE_NAMES = 'bfloat16', 'float16', 'float32', 'float8_e4m3fn'
KINDS = {bool: 'true or false', str: 'a name'}

# The keys that are read beside those that a family lists.
ANY_KEYS = ('model_type', 'dtype', 'torch_dtype', 'quantization_config', 'compression_config')
ALIASES = {'num_experts': 'num_local_experts'}  # Other names of keys, which `transformers` writes.
MEANS = {'shared_inter_dim': 'moe_inter_dim'}  # Fields in which 0 means the value of another one.
# Keys that stand beside the section of the text, where there is one.
OF_WHOLE = (
    'architectures', 'model_type', 'auto_map', 'transformers_version', 'quantization_config',
    'compression_config', 'tie_word_embeddings', 'dtype', 'torch_dtype',
)  # fmt: skip
HEAD_KEYS = ('num_key_value_heads', 'head_dim')  # Those of grouped-query attention.


def read_config(config: Any) -> tuple[str, ModelConfig]:
  """Returns the name of a released config.json's family, and the model's sizes.

  Every key is read, is known to change nothing, or is refused by its name.

  Raises:
    ConfigError: Keys are missing or unknown, or the file is of another model; the message names
      every reason.
  """
  name = usual_name(config) if isinstance(config, dict) else None
  if not isinstance(name, str) or name not in FAMILIES:
    raise ConfigError(f'config.json: model_type={name!r} must be one of {tuple(FAMILIES)}.')
  family, problems = FAMILIES[name], list[str]()
  config = plain_keys(config, problems)
  check_quantization(config)
  for key, value in family.fixed.items():
    if config.get(key) not in (None, value):
      right = 'null' if value is None else repr(value)
      problems.append(f'{key}={config[key]!r} must be {right}.')
  missing = [key for key in family.explicit if key not in config]
  problems += [f'{key} is missing: loaders take another value for it than null.' for key in missing]
  if len({config.get(key) is None for key in family.null_together}) > 1:
    problems.append(f'{" and ".join(family.null_together)} must be null together, or neither.')
  check = lambda key, value, field: _checked(key, value, _TYPES[field], problems)
  sizes = _sizes(config, family, check, problems)
  rope = read_rope(config, family, sizes, check, problems)
  known = _known(family, has_indexer(config))
  check_keys(config, known, family, sizes, has_indexer=has_indexer(config), problems=problems)
  _refuse(problems)
  layers = read_layers(config, family, sizes['n_layers'], has_indexer(config), problems)
  dtype = _dtype(config, problems)
  _refuse(problems)
  if 'window_layers' not in layers:  # No layer has these sizes.
    sizes = {field: size for field, size in sizes.items() if not field.startswith('window_')}
  of_nope_layers = {} if layers['nope_layers'] else {'nope_layers_expand': False}
  try:
    fields = {**family.constants, **of_nope_layers, **sizes, **rope, **layers}
    return name, ModelConfig(**fields, dtype=dtype)
  except (TypeError, ValueError) as error:
    raise ConfigError(f'config.json: {error}') from error


def has_indexer(config: dict[str, Any]) -> bool:
  """Returns whether a checkpoint has indexers, by its config.json."""
  family = FAMILIES[usual_name(config)]
  added = family.may_have_indexer and any(key in config for key in family.indexer_fields)
  return family.has_indexer or added


def _sizes(config: dict, family: Family, check: Check, problems: list[str]) -> dict[str, Any]:
  """Returns the fields that have keys of their own."""
  sizes = {}
  for key, field in _required(family, has_indexer(config)).items():
    name = key if key in config else ALIASES.get(key)
    if name not in config:
      problems.append(f'{key} is missing.')
    else:
      sizes[field] = check(name, config[name], field)
  for key, (field, default) in _optional(family, has_indexer(config)).items():
    sizes[field] = default if config.get(key) is None else check(key, config[key], field)
  if not has_indexer(config):
    sizes |= family.fresh_indexer
  if family.constants.get('attention') == 'gqa' and not problems:
    sizes |= _heads(config, sizes, check)
  return sizes


def _heads(config: dict, sizes: dict[str, Any], check: Check) -> dict[str, Any]:
  """Returns the key heads and the widths of grouped-query attention."""
  usual = {'num_key_value_heads': sizes['n_heads'], 'head_dim': sizes['dim'] // sizes['n_heads']}
  given = {key: config[key] for key in HEAD_KEYS if config.get(key) is not None}
  n_kv_heads, width = (check(key, (usual | given)[key], 'n_kv_heads') for key in HEAD_KEYS)
  widths = {'qk_nope_head_dim': 0, 'qk_rope_head_dim': width, 'v_head_dim': width}
  return {'n_kv_heads': n_kv_heads, **widths}


def _refuse(problems: list[str]):
  if problems:
    raise ConfigError('config.json:\n  ' + '\n  '.join(first_ten(problems)))


def _required(family: Family, has_indexer: bool) -> dict[str, str]:
  return {**family.fields, **(family.indexer_fields if has_indexer else {})}


def _optional(family: Family, has_indexer: bool) -> dict[str, tuple[str, Any]]:
  added = {name: (name, value) for name, value in ADDED_INDEX_KEYS.items()}
  windows = {family.window_prefix + key: pair for key, pair in family.window_fields.items()}
  return {**family.optional, **windows, **(added if has_indexer else {})}


def _known(family: Family, has_indexer: bool) -> set[str]:
  tables = _required(family, has_indexer), _optional(family, has_indexer), family.fixed
  heads = HEAD_KEYS if family.constants.get('attention') == 'gqa' else ()
  indexer = INDEXER_KEYS if has_indexer else ()
  lists = ROPE_KEYS, ANY_KEYS, family.layer_keys, family.ignored, family.explicit, heads, indexer
  return set().union(*tables, *lists, family.towers, family.beside_text)


def _checked(key: str, value: Any, kind: type, problems: list[str]) -> Any:
  """Returns the value of a key, or notes that it cannot be the value of such a field."""
  if kind in (bool, str):
    if isinstance(value, kind):
      return value
    problems.append(f'{key}={value!r} must be {KINDS[kind]}.')
  elif isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
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
  if unknown := stored - {*DTYPE_NAMES}:
    problems.append(f'dtype={unknown.pop()!r} must be one of {DTYPE_NAMES}.')
  return 'float32' if 'float32' in stored else 'bfloat16'


def write_config(
    name: str, cfg: ModelConfig, base: dict[str, Any], *, has_indexer: bool | None = None
) -> dict[str, Any]:
  """Returns the config.json that the loaders of a model's family read.

  Args:
    name: A key of FAMILIES.
    cfg: The model.
    base: The config.json that the model was imported with, whose other keys are kept; {} if there
      is none.
    has_indexer: Whether the checkpoint has indexers. None stands for what is usual in the family.
  """
  family = FAMILIES[name]
  has_indexer = family.has_indexer if has_indexer is None else has_indexer
  base = plain_keys(base, []) if usual_name(base) in FAMILIES else base
  config = _plain_config(name, cfg, base, has_indexer)
  return _with_text_section(config, family) if family.text_type else config


def _with_text_section(config: dict[str, Any], family: Family) -> dict[str, Any]:
  """Returns a config.json in which the keys of the text stand in a section of their own."""
  beside = {*family.beside_text, *OF_WHOLE}
  text = {key: value for key, value in config.items() if key not in beside}
  whole = {key: value for key, value in config.items() if key in beside}
  return whole | {'text_config': text | {'model_type': family.text_type}}


def _plain_config(
    name: str, cfg: ModelConfig, base: dict[str, Any], has_indexer: bool
) -> dict[str, Any]:
  """Returns a config.json without sections for the text, from a base without them."""
  family = FAMILIES[name]
  config = {**family.fixed, **base, 'architectures': [family.architecture], 'model_type': name}
  config |= {key: getattr(cfg, field) for key, field in _required(family, has_indexer).items()}
  config |= {key: _or_null(_meant(cfg, field)) for key, (field, _) in family.optional.items()}
  if family.tower_width:
    config |= {key: config.get(key) or {family.tower_width: cfg.dim} for key in family.towers}
  meant = {family.optional[key] for key in family.null_together}
  if all(getattr(cfg, field) == meant_by_null for field, meant_by_null in meant):
    config |= dict.fromkeys(family.null_together)
  config['num_key_value_heads'] = cfg.n_heads
  if cfg.attention == 'gqa':
    config |= {'num_key_value_heads': cfg.n_kv_heads, 'head_dim': cfg.head_dim}
  if not {'dtype', 'torch_dtype'} & config.keys():
    config['torch_dtype'] = cfg.dtype
  config |= write_layers(cfg, family, base)
  if has_indexer:
    config |= write_indexers(cfg, family)
  else:
    indexer = {*INDEXER_KEYS, *family.indexer_fields, *ADDED_INDEX_KEYS}
    indexer |= {'index_share_for_mtp_iteration'}
    config = {key: value for key, value in config.items() if key not in indexer}
  if _rotates_as(base, cfg):
    return config  # What it says of rotation stays as it came.
  config = {key: value for key, value in config.items() if key not in ROPE_KEYS}
  return config | write_rope(cfg, family)


def _meant(cfg: ModelConfig, field: str) -> Any:
  return getattr(cfg, field) or getattr(cfg, MEANS.get(field, field))


def _or_null(value: Any) -> Any:
  """Returns null for a size that the model has nothing of."""
  return None if value == 0 and not isinstance(value, bool) else value


def _rotates_as(base: dict[str, Any], cfg: ModelConfig) -> bool:
  """Returns whether a config.json describes the model's rotary positions."""
  if not set(ROPE_KEYS) & base.keys():
    return False
  try:
    name, model = read_config(base)
    return rotation(model, FAMILIES[name]) == rotation(cfg, FAMILIES[name])
  except ConfigError:
    return True  # An earlier version imported it; its model has never been another.
