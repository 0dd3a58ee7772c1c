# SPDX-License-Identifier: Apache-2.0
"""Gives a config.json the keys of its family's release, where `transformers` has saved others."""

from collections.abc import Mapping
import math
from typing import Any

from dsa_jax.convert.config_keys import SPARSE_LAYERS, WINDOW
from dsa_jax.convert.rope_json import is_number
from dsa_jax.families import FAMILIES
from dsa_jax.families.family import Family

USUAL_NAMES = {other: name for name, family in FAMILIES.items() for other in family.other_names}
OF_ONE = 'model_type', 'architectures', 'transformers_version', 'auto_map', '_name_or_path', 'use_cache'
OF_HEADS = 'head_dim', 'num_key_value_heads'  # What follows from other sizes of a layer.


def usual_name(config: Mapping[str, Any]) -> Any:
  """Returns the model_type of a config.json, in the spelling that FAMILIES has, if it has one."""
  name = config.get('model_type')
  return USUAL_NAMES.get(name, name) if isinstance(name, str) else name


def plain_keys(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
  """Returns a config.json of a known family without sections for the text or for kinds of layers.

  Args:
    config: The config.json.
    problems: The list that takes a line for what plain keys cannot say.
  """
  name = usual_name(config)
  family, plain = FAMILIES[name], {**config, 'model_type': name}
  text = plain.pop('text_config', None) if family.towers else None
  if isinstance(text, dict):
    problems += _contradictions(plain, text)
    plain = text | {key: value for key, value in plain.items() if value is not None}
  elif text is not None:
    problems.append(f'text_config={text!r} must be a section.')
  for other, key in family.renamed.items():
    if (value := plain.pop(other, None)) is not None and plain.setdefault(key, value) != value:
      problems.append(f'{other}={value!r} contradicts {key}={plain[key]!r}.')
  if family.window_fields:
    types = plain.get('layer_types')
    windows = [i for i, kind in enumerate(types) if kind == WINDOW] if isinstance(types, list) else []
    plain |= _sizes(plain, windows, family, problems)
    plain.pop('per_layer_config', None)
    plain |= _bases(plain, family, problems)
    if plain.get('rope_parameters') is None:
      plain.pop('rope_parameters', None)
  return plain


def _contradictions(whole: Mapping[str, Any], text: Mapping[str, Any]) -> list[str]:
  """Returns a line for each key of the text that has another value beside its section.

  Ids may differ: a model of several towers ends a text by more of them.
  """
  both = [key for key in text if whole.get(key) is not None and not key.endswith('_token_id')]
  return [
      f'{key}={whole[key]!r} contradicts {key}={text[key]!r} of text_config.'
      for key in both
      if key not in OF_ONE and whole[key] != text[key]
  ]


def _sizes(
    config: dict[str, Any], windows: list[int], family: Family, problems: list[str]
) -> dict[str, Any]:
  """Returns the keys of layers with a window that stand in `per_layer_config`.

  A size that is not there is that of all layers.
  """
  sections = config.get('per_layer_config')
  if sections is None or not (sections or windows):
    return {}
  keys = [key for key in (*family.window_fields, *OF_HEADS) if key != 'rope_theta']
  whole = {str(i): {key: config.get(key) for key in keys} for i in windows}
  try:
    for i, section in sections.items():
      whole[str(int(i))] |= section
    [sizes] = {tuple(sorted(section.items())) for section in whole.values()}
  except (AttributeError, KeyError, TypeError, ValueError):
    sizes = (('?', None),)
  if {key for key, _ in sizes} != {*keys}:
    problems.append(
        f'per_layer_config={sections!r} must give all layers with a window the same of {keys}, and '
        'nothing to others.'
    )
    return {}
  return {family.window_prefix + key: value for key, value in sizes}


def _bases(config: dict[str, Any], family: Family, problems: list[str]) -> dict[str, Any]:
  """Returns the bases of rotary positions that stand in `rope_parameters`, which they replace.

  A section without kinds of layers is of all of them.
  """
  rope, base = config.get('rope_parameters'), family.window_prefix + 'rope_theta'
  if not isinstance(rope, dict) or not rope:
    return {}
  if not all(isinstance(section, dict) for section in rope.values()):
    return {base: rope['rope_theta']} if 'rope_theta' in rope else {}
  prefixes = {kind: '' for kind in SPARSE_LAYERS} | {WINDOW: family.window_prefix}
  bases = {}
  for kind, section in rope.items():
    prefix = prefixes.get(kind)
    if prefix is None or not _is_plain(section, config, prefix):
      problems.append(
          f'rope_parameters: {kind!r}: {section!r} must be of layers that select or have a window, '
          "and have a rope_theta, rope_type 'default', and a share that gives qk_rope_head_dim."
      )
    else:
      bases[prefix + 'rope_theta'] = section['rope_theta']
  return {'rope_parameters': None} | bases


def _is_plain(section: dict[str, Any], config: dict[str, Any], prefix: str) -> bool:
  """Returns whether a section says no more than a base."""
  width, head = (config.get(prefix + key, 0) for key in ('qk_rope_head_dim', 'head_dim'))
  share = section.get('partial_rotary_factor')
  rest = {key: x for key, x in section.items() if key not in ('partial_rotary_factor', 'rope_theta')}
  numbers = is_number(share) and is_number(head) and is_number(width)
  fits = share is None or numbers and math.isclose(share * head, width)
  return 'rope_theta' in section and rest in ({}, {'rope_type': 'default'}) and fits
