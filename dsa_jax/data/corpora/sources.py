# SPDX-License-Identifier: Apache-2.0
"""Where documents come from: every format by its name, and how each is opened as tokens."""

import collections
from collections.abc import Sequence
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any

import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.data.corpora import files as places, tokenizing
from dsa_jax.data.corpora.raw import Arrow, JsonLines, Parquet, RawFormat, Text
from dsa_jax.data.corpora.tokens import (
    FlatTokens,
    MegatronTokens,
    TokenFolder,
    TokenStream,
    read_across,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens(places.Files):
  """Folders that `python -m dsa_jax.tokenize` wrote."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flat(places.Files):
  """Flat files of token ids, `.npy` or bare."""

  separator: int  # The id that ends each document.
  dtype: str = 'uint16'  # Of bare files.

  def __post_init__(self):
    super().__post_init__()
    if isinstance(self.separator, bool) or not isinstance(self.separator, int) or self.separator < 0:
      raise ConfigError(f'separator={self.separator!r} must be an id, 0 or more.')
    if self.dtype not in ('uint16', 'uint32'):
      raise ConfigError(f"dtype={self.dtype!r} must be 'uint16' or 'uint32'.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Megatron(places.Files):
  """Pairs of files `NAME.bin` and `NAME.idx`, each given as NAME."""


RAW = {'text': Text, 'jsonl': JsonLines, 'parquet': Parquet, 'arrow': Arrow}
FORMATS = RAW | {'tokens': Tokens, 'flat': Flat, 'megatron': Megatron}
Format = RawFormat | Tokens | Flat | Megatron


class Joined(TokenStream):
  """Several streams as one."""

  def __init__(self, streams: Sequence[TokenStream]):
    self._streams, first = streams, streams[0]
    for other in streams[1:]:
      if other.tokenizer != first.tokenizer:
        raise ConfigError(
            f'{first.place} and {other.place} were made with different tokenizers '
            f'({first.tokenizer[:12]} and {other.tokenizer[:12]}): tokenize one of them again.'
        )
    self.about = np.concatenate([stream.about for stream in streams])
    self.vocab_size = max(stream.vocab_size for stream in streams)
    self.tokenizer, self.place = first.tokenizer, f'{first.place} and others'
    self.left_out = collections.Counter()
    for stream in streams:
      self.left_out.update(stream.left_out)  # A sum would drop reasons that are known to be no one's.
    totals = [int(stream.about['tokens'].sum()) for stream in streams]
    self._starts = np.cumsum([0, *totals])

  def read(self, first: int, n: int) -> np.ndarray:
    of_stream = lambda i, inside, taken: self._streams[i].read(inside, taken)
    return read_across(self._starts, of_stream, first, n)


def open_format(
    source: Format, tokenizer: str, cache: pathlib.Path, damaged: str, special_tokens: str = 'text'
) -> TokenStream:
  """Opens a source as tokens. Raw files are tokenized first, unless the cache has their tokens.

  Raises:
    ConfigError: A file is missing, damaged, or of another tokenizer.
  """
  if isinstance(source, RawFormat):
    stream = TokenFolder(tokenizing.cached(source, tokenizer, cache, damaged, special_tokens))
    stream.place = str(source.files)  # What its user knows it by.
    return stream
  names = names_of(source)
  if isinstance(source, Tokens):
    streams = [TokenFolder(name) for name in names]
  elif isinstance(source, Flat):
    make = lambda name: FlatTokens(name, source.dtype, source.separator, _index(cache, source, name))
    with tokenizing.kept_in(cache):
      streams = [make(name) for name in names]
  else:
    with tokenizing.kept_in(cache):
      both = lambda name: _index(cache, source, f'{name}.bin', f'{name}.idx')
      streams = [MegatronTokens(name, both(name)) for name in names]
  return streams[0] if len(streams) == 1 else Joined(streams)


def names_of(source: Format) -> list[str]:
  """Returns the files, pairs of files or folders of tokens that a source reads, in their order."""
  if isinstance(source, RawFormat):
    return [name for piece in source.pieces() for name in piece.names]
  if isinstance(source, Tokens):
    return places.expand_local(source.files)
  if isinstance(source, Flat):
    return places.expand(source.files, ('.bin', '.npy'))
  return places.expand_local(_prefixes(source.files), '.idx')


def _prefixes(files: str | Sequence[str]) -> list[str]:
  """Returns the paths of pairs of files, either of which may have been given."""
  names = [files] if isinstance(files, str) else files
  return [name.removesuffix('.bin').removesuffix('.idx') for name in names]


def _index(cache: pathlib.Path, source: Any, *names: str) -> pathlib.Path:
  """Returns where what is known of the documents of token files is kept."""
  for name in names:
    if not os.path.isfile(name):
      raise ConfigError(f'there is no file {name} on this machine.')
  states = [[os.path.abspath(name), places.state_of(name)] for name in names]
  state = [*itertools.chain(*states), dataclasses.asdict(source)]
  digest = hashlib.sha256(json.dumps(state, default=list).encode()).hexdigest()[:24]
  return cache / f'{digest}.npy'
