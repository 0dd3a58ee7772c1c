#!/usr/bin/env bash
# A Zstandard file that was cut short is read as if it were whole by the `zstandard` package.
#
# Seen on 2026-11-29 with zstandard 0.25.0 and pyarrow 26.0.1, Python 3.11, Linux.
#
# Expected: a reader says that the file ends within a frame, as Python's gzip does of a cut .gz
# (EOFError) and pyarrow of a cut .zst (OSError: Truncated compressed stream).
# Seen: `ZstdDecompressor().stream_reader(file)` and `copy_stream` return the blocks that are complete
# and raise nothing. Of a corpus of JSON lines whose download broke off, the first part is read, and
# the last document may end anywhere; of one written in frames, as parallel compressors write it,
# whole documents are missing.
#
# Here: data/corpora/files.py reads .zst through pyarrow, and a cut file stops the job by its name.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q zstandard==0.25.0 pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import io
import json
import random

import pyarrow
import zstandard

random.seed(0)
words = lambda: ' '.join(random.choices(['key', 'query', 'value', 'token', 'index', 'score'], k=400))
lines = ''.join(json.dumps({'text': words()}) + '\n' for _ in range(1000)).encode()
packed = zstandard.ZstdCompressor().compress(lines)
cut = packed[: len(packed) // 2]

read = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(cut), read_across_frames=True).read()
copied = io.BytesIO()
zstandard.ZstdDecompressor().copy_stream(io.BytesIO(cut), copied)
try:
  pyarrow.CompressedInputStream(pyarrow.BufferReader(cut), 'zstd').read()
  other = 'no error'
except OSError as error:
  other = f'OSError: {error}'
print(f'{len(lines)} bytes packed into {len(packed)}, of which {len(cut)} are left')
print(f'zstandard reads {len(read)} bytes, copies {len(copied.getvalue())}, and raises nothing')
print(f'pyarrow: {other}')
assert 0 < len(read) < len(lines) and lines.startswith(read)
assert copied.getvalue() == read and 'Truncated' in other
PYTHON
