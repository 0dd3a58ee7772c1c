# SPDX-License-Identifier: Apache-2.0
"""Where documents come from: every format by its name, and how each is opened as tokens."""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.data.corpora import files as places, tokenizing
from dsa_jax.data.corpora.raw import Arrow, JsonLines, Parquet, RawFormat, Text
from dsa_jax.data.corpora.tokens import FlatTokens, MegatronTokens, TokenFolder, TokenStream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
  """Folders that `python -m dsa_jax.tokenize` wrote."""

  files: str | Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flat:
  """Flat files of token ids, `.npy` or bare."""

  files: str | Sequence[str]
  separator: int  # The id that ends each document.
  dtype: str = 'uint16'  # Of bare files.

  def __post_init__(self):
    if self.dtype not in ('uint16', 'uint32'):
      raise ConfigError(f"dtype={self.dtype!r} must be 'uint16' or 'uint32'.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Megatron:
  """Pairs of files `NAME.bin` and `NAME.idx`, each given as NAME."""

  files: str | Sequence[str]


RAW = {'text': Text, 'jsonl': JsonLines, 'parquet': Parquet, 'arrow': Arrow}
FORMATS = RAW | {'tokens': Tokens, 'flat': Flat, 'megatron': Megatron}
Format = RawFormat | Tokens | Flat | Megatron


class Joined(TokenStream):
  """Several streams as one."""

  def __init__(self, streams: Sequence[TokenStream]):
    self._streams = streams
    self.about = np.concatenate([stream.about for stream in streams])
    self.vocab_size = max(stream.vocab_size for stream in streams)
    self.tokenizer, self.place = streams[0].tokenizer, f'{streams[0].place} and others'
    totals = [int(stream.about['tokens'].sum()) for stream in streams]
    self._starts = np.cumsum([0, *totals])

  def read(self, first: int, n: int) -> np.ndarray:
    parts = []
    while n:
      i = int(np.searchsorted(self._starts, first, side='right')) - 1
      taken = min(n, int(self._starts[i + 1]) - first)
      parts.append(self._streams[i].read(first - int(self._starts[i]), taken))
      first, n = first + taken, n - taken
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def default_cache() -> pathlib.Path:
  """Returns the user's folder for tokens of raw files, and for indices of token files."""
  root = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(root).expanduser() / 'dsa_jax' / 'tokens'


def open_format(source: Format, tokenizer: str, cache: pathlib.Path, damaged: str) -> TokenStream:
  """Opens a source as tokens. Raw files are tokenized first, unless the cache has their tokens.

  Raises:
    ConfigError: A file is missing, damaged, or of another tokenizer.
  """
  if isinstance(source, RawFormat):
    stream = TokenFolder(tokenizing.cached(source, tokenizer, cache, damaged))
    stream.place = str(source.files)  # What its user knows it by.
    return stream
  names = [source.files] if isinstance(source.files, str) else list(source.files)
  if isinstance(source, Tokens):
    streams = [TokenFolder(name) for name in names]
  elif isinstance(source, Flat):
    make = lambda name: FlatTokens(name, source.dtype, source.separator, _index(cache, source, name))
    streams = [make(name) for name in places.expand(source.files)]
  else:
    streams = [MegatronTokens(name, _index(cache, source, f'{name}.bin')) for name in names]
  return streams[0] if len(streams) == 1 else Joined(streams)


def _index(cache: pathlib.Path, source: Any, name: str) -> pathlib.Path:
  """Returns where what is known of a token file's documents is kept."""
  if not os.path.isfile(name):
    raise ConfigError(f'there is no file {name}.')
  state = [os.path.abspath(name), places.state_of(name), dataclasses.asdict(source)]
  digest = hashlib.sha256(json.dumps(state, default=list).encode()).hexdigest()[:24]
  return cache / f'{digest}.npy'
