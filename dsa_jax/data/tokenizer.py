# SPDX-License-Identifier: Apache-2.0
"""Turns text into token ids and back, by a checkpoint's tokenizer.json or as plain bytes."""

import codecs
from collections.abc import Iterable, Iterator
import pathlib

import tokenizers

from dsa_jax.config import ConfigError
from dsa_jax.data.text import BOS


class Bytes:
  """A tokenizer whose ids are bytes, as in the package's own text data, after BOS."""

  stop = (BOS,)  # Ids that end a text, because the next document begins.

  def encode(self, text: str) -> list[int]:
    """Returns BOS and the bytes of a text."""
    return [BOS, *text.encode()]

  def stream(self, ids: Iterable[int]) -> Iterator[str]:
    """Yields text as soon as ids make whole characters."""
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    for i in ids:
      yield decoder.decode(bytes([i])) if i < 256 else ''
    yield decoder.decode(b'', final=True)


class Pretrained:
  """A tokenizer that the `tokenizers` library reads from a tokenizer.json."""

  def __init__(self, path: pathlib.Path, stop: tuple[int, ...] = ()):
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises no narrower one.
      raise ConfigError(f'{path} is no tokenizer: {error}') from error
    self.stop = stop

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text).ids

  def stream(self, ids: Iterable[int]) -> Iterator[str]:
    steps = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
    for i in ids:
      yield steps.step(self._tokenizer, i) or ''


Tokenizer = Bytes | Pretrained


def find_tokenizer(folder: pathlib.Path, record: dict) -> Tokenizer:
  """Returns the tokenizer of a checkpoint: its tokenizer.json, or bytes where it has none."""
  path = folder / 'tokenizer.json'
  if not path.exists():
    return Bytes()
  stop = record.get('source', {}).get('config', {}).get('eos_token_id')
  stop = stop if isinstance(stop, list) else [] if stop is None else [stop]
  return Pretrained(path, tuple(stop))
