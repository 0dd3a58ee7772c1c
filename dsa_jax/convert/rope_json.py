# SPDX-License-Identifier: Apache-2.0
"""Reads the rotary keys of a config.json, and writes them: none of them is passed over."""

from collections.abc import Callable, Mapping
import math
from typing import Any

from dsa_jax.config import ModelConfig
from dsa_jax.families.family import Family

SECTIONS = ('rope_parameters', 'rope_scaling')  # The newer key, and the older one.
KEYS = (*SECTIONS, 'rope_theta', 'partial_rotary_factor', 'original_max_position_embeddings')

# Keys of a section whose values the model is built for.
NEUTRAL = {'attn_factor': 1, 'extrapolation_factor': 1, 'truncate': True}

DISPUTED = 'attn_factor', 'extrapolation_factor'

# Returns the value of a key for a field of ModelConfig, or notes a problem.
Check = Callable[[str, Any, str], Any]


def read_rope(
    config: dict[str, Any], family: Family, sizes: dict[str, Any], check: Check,
    problems: list[str],
) -> dict[str, Any]:  # fmt: skip
  """Returns the fields of rotary positions, from `rope_parameters` or the older `rope_scaling`.

  Args:
    config: The config.json.
    family: The model's family.
    sizes: The fields that have been read before.
    check: Returns the value of a key for a field of ModelConfig, or notes a problem.
    problems: The list that takes every key which is unknown, contradicts another or has a value
      that the model is not built for.
  """
  rope = _section(config, family, problems)
  if rope is None:
    return {}
  rope = {key: value for key, value in rope.items() if key not in family.rope_ignored}
  kind = rope.pop('rope_type')
  if kind not in tuple(family.ropes):  # It may be of any type.
    problems.append(f'rope_scaling: type={kind!r} must be {" or ".join(map(repr, family.ropes))}.')
    return {}
  theta = check('rope_theta', rope.pop('rope_theta', family.rope_theta), 'rope_theta')
  fields = {'rope_type': kind, 'rope_theta': theta}
  fields |= _read_kind(rope, family.ropes[kind], check, problems)
  fields.setdefault('original_seq_len', sizes.get('max_seq_len'))
  share = rope.pop('partial_rotary_factor', family.rotary_share or 1)
  if family.rotary_share is None:
    _check_width(share, config, problems)
  elif not problems:
    fields |= _split_heads(share, sizes, problems)
  _check_original(rope.pop('original_max_position_embeddings', None), fields, problems)
  if _scales_rotated(kind, family):
    fields |= _read_attention_factor(rope, fields['rope_factor'], problems)
  if _says_factor(family) and rope.get('attention_factor') is None:
    problems.append('rope_scaling: attention_factor is missing: loaders take another value than 1.')
  neutral = {**NEUTRAL, 'attention_factor': 1} | ({'factor': 1} if kind == 'default' else {})
  for key, value in rope.items():
    if key not in neutral:
      problems.append(f'rope_scaling: {key}={value!r} is unknown for {kind!r} positions.')
    elif not is_number(value) or not math.isclose(value, neutral[key], rel_tol=1e-6):
      disputed = ': `transformers` passes it over, and other loaders do not; delete it to do as it does'
      advice = disputed if key in DISPUTED else ''
      problems.append(f'rope_scaling: {key}={value!r} must be {neutral[key]!r}{advice}.')
  return fields


def _scales_rotated(kind: str, family: Family) -> bool:
  """Returns whether YaRN makes rotated channels longer, by an `attention_factor` that may be said.

  With DeepSeek's `mscale` it does not: that is a factor of the softmax scale.
  """
  keys = family.ropes.get('yarn', {})
  return kind == 'yarn' and bool(keys) and 'mscale' not in keys and not _says_factor(family)


def _read_attention_factor(
    rope: dict[str, Any], factor: Any, problems: list[str]
) -> dict[str, float]:
  """Takes what cosines and sines are multiplied by out of a section, and returns it as `mscale`."""
  times, said = rope.pop('attn_factor', 1), rope.pop('attention_factor', None)
  if not is_number(factor) or factor < 1:  # That is a problem of its own.
    return {}
  usual = 0.1 * math.log(factor) + 1
  for key, value in ('attn_factor', times), ('attention_factor', 1 if said is None else said):
    if not is_number(value) or value <= 0:
      problems.append(f'rope_scaling: {key}={value!r} must be a number above 0.')
      return {}
  if said is None and not math.isclose(times, 1, rel_tol=1e-6):
    problems.append(
        f'rope_scaling: attn_factor={times!r} is read in two ways: say attention_factor={usual:.6g}, as '
        f'transformers takes it, or attention_factor={times * usual:.6g}, which vLLM makes of it.'
    )
  if said is None or math.isclose(said, usual, rel_tol=1e-6):
    return {}
  if factor == 1:
    problems.append(f'rope_scaling: attention_factor={said!r} must be 1 where factor is 1.')
    return {}
  return {'mscale': round((said - 1) / (usual - 1), 12)}


def _says_factor(family: Family) -> bool:
  """Returns whether YaRN scales nothing in a family, which config.json says by a factor of 1."""
  return family.constants.get('mscale') == 0


def _section(
    config: dict[str, Any], family: Family, problems: list[str]
) -> dict[str, Any] | None:
  """Returns everything that is said of rotary positions, each key once; None if that fails."""
  before = len(problems)
  sections = {key: config[key] for key in SECTIONS if config.get(key)}
  if family.usual_rope and not sections:
    sections = {SECTIONS[0]: dict(family.usual_rope)}
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
  return None if len(problems) > before else {'rope_type': 'default'} | merged


def _said(section: dict[str, Any]) -> dict[str, Any]:
  """Returns a section without its base, and with its type under one name."""
  kind = section.get('rope_type') or section.get('type') or 'default'
  others = {k: v for k, v in section.items() if v is not None}
  return {k: v for k, v in others.items() if k not in ('type', 'rope_theta')} | {'rope_type': kind}


def _read_kind(
    rope: dict[str, Any], keys: Mapping[str, str], check: Check, problems: list[str]
) -> dict[str, Any]:
  """Takes the keys of a kind of positions out of a section and returns their fields."""
  fields = {}
  for key, field in keys.items():
    default = getattr(ModelConfig, field) if key.startswith('beta') else None
    fields[field] = check(f'rope_scaling: {key}', rope.pop(key, default), field)
  if 'mscale' in keys:
    alone = rope.pop('mscale_all_dim', None)
    if alone != fields['mscale']:
      problems.append(
          f"rope_scaling: mscale_all_dim={alone!r} must be mscale={fields['mscale']!r}: other "
          'ratios scale the rotary channels, which DeepSeek never does.'
      )
  factor, slow, fast = map(fields.get, ('rope_factor', 'low_freq_factor', 'high_freq_factor'))
  if factor is not None and factor < 1:
    problems.append(f'rope_scaling: factor={factor!r} must be at least 1.')
  if slow is not None and fast is not None and not slow < fast:
    problems.append(
        f'rope_scaling: low_freq_factor={slow!r} must be below high_freq_factor={fast!r}.'
    )
  return fields


def _split_heads(share: Any, sizes: dict[str, Any], problems: list[str]) -> dict[str, Any]:
  """Returns how many channels of a head are rotated, and how many are not."""
  if not is_number(share) or not 0 < share <= 1:
    problems.append(f'partial_rotary_factor={share!r} must be above 0 and at most 1.')
    return {}
  head = sizes['qk_nope_head_dim'] + sizes['qk_rope_head_dim']
  rotated = int(head * share)
  return {'qk_rope_head_dim': rotated, 'qk_nope_head_dim': head - rotated}


def is_number(x: Any) -> bool:
  return isinstance(x, (int, float)) and math.isfinite(x)


def _check_width(factor: Any, config: dict[str, Any], problems: list[str]):
  width = config.get('qk_rope_head_dim')
  head = config.get('head_dim') or width
  numbers = all(map(is_number, (factor, head, width)))
  if factor != 1 and not (numbers and round(factor * head) == width):
    problems.append(
        f'partial_rotary_factor={factor!r} must be 1: qk_rope_head_dim channels of a head are '
        'rotated, or all of them.'
    )


def _check_original(length: Any, fields: dict[str, Any], problems: list[str]):
  """Checks a length that is said once more, or where there is no YaRN."""
  if length is not None and length != fields['original_seq_len']:
    original = fields['original_seq_len']
    problems.append(f'original_max_position_embeddings={length!r} must be {original!r}, or absent.')


def rotation(cfg: ModelConfig, family: Family) -> tuple[Any, ...]:
  """Returns all that a model's rotary positions depend on."""
  fields = (*family.ropes.get(cfg.rope_kind, {}).values(), 'mscale')
  return cfg.rope_kind, cfg.rope_theta, cfg.qk_rope_head_dim, *(getattr(cfg, f) for f in fields)


def write_rope(cfg: ModelConfig, family: Family) -> dict[str, Any]:
  """Returns the keys of a config.json that say how a model rotates."""
  kind = cfg.rope_kind
  if family.rotary_share is None:
    share = {}
  else:
    share = {'partial_rotary_factor': cfg.qk_rope_head_dim / cfg.head_dim}
  if kind == 'default' and family.window_fields:  # A section would be of all layers.
    return {'rope_theta': cfg.rope_theta}
  if kind == 'default':
    return {'rope_parameters': {'rope_type': kind, 'rope_theta': cfg.rope_theta, **share}}
  section = {key: getattr(cfg, field) for key, field in family.ropes.get(kind, {}).items()}
  if 'mscale' in section:
    section['mscale_all_dim'] = cfg.mscale
  elif _scales_rotated(kind, family) and cfg.mscale != 1:
    section['attention_factor'] = 0.1 * cfg.mscale * math.log(cfg.rope_factor) + 1
  if _says_factor(family):
    section |= {'attention_factor': 1.0, 'rope_type': kind, 'rope_theta': cfg.rope_theta}
    return {'rope_parameters': section}
  return {'rope_scaling': {'type': kind, **section}, 'rope_theta': cfg.rope_theta, **share}
