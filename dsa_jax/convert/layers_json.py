# SPDX-License-Identifier: Apache-2.0
"""Reads the keys of a config.json that tell layers apart, and writes them."""

from collections.abc import Sequence
from typing import Any

from dsa_jax.config import ModelConfig
from dsa_jax.convert.windows_json import read_windows, write_windows
from dsa_jax.families.family import Family

# Keys of our own, which are also fields, with the values that DeepSeek's indexers have.
ADDED_INDEX_KEYS = {
    'index_rope_head_dim': 0, 'index_n_selections': 1, 'index_rope_factor': 1.0, 'index_original_seq_len': 0,
}  # fmt: skip
INDEXER_KEYS = (
    'indexer_rope_interleave', 'indexer_types', 'index_topk_pattern', 'index_topk_freq',
    'index_skip_topk_offset',
)  # fmt: skip


def read_layers(
    config: dict, family: Family, depth: int, has_indexer: bool, problems: list[str]
) -> dict[str, Any]:
  """Returns the fields that say which layers have experts, rotate, or have an indexer or a window.

  Args:
    config: The config.json.
    family: The model's family.
    depth: The number of layers.
    has_indexer: Whether the checkpoint has indexers.
    problems: The list that takes a line for each wrong value.
  """
  dense = _dense_layers(config, family, depth, problems)
  leading = _n_leading(dense)
  fields = {
      'n_dense_layers': leading,
      'mlp_layers': dense[leading:],
      'nope_layers': _nope_layers(config, family, depth, problems),
      'kv_sources': _kv_sources(config, family, depth, problems),
      'indexer_rope_interleave': family.indexer_rope_interleave,
      **read_windows(config, family, depth, has_indexer, problems),
  }
  if 'num_nextn_predict_layers' in family.layer_keys:
    fields['n_mtp_layers'] = _mtp_layers(config, problems)
  if has_indexer:
    fields['indexer_types'] = _indexer_types(config, family, depth, problems)
    fields['indexer_rope_interleave'] = _interleave(config, family, problems)
  return fields


def write_layers(cfg: ModelConfig, family: Family, base: dict[str, Any]) -> dict[str, Any]:
  """Returns the keys that say what `read_layers` reads, less those of indexers.

  `base` is the config.json that the model was imported with. Its own words for the layers that have
  an MLP are kept.
  """
  dense, depth = cfg.dense_layers, cfg.n_layers
  same = [n for n in range(1, depth) if _by_frequency(cfg.n_dense_layers, n, depth) == dense]
  keys = {
      'first_k_dense_replace': cfg.n_dense_layers,
      'moe_layer_freq': next(iter(same), 1),
      'mlp_only_layers': list(dense),
      'decoder_sparse_step': 1,
  }
  must_list = cfg.mlp_layers or 'first_k_dense_replace' not in family.layer_keys
  if family.lists_mlp_layers and must_list:
    keys['mlp_layer_types'] = ['dense' if i in dense else 'sparse' for i in range(depth)]
  if _dense_layers(base, family, depth, []) == dense:
    keys |= {key: base[key] for key in keys if base.get(key) is not None}
  keys |= {
      'num_nextn_predict_layers': cfg.n_mtp_layers,
      'no_rope_layers': [int(i not in cfg.nope_layers) for i in range(depth)],
      'kv_source_layers': list(cfg.kv_sources or range(depth)),
  }
  keys = {key: value for key, value in keys.items() if key in family.layer_keys}
  return keys | write_windows(cfg, family, base)


def write_indexers(cfg: ModelConfig, family: Family) -> dict[str, Any]:
  """Returns the keys that say how a model's indexers are, besides their sizes."""
  fields = {name: getattr(cfg, name) for name in ADDED_INDEX_KEYS}
  keys = {name: value for name, value in fields.items() if value != ADDED_INDEX_KEYS[name]}
  if family.lists_indexers or family.disputes_rotation:
    keys['indexer_rope_interleave'] = cfg.indexer_rope_interleave
  if family.lists_indexers:
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


def _dense_layers(
    config: dict, family: Family, depth: int, problems: list[str]
) -> tuple[int, ...]:
  """Returns the layers that have an MLP in place of experts."""
  if not family.tensors.moe:
    return tuple(range(depth))
  if 'mlp_only_layers' in family.layer_keys:
    return _listed(config, depth, problems)
  types = config.get('mlp_layer_types') or []
  if not isinstance(types, list) or any(kind not in ('dense', 'sparse') for kind in types):
    problems.append(f"mlp_layer_types={types!r} must be a list of 'dense' and 'sparse'.")
    return ()
  listed = tuple(i for i, kind in enumerate(types) if kind == 'dense')
  given = [config.get(key) for key in ('first_k_dense_replace', 'moe_layer_freq')]
  usual = _n_leading(listed) if types else family.leading_mlp_layers
  leading, every = (x if y is None else y for x, y in zip((usual, 1), given))
  if type(leading) is not int or not 0 <= leading <= depth:
    problems.append(f'first_k_dense_replace={leading!r} must be within 0 and {depth}.')
    return ()
  if type(every) is not int or every < 1:
    problems.append(f'moe_layer_freq={every!r} must be a count.')
    return ()
  by_rule = _by_frequency(leading, every, depth)
  if not types:
    return by_rule
  if len(types) != depth:
    problems.append(f'mlp_layer_types={types} must have an entry for each of {depth} layers.')
  elif not family.lists_mlp_layers and listed != by_rule:
    problems.append(f"mlp_layer_types={types} must be {leading} 'dense', then 'sparse' only.")
  elif _n_leading(listed) != leading:
    problems.append(f'mlp_layer_types={types} contradicts first_k_dense_replace={leading}.')
  return listed


def _by_frequency(leading: int, every: int, depth: int) -> tuple[int, ...]:
  """Returns the leading layers, and those whose number is no multiple of `every`.

  They have an MLP in place of experts.

  Source:
    DeepSeek-V2's and V3's modeling_deepseek.py: `layer_idx % config.moe_layer_freq == 0`. The
    classes of `transformers` do not read the key.
  """
  return tuple(i for i in range(depth) if i < leading or i % every)


def _listed(config: dict, depth: int, problems: list[str]) -> tuple[int, ...]:
  """Returns the layers with an MLP by Qwen3's keys: those listed, and all but one of every few."""
  layers, step = config.get('mlp_only_layers') or [], config.get('decoder_sparse_step')
  is_layer = lambda x: type(x) is int and 0 <= x < depth
  if not isinstance(layers, list) or not all(map(is_layer, layers)):
    problems.append(f'mlp_only_layers={layers!r} must be numbers of layers, such as [0, 1], or [].')
    return ()
  step = 1 if step is None else step
  if type(step) is not int or step < 1:
    problems.append(f'decoder_sparse_step={step!r} must be a count.')
    return ()
  return tuple(i for i in range(depth) if i in layers or (i + 1) % step)


def _n_leading(layers: Sequence[int]) -> int:
  """Returns how many of these ascending numbers are 0, 1, 2 and so on."""
  return sum(i == at for at, i in enumerate(layers))


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


def _kv_sources(config: dict, family: Family, depth: int, problems: list[str]) -> tuple[int, ...]:
  """Returns the layer whose latents each layer reads; () if all read their own."""
  sources = config.get('kv_source_layers') if 'kv_source_layers' in family.layer_keys else None
  if sources is None or sources == [*range(depth)]:
    return ()
  if not isinstance(sources, list) or any(type(source) is not int for source in sources):
    problems.append(f'kv_source_layers={sources!r} must be numbers of layers, one for each layer.')
    return ()
  return tuple(sources)


def _indexer_types(
    config: dict, family: Family, depth: int, problems: list[str]
) -> tuple[str, ...]:
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
    schedules['index_topk_freq'] = _every_few(every, offset, depth)
  usual = '', _every_few(family.index_topk_freq, 2, depth)
  (first, types), *others = schedules.items() or [usual]
  for other, theirs in others:
    if theirs != types:
      problems.append(f'{other}={config[other]!r} contradicts {first}={config[first]!r}.')
  return () if set(types) == {'full'} and len(types) == depth else tuple(types)


def _every_few(every: int, offset: int, depth: int) -> list[str]:
  return ['shared' if max(i - offset + 1, 0) % every else 'full' for i in range(depth)]
