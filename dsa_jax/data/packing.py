# SPDX-License-Identifier: Apache-2.0
"""Packs documents into rows, which are read from a stream of tokens when they are asked for."""

import bisect
from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.data.batch import Batch
from dsa_jax.data.corpora.tokens import TokenStream
from dsa_jax.data.seeds import check_seed

PACKINGS = ('concat', 'best_fit', 'full')
WINDOW = 8192  # Pieces that are packed among each other.
LOOKED_AT = 1000  # Rows.
AT_ONCE = 2**20  # Documents that are looked at at one time.
DECODED = 2**22  # Tokens of a document that is decoded to see which part has how much text.


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingConfig:
  """Which documents are read, and how they share rows."""

  # 'concat' lays documents end to end and cuts the stream into rows. 'best_fit' cuts only documents
  # that are longer than a row, and puts the others together so that little space is left. 'full'
  # reads each row from one document, so every query sees as far as its row reaches, and leaves out
  # what fills no row: shorter documents, and the ends of longer ones.
  packing: str = 'concat'
  min_tokens: int = 0  # Shorter documents are left out.
  max_tokens: int = 0  # Longer documents are left out; 0 sets no limit.
  long_tokens: int = 0  # Documents of so many tokens or more are long.
  long_times: int = 1  # How often an epoch reads each long document.

  def __post_init__(self):
    if self.packing not in PACKINGS:
      raise ConfigError(f'packing={self.packing!r} must be one of {PACKINGS}.')
    for name in ('min_tokens', 'max_tokens', 'long_tokens'):
      if getattr(self, name) < 0:
        raise ConfigError(f'{name}={getattr(self, name)} must not be negative.')
    if self.long_times < 1:
      raise ConfigError(f'long_times={self.long_times} must be at least 1.')
    if self.max_tokens and self.max_tokens < self.min_tokens:
      raise ConfigError(f'{self.max_tokens=} must not be below {self.min_tokens=}.')

  def of_rows(self, seq_len: int) -> 'PackingConfig':
    """Returns which documents rows of `seq_len` tokens are made of."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(PackingConfig)}
    if self.packing == 'full':
      if 0 < self.max_tokens < seq_len:
        raise ConfigError(
            f"packing='full' fills each row of {seq_len} tokens from one document, but "
            f'max_tokens={self.max_tokens} leaves all such documents out.'
        )
      fields['min_tokens'] = max(self.min_tokens, seq_len)
    return PackingConfig(**fields)


class Pieces(NamedTuple):
  """Parts of documents that share a row, in their order."""

  at: np.ndarray  # Where each begins in the stream.
  n: np.ndarray  # Its tokens.
  goes_on: bool  # Whether the last one's document has more tokens.


class Rows:
  """A random-access source of rows of tokens.

  Documents of a row do not see each other. A document that is cut goes on in another row as a new
  one, and no target is lost: that of the last token before a cut is the first one after it. The last
  token of a document has no target. 'full' leaves out what fills no row, and cuts nothing else.
  """

  def __init__(self, stream: TokenStream, documents: np.ndarray, seq_len: int, packing: str):
    """Packs documents.

    Args:
      stream: What holds them.
      documents: The numbers of those to read, in their order.
      seq_len: Tokens of a row.
      packing: One of `PACKINGS`.
    """
    if seq_len < 2:
      raise ConfigError(f'{seq_len=} must be at least 2: one token and its target.')
    self.seq_len, self.stream = seq_len, stream
    lengths = stream.about['tokens'].astype(np.int64)
    first = np.cumsum(lengths)
    first -= lengths
    first, self.lengths = first[documents], lengths[documents]  # Of the documents.
    del lengths  # Of millions of documents, each such array counts.
    layout = {'concat': Concat, 'best_fit': BestFit, 'full': Full}[packing]
    self.layout = layout(first, self.lengths, seq_len)

  def __len__(self) -> int:
    return self.layout.n_rows

  def __getitem__(self, i: int) -> Batch:
    if not 0 <= i < len(self):
      raise IndexError(f'row {i} of {len(self)}')
    return self._fill(self.layout.pieces(i))

  def text_of(
      self, rows: Sequence[int], decode: Callable[[list[int]], str] | None = None
  ) -> tuple[float, int]:
    """Returns the bytes of text that the targets of rows stand for, and the number of targets.

    Args:
      rows: The numbers of the rows.
      decode: Returns the text of ids, by whose length a part of a document gets its share of the
        document's bytes. Without it, and in a document of more than `DECODED` tokens, all targets have
        the same share.

    Returns:
      The bytes, NaN where those of a document are not known; and the number of targets.
    """
    pieces = [self.layout.pieces(i) for i in rows]
    at, n_targets = np.concatenate([x.at for x in pieces]), np.concatenate([x.n for x in pieces]) - 1
    n_targets[np.cumsum([len(x.n) for x in pieces]) - 1] += [x.goes_on for x in pieces]
    at, n_targets = at[n_targets > 0], n_targets[n_targets > 0]
    tokens = self.stream.about['tokens'].astype(np.int64)
    ends = np.cumsum(tokens)
    documents = np.searchsorted(ends, at, side='right')
    n_bytes, tokens, ends = self.stream.about['bytes'][documents], tokens[documents], ends[documents]
    if not n_bytes.all():
      return math.nan, int(n_targets.sum())
    read = lambda begin, end: self.stream.read(int(begin), int(end - begin)).tolist()
    # Decoders write U+FFFD for each byte of a character that is cut.
    size = lambda begin, end: len(decode(read(begin, end)).replace('\ufffd', '?').encode())
    of_whole = functools.cache(lambda n, end: size(end - n + 1, end))
    shares = n_targets / (tokens - 1)
    for i in np.flatnonzero((shares < 1) & (tokens <= DECODED)) if decode else ():
      if whole := of_whole(tokens[i], ends[i]):
        shares[i] = size(at[i] + 1, at[i] + 1 + n_targets[i]) / whole
    return float(np.sum(shares * n_bytes)), int(n_targets.sum())

  def _fill(self, pieces: Pieces) -> Batch:
    n = int(pieces.n.sum())
    window = np.zeros(self.seq_len + 1, np.int32)
    window[: n + 1] = self._read(pieces)
    position = np.arange(self.seq_len, dtype=np.int32)
    ends = np.cumsum(pieces.n)
    start = position.copy()
    start[:n] = np.repeat((ends - pieces.n).astype(np.int32), pieces.n)
    weights = np.zeros(self.seq_len, np.float32)
    weights[:n] = 1
    weights[(ends if not pieces.goes_on else ends[:-1]) - 1] = 0
    end = position.copy()
    end[:n] += 1
    targets = np.where(weights > 0, window[1:], 0)
    return Batch(window[:-1], targets, weights, start, end)

  def _read(self, pieces: Pieces) -> np.ndarray:
    """Reads the tokens of pieces, and the one behind the last, 0 where its document has ended."""
    begins = np.append(True, pieces.at[1:] != pieces.at[:-1] + pieces.n[:-1])
    first = np.flatnonzero(begins)
    n = np.add.reduceat(pieces.n, first)
    n[-1] += pieces.goes_on
    parts = [self.stream.read(int(at), int(k)) for at, k in zip(pieces.at[first], n)]
    return np.concatenate([*parts, np.zeros(0 if pieces.goes_on else 1, np.int32)])


class Concat:
  """Documents end to end, cut every `seq_len` tokens."""

  def __init__(self, first: np.ndarray, lengths: np.ndarray, seq_len: int):
    self._first, self._seq_len, self._ends = first, seq_len, np.cumsum(lengths)
    self.n_cut = 0
    for i in range(0, len(lengths), AT_ONCE):
      ends, n = self._ends[i : i + AT_ONCE], lengths[i : i + AT_ONCE]
      self.n_cut += int(np.sum((ends - n) // seq_len != (ends - 1) // seq_len))
    self.n_tokens = int(self._ends[-1])
    self.n_rows = -(-self.n_tokens // seq_len)

  def pieces(self, i: int) -> Pieces:
    begin = i * self._seq_len
    end = min(begin + self._seq_len, self.n_tokens)
    a = int(np.searchsorted(self._ends, begin, side='right'))
    b = int(np.searchsorted(self._ends, end, side='left')) + 1
    ends = self._ends[a:b]
    begins = np.append(self._ends[a - 1] if a else 0, ends[:-1])
    inside = np.maximum(begin - begins, 0)
    n = np.minimum(ends, end) - np.maximum(begins, begin)
    return Pieces(self._first[a:b] + inside, n, bool(ends[-1] > end))


class BestFit:
  """Rows of long documents, cut; then the rest, the longest first, each where least space is left."""

  def __init__(self, first: np.ndarray, lengths: np.ndarray, seq_len: int):
    self.n_cut = int(np.sum(lengths > seq_len))
    at, n, sizes, goes_on = [], [], [], []  # An array of each window; lists would take far more.
    for i in range(0, len(first), WINDOW):
      rows = _pack(first[i : i + WINDOW], lengths[i : i + WINDOW], seq_len)
      pieces = np.array([(x, k) for row in rows for x, k, _ in row], np.int64)
      at.append(pieces[:, 0])
      n.append(pieces[:, 1])
      sizes.append(np.array([len(row) for row in rows]))
      goes_on.append(np.array([row[-1][2] for row in rows]))
    self._at, self._n, self._goes_on = map(np.concatenate, (at, n, goes_on))
    self._rows = np.append(0, np.cumsum(np.concatenate(sizes)))
    self.n_rows, self.n_tokens = len(self._goes_on), int(self._n.sum())

  def pieces(self, i: int) -> Pieces:
    own = slice(self._rows[i], self._rows[i + 1])
    return Pieces(self._at[own], self._n[own], bool(self._goes_on[i]))


class Full:
  """Rows that one document fills each, in the order of the documents."""

  def __init__(self, first: np.ndarray, lengths: np.ndarray, seq_len: int):
    n = lengths // seq_len
    self._at = np.repeat(first - seq_len * (np.cumsum(n) - n), n) + seq_len * np.arange(n.sum())
    self._goes_on = self._at + seq_len < np.repeat(first + lengths, n)
    self._seq_len, self.n_rows, self.n_tokens = seq_len, len(self._at), len(self._at) * seq_len
    self.n_cut = int(np.sum(lengths > seq_len))

  def pieces(self, i: int) -> Pieces:
    return Pieces(self._at[i : i + 1], np.array([self._seq_len]), bool(self._goes_on[i]))


def _pack(first: np.ndarray, lengths: np.ndarray, seq_len: int) -> list[list[tuple[int, int, bool]]]:
  """Returns rows of (place, tokens, whether the document goes on)."""
  rows, rest = [], []
  for at, n in zip(first.tolist(), lengths.tolist()):
    while n > seq_len:
      rows.append([(at, seq_len, True)])
      at, n = at + seq_len, n - seq_len
    rest.append((n, at))
  open_rows = []  # (space, row), by space.
  for n, at in sorted(rest, key=lambda piece: (-piece[0], piece[1])):
    i = bisect.bisect_left(open_rows, (n,))
    if i < len(open_rows):
      space, row = open_rows.pop(i)
    else:
      space, row = seq_len, len(rows)
      rows.append([])
    rows[row].append((at, n, False))
    if space > n:
      bisect.insort(open_rows, (space - n, row))
  return rows


def choose(
    stream: TokenStream, split: str, validation_share: float | None, seed: int, packing: PackingConfig
) -> np.ndarray:
  """Returns the numbers of the documents of a split, in their order.

  A document's side depends on its content and the seed alone, so it stays as a corpus grows, and
  copies of a document are on the same side.

  Args:
    stream: What holds the documents.
    split: 'train' or 'validation'.
    validation_share: The share of the documents to expect in validation; None if all the documents
      are of the split.
    seed: Determines the split.
    packing: Which documents are left out, or are read more than once in training.

  Raises:
    ConfigError: No document is left, or none has a token to predict.
  """
  check_seed(seed)
  lengths = stream.about['tokens']
  on_side = is_on_side(stream.about['hash'], split, validation_share, seed)
  documents = np.flatnonzero(fits(lengths, packing) & on_side)
  if not len(documents) or lengths[documents].max() < 2:
    which = 'document of two tokens or more' if len(documents) else 'document'
    raise ConfigError(
        f'{stream.place} has no {which} for {split}, of {len(lengths)}: data.{validation_share=}, '
        f'min_tokens={packing.min_tokens}, max_tokens={packing.max_tokens}, {packing.packing=}. Give '
        'more or longer documents, another share, or validation files of their own.'
    )
  return repeat_long(documents, lengths, split, packing)


def count_left_out(
    stream: TokenStream, split: str, validation_share: float | None, seed: int, packing: PackingConfig
) -> int:
  """Returns how many documents `choose` leaves out for their length."""
  lengths = stream.about['tokens']
  unfit = (lengths > 0) & ~fits(lengths, packing)
  return int(np.sum(unfit & is_on_side(stream.about['hash'], split, validation_share, seed)))


def fits(lengths: np.ndarray, packing: PackingConfig) -> np.ndarray:
  """Returns which documents are as long as they must be."""
  fit = lengths >= max(packing.min_tokens, 1)
  return fit & (lengths <= packing.max_tokens) if packing.max_tokens else fit


def is_on_side(
    hashes: np.ndarray, split: str, validation_share: float | None, seed: int
) -> np.ndarray:
  """Returns which documents are of a split; see `choose`."""
  if validation_share is None:
    return np.ones(len(hashes), bool)
  sides = np.empty(len(hashes), bool)
  for i in range(0, len(hashes), AT_ONCE):  # Ranks of all would take far more than their sides.
    sides[i : i + AT_ONCE] = _ranks(hashes[i : i + AT_ONCE], seed) < validation_share
  return sides == (split == 'validation')


def repeat_long(
    documents: np.ndarray, lengths: np.ndarray, split: str, packing: PackingConfig
) -> np.ndarray:
  """Returns the numbers of documents, those of long ones as often as training reads them."""
  if packing.long_times == 1 or split == 'validation':
    return documents
  long = documents[lengths[documents] >= packing.long_tokens]
  return np.concatenate([documents] + [long] * (packing.long_times - 1))


def about(rows: Rows) -> dict[str, Any]:
  """Returns how long the documents of rows are, how many are cut, and what queries see.

  `lengths[i]` counts documents of 2**i tokens or more, but less than 2**(i + 1), and `context[i]` is
  the share of queries that see so many tokens, themselves included. The latter, and how far rows are
  filled, is that of up to `LOOKED_AT` rows.
  """
  sample = np.linspace(0, len(rows) - 1, min(len(rows), LOOKED_AT)).astype(int)
  pieces = np.concatenate([rows.layout.pieces(int(i)).n for i in sample])
  low = 2 ** np.arange(rows.seq_len.bit_length())
  seen = np.maximum(np.minimum(pieces[:, None], 2 * low - 1) - low + 1, 0).sum(axis=0)
  return {
      'documents': len(rows.lengths),
      'tokens': rows.layout.n_tokens,
      'rows': len(rows),
      'cut': rows.layout.n_cut,
      'filled': float(pieces.sum() / (len(sample) * rows.seq_len)),
      'lengths': np.bincount(np.log2(rows.lengths).astype(int)).tolist(),
      'context': (seen / seen.sum()).tolist(),
  }


def _ranks(hashes: np.ndarray, seed: int) -> np.ndarray:
  """Returns numbers in [0, 1) that look random, of hashes and a seed."""
  x = hashes.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15 * (seed + 1) % 2**64)
  for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
    x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
  return (x ^ (x >> np.uint64(31))) / 2.0**64
