# SPDX-License-Identifier: Apache-2.0
"""Reads the keys of a config.json that give layers windows, and writes them."""

from typing import Any

from dsa_jax.config import ModelConfig
from dsa_jax.convert.config_keys import DENSE_LAYERS, SPARSE_LAYERS, WINDOW
from dsa_jax.families.family import Family

LENGTHS = 'sliding_window', 'sliding_window_size'  # A family has one of these keys, or none.


def read_windows(
    config: dict, family: Family, depth: int, has_indexer: bool, problems: list[str]
) -> dict[str, Any]:
  """Returns the fields that say which layers attend to a window, and how long it is.

  A family whose config.json has no `use_sliding_window` gives all layers a window, or none.

  Args:
    config: The config.json.
    family: The model's family.
    depth: The number of layers.
    has_indexer: Whether the checkpoint has indexers.
    problems: The list that takes a line for each wrong value.
  """
  window, names = _window(config, family, problems), SPARSE_LAYERS if has_indexer else DENSE_LAYERS
  types = config.get('layer_types') if 'layer_types' in family.layer_keys else None
  layers = range(depth)
  if types is not None:
    names = (*names, WINDOW) if window else names
    if not isinstance(types, list) or len(types) != depth or any(x not in names for x in types):
      problems.append(f'layer_types={types!r} must be one of {names} for each of {depth} layers.')
      return {}
    layers = [i for i, kind in enumerate(types) if kind == WINDOW]
  elif window and 'max_window_layers' in family.layer_keys:
    first = config.get('max_window_layers')
    if type(first) is not int or first < 0:
      problems.append(f'max_window_layers={first!r} must be a count of layers.')
      return {}
    layers = range(first, depth)
  elif window and family.windows_between:
    layers = [i for i in layers if max(i - 1, 0) % family.windows_between]
  return {'window_layers': tuple(layers), 'sliding_window': window} if window and layers else {}


def _window(config: dict, family: Family, problems: list[str]) -> int:
  """Returns the length of windows; 0 if there are none."""
  key = _key_of_length(family)
  if key is None:
    return 0
  if 'use_sliding_window' in family.layer_keys:
    used = config.get('use_sliding_window')
    if type(used) is not bool and used is not None:
      problems.append(f'use_sliding_window={used!r} must be true or false.')
    if not (family.usual_window if used is None else used):
      return 0
    if used and key not in config:
      problems.append(f'use_sliding_window is true, but there is no {key}: say how many tokens, as loaders differ.')
      return 0
  window = config.get(key, family.usual_window)
  if window is not None and (type(window) is not int or window < (key in config)):
    problems.append(f'{key}={window!r} must be a count of tokens, or null.')
    return 0
  return family.usual_window if window is None else window


def _key_of_length(family: Family) -> str | None:
  return next((key for key in LENGTHS if key in family.layer_keys), None)


def write_windows(cfg: ModelConfig, family: Family, base: dict[str, Any]) -> dict[str, Any]:
  """Returns the keys that say what `read_windows` reads; in the words of `base` where they fit."""
  length = _key_of_length(family) or ''
  keys: dict[str, Any] = {length: cfg.sliding_window or None}
  if 'use_sliding_window' in family.layer_keys:
    keys = {'use_sliding_window': False}
  if cfg.window_layers:
    types = [WINDOW if i in cfg.window_layers else DENSE_LAYERS[0] for i in range(cfg.n_layers)]
    keys = {
        'use_sliding_window': True, length: cfg.sliding_window,
        'max_window_layers': cfg.window_layers[0], 'layer_types': types,
    }  # fmt: skip
  fields = {'window_layers': cfg.window_layers, 'sliding_window': cfg.sliding_window}
  if read_windows(base, family, cfg.n_layers, True, []) == (fields if cfg.window_layers else {}):
    keys |= {key: base[key] for key in keys if key in base}
  return {key: value for key, value in keys.items() if key in family.layer_keys} | _sizes(cfg, family)


def _sizes(cfg: ModelConfig, family: Family) -> dict[str, Any]:
  """Returns the keys of sizes that are of layers with a window."""
  if not cfg.window_layers or not family.window_fields:
    return {}
  near = cfg.of_windows
  fields = {key: field.removeprefix('window_') for key, (field, _) in family.window_fields.items()}
  keys = {key: getattr(near, field) for key, field in fields.items()}
  keys |= {'num_key_value_heads': near.n_heads, 'head_dim': near.head_dim}
  return {family.window_prefix + key: value for key, value in keys.items()}
