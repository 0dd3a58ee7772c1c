# SPDX-License-Identifier: Apache-2.0
"""Recognises files that hold no plain text, by their content."""

import pickletools

POINTER = 'git-lfs pointer'  # The stand-in that git leaves where git-lfs is not installed.

# The first bytes of formats; those that may begin a text as well have more to say below.
BEGINNINGS = (
    (b'\x1f\x8b', 'gzip'),
    (b'\x1f\x9d', 'compress (.Z)'),
    (b'\x28\xb5\x2f\xfd', 'Zstandard'),
    (b'\xfd7zXZ\x00', 'xz'),
    (b'\x5d\x00\x00', 'lzma'),
    (b'\x04\x22\x4d\x18', 'lz4'),
    (b'\xff\x06\x00\x00sNaPpY', 'snappy'),
    (b'7z\xbc\xaf\x27\x1c', '7-Zip'),
    (b'Rar!\x1a\x07', 'RAR'),
    (b'LZIP\x01', 'lzip'),
    (b'PK\x03\x04', 'zip'),
    (b'PK\x05\x06', 'zip'),
    (b'PK\x07\x08', 'zip'),
    (b'\x93NUMPY', 'numpy'),
    (b'\x89HDF\r\n\x1a\n', 'HDF5'),
    (b'\x89PNG\r\n\x1a\n', 'PNG'),
    (b'\xff\xd8\xff', 'JPEG'),
    (b'\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1', 'an old Office document'),
    (b'%PDF-', 'PDF'),
    (b'ARROW1\x00\x00', 'Arrow'),
    (b'SQLite format 3\x00', 'SQLite'),
    (b'Obj\x01', 'Avro'),
    (b'\x7fELF', 'ELF'),
    (b'\xff\xfe\x00\x00', 'UTF-32'),
    (b'\x00\x00\xfe\xff', 'UTF-32'),
    (b'\xff\xfe', 'UTF-16'),
    (b'\xfe\xff', 'UTF-16'),
    (b'version https://git-lfs.github.com/spec/', POINTER),
)
# Characters that hardly any text has, in any encoding whose codes below 128 are those of ASCII. In
# CP437 some others print, such as the sign of a paragraph; 26 ended files of DOS.
CONTROLS = bytes({*range(1, 7), *range(14, 20), *range(22, 26), *range(28, 32)})
FEW = 1e-3  # The share of them that a text may have all the same.
BZIP2 = b'1AY&SY', b'\x17rE8P\x90'  # What follows `BZh` and a digit: a block, or the end.


def recognise(content: bytes) -> str:
  """Returns what a file holds in place of plain text; '' if nothing speaks against text."""
  if kind := kind_of(content):
    return kind
  if content.startswith(b'BZh') and content[4:10] in BZIP2:
    return 'bzip2'
  if content.startswith((b'PAR1', b'PARE')) and content.endswith(content[:4]) and len(content) > 8:
    return 'Parquet'
  if content[:3] == b'ORC' and b'\x00' in content:
    return 'ORC'
  if content[257:262] == b'ustar':
    return 'tar'
  if _is_pickle(content):
    return 'pickle'
  return 'binary data: it has NUL bytes' if b'\x00' in content else ''


def recognise_in_any_encoding(content: bytes) -> str:
  """Returns what `recognise` does, of a file that is read whether or not it is UTF-8."""
  if kind := recognise(content):
    return kind
  return 'binary data: it has control characters, and is no UTF-8' if _is_binary(content) else ''


def _is_binary(content: bytes) -> bool:
  """Returns whether a file is neither UTF-8 nor text in another encoding, such as Latin-1."""
  try:
    content.decode()
  except UnicodeDecodeError:
    return len(content) - len(content.translate(None, CONTROLS)) > FEW * len(content)
  return False


def kind_of(content: bytes, shortest: int = 1) -> str:
  """Returns the format whose first bytes these are; '' if they are none's.

  Args:
    content: The beginning of a file, or all of it.
    shortest: How many first bytes a format must have to count.
  """
  for beginning, name in BEGINNINGS:
    if len(beginning) >= shortest and content.startswith(beginning):
      return name
  return ''


def _is_pickle(content: bytes) -> bool:
  """Returns whether a file is one whole pickle. The oldest have no first bytes of their own."""
  if content[:1] == b'\x80' and content[1:2] in (b'\x02', b'\x03', b'\x04', b'\x05'):
    return True
  if not content.endswith(b'.') or len(content) < 3:
    return False
  try:
    *_, (stop, _, position) = pickletools.genops(content)
  except Exception:  # Text that is none: of what kind the error is, the library leaves open.
    return False
  return stop.name == 'STOP' and position == len(content) - 1
