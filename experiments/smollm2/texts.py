# SPDX-License-Identifier: Apache-2.0
r"""Fetches English text that may be used freely, and splits it by document.

    python experiments/smollm2/texts.py texts

writes texts/train/SOURCE.jsonl and texts/held_out/SOURCE.jsonl, whose lines are {"name", "text"}. A tenth
of the documents, by the hash of their names, is held out. texts/train/recall.jsonl has pieces of the novels and
of the FAQ, each followed by its own sentences in another order: to read these again is to look back. It reads four packages of a Debian-like
machine by `apt-get download` and `dpkg -x`, which install nothing: the documentation of Linux and of
Python, an FAQ in the form of a book, and novels by Jane Austen. HTML becomes plain text. Nothing of it is
committed.
"""

import argparse
import gzip
import hashlib
import html.parser
import json
import pathlib
import random
import re
import struct
import subprocess
import tempfile
import zlib

PACKAGES = {
    'linux': 'linux-doc-6.12',
    'python': 'python3.11-doc',
    'faq': 'anarchism',
    'novels': 'r-cran-janeaustenr',
}
SHORTEST = 4000  # Characters of a document.
HELD_OUT = 0.1  # The share of documents.
SIDES = 'train', 'held_out'
PIECE = 4600  # Characters that a document of `recall` has twice: 1,024 tokens, nearly.


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('out', type=pathlib.Path)
  out = parser.parse_args().out
  for side in SIDES:
    (out / side).mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as folder:
    for source, package in PACKAGES.items():
      root = unpack(package, pathlib.Path(folder) / source)
      read = novels if source == 'novels' else pages
      documents = {side: [] for side in SIDES}
      for name, text in sorted(read(root)):
        if len(text) >= SHORTEST:
          documents[side_of(name)].append(json.dumps(dict(name=name, text=text)) + '\n')
      for side, lines in documents.items():
        keep(out / side / f'{source}.jsonl', lines)
  write_recall(out / 'train')


def keep(path: pathlib.Path, lines: list[str]):
  """Writes a whole file or none."""
  new = path.with_suffix('.new')
  new.write_text(''.join(lines))
  new.replace(path)
  print(f'{path.parent.name:9} {path.stem:8} {len(lines):5} documents, {sum(map(len, lines)) / 1e6:6.1f} MB')


def write_recall(train: pathlib.Path):
  """Writes documents whose second half is the first one's sentences, in another order."""
  rng, lines = random.Random(0), []
  for source in 'novels', 'faq':
    for line in (train / f'{source}.jsonl').read_text().splitlines():
      document = json.loads(line)
      text = ' '.join(document['text'].split())
      for at in range(0, len(text) - PIECE, PIECE):
        sentences = re.split(r'(?<=[.!?]) ', text[at : at + PIECE])
        again = rng.sample(sentences, len(sentences))
        pair = dict(name=f'{document["name"]}, from {at}', text=' '.join([*sentences, *again]))
        lines.append(json.dumps(pair) + '\n')
  keep(train / 'recall.jsonl', lines)


def side_of(name: str) -> str:
  rank = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
  return 'held_out' if rank < HELD_OUT else 'train'


def unpack(package: str, folder: pathlib.Path) -> pathlib.Path:
  """Downloads a Debian package and returns the folder with its files."""
  folder.mkdir()
  subprocess.run(['apt-get', 'download', '-qq', package], cwd=folder, check=True)
  [archive] = folder.glob('*.deb')
  subprocess.run(['dpkg', '-x', archive, folder / 'files'], check=True)
  return folder / 'files'


def pages(root: pathlib.Path):
  """Yields the name and the text of every page of documentation, from its source where there is one."""
  paths = [path for path in root.rglob('*') if path.is_file() and not path.is_symlink()]
  suffixes = {'.rst', '.txt'}
  if not any(set(path.suffixes) & suffixes for path in paths):
    suffixes = {'.html'}
  for path in paths:
    if not set(path.suffixes) & suffixes or path.name.startswith(('changelog', 'copyright')):
      continue
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == '.gz' else data).decode(errors='replace')
    yield str(path.relative_to(root)), Plain.of(text) if '.html' in suffixes else text


class Plain(html.parser.HTMLParser):
  """Collects what a page shows, with a line for each block."""

  BLOCKS = ('p', 'div', 'br', 'li', 'tr', 'blockquote', 'pre', 'h1', 'h2', 'h3', 'h4', 'h5')

  def __init__(self):
    super().__init__()
    self.parts, self.hidden = [], 0

  def handle_starttag(self, tag, attrs):
    self.hidden += tag in ('script', 'style')
    if tag in self.BLOCKS:
      self.parts.append('\n')

  def handle_endtag(self, tag):
    self.hidden -= tag in ('script', 'style')

  def handle_data(self, data):
    if not self.hidden:
      self.parts.append(data.replace('\n', ' '))

  @classmethod
  def of(cls, page: str) -> str:
    parser = cls()
    parser.feed(page)
    lines = (' '.join(line.split()) for line in ''.join(parser.parts).split('\n'))
    return '\n'.join(line for line in lines if line)


def novels(root: pathlib.Path):
  """Yields each novel, which R keeps as a vector of lines in a compressed object."""
  [file] = root.rglob('janeaustenr/data/Rdata.rdb')
  data, number = file.read_bytes(), 0
  while data:
    stream = zlib.decompressobj()  # Behind four bytes that give the size.
    lines = strings(stream.decompress(data[4:]))
    data = stream.unused_data
    if lines:
      number += 1
      yield f'novel {number}', '\n'.join(lines)


def strings(serialized: bytes) -> list[str]:
  """Returns the first long vector of strings of an object in R's serialization (XDR)."""
  for at in range(len(serialized) - 8):
    kind, count = struct.unpack_from('>II', serialized, at)
    if kind & 0xFF == 16 and 1000 < count < 1_000_000:
      break
  else:
    return []
  values, at = [], at + 8
  for _ in range(count):
    _, size = struct.unpack_from('>Ii', serialized, at)
    values.append(serialized[at + 8 : at + 8 + max(size, 0)].decode())
    at += 8 + max(size, 0)
  return values


if __name__ == '__main__':
  main()
