# SPDX-License-Identifier: Apache-2.0
"""Released checkpoints by their names on the Hugging Face hub."""

import pathlib
import re

import huggingface_hub

from dsa_jax.config import ConfigError, local_path

NAME = re.compile(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?')
# What a conversion reads and keeps. Weights in other formats stay where they are.
WANTED = ['*.json', '*.safetensors', '*.jinja', '*.model', '*.model.v3', 'merges.txt', 'vocab.txt', '*.py']
UNWANTED = ['*/*', 'consolidated*']  # The same weights once more, in other formats.


def find_source(name: str) -> pathlib.Path:
  """Returns a folder or a GGUF file of this machine, or downloads one from the hub.

  The hub's names are `OWNER/MODEL` and `OWNER/MODEL@REVISION`. What was downloaded before is used
  again; see `huggingface_hub.snapshot_download`.

  Raises:
    ConfigError: There is no such folder, and the hub does not have it or cannot be reached.
  """
  path = local_path(name, 'SOURCE')
  match = NAME.fullmatch(name)
  if path.exists() or not match or path.suffix == '.gguf':
    return path
  try:
    folder = huggingface_hub.snapshot_download(
        match[1], revision=match[2], allow_patterns=WANTED, ignore_patterns=UNWANTED
    )
  except Exception as error:  # Whatever it is, the name is a folder that is not there.
    reason = str(error).strip().splitlines() or [type(error).__name__]
    raise ConfigError(
        f'SOURCE={name!r} is no folder here, and the Hugging Face hub did not give it: {reason[0]}'
    ) from error
  return pathlib.Path(folder)
