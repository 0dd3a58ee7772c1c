# SPDX-License-Identifier: Apache-2.0
"""Documents as one stream of token ids, read from memory-mapped or random-access files."""

import abc
import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import hashlib
import json
import os
import pathlib
import resource
import struct
from typing import Any
import uuid

import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.data.corpora.files import is_compressed
from dsa_jax.data.formats import kind_of

MANIFEST = 'manifest.json'
DOCUMENTS = 'documents.npy'
VERSION = 1
RECORD = 8192  # Tokens of a record.
SCANNED = 2**24  # Tokens that are looked at at one time.
OF_LLM_C = 20240520, 20240801  # Numbers that begin its files of two and of four bytes an id.
PACKED = '.lz4', '.npz', '.zip'  # Endings of files without bare ids, beside those of `is_compressed`.
MAGIC_BYTES = 6  # First bytes that tell a format. Fewer may be ids, such as 93 for lzma.
# What is known of a document: its tokens, the bytes of its text, and a hash of its content.
ABOUT = np.dtype([('tokens', '<u8'), ('bytes', '<u8'), ('hash', '<u8')])


class TokenStream(abc.ABC):
  """Documents end to end, and what is known of each."""

  about: np.ndarray  # Of type ABOUT, a record for each document, in their order. Memory-mapped.
  vocab_size: int  # One more than the highest id.
  tokenizer: str  # The digest of the tokenizer, '' if it is not known.
  place: str
  left_out: collections.Counter[str]  # Documents that were not written, by reason.

  @abc.abstractmethod
  def read(self, first: int, n: int) -> np.ndarray:
    """Returns n tokens from a place of the stream."""

  def digest(self) -> str:
    """Returns a description that tells other content or another order, without reading the tokens.

    Those of earlier versions end before the order.
    """
    sums = [int(np.sum(self.about[name], dtype=np.uint64)) for name in ABOUT.names]
    order = hashlib.blake2b(self.tokenizer.encode(), digest_size=8)
    for i in range(0, len(self.about), SCANNED):
      order.update(self.about[i : i + SCANNED].tobytes())
    text = f'{len(self.about)} documents, {sums[0]} tokens, {sums[2]:016x}'
    return f'{text}, in the order {order.hexdigest()}'


class TokenFolder(TokenStream):
  """A folder that `tokenizing.tokenize` wrote: ArrayRecord files, and an index of documents."""

  def __init__(self, folder: str | pathlib.Path):
    """Opens the folder.

    Raises:
      ConfigError: It is none, or a file of it is not what its manifest says.
    """
    self.place = str(folder)
    folder = pathlib.Path(folder).expanduser()
    manifest = read_manifest(folder)
    try:
      self._dtype = np.dtype(manifest['dtype'])
      self.vocab_size, self.tokenizer = manifest['vocab_size'], manifest['tokenizer']
      self.left_out = collections.Counter({name: manifest[name] for name in ('empty', 'damaged')})
      self._parts = [_whole(folder / part['file'], part['size']) for part in manifest['parts']]
      self._starts = np.cumsum([0] + [part['tokens'] for part in manifest['parts']])
      told = manifest['documents'], int(self._starts[-1])
    except (KeyError, TypeError) as error:
      raise ConfigError(f'{folder / MANIFEST} is damaged: {type(error).__name__} {error}.') from error
    self.about = _mapped(folder / DOCUMENTS)
    known = len(self.about), int(np.sum(self.about['tokens'], dtype=np.uint64))
    if known != told:
      raise ConfigError(
          f'{folder / DOCUMENTS} knows {known[0]} documents of {known[1]} tokens, the manifest '
          f'{told[0]} of {told[1]}: they do not belong together.'
      )

  def read(self, first: int, n: int) -> np.ndarray:
    return read_across(self._starts, self._read_part, first, n)

  def _read_part(self, i: int, first: int, n: int) -> np.ndarray:
    try:
      records = _reader(*self._parts[i]).read(first // RECORD, -(-(first + n) // RECORD))
    except (RuntimeError, IndexError) as error:  # The library's.
      raise ConfigError(f'{self._parts[i][0]} is damaged: {error}. Tokenize or copy it again.') from error
    tokens = np.frombuffer(b''.join(records), self._dtype)
    return tokens[first % RECORD : first % RECORD + n]


def read_across(
    starts: np.ndarray, read: Callable[[int, int, int], np.ndarray], first: int, n: int
) -> np.ndarray:
  """Returns n tokens of streams that lie end to end.

  Args:
    starts: Where each stream begins, and where the last one ends.
    read: Returns tokens of a stream, given its number, a place in it, and how many to read.
    first: Where the tokens begin.
    n: How many there are.
  """
  parts = []
  while n:
    i = int(np.searchsorted(starts, first, side='right')) - 1
    taken = min(n, int(starts[i + 1]) - first)
    parts.append(read(i, first - int(starts[i]), taken))
    first, n = first + taken, n - taken
  return np.concatenate(parts) if parts else np.empty(0, np.uint16)


def _whole(path: pathlib.Path, size: int) -> tuple[str, int]:
  """Returns a part's path, and a number that a part in its place later would not have."""
  about = path.stat() if path.is_file() else None
  if about is None or about.st_size != size:
    has = about.st_size if about else None
    raise ConfigError(f'{path} has {has} bytes and must have {size}: the copy is not whole.')
  return str(path), about.st_mtime_ns


# A corpus of terabytes has more parts than a process may have open files.
@functools.lru_cache(max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, 16))
def _reader(path: str, changed: int) -> Any:
  """Opens a part. When it was last changed tells it from another one of that name."""
  from array_record.python import array_record_module

  options = 'readahead_buffer_size:0'  # Rows are read in no order.
  return array_record_module.ArrayRecordReader(path, options)


class FlatTokens(TokenStream):
  """A flat file of token ids, in which one id separates documents."""

  def __init__(self, name: str, dtype: str, separator: int, index: pathlib.Path):
    """Opens the file, and finds its documents if nobody has.

    Args:
      name: A `.npy` of one dimension, or any other file of nothing but ids.
      dtype: Of the ids of a file that is no `.npy`: uint16 or uint32.
      separator: The id that ends every document, and belongs to it.
      index: Where to keep what is known of the documents.
    """
    self.place, self.tokenizer, self.left_out = name, '', collections.Counter()
    self._tokens = _flat(name, dtype)
    if not name.endswith('.npy'):
      _check_width(name, self._tokens, dtype)
    if not index.exists():
      save(index, _scan(self._tokens, separator))
    self.about = _mapped(index)
    self.vocab_size = _check_ids(name, self._tokens, index.with_suffix('.ids.json')) + 1

  def read(self, first: int, n: int) -> np.ndarray:
    return self._tokens[first : first + n]


class MegatronTokens(TokenStream):
  """A pair of files of Megatron's indexed datasets, `NAME.bin` and `NAME.idx`.

  Source:
    megatron/core/datasets/indexed_dataset.py in NVIDIA/Megatron-LM.
  """

  MAGIC = b'MMIDIDX\x00\x00'
  DTYPES = {1: 'u1', 2: 'i1', 3: '<i2', 4: '<i4', 5: '<i8', 8: '<u2'}

  def __init__(self, prefix: str, index: pathlib.Path):
    """Opens the files.

    Args:
      prefix: Their path without the ending.
      index: Where to keep what is known of the documents.
    """
    self.place, self.tokenizer = prefix, ''
    lengths, documents, dtype = self._read_index(pathlib.Path(prefix + '.idx'))
    self._tokens = _flat(prefix + '.bin', dtype, is_known=True)  # The index knows how long it is.
    if len(self._tokens) != int(lengths.sum()):
      raise ConfigError(
          f'{prefix}.bin has {len(self._tokens)} tokens, {prefix}.idx says {int(lengths.sum())}: '
          'they do not belong together, or one is not whole.'
      )
    if not index.exists():
      ends = np.cumsum(np.append(0, lengths))[documents]
      save(index, _describe(self._tokens, np.diff(ends)))
    self.about = _mapped(index)
    self.left_out = collections.Counter(empty=int(np.sum(self.about['tokens'] == 0)))
    self.vocab_size = _check_ids(prefix, self._tokens, index.with_suffix('.ids.json')) + 1

  def _read_index(self, path: pathlib.Path):
    content = path.read_bytes() if path.is_file() else b''
    if content[:9] != self.MAGIC:
      raise ConfigError(f"{path} is no index of Megatron's: it does not begin with {self.MAGIC!r}.")
    version, code, n, n_documents = struct.unpack('<QBQQ', content[9:34].ljust(25, b'\0'))
    size = 34 + 12 * n + 8 * n_documents  # Lengths, pointers, documents; maybe modes behind them.
    if version != 1 or code not in self.DTYPES or len(content) < size:
      raise ConfigError(
          f'{path} is not whole, or of a version that is not known: {version=}, {code=}, '
          f'{len(content)} bytes for {n} sequences of {n_documents} documents.'
      )
    lengths = np.frombuffer(content, '<i4', n, 34).astype(np.int64)
    pointers = np.frombuffer(content, '<i8', n, 34 + 4 * n)
    documents = np.frombuffer(content, '<i8', n_documents, 34 + 12 * n)
    if not n_documents or documents[0] or documents[-1] != n or np.any(np.diff(documents) < 0):
      raise ConfigError(f'{path} is damaged: its documents do not divide its {n} sequences.')
    begins = (np.cumsum(lengths) - lengths) * np.dtype(self.DTYPES[code]).itemsize
    if np.any(lengths < 0) or np.any(pointers != begins):
      raise ConfigError(f'{path} is damaged: its sequences do not lie one behind the other.')
    return lengths, documents, self.DTYPES[code]

  def read(self, first: int, n: int) -> np.ndarray:
    return self._tokens[first : first + n]


def write_part(path: pathlib.Path, documents: Iterable[np.ndarray], dtype: str) -> int:
  """Writes the tokens of documents, as they come, as one ArrayRecord file, and returns its size.

  Raises:
    OSError: The file could not be written to its end.
  """
  from array_record.python import array_record_module

  fresh = _fresh(path)  # A process of a job that was killed may still be writing.
  try:
    writer = array_record_module.ArrayRecordWriter(str(fresh), 'group_size:1,uncompressed')
    for record in _records(documents, dtype):
      writer.write(record.tobytes())
    writer.close()
    os.replace(fresh, path)
  except RuntimeError as error:  # The library's, as where the disk is full.
    raise OSError(f'{path} could not be written: {error}') from error
  finally:
    fresh.unlink(missing_ok=True)
  return path.stat().st_size


def _records(documents: Iterable[np.ndarray], dtype: str) -> Iterator[np.ndarray]:
  """Yields the tokens of documents, `RECORD` at a time."""
  waiting, n, most = [], 0, np.iinfo(dtype).max
  for document in documents:
    if document.max(initial=0) > most:
      raise ConfigError(f'the tokenizer gave a document the id {document.max()}, which exceeds its own highest one.')
    waiting.append(document.astype(dtype))
    n += len(document)
    if n >= RECORD:
      stream, whole = np.concatenate(waiting), n // RECORD * RECORD
      yield from np.split(stream[:whole], n // RECORD)
      waiting, n = [stream[whole:]], n - whole
  if n:
    yield np.concatenate(waiting)


def describe(tokens: Sequence[np.ndarray], texts: Sequence[bytes]) -> np.ndarray:
  """Returns what is known of documents, whose hash is that of their text."""
  rows = [(len(t), len(x), hash_of(x)) for t, x in zip(tokens, texts, strict=True)]
  return np.array(rows, ABOUT)


def hash_of(content: bytes) -> int:
  return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), 'little')


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the manifest of a folder of tokens.

  Raises:
    ConfigError: The folder has none, or one of another version.
  """
  try:
    manifest = json.loads((folder / MANIFEST).read_text())
    version = manifest['version']
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ConfigError(
        f'{folder} is no folder of tokens: {type(error).__name__} {error}. Make one: '
        'python -m dsa_jax.tokenize --files=... --tokenizer=... FOLDER'
    ) from error
  if version != VERSION:
    raise ConfigError(f'{folder / MANIFEST} is of version {version}; this is {VERSION}.')
  return manifest


class _Ids:
  """The ids of a file, whose slices are read when they are asked for.

  Mapped pages would stay in memory, and count as this process's, until the machine is short of it.
  """

  def __init__(self, mapped: np.memmap):
    self._path, self._offset = mapped.filename, mapped.offset
    self.dtype, self._n = mapped.dtype, len(mapped)

  def __len__(self) -> int:
    return self._n

  def __getitem__(self, part: slice) -> np.ndarray:
    first, end, _ = part.indices(self._n)
    offset = self._offset + first * self.dtype.itemsize
    ids = np.fromfile(self._path, self.dtype, max(end - first, 0), offset=offset)
    if len(ids) < end - first:
      raise ConfigError(f'{self._path} has become shorter while it was read.')
    return ids


def _check_ids(place: str, tokens: _Ids, kept: pathlib.Path) -> int:
  """Returns the highest id of a file, all of whose ids are looked at once.

  Raises:
    ConfigError: An id is negative, or no model's.
  """
  if not kept.exists():
    low, high = np.iinfo(np.int64).max, 0
    for first in range(0, len(tokens), SCANNED):  # One part after another: memory holds no file.
      part = tokens[first : first + SCANNED]
      low, high = min(low, int(part.min())), max(high, int(part.max()))
    write_whole(kept, json.dumps([low, high]))
  low, high = json.loads(kept.read_text())
  if low < 0 or high >= 2**31:
    raise ConfigError(f'{place} has ids from {low} to {high}; ids are 0 or more, and below {2**31}.')
  return high


def _flat(name: str, dtype: str, *, is_known: bool = False) -> _Ids:
  """Opens the ids of a file, which may be of another kind unless it is known."""
  try:
    if not is_known:
      _check_kind(name)
    if name.endswith('.npy'):
      tokens = np.load(name, mmap_mode='r')
    else:
      tokens = np.memmap(name, dtype, 'r')
  except ConfigError:
    raise
  except (OSError, ValueError) as error:
    raise ConfigError(f'{name} could not be read as token ids: {error}') from error
  if tokens.ndim != 1 or tokens.dtype.kind not in 'ui' or not len(tokens):
    raise ConfigError(f'{name} must hold ids in one dimension; it holds {tokens.dtype} {tokens.shape}.')
  return _Ids(tokens)


def _check_width(name: str, tokens: _Ids, dtype: str):
  """Raises ConfigError if ids look like parts of wider ones, which nothing else tells."""
  some = tokens[:SCANNED]
  odd = some[1::2]
  most = {'uint16': 15, 'uint32': 0}[dtype]  # The upper half of an id of four bytes, and of eight.
  if len(tokens) % 2 or len(some) < 16 or not odd.max() <= most < some[::2].max():
    return
  if dtype == 'uint16' and (odd[1::2].any() or some[2::4].any()):
    raise ConfigError(
        f"{name} looks like ids of four bytes: every second of two bytes is below 16. Set dtype='uint32'."
    )
  raise ConfigError(f'{name} looks like ids of eight bytes, most of which are 0: save them as .npy, or as uint32.')


def _check_kind(name: str):
  """Raises ConfigError if a file holds neither bare ids nor an array."""
  if name.endswith('.npy'):
    return
  with open(name, 'rb') as file:
    head = file.read(64)
  if int.from_bytes(head[:4], 'little') in OF_LLM_C:
    raise ConfigError(f'{name} has the header of llm.c: strip it, its first 1,024 bytes are no ids.')
  kind = kind_of(head, MAGIC_BYTES)
  if not kind and (is_compressed(name) or name.endswith(PACKED)):
    kind = 'compressed'
  if kind:
    raise ConfigError(f'{name} is no bare file of ids, but {kind}: unpack it, or give an array as .npy.')


def _scan(tokens: _Ids, separator: int) -> np.ndarray:
  """Finds documents that end with a separator."""
  ends = []
  for first in range(0, len(tokens), SCANNED):
    ends.append(first + 1 + np.flatnonzero(tokens[first : first + SCANNED] == separator))
  ends = np.concatenate(ends)
  if not len(ends):
    raise ConfigError(f'{separator=} stands nowhere in {len(tokens)} tokens: give the id of the file.')
  if ends[-1] < len(tokens):
    ends = np.append(ends, len(tokens))
  return _describe(tokens, np.diff(ends, prepend=0))


def _describe(tokens: _Ids, lengths: np.ndarray) -> np.ndarray:
  about = np.zeros(len(lengths), ABOUT)
  about['tokens'] = lengths
  ends = np.cumsum(lengths)
  i = 0
  while i < len(lengths):  # Reads many documents at one time.
    first = ends[i] - lengths[i]
    after = int(np.searchsorted(ends, first + SCANNED, 'right'))
    if after <= i:
      about['hash'][i] = _hash_of_long(tokens, int(first), int(ends[i]))
      i += 1
      continue
    ids = tokens[first : ends[after - 1]].astype(np.uint32)
    for j in range(i, after):
      about['hash'][j] = hash_of(ids[ends[j] - lengths[j] - first : ends[j] - first].tobytes())
    i = after
  return about


def _hash_of_long(tokens: _Ids, first: int, end: int) -> int:
  """Returns the hash of a document that memory need not hold."""
  digest = hashlib.blake2b(digest_size=8)
  for at in range(first, end, SCANNED):
    digest.update(tokens[at : min(at + SCANNED, end)].astype(np.uint32).tobytes())
  return int.from_bytes(digest.digest(), 'little')


def write_whole(path: pathlib.Path, text: str):
  """Writes a file that is there as a whole or not at all."""
  fresh = _fresh(path)
  fresh.write_text(text)
  os.replace(fresh, path)


def save(path: pathlib.Path, array: np.ndarray):
  """Writes an array that is there as a whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  fresh = _fresh(path)
  with open(fresh, 'wb') as file:
    np.save(file, array)
  os.replace(fresh, path)


def _fresh(path: pathlib.Path) -> pathlib.Path:
  """Returns a name beside a path that no other process uses."""
  return path.with_name(f'{path.name}.{uuid.uuid4().hex[:12]}')  # Containers have the same process ids.


def _mapped(path: pathlib.Path) -> np.ndarray:
  try:
    about = np.load(path, mmap_mode='r')
  except (OSError, ValueError) as error:
    raise ConfigError(f'{path} is damaged: {error}') from error
  if about.dtype != ABOUT:
    raise ConfigError(f'{path} must hold {ABOUT}; it holds {about.dtype}.')
  return about
