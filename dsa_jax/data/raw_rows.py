# SPDX-License-Identifier: Apache-2.0
"""Rows of raw files that are tokenized while they are read, one window of documents at a time."""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import hashlib
import itertools
import json
from typing import Any, NamedTuple

import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.data import packing as packing_lib
from dsa_jax.data.batch import Batch
from dsa_jax.data.corpora import files as places, tokenizing
from dsa_jax.data.corpora.raw import Damaged, Document, Piece, RawFormat
from dsa_jax.data.corpora.tokens import TokenStream, describe, hash_of
from dsa_jax.data.packing import PackingConfig, Rows, fits, is_on_side, repeat_long
from dsa_jax.data.tokenizer import Tokenizer

WINDOW = 2**22  # Bytes of the documents of a window, at least.
WINDOW_ROWS = 256  # A window fills so many rows of bytes, so padding the last one costs little.
TOGETHER = 4  # Pieces that are read in turn, so that a window holds documents of several places.
AT_ONCE = 16  # Documents whose side is found at one time.
LEFT_OUT = 'empty', 'damaged', 'length'  # Reasons.


class Place(NamedTuple):
  """Where a window lies in the endless sequence of windows."""

  epoch: int
  group: int  # Of pieces that are read together, in the order of the epoch.
  window: int  # Of the group.


@dataclasses.dataclass(frozen=True)  # No tuple: grain would put its arrays into shared memory.
class Window:
  """Rows of neighbouring documents."""

  place: Place
  rows: Rows | None  # None if no document of the window will do.
  order: np.ndarray  # The numbers of the rows, shuffled.
  counts: collections.Counter[str]  # Documents that were read, and those left out, by reason.
  damaged: Damaged | None  # The first one.


class Picked:
  """Rows of windows by their numbers, which are filled when they are asked for."""

  def __init__(self, places: Sequence[tuple[Rows, int]]):
    self.places = places

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, i: int) -> Batch:
    rows, row = self.places[i]
    return rows[row]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawRows:
  """The rows of a split of raw files, without end.

  Each epoch reads all pieces in an order of its own, `TOGETHER` at a time. Their documents are cut
  into windows, whose documents of this split are tokenized and packed together, and whose rows are
  shuffled. Only the last row of a window is padded. Neither the order nor the windows depend on who
  reads them, and no more than a few windows are in memory.
  """

  source: RawFormat
  pieces: tuple[Piece, ...]
  tokenizer: str
  special_tokens: str  # See `open_tokenizer`.
  digest: str  # The tokenizer's.
  damaged: str  # What to do about damaged documents; one of `tokenizing.DAMAGED`.
  split: str
  validation_share: float | None  # None if all documents are of the split.
  seed: int  # Determines the split.
  packing: PackingConfig
  seq_len: int
  window_bytes: int  # Of the documents of a window, about.

  def __post_init__(self):
    if self.seq_len < 2:
      raise ConfigError(f'{self.seq_len=} must be at least 2: one token and its target.')
    if not self.pieces or (self.split == 'validation' and self.validation_share == 0):
      raise self.error

  @property
  def n_windows(self) -> int:
    """About how many windows there are, but that files may be compressed."""
    return -(-sum(piece.nbytes for piece in self.pieces) // self.window_bytes)

  def windows(
      self, order: int, begin: Place = Place(0, 0, 0), part: tuple[int, int] = (0, 1)
  ) -> Iterator[Window]:
    """Yields windows without end.

    Args:
      order: Seeds the order of pieces and rows.
      begin: Where to begin. Windows of the group that come before are read, but not tokenized.
      part: (i, n) yields every n-th window from the i-th on, and does not tokenize the others.

    Raises:
      ConfigError: A file cannot be read, or a document of these windows is damaged.
    """
    numbers = itertools.count(-part[0])
    for epoch in itertools.count(begin.epoch):
      shuffled = np.random.default_rng([order, epoch]).permutation(len(self.pieces))
      for group in range(-(-len(shuffled) // TOGETHER)):
        if (epoch, group) < begin[:2]:
          continue
        together = [self.pieces[i] for i in shuffled[group * TOGETHER :][:TOGETHER]]
        for i, texts in enumerate(self._cut(together)):
          place = Place(epoch, group, i)
          if place >= begin and next(numbers) % part[1] == 0:
            yield self._window(place, order, texts)

  def first(self, n: int) -> Picked:
    """Returns the first n rows of an epoch, all of them if there are fewer.

    Raises:
      ConfigError: There is none.
    """
    count = lambda: sum(len(window.order) for window in self.kept)
    if count() < n:
      last = self.kept[-1].place if self.kept else Place(0, 0, -1)
      for window in self.windows(0, last._replace(window=last.window + 1)):
        if window.place.epoch:
          break
        self.kept.append(window)
        if count() >= n:
          break
    if not count():
      raise self.error
    rows = [(window.rows, int(i)) for window in self.kept for i in window.order]
    return Picked(rows[:n])

  @functools.cached_property
  def kept(self) -> list[Window]:
    """The windows that `first` has read."""
    return []

  def about(self) -> dict[str, Any]:
    """Returns what `packing.about` says of the first window that has rows, and what was left out."""
    self.first(1)
    window = next(window for window in self.kept if window.rows)
    counts = {name: sum(window.counts[name] for window in self.kept) for name in LEFT_OUT}
    return packing_lib.about(window.rows) | {'left_out': counts, 'is_sample': True}

  @property
  def error(self) -> ConfigError:
    """What to raise where a whole epoch has no row."""
    share, packing = self.validation_share, self.packing
    return ConfigError(
        f'{self.source.files} has no document of two tokens or more for {self.split}: '
        f'data.validation_share={share}, min_tokens={packing.min_tokens}, '
        f'max_tokens={packing.max_tokens}, {packing.packing=}. Give more or longer documents, another '
        'share, or validation files of their own.'
    )

  def _cut(self, pieces: Sequence[Piece]) -> Iterator['_Texts']:
    """Yields the documents of pieces that are read together, at least once."""
    texts, size = _Texts([], [], collections.Counter()), 0
    documents = _in_turn([self.source.documents(piece) for piece in pieces])
    for document, is_own in self._with_sides(documents):
      if isinstance(document, Damaged):
        texts.counts['damaged'] += 1
        texts.damaged[:] = texts.damaged or [document]
      elif not document:
        texts.counts['empty'] += 1
      elif is_own:
        texts.documents.append(document)
        size += len(document)
      if size >= self.window_bytes:
        yield texts
        texts, size = _Texts([], [], collections.Counter()), 0
    yield texts

  def _with_sides(self, documents: Iterator[Document]) -> Iterator[tuple[Document, bool]]:
    """Yields documents, each with whether it is of the split."""
    if self.validation_share is None:
      yield from zip(documents, itertools.repeat(True))
    while some := list(itertools.islice(documents, AT_ONCE)):
      hashes = [0 if isinstance(x, Damaged) else hash_of(x) for x in some]
      hashes = np.array(hashes, np.uint64)
      yield from zip(some, is_on_side(hashes, self.split, self.validation_share, self.seed))

  def _window(self, place: Place, order: int, texts: '_Texts') -> Window:
    """Tokenizes and packs documents."""
    if texts.damaged and self.damaged == 'stop':
      tokenizing.refuse(texts.damaged[0])
    tokenizer = tokenizing.open_same(self.tokenizer, self.special_tokens, self.digest)
    parts = tokenizing.in_batches(texts.documents)
    ids = [x for part, *_ in parts for x in tokenizer.encode_documents(part)]
    stream = _InMemory(ids, texts.documents)
    lengths = stream.about['tokens']
    documents = np.flatnonzero(fits(lengths, self.packing))
    texts.counts.update(documents=len(lengths), length=len(lengths) - len(documents))
    documents = repeat_long(documents, lengths, self.split, self.packing)
    rows = None
    if len(documents) and lengths[documents].max() >= 2:
      rows = Rows(stream, documents, self.seq_len, self.packing.packing)
    shuffled = np.random.default_rng([order, *place]).permutation(len(rows) if rows else 0)
    return Window(place, rows, shuffled, texts.counts, next(iter(texts.damaged), None))


def describe_raw(source: RawFormat, pieces: Sequence[Piece], tokenizer: Tokenizer) -> str:
  """Returns what tells other files or another tokenizer, by the size, the ends and some blocks of each file.

  Descriptions of earlier versions end before the blocks.
  """
  names = dict.fromkeys(name for piece in pieces for name in piece.names)
  fields = dataclasses.asdict(source) | {'files': [places.ends_of(name) for name in names]}
  known = json.dumps([type(source).__name__, fields, tokenizer.digest])
  blocks = json.dumps([places.middle_of(name) for name in names])
  digests = [hashlib.sha256(text.encode()).hexdigest()[:24] for text in (known, blocks)]
  return f'files: {len(names)}, {digests[0]}, with blocks {digests[1]}'


class _Texts(NamedTuple):
  """The documents of a window."""

  documents: list[bytes]  # Those of the split.
  damaged: list[Damaged]  # The first one, if there is one.
  counts: collections.Counter[str]


class _InMemory(TokenStream):
  """Documents of a window, one after another."""

  def __init__(self, ids: Sequence[np.ndarray], texts: Sequence[bytes]):
    self.about = describe(ids, texts)
    self._tokens = np.concatenate([np.empty(0, np.uint32), *ids])

  def read(self, first: int, n: int) -> np.ndarray:
    return self._tokens[first : first + n]


def _in_turn(iterators: list[Iterator[Document]]) -> Iterator[Document]:
  """Yields a document of each iterator, again and again, until all have ended."""
  while iterators:
    for documents in list(iterators):
      if (document := next(documents, None)) is None:
        iterators.remove(documents)
      else:
        yield document
