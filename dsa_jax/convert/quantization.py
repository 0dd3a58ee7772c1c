# SPDX-License-Identifier: Apache-2.0
"""What config.json says of quantised weights, so that it agrees with the files beside it."""

from collections.abc import Collection
import fnmatch
import re
from typing import Any

from dsa_jax.convert import fp8

FP8 = {  # What DeepSeek's config.json says of FP8.
    'quant_method': 'fp8',
    'fmt': 'e4m3',
    'activation_scheme': 'dynamic',
    'weight_block_size': [fp8.BLOCK, fp8.BLOCK],
    'scale_fmt': 'ue8m0',
}
LISTS = ('modules_to_not_convert', 'ignored_layers')  # Keys that list what is not quantised.


def describe(
    base: dict[str, Any] | None, quantized: Collection[str], wide: Collection[str]
) -> dict[str, Any]:
  """Returns the `quantization_config` of a checkpoint in which some matrices are FP8.

  The lists of `base` lose those entries that speak of an FP8 matrix, and the first of them gets
  those matrices that are not FP8 and that no entry speaks of.

  Args:
    base: The section that the model was imported with, if there was one.
    quantized: The names of all modules whose weights are FP8.
    wide: The names of those that might be and are not.
  """
  section = dict(base or FP8)
  unnamed, all_quantized = list(wide), '\n'.join(f'.{module}.' for module in quantized)
  is_false = lambda entry: f'.{entry}.' in all_quantized or (  # Quick for a thousand plain entries.
      not _is_plain(entry) and any(_speaks_of(entry, module) for module in quantized)
  )
  for key in LISTS:
    if isinstance(section.get(key), list):
      before = [entry for entry in section[key] if isinstance(entry, str)]
      kept = [entry for entry in before if not is_false(entry)]
      unnamed = [m for m in unnamed if not any(_speaks_of(entry, m) for entry in kept)]
      section[key] = kept
      if before and not kept:
        del section[key]
  if unnamed:
    key = next((key for key in LISTS if isinstance(section.get(key), list)), LISTS[0])
    section[key] = section.get(key, []) + _short(unnamed, quantized)
  return section


def _is_plain(entry: str) -> bool:
  return not entry.startswith('re:') and '*' not in entry


def _speaks_of(entry: str, module: str) -> bool:
  """Returns whether an entry names a module, or a part of the model that holds it."""
  if entry.startswith('re:'):
    return re.match(entry[3:], module) is not None
  if '*' in entry:
    return fnmatch.fnmatchcase(module, entry) or fnmatch.fnmatchcase(module, entry + '.*')
  return f'.{entry}.' in f'.{module}.'


def _short(modules: list[str], quantized: Collection[str]) -> list[str]:
  """Returns the names of modules, with one name for all experts of a layer if none is FP8."""
  holder = lambda module: module.split('.experts.')[0] + '.experts' * ('.experts.' in module)
  mixed = {holder(module) for module in quantized}
  short = [module if holder(module) in mixed else holder(module) for module in modules]
  return list(dict.fromkeys(short))
