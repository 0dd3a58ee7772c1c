# SPDX-License-Identifier: Apache-2.0
"""Reads the keys of a config.json that tell layers apart, and writes them."""

from typing import Any

from dsa_jax.config import ModelConfig
from dsa_jax.families.family import Family

# Keys of our own, which are also fields, with the values that DeepSeek's indexers have.
ADDED_INDEX_KEYS = {'index_rope_head_dim': 0, 'index_n_selections': 1}
INDEXER_KEYS = (
    'indexer_rope_interleave', 'indexer_types', 'index_topk_pattern', 'index_topk_freq',
    'index_skip_topk_offset',
)  # fmt: skip


def read_layers(
    config: dict, family: Family, depth: int, has_indexer: bool, problems: list[str]
) -> dict[str, Any]:
  """Returns the fields that say which layers have experts, rotate, or have an indexer.

  Args:
    config: The config.json.
    family: The model's family.
    depth: The number of layers.
    has_indexer: Whether the checkpoint has indexers.
    problems: The list that takes a line for each wrong value.
  """
  fields = {
      'n_dense_layers': _leading_layers(config, family, depth, problems),
      'nope_layers': _nope_layers(config, family, depth, problems),
      'indexer_rope_interleave': family.indexer_rope_interleave,
  }
  if 'num_nextn_predict_layers' in family.layer_keys:
    fields['n_mtp_layers'] = _mtp_layers(config, problems)
  if has_indexer:
    fields['indexer_types'] = _indexer_types(config, depth, problems)
    fields['indexer_rope_interleave'] = _interleave(config, family, problems)
  return fields


def write_layers(cfg: ModelConfig, family: Family) -> dict[str, Any]:
  """Returns the keys that say what `read_layers` reads, less those of indexers."""
  keys = {
      'first_k_dense_replace': cfg.n_dense_layers,
      'mlp_only_layers': list(range(cfg.n_dense_layers)),
      'num_nextn_predict_layers': cfg.n_mtp_layers,
      'no_rope_layers': [int(i not in cfg.nope_layers) for i in range(cfg.n_layers)],
  }
  return {key: value for key, value in keys.items() if key in family.layer_keys}


def write_indexers(cfg: ModelConfig, family: Family) -> dict[str, Any]:
  """Returns the keys that say how a model's indexers are, besides their sizes."""
  fields = {name: getattr(cfg, name) for name in ADDED_INDEX_KEYS}
  keys = {name: value for name, value in fields.items() if value != ADDED_INDEX_KEYS[name]}
  if family.lists_indexers:
    keys['indexer_rope_interleave'] = cfg.indexer_rope_interleave
    keys['indexer_types'] = list(cfg.indexer_types or ('full',) * cfg.n_layers)
  return keys


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


def _leading_layers(config: dict, family: Family, depth: int, problems: list[str]) -> int:
  """Returns the number of leading layers that have an MLP in place of experts."""
  if not family.tensors.moe:
    return depth
  if 'mlp_only_layers' in family.layer_keys:
    return _only_leading(config, depth, problems)
  types = config.get('mlp_layer_types')
  listed = types.count('dense') if isinstance(types, list) else 0
  leading = config.get('first_k_dense_replace', listed)
  if isinstance(leading, bool) or not isinstance(leading, int) or not 0 <= leading <= depth:
    problems.append(f'first_k_dense_replace={leading!r} must be within 0 and {depth}.')
  elif types and types != ['dense'] * leading + ['sparse'] * (depth - leading):
    problems.append(f"mlp_layer_types={types} must be {leading} 'dense', then 'sparse' only.")
  return leading


def _only_leading(config: dict, depth: int, problems: list[str]) -> int:
  layers = config.get('mlp_only_layers') or []
  if not isinstance(layers, list) or layers != list(range(len(layers))) or len(layers) > depth:
    problems.append(f'mlp_only_layers={layers!r} must be the first layers, such as [0, 1], or [].')
    return 0
  return len(layers)


def _nope_layers(config: dict, family: Family, depth: int, problems: list[str]) -> tuple[int, ...]:
  """Returns the layers that rotate nothing: listed with 0, or the last of every few."""
  if not family.nope_interval:
    return ()
  interval, rotates = config.get('no_rope_layer_interval'), config.get('no_rope_layers')
  interval = family.nope_interval if interval is None else interval
  if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
    problems.append(f'no_rope_layer_interval={interval!r} must be a count.')
    return ()
  if rotates is None:
    rotates = [int((i + 1) % interval != 0) for i in range(depth)]
  if not isinstance(rotates, list) or len(rotates) != depth or set(map(repr, rotates)) - {'0', '1'}:
    problems.append(
        f'no_rope_layers={rotates!r} must be 1 for each of {depth} layers that rotates, else 0.'
    )
    return ()
  return tuple(i for i, rotating in enumerate(rotates) if not rotating)


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
