# SPDX-License-Identifier: Apache-2.0
"""Formats that hold documents as text. Each cuts its files into pieces, which processes share."""

import codecs
from collections.abc import Iterator
import dataclasses
import itertools
import json
import pathlib
from typing import Any, NamedTuple
import zlib

from dsa_jax.config import ConfigError
from dsa_jax.data.corpora import files as places
from dsa_jax.data.formats import recognise
from dsa_jax.data.text import find_files

PIECE = 2**25  # Bytes of the files of a piece, about.
READ = 2**20  # Bytes that are read at one time.
ARROW = b'ARROW1'  # What begins a file in the format that may be read in any order.
END = b'\xff\xff\xff\xff\0\0\0\0'  # What ends a stream of Arrow.


class Piece(NamedTuple):
  """A part of a corpus, which one process reads."""

  names: tuple[str, ...]  # Files.
  first: int = 0  # Where it begins in a single file, in the format's own unit.
  end: int = -1  # One past its end; -1 is the end of the file.
  nbytes: int = 0  # What it takes in files, for a progress bar.


class Damaged(NamedTuple):
  """In place of a document: what is wrong with it."""

  where: str
  reason: str


Document = bytes | Damaged  # UTF-8.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(places.Files):
  """Files of plain text, each of them a document. '' stands for the sources of Python's library."""

  def pieces(self) -> list[Piece]:
    """Returns groups of files, in their order."""
    pieces, names, total = [], [], 0
    for name in places.expand(self.files) if self.files else map(str, find_files('')):
      size = places.size_of(name)
      if names and total + size > PIECE:
        pieces.append(Piece(tuple(names), nbytes=total))
        names, total = [], 0
      names.append(name)
      total += size
    return [*pieces, Piece(tuple(names), nbytes=total)]

  def documents(self, piece: Piece) -> Iterator[Document]:
    """Yields the text of each file.

    Raises:
      ConfigError: A file is cut short.
    """
    for name in piece.names:
      text = _read_all(name)
      if format := recognise(text):
        yield Damaged(name, f'it is no plain text ({format}): unpack such files, or save them as UTF-8')
        continue
      yield _checked(name, text.removeprefix(codecs.BOM_UTF8))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records(places.Files):
  """Files of records, one of whose fields holds documents."""

  field: str = 'text'

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.field, str) or not self.field:
      raise ConfigError(f'field={self.field!r} must be the name of a field.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines(Records):
  """Files with a JSON object in each line, one of whose fields is a document."""

  def pieces(self) -> list[Piece]:
    """Returns ranges of bytes, which hold the lines that begin in them; compressed files whole."""
    pieces = []
    for name in places.expand(self.files, ('.jsonl', '.ndjson', '.json')):
      size = places.size_of(name)
      if places.is_compressed(name):
        pieces.append(Piece((name,), nbytes=size))
      else:
        n = -(-size // PIECE)  # They are of one size, so processes end together.
        cuts = [i * size // n for i in range(n + 1)] if n else []
        pieces += [Piece((name,), a, b, b - a) for a, b in itertools.pairwise(cuts)]
    return pieces

  def documents(self, piece: Piece) -> Iterator[Document]:
    """Yields the text of each line; empty lines are none."""
    (name,) = piece.names
    for at, line in _lines(name, piece.first, piece.end):
      if at == 0 and (kind := recognise(line)) and not kind.startswith('binary data'):
        raise ConfigError(f'{name} holds no lines of JSON, but {kind}.')
      if line.strip():
        yield self._document(f'{name}, the line at byte {at}', line)

  def _document(self, where: str, line: bytes) -> Document:
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as error:
      return Damaged(where, f'it is no JSON: {error}')
    if not isinstance(record, dict):
      return Damaged(where, f'it holds a {type(record).__name__}, not an object')
    return _encode(where, record, self.field)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parquet(Records):
  """Parquet files, one of whose columns holds documents."""

  def pieces(self) -> list[Piece]:
    """Returns groups of rows as the files have them, small ones together; compressed files whole."""
    pieces = []
    for name in places.expand(self.files, ('.parquet',)):
      with _parquet(name) as table:
        _check_column(name, self.field, table.schema_arrow)
        about, most = table.metadata, float('inf') if places.is_compressed(name) else PIECE
        first = total = 0
        for i in range(about.num_row_groups):
          total += about.row_group(i).total_byte_size
          if total >= most or i + 1 == about.num_row_groups:
            pieces.append(Piece((name,), first, i + 1, total))
            first, total = i + 1, 0
    return pieces

  def documents(self, piece: Piece) -> Iterator[Document]:
    """Yields the text of each row."""
    import pyarrow

    (name,) = piece.names
    groups = range(piece.first, piece.end)
    with _parquet(name) as table:
      row = sum(table.metadata.row_group(i).num_rows for i in range(piece.first))
      try:
        for batch in table.iter_batches(batch_size=1024, row_groups=groups, columns=[self.field]):
          for value in _plain(batch.column(0)):
            yield _string(f'{name}, row {row}', value, self.field)
            row += 1
      except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f'{name} is damaged near row {row}: {error}') from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrow(Records):
  """Folders that `datasets.Dataset.save_to_disk` wrote, or Arrow files, with a column of documents."""

  def pieces(self) -> list[Piece]:
    """Returns the files, those of a folder as its state.json lists them."""
    pieces = []
    for path in map(pathlib.Path, places.expand_local(self.files)):
      names = [str(path)] if path.is_file() else _saved_files(path)
      pieces += [Piece((name,), nbytes=places.size_of(name)) for name in names]
    return pieces

  def documents(self, piece: Piece) -> Iterator[Document]:
    """Yields the text of each row."""
    import pyarrow

    (name,) = piece.names
    row = 0
    try:
      with pyarrow.memory_map(name) as source, _arrow(source) as table:
        _check_column(name, self.field, table.schema)
        for batch in _batches(table):
          for value in _plain(batch.column(self.field)):
            yield _string(f'{name}, row {row}', value, self.field)
            row += 1
    except (OSError, pyarrow.ArrowInvalid) as error:
      raise ConfigError(f'{name} is damaged near row {row}: {error}') from error


RawFormat = Text | JsonLines | Parquet | Arrow


def _read_all(name: str) -> bytes:
  try:
    with places.open_plain(name) as file:
      return file.read()
  except (OSError, EOFError, zlib.error) as error:
    raise ConfigError(f'{name} could not be read: {error}') from error


def _lines(name: str, first: int, end: int) -> Iterator[tuple[int, bytes]]:
  """Yields the lines that begin in a range of a file, each with its first byte."""
  try:
    with places.open_plain(name) as file:
      if first:  # Whatever line holds the byte before begins earlier.
        file.seek(first - 1)
      at, lines = max(first - 1, 0), _split(file)
      if first:
        at += len(next(lines, b''))
      for line in lines:
        if 0 <= end <= at:
          return
        yield at, line
        at += len(line)
  except (OSError, EOFError, zlib.error) as error:
    raise ConfigError(f'{name} could not be read to its end: {error}') from error


def _split(file: Any) -> Iterator[bytes]:
  """Yields lines with their line feeds. A carriage return may stand within a line."""
  begun = []  # Parts of a line that has not ended.
  while chunk := file.read(READ):
    *lines, rest = chunk.split(b'\n')
    for line in lines:
      yield b''.join([*begun, line, b'\n'])
      begun = []
    begun.append(rest)
  if last := b''.join(begun):
    yield last


def _encode(where: str, record: dict[str, Any], field: str) -> Document:
  value = record.get(field)
  if not isinstance(value, str):
    kind = f'is a {type(value).__name__}' if field in record else 'is missing'
    return Damaged(where, f'the field {field!r} {kind}; it must be a string')
  try:
    return value.encode()
  except UnicodeEncodeError as error:  # JSON may escape half a character.
    return Damaged(where, f'the field {field!r} is no Unicode text: {error}')


def _plain(column: Any) -> Any:
  """Returns a column whose values are the strings themselves."""
  return column.dictionary_decode() if hasattr(column, 'dictionary_decode') else column


def _string(where: str, value: Any, field: str) -> Document:
  """Returns the text of a value of a column, which need not be what the file's schema promises."""
  if not value.is_valid:
    return Damaged(where, f'the field {field!r} is null; it must be a string')
  return _checked(where, value.as_buffer().to_pybytes())


def _checked(where: str, text: bytes) -> Document:
  try:
    text.decode()
  except UnicodeDecodeError as error:
    return Damaged(where, f'it is no UTF-8 at byte {error.start}')
  return text


def _parquet(name: str):
  """Opens a file, whose parts are read in no order: a compressed one is unpacked in memory."""
  import pyarrow
  from pyarrow import parquet

  is_compressed = places.is_compressed(name)
  file = pyarrow.BufferReader(_read_all(name)) if is_compressed else places.open_file(name)
  try:
    return parquet.ParquetFile(file)
  except (OSError, pyarrow.ArrowInvalid) as error:
    raise ConfigError(f'{name} is no whole Parquet file: {error}') from error


def _arrow(source: Any):
  """Opens what `datasets` writes, a stream, or a file in Arrow's other format."""
  import pyarrow

  is_file = source.read(len(ARROW)) == ARROW
  source.seek(max(source.size() - len(END), 0))
  if not is_file and source.read() != END:
    raise pyarrow.ArrowInvalid('it does not end as a stream does, so rows may be missing')
  source.seek(0)
  return pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)


def _batches(table: Any) -> Iterator[Any]:
  if hasattr(table, 'get_batch'):
    return map(table.get_batch, range(table.num_record_batches))
  return iter(table)


def _check_column(name: str, field: str, schema: Any):
  import pyarrow

  if schema.names.count(field) != 1:
    number = 'several columns' if field in schema.names else 'no column'
    raise ConfigError(f'{name} has {number} {field!r}; its columns are {schema.names}.')
  kind = schema.field(field).type
  is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
  if pyarrow.types.is_dictionary(kind):
    kind = kind.value_type
  if not any(check(kind) for check in is_text):
    raise ConfigError(f'{name}: the column {field!r} holds {kind}, and must hold strings.')


def _saved_files(root: pathlib.Path) -> list[str]:
  """Returns the Arrow files of a saved dataset, in their order."""
  if (root / 'dataset_dict.json').exists():
    splits = json.loads((root / 'dataset_dict.json').read_text()).get('splits')
    raise ConfigError(f'files={str(root)!r} holds several datasets: give one of its folders {splits}.')
  try:
    state = json.loads((root / 'state.json').read_text())
    names = [entry['filename'] for entry in state['_data_files']]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ConfigError(
        f'files={str(root)!r} is no dataset that `save_to_disk` wrote: {type(error).__name__} {error}.'
    ) from error
  if state.get('_indices_files'):
    raise ConfigError(
        f'files={str(root)!r} is a view of rows in another order: save it after `flatten_indices()`.'
    )
  if missing := [name for name in names if not (root / name).is_file()]:
    raise ConfigError(f'files={str(root)!r} is not whole: it lacks {missing[0]}, which state.json names.')
  return [str(root / name) for name in names]
