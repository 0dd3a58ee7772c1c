# SPDX-License-Identifier: Apache-2.0
"""Packs the bytes of local text files into rows."""

import collections
from collections.abc import Collection, Sequence
import glob
import hashlib
import logging
import os
import pathlib
import sysconfig

import numpy as np

from dsa_jax.config import ConfigError, local_path
from dsa_jax.data.batch import Batch
from dsa_jax.data.formats import recognise_in_any_encoding
from dsa_jax.data.seeds import check_seed

BOS = 256
PAD = 257
VOCAB_SIZE = 258

_NOT_LIBRARY = frozenset(
    ('site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idle_test')
)


def find_files(pattern: str | None) -> list[pathlib.Path]:
  """Returns the non-empty files that `pattern` matches, as absolute paths in a fixed order.

  The order is that of the paths below their common folder, so it does not depend on where that
  folder lies or on the order in which the file system lists it.

  Args:
    pattern: A glob, in which `~` and a recursive `**` are expanded. None or '' stands for the
      Python sources of the running interpreter's standard library, without its tests: some ten
      megabytes that every machine has.

  Raises:
    ConfigError: Nothing matches.
  """
  if pattern:
    local_path(pattern, 'files')
    names = glob.glob(os.path.expanduser(pattern), recursive=True)
    wanted = _better_pattern(os.path.expanduser(pattern))
  else:
    names = _standard_library(sysconfig.get_path('stdlib'))
    wanted = 'this interpreter has no standard library in source form: give a glob of files'
  paths = {pathlib.Path(os.path.abspath(name)) for name in names}
  files = [path for path in paths if path.is_file() and path.stat().st_size]
  if not files:
    raise ConfigError(f'{pattern=} matches no file that holds anything; {wanted}.')
  return sorted(files, key=pathlib.Path.as_posix)


def _better_pattern(pattern: str) -> str:
  """Returns what to give in place of a pattern that matches nothing."""
  escaped = pattern.replace('[', '[[]')
  if os.path.isdir(pattern):
    return f'give a glob of the files in this folder, such as {os.path.join(escaped, "**", "*")}'
  if '[' in pattern and glob.glob(escaped, recursive=True):
    return f'give a glob that escapes the brackets of a name: {escaped}'
  return 'give a glob of files, such as ~/texts/**/*.txt, or None for the standard library'


def _standard_library(root: str) -> list[str]:
  names = []
  for folder, subfolders, files in os.walk(root):
    subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
    names += [os.path.join(folder, name) for name in files if name.endswith('.py')]
  return names


def split_files(
    files: Sequence[pathlib.Path], validation_share: float, seed: int = 0
) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
  """Splits by file into (train, validation), each in the order given.

  A file's side depends on `seed` and on the last two parts of its path (folder and file name)
  alone. A corpus that grows or moves therefore keeps its split, and copies of one file in two trees
  land on the same side. There is one exception: a side that would stay empty takes the one file
  whose hash is nearest to it.

  Args:
    files: The files; repetitions are ignored.
    validation_share: The share of the files (not of the bytes) to expect in validation.
    seed: Determines the split.

  Raises:
    ConfigError: The share is not between 0 and 1, or there are fewer than two files.
  """
  if not 0 < validation_share < 1:
    raise ConfigError(f'{validation_share=} must lie between 0 and 1, both excluded.')
  files = list(dict.fromkeys(files))
  if len(files) < 2:
    raise ConfigError(
        f'a split by file needs at least 2 different files, got {len(files)}: cut the text into '
        'several, one for each document, or with `split --line-bytes=1M FILE part-`.'
    )
  names = {file: '/'.join(file.parts[-2:]) for file in files}
  ranks = {file: _unit_hash(name, seed) for file, name in names.items()}
  n_validation = sum(rank < validation_share for rank in ranks.values())
  n_validation = min(max(n_validation, 1), len(files) - 1)
  ordered = sorted(files, key=lambda file: (ranks[file], file.as_posix()))
  validation = set(ordered[:n_validation])
  _check_shares(names.values(), n_validation, validation_share)
  return [f for f in files if f not in validation], [f for f in files if f in validation]


def _check_shares(names: Collection[str], n_validation: int, wanted: float):
  """Warns of a split that is far from what was asked for, as where many files share a name."""
  n, (name, n_namesakes) = len(names), collections.Counter(names).most_common(1)[0]
  deviation = (n * wanted * (1 - wanted)) ** 0.5
  if n_namesakes <= n / 2 and abs(n_validation - n * wanted) <= max(1, 3 * deviation):
    return
  logging.warning(
      f'validation has {n_validation} of {n} files ({n_validation / n:.0%}) and training the other '
      f'{n - n_validation}; validation_share={wanted} asks for {wanted:.0%}. A file goes by the '
      f'last two parts of its path, and {n_namesakes} are named {name}: rename files, or choose '
      'another data.seed.'
  )


def _unit_hash(name: str, seed: int) -> float:
  digest = hashlib.sha256(f'{seed}:{name}'.encode('utf-8', 'surrogateescape')).digest()
  return int.from_bytes(digest[:8], 'big') / 2**64


def read_text(file: pathlib.Path, others: list[str]) -> bytes:
  """Returns the content of a file; `others` takes a line if that is no plain text."""
  content = file.read_bytes()
  if format := recognise_in_any_encoding(content):
    others.append(f'{file} ({format})')
  return content


def refuse_others(others: Sequence[str]):
  """Raises ConfigError if there are files that hold no plain text."""
  if others:
    rest = f' and {len(others) - 10} more' if len(others) > 10 else ''
    raise ConfigError(
        f'no plain text: {", ".join(others[:10])}{rest}. Unpack such files or save them as UTF-8, or '
        'leave them out of the glob.'
    )


class PackedText:
  """A random-access source: documents are laid end to end and cut into rows of `seq_len` tokens.

  A document is BOS and its bytes. Short documents share a row and do not see each other. A long
  document is cut: its part in the next row does not see the part before, but no byte and no target
  is lost. The last token of a document has no target (PAD, weight 0). Only the last row is padded.
  """

  def __init__(self, documents: Sequence[bytes], seq_len: int, seed: int = 0):
    """Packs documents.

    Args:
      documents: The bytes of each document.
      seq_len: Tokens of a row.
      seed: Determines the order of the documents; rows are shuffled elsewhere.

    Raises:
      ConfigError: An argument is out of range.
    """
    if seq_len < 2:
      raise ConfigError(f'{seq_len=} must be at least 2: one token and its target.')
    if not documents:
      raise ConfigError('no documents to pack: give at least one.')
    check_seed(seed)
    self.seq_len = seq_len
    n_tokens = sum(len(document) + 1 for document in documents)
    self._n_rows = -(-n_tokens // seq_len)
    # The stream has one token more than the rows hold, the target of the very last position.
    self._stream = np.full(self._n_rows * seq_len + 1, PAD, np.uint16)
    offset = 0
    for i in np.random.default_rng(seed).permutation(len(documents)):
      document = np.frombuffer(documents[i], np.uint8)
      self._stream[offset] = BOS
      self._stream[offset + 1 : offset + 1 + len(document)] = document
      offset += 1 + len(document)

  @classmethod
  def from_files(cls, files: Sequence[pathlib.Path], seq_len: int, seed: int = 0) -> 'PackedText':
    """Packs text files, each as one document.

    Raises:
      ConfigError: A file holds no plain text, or an argument is out of range.
    """
    documents, others = [], []
    for file in files:
      documents.append(read_text(file, others))
    refuse_others(others)
    return cls(documents, seq_len, seed)

  def __len__(self) -> int:
    return self._n_rows

  def __getitem__(self, i: int) -> Batch:
    if not 0 <= i < self._n_rows:
      raise IndexError(f'row {i} of {self._n_rows}')
    first = i * self.seq_len
    window = self._stream[first : first + self.seq_len + 1].astype(np.int32)
    tokens = window[:-1]
    targets = np.where(window[1:] < BOS, window[1:], PAD)
    position = np.arange(self.seq_len, dtype=np.int32)
    start = np.maximum.accumulate(np.where(tokens == BOS, position, 0))
    padding = tokens == PAD
    return Batch(
        tokens=tokens,
        targets=targets,
        weights=(targets < BOS).astype(np.float32),
        start=np.where(padding, position, start),
        end=np.where(padding, position, position + 1),
    )
