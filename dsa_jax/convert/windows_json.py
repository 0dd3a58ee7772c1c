# SPDX-License-Identifier: Apache-2.0
"""Reads the keys of a config.json that give layers windows, and writes them."""

from typing import Any

from dsa_jax.config import ModelConfig
from dsa_jax.convert.config_keys import DENSE_LAYERS, SPARSE_LAYERS
from dsa_jax.families.family import Family

WINDOW = 'sliding_attention'  # What layer_types calls a layer with a window.


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
  return {'window_layers': tuple(layers), 'sliding_window': window} if window and layers else {}


def _window(config: dict, family: Family, problems: list[str]) -> int:
  """Returns the length of windows; 0 if there are none."""
  if 'sliding_window' not in family.layer_keys:
    return 0
  if 'use_sliding_window' in family.layer_keys:
    used = config.get('use_sliding_window')
    if type(used) is not bool and used is not None:
      problems.append(f'use_sliding_window={used!r} must be true or false.')
    if not used:
      return 0
  window = config.get('sliding_window', 0)
  if window is not None and (type(window) is not int or window < 1):
    problems.append(f'sliding_window={window!r} must be a count of tokens, or null.')
    return 0
  return window or 0


def write_windows(cfg: ModelConfig, family: Family, base: dict[str, Any]) -> dict[str, Any]:
  """Returns the keys that say what `read_windows` reads; in the words of `base` where they fit."""
  keys: dict[str, Any] = {'sliding_window': cfg.sliding_window or None}
  if 'use_sliding_window' in family.layer_keys:
    keys = {'use_sliding_window': False}
  if cfg.window_layers:
    types = [WINDOW if i in cfg.window_layers else DENSE_LAYERS[0] for i in range(cfg.n_layers)]
    keys = {
        'use_sliding_window': True, 'sliding_window': cfg.sliding_window,
        'max_window_layers': cfg.window_layers[0], 'layer_types': types,
    }  # fmt: skip
  fields = {'window_layers': cfg.window_layers, 'sliding_window': cfg.sliding_window}
  if read_windows(base, family, cfg.n_layers, True, []) == (fields if cfg.window_layers else {}):
    keys |= {key: base[key] for key in keys if key in base}
  return {key: value for key, value in keys.items() if key in family.layer_keys}
