# SPDX-License-Identifier: Apache-2.0
"""One corpus in every format."""

import gzip
import json
import pathlib
import struct

import numpy as np
import pyarrow
from pyarrow import parquet

from dsa_jax.data.corpora import tokenizing
from dsa_jax.data.corpora.raw import JsonLines
from dsa_jax.data.sources import DataConfig

END = 257  # Bytes have no id that ends a document; flat files need one.


def documents(n: int = 60, seed: int = 0) -> list[str]:
  """Returns texts of some 150 characters, with line feeds, carriage returns and wide characters."""
  rng = np.random.default_rng(seed)
  alphabet = [*'abcdefgh \n\r', 'é', '語', '🎈']
  return [''.join(rng.choice(alphabet, size=size)) for size in rng.integers(1, 300, size=n)]


def write(folder: pathlib.Path, texts: list[str]) -> dict[str, dict]:
  """Writes the texts in every format, and returns the fields of a source for each."""
  (folder / 'text').mkdir(parents=True)
  for i, text in enumerate(texts):
    (folder / 'text' / f'{i:04}.txt').write_bytes(text.encode())
  lines = ''.join(json.dumps({'text': text, 'id': i}) + '\n' for i, text in enumerate(texts)).encode()
  (folder / 'plain.jsonl').write_bytes(lines)
  (folder / 'packed.jsonl.gz').write_bytes(gzip.compress(lines[:5000]) + gzip.compress(lines[5000:]))
  with pyarrow.CompressedOutputStream(str(folder / 'packed.jsonl.zst'), 'zstd') as file:
    file.write(lines)
  table = pyarrow.table({'id': range(len(texts)), 'content': texts})
  parquet.write_table(table, folder / 'rows.parquet', row_group_size=7)
  (folder / 'rows.parquet.gz').write_bytes(gzip.compress((folder / 'rows.parquet').read_bytes()))
  save_dataset(folder / 'arrow', table)
  write_flat(folder, texts)
  write_megatron(folder / 'megatron', texts)
  tokenizing.tokenize([JsonLines(files=str(folder / 'plain.jsonl'))], 'bytes', folder / 'tokens', quiet=True, workers=1)
  path = lambda name: str(folder / name)
  return {
      'text': dict(format='text', files=path('text')),
      'jsonl': dict(format='jsonl', files=path('plain.jsonl')),
      'gzip': dict(format='jsonl', files=path('packed.jsonl.gz')),
      'zstd': dict(format='jsonl', files=path('packed.jsonl.zst')),
      'parquet': dict(format='parquet', files=path('rows.parquet'), field='content'),
      'parquet.gz': dict(format='parquet', files=path('rows.parquet.gz'), field='content'),
      'arrow': dict(format='arrow', files=path('arrow'), field='content'),
      'tokens': dict(format='tokens', files=path('tokens')),
      'megatron': dict(format='megatron', files=path('megatron')),
      'flat': dict(format='flat', files=path('flat.bin'), separator=END),
      'npy': dict(format='flat', files=path('flat.npy'), separator=END),
  }


def ids_of(text: str) -> list[int]:
  return [256, *text.encode()]


def save_dataset(folder: pathlib.Path, table: pyarrow.Table):
  """Writes what `datasets.Dataset.save_to_disk` does, in two files."""
  folder.mkdir()
  half = len(table) // 2
  names = ['data-00000-of-00002.arrow', 'data-00001-of-00002.arrow']
  for name, part in zip(names, (table[:half], table[half:]), strict=True):
    with pyarrow.OSFile(str(folder / name), 'wb') as file:
      with pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(part, max_chunksize=5)
  state = {'_data_files': [{'filename': name} for name in names], '_indices_files': None}
  (folder / 'state.json').write_text(json.dumps(state))
  (folder / 'dataset_info.json').write_text('{}')


def write_flat(folder: pathlib.Path, texts: list[str]):
  ids = np.concatenate([np.array([*ids_of(text), END], np.uint16) for text in texts])
  ids.tofile(folder / 'flat.bin')
  np.save(folder / 'flat.npy', ids.astype(np.uint32))


def write_megatron(prefix: pathlib.Path, texts: list[str]):
  """Writes documents as one sequence each, as Megatron's builder does."""
  ids = [np.array(ids_of(text), '<u2') for text in texts]
  np.concatenate(ids).tofile(prefix.with_suffix('.bin'))
  lengths = np.array([len(x) for x in ids], '<i4')
  pointers = (np.cumsum(lengths) - lengths).astype('<i8') * 2
  header = b'MMIDIDX\x00\x00' + struct.pack('<QBQQ', 1, 8, len(ids), len(ids) + 1)
  ends = np.arange(len(ids) + 1, dtype='<i8').tobytes()
  prefix.with_suffix('.idx').write_bytes(header + lengths.tobytes() + pointers.tobytes() + ends)


def config(tmp_path: pathlib.Path, fields: dict, **others) -> DataConfig:
  """Returns the config of a mixture of one source."""
  return mixture(tmp_path, {'one': fields}, **others)


def mixture(tmp_path: pathlib.Path, sources: dict, **others) -> DataConfig:
  return DataConfig(source='mixture', sources=sources, cache=str(tmp_path / 'cache'), **others)
