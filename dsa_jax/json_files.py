# SPDX-License-Identifier: Apache-2.0
"""Reads the small JSON files beside checkpoints, runs and tokenizers."""

import json
import pathlib
from typing import Any

from dsa_jax.config import ConfigError


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """Returns a JSON object, {} where there is no file."""
  if not path.exists():
    return {}
  try:
    values = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ConfigError(f'{path} is no JSON: {error}') from error
  if not isinstance(values, dict):
    raise ConfigError(f'{path} must hold a JSON object; it holds a {type(values).__name__}.')
  return values
