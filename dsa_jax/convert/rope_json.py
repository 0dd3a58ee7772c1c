# SPDX-License-Identifier: Apache-2.0
"""Reads the rotary keys of a config.json, and writes them: none of them is passed over."""

from collections.abc import Callable
from typing import Any

from dsa_jax.config import ModelConfig
from dsa_jax.families.family import Family

SECTIONS = ('rope_parameters', 'rope_scaling')  # The newer key, and the older one.
KEYS = (*SECTIONS, 'rope_theta', 'partial_rotary_factor', 'original_max_position_embeddings')

# Keys of a section whose values the model is built for. The two factors multiply cosines and sines.
NEUTRAL = {'attention_factor': 1, 'attn_factor': 1, 'extrapolation_factor': 1, 'truncate': True}
FIELDS = ('rope_theta', 'rope_factor', 'original_seq_len', 'beta_fast', 'beta_slow', 'mscale')

Number = Callable[[str, Any, str], Any]  # Checks a number for a field of ModelConfig.


def read_rope(
    config: dict[str, Any], family: Family, sizes: dict[str, Any], number: Number,
    problems: list[str],
) -> dict[str, Any]:  # fmt: skip
  """Returns the fields of rotary positions, from `rope_parameters` or the older `rope_scaling`.

  Args:
    config: The config.json.
    family: The model's family.
    sizes: The fields that have been read before.
    number: Returns a number for a field, or notes a problem.
    problems: The list that takes every key which is unknown, contradicts another or has a value
      that the model is not built for.
  """
  rope = _section(config, problems)
  if rope is None:
    return {}
  kind = rope.pop('rope_type')
  if kind not in ('yarn', 'default'):
    problems.append(f"rope_scaling: type={kind!r} must be 'yarn' or 'default'.")
    return {}
  theta = number('rope_theta', rope.pop('rope_theta'), 'rope_theta')
  fields = {'rope_type': kind, 'rope_theta': theta}
  if kind == 'yarn':
    fields |= _read_yarn(rope, family, number, problems)
  else:
    fields['original_seq_len'] = sizes.get('max_seq_len')
  _check_width(rope.pop('partial_rotary_factor', 1), config, problems)
  _check_original(rope.pop('original_max_position_embeddings', None), fields, problems)
  neutral = NEUTRAL if kind == 'yarn' else NEUTRAL | {'factor': 1}
  for key, value in rope.items():
    if key not in neutral:
      problems.append(f'rope_scaling: {key}={value!r} is unknown for {kind!r} positions.')
    elif value != neutral[key]:
      problems.append(f'rope_scaling: {key}={value!r} must be {neutral[key]!r}.')
  return fields


def _section(config: dict[str, Any], problems: list[str]) -> dict[str, Any] | None:
  """Returns everything that is said of rotary positions, each key once; None if that fails."""
  before = len(problems)
  sections = {key: config[key] for key in SECTIONS if config.get(key)}
  merged: dict[str, Any] = {}
  top = {key: config[key] for key in KEYS if key not in SECTIONS and config.get(key) is not None}
  for where, section in {**sections, 'config': top}.items():
    if not isinstance(section, dict):
      problems.append(f'{where}={section!r} must be an object.')
      continue
    for key, value in section.items():
      key = 'rope_type' if key == 'type' else key
      if value is not None and merged.setdefault(key, value) != value:
        problems.append(f'{where}: {key}={value!r} contradicts {key}={merged[key]!r} beside it.')
  if len(sections) == 2 and len(problems) == before:
    newer, older = sections.values()
    if _said(newer) != _said(older):
      problems.append(
          f'rope_parameters={newer} and rope_scaling={older} contradict each other: keep one.'
      )
  return None if len(problems) > before else {'rope_type': 'default', 'rope_theta': None} | merged


def _said(section: dict[str, Any]) -> dict[str, Any]:
  """Returns a section without its base, and with its type under one name."""
  kind = section.get('rope_type') or section.get('type') or 'default'
  others = {k: v for k, v in section.items() if v is not None}
  return {k: v for k, v in others.items() if k not in ('type', 'rope_theta')} | {'rope_type': kind}


def _read_yarn(
    rope: dict[str, Any], family: Family, number: Number, problems: list[str]
) -> dict[str, Any]:
  """Takes YaRN's keys out of a section and returns their fields."""
  fields, alone = {}, rope.pop('mscale_all_dim', None)
  for key, field in family.yarn_fields.items():
    default = getattr(ModelConfig, field) if key.startswith('beta') else None
    fields[field] = number(f'rope_scaling: {key}', rope.pop(key, default), field)
  if alone != fields['mscale']:
    problems.append(
        f"rope_scaling: mscale_all_dim={alone!r} must be mscale={fields['mscale']!r}: other ratios "
        'scale the rotary channels, which DeepSeek never does.'
    )
  if fields['rope_factor'] is not None and fields['rope_factor'] < 1:
    problems.append(f"rope_scaling: factor={fields['rope_factor']!r} must be at least 1.")
  return fields


def _check_width(factor: Any, config: dict[str, Any], problems: list[str]):
  width = config.get('qk_rope_head_dim')
  head = config.get('head_dim') or width
  numbers = all(isinstance(x, (int, float)) for x in (factor, head, width))
  if factor != 1 and not (numbers and round(factor * head) == width):
    problems.append(f'partial_rotary_factor={factor!r} must be 1: qk_rope_head_dim is its width.')


def _check_original(length: Any, fields: dict[str, Any], problems: list[str]):
  """Checks a length that is said once more, or where there is no YaRN."""
  if length is not None and length != fields['original_seq_len']:
    original = fields['original_seq_len']
    problems.append(f'original_max_position_embeddings={length!r} must be {original!r}, or absent.')


def rotation(cfg: ModelConfig) -> tuple[Any, ...]:
  """Returns all that a model's rotary positions depend on."""
  fields = FIELDS if cfg.uses_yarn else ('rope_theta',)
  return cfg.uses_yarn, *(getattr(cfg, field) for field in fields)


def write_rope(cfg: ModelConfig, family: Family) -> dict[str, Any]:
  """Returns the keys of a config.json that say how a model rotates."""
  if cfg.uses_yarn:
    yarn = {key: getattr(cfg, field) for key, field in family.yarn_fields.items()}
    section = {'type': 'yarn', 'mscale_all_dim': cfg.mscale, **yarn}
    return {'rope_scaling': section, 'rope_theta': cfg.rope_theta}
  return {'rope_parameters': {'rope_type': 'default', 'rope_theta': cfg.rope_theta}}
