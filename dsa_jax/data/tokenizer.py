# SPDX-License-Identifier: Apache-2.0
"""Turns text into token ids and back, by a checkpoint's tokenizer.json or as plain bytes."""

import codecs
from collections.abc import Iterable, Iterator
import json
import logging
import pathlib
from typing import Any

import tokenizers

from dsa_jax.config import ConfigError
from dsa_jax.data.formats import POINTER, recognise
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
  """A tokenizer that the `tokenizers` library reads from a tokenizer.json.

  What the file was last used for does not count: truncation, padding and random merges are off.
  """

  def __init__(self, path: pathlib.Path, stop: tuple[int, ...] = ()):
    try:
      content = path.read_bytes()
      if recognise(content) == POINTER:
        raise ConfigError('it is a git-lfs pointer: `git lfs pull` fetches the file itself')
      self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # The library raises no narrower one.
      raise ConfigError(f'{path} is no tokenizer: {error}') from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    model = self._tokenizer.model
    if getattr(model, 'dropout', None) is not None:
      model.dropout = None
    if getattr(model, 'nbest_size', None) is not None:
      model.nbest_size, model.alpha = None, None
    self.stop = stop
    self.bos: int | None = None  # The id that begins a text, if it is known.
    self.adds_bos: bool | None = None  # Whether a text gets one; None leaves it to tokenizer.json.

  def id_of(self, token: str) -> int | None:
    return self._tokenizer.token_to_id(token)

  def is_special(self, i: Any) -> bool:
    """Returns whether an id is that of a mark, which no ordinary text holds."""
    marks = self._tokenizer.get_added_tokens_decoder()
    return isinstance(i, int) and not isinstance(i, bool) and i in marks and marks[i].special

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, which begin with what begins a text, once."""
    encoding = self._tokenizer.encode(text)
    ids, is_added = encoding.ids, encoding.special_tokens_mask
    n_before = is_added.index(0) if 0 in is_added else len(ids)
    before, rest = ids[:n_before], ids[n_before:]
    if self.adds_bos is False:
      before = [i for i in before if i != self.bos]
    while before and rest[: len(before)] == before:  # The text brings them along.
      rest = rest[len(before) :]
    if self.bos is None:
      return before + rest
    wants = self.bos in before or self.adds_bos or rest[:1] == [self.bos]
    while rest[:1] == [self.bos]:
      rest = rest[1:]
    before = [i for i in before if i != self.bos]
    return ([self.bos] if wants else []) + before + rest

  def stream(self, ids: Iterable[int]) -> Iterator[str]:
    steps = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
    for i in ids:
      yield steps.step(self._tokenizer, i) or ''


Tokenizer = Bytes | Pretrained


def find_tokenizer(folder: pathlib.Path, record: dict[str, Any]) -> Tokenizer:
  """Returns the tokenizer of a checkpoint: its tokenizer.json, or bytes where it has none.

  The files beside it say whether a text begins with an id of its own, and which ids end one.

  Args:
    folder: The checkpoint.
    record: Its config.json, which holds that of the release.

  Raises:
    ConfigError: A file is damaged, or names a token that the tokenizer lacks.
  """
  path = folder / 'tokenizer.json'
  if not path.exists():
    if record.get('source'):
      logging.warning(f'{folder} has no tokenizer.json: texts are read and written as bytes.')
    return Bytes()
  tokenizer = Pretrained(path)
  released = record.get('source', {}).get('config', {})
  settings = _read(folder / 'tokenizer_config.json')
  tokens = _read(folder / 'special_tokens_map.json')
  token = lambda key: _content(settings.get(key)) or _content(tokens.get(key))
  tokenizer.stop = _stop_ids(folder, released)
  if not tokenizer.stop and token('eos_token'):
    ended = tokenizer.id_of(token('eos_token'))
    tokenizer.stop = () if ended is None else (ended,)
  adds, where = settings.get('add_bos_token'), f'{folder}/tokenizer_config.json'
  if adds not in (None, True, False):
    raise ConfigError(f'{where}: add_bos_token={adds!r} must be true or false.')
  bos, first = token('bos_token'), released.get('bos_token_id')
  tokenizer.bos = tokenizer.id_of(bos) if bos else first if tokenizer.is_special(first) else None
  if adds and tokenizer.bos is None:
    raise ConfigError(
        f'{where}: add_bos_token is true, but bos_token={bos!r} is no token of tokenizer.json.'
    )
  tokenizer.adds_bos = adds
  return tokenizer


def _read(path: pathlib.Path) -> dict[str, Any]:
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


def _content(token: Any) -> str | None:
  """Returns the text of a token, which may be described by an object."""
  token = token.get('content') if isinstance(token, dict) else token
  return token if isinstance(token, str) else None


def _stop_ids(folder: pathlib.Path, released: dict[str, Any]) -> tuple[int, ...]:
  """Returns the ids that end a text by config.json or by generation_config.json."""
  generation = _read(folder / 'generation_config.json')
  ids = list[int]()
  for name, config in (('config.json', released), ('generation_config.json', generation)):
    stop = config.get('eos_token_id')
    for i in stop if isinstance(stop, list) else [] if stop is None else [stop]:
      if isinstance(i, bool) or not isinstance(i, int) or i < 0:
        raise ConfigError(f'{folder}: {name}: eos_token_id={stop!r} must be an id or a list.')
      ids.append(i)
  return tuple(dict.fromkeys(ids))
