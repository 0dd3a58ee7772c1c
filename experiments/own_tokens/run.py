# SPDX-License-Identifier: Apache-2.0
"""Measures tokenizing and reading on this machine: writes figures.json.

python experiments/own_tokens/run.py [FOLDER]

Ratios, each side by side in one run: what `python -m dsa_jax.tokenize` does against the
`tokenizers` library alone on the same text in memory, with all cores; the batches of an epoch that is
tokenized on the fly against that library; packed rows read from tokens, per second and core; and the
resident memory of reading a sparse file of 20 GB against one of 20 MB, and on the fly a whole corpus
against a tenth of it.
FOLDER (a temporary one) holds the corpus: this interpreter's library, as often as fills 100 MB.
"""

import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsa_jax.data.corpora import tokenizing
from dsa_jax.data.corpora.raw import JsonLines
from dsa_jax.data.text import find_files

CORPUS = 100_000_000  # Bytes.
VOCABULARY = 16_384
ROUNDS = 3
SEQ_LEN = 4096
SMALL, LARGE = 20_000_000, 20_000_000_000  # Bytes of a flat file.

READ = """
import json, pathlib, re, sys, time
import numpy as np
from dsa_jax.data.sources import DataConfig
from dsa_jax.data.pipeline import make_iterator
source, cache, seq_len = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
data = DataConfig(source='mixture', sources={'x': source}, cache=cache)
rows = data.rows(seq_len, 'train').sources[0]
order = np.random.default_rng(0).permutation(len(rows))[:4000]
began = time.process_time()
for i in order:
  rows[int(i)]
seconds = time.process_time() - began
iterator = make_iterator(data.rows(seq_len, 'train'), 8, 0)
for _ in range(100):
  next(iterator)
peak = re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]
anonymous = re.search(r'RssAnon:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]
print(json.dumps([len(order) * seq_len / seconds, int(peak) / 1024, int(anonymous) / 1024]))
"""


STREAM = """
import json, multiprocessing, pathlib, re, resource, sys, time
from dsa_jax.data.sources import DataConfig
from dsa_jax.data.pipeline import make_iterator
files, tokenizer, seq_len = sys.argv[1], sys.argv[2], int(sys.argv[3])
data = DataConfig(
    source='mixture', sources={'x': dict(format='jsonl', files=files)}, tokenizer=tokenizer,
    tokenized='on_the_fly', validation_share=0.0,
)
began = time.perf_counter()
iterator = make_iterator(data.rows(seq_len, 'train'), 8, 0)
next(iterator)
first = time.perf_counter() - began
n = 1
while iterator.get_state()['epoch'] == 0:
  next(iterator)
  n += 1
seconds = time.perf_counter() - began
workers = multiprocessing.active_children()
iterator.close()
for worker in workers:
  worker.join()
peak = re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]
child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([first, seconds, n * 8 * seq_len / seconds, int(peak) / 1024, child / 1024]))
"""


def main():
  folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
  if folder.exists() and any(folder.iterdir()):
    sys.exit(f'error: {folder} must be empty: what an earlier run left there would be measured, too.')
  texts = corpus()
  tokenizer = train(texts)
  (folder / 'tokenizer').mkdir(parents=True)
  tokenizer.save(str(folder / 'tokenizer/tokenizer.json'))
  lines = (json.dumps({'text': text}) + '\n' for text in texts)
  (folder / 'corpus.jsonl').write_text(''.join(lines))
  figures = {
      'machine': f'{platform.machine()}, {os.cpu_count()} cores', 'date': time.strftime('%Y-%m-%d'),
      'tokenizers': tokenizers.__version__, 'tokenize': measure_tokenizing(folder, tokenizer, texts),
      'on_the_fly': measure_on_the_fly(folder, tokenizer, texts), 'read': measure_reading(folder),
  }  # fmt: skip
  print(json.dumps(figures, indent=1))
  path = pathlib.Path(__file__).with_name('figures.json')
  path.write_text(json.dumps(figures, indent=1) + '\n')


def corpus() -> list[str]:
  texts = [path.read_text(errors='replace') for path in find_files('')]
  times = CORPUS // sum(map(len, texts)) + 1
  return [f'# {i}\n{text}' for i in range(times) for text in texts]


def train(texts: list[str]) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
  tokenizer.train_from_iterator(texts[: len(texts) // 5], trainer)
  return tokenizer


def measure_tokenizing(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer, texts: list[str]) -> dict:
  """Returns MB/s of both, and the median of the rounds' ratios."""
  n_bytes = sum(len(text.encode()) for text in texts)
  source = JsonLines(files=str(folder / 'corpus.jsonl'))
  rounds = []
  for i in range(ROUNDS):
    alone = seconds_alone(tokenizer, texts)
    began = time.perf_counter()
    tokenizing.tokenize([source], str(folder / 'tokenizer'), folder / f'tokens{i}', quiet=True)
    rounds.append((alone, time.perf_counter() - began))
    print(rounds[-1], flush=True)
  return {
      'bytes': n_bytes,
      'library_mb_per_second': n_bytes / 1e6 / np.median([a for a, _ in rounds]),
      'ours_mb_per_second': n_bytes / 1e6 / np.median([b for _, b in rounds]),
      'ours_of_library': np.median([a / b for a, b in rounds]),
  }


def seconds_alone(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> float:
  """Returns the seconds that the library takes."""
  began = time.perf_counter()
  for j in range(0, len(texts), 200):
    for encoding in tokenizer.encode_batch_fast(texts[j : j + 200], add_special_tokens=False):
      np.asarray(encoding.ids, np.uint16)
  return time.perf_counter() - began


def measure_on_the_fly(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer, texts: list[str]) -> dict:
  """Returns MB/s of both, the median of the rounds' ratios, and MiB of resident memory."""
  n_bytes = sum(len(text.encode()) for text in texts)
  lines = (folder / 'corpus.jsonl').read_text().splitlines(keepends=True)
  (folder / 'tenth.jsonl').write_text(''.join(lines[: len(lines) // 10]))
  figures, rounds = {}, []
  for i in range(ROUNDS + 1):
    name = 'corpus' if i else 'tenth'
    arguments = [str(folder / f'{name}.jsonl'), str(folder / 'tokenizer'), str(SEQ_LEN)]
    alone = seconds_alone(tokenizer, texts) if i else 0
    done = subprocess.run(
        [sys.executable, '-c', STREAM, *arguments], capture_output=True, text=True, check=True
    )
    first, seconds, speed, own, child = json.loads(done.stdout)
    figures[f'memory_{name}'] = {'own_peak_mib': own, 'worker_peak_mib': child}
    rounds += [(alone, seconds, first, speed)] if i else []
    print(rounds[-1:], flush=True)
  return figures | {
      'library_mb_per_second': n_bytes / 1e6 / np.median([a for a, *_ in rounds]),
      'ours_mb_per_second': n_bytes / 1e6 / np.median([b for _, b, *_ in rounds]),
      'ours_of_library': np.median([a / b for a, b, *_ in rounds]),
      'seconds_to_first_batch': np.median([first for *_, first, _ in rounds]),
      'tokens_per_second': np.median([speed for *_, speed in rounds]),
  }


def measure_reading(folder: pathlib.Path) -> dict:
  """Returns tokens per second of processor time, and MiB of resident memory."""
  cases = {'tokens': dict(format='tokens', files=str(folder / 'tokens0'))}
  for name, size in ('flat, 20 MB', SMALL), ('flat, 20 GB', LARGE):
    path = folder / f'{size}.bin'
    with open(path, 'wb') as file:  # Zeros that take no room, and documents that end here and there.
      file.truncate(size)
      for at in np.linspace(2, size - 2, 20_000).astype(int) // 2 * 2:
        file.seek(at)
        file.write(b'\x01\x00')
    cases[name] = dict(format='flat', files=str(path), separator=1)
  figures = {}
  for name, source in cases.items():
    arguments = [json.dumps(source), str(folder / 'cache'), str(SEQ_LEN)]
    peaks = []
    for _ in range(2):  # The first finds the documents of a flat file, and looks at its ids.
      done = subprocess.run(
          [sys.executable, '-c', READ, *arguments], capture_output=True, text=True, check=True
      )
      speed, peak, anonymous = json.loads(done.stdout)
      peaks.append(peak)
    figures[name] = {
        'million_tokens_per_second': speed / 1e6, 'peak_mib': peak, 'own_memory_mib': anonymous,
        'peak_mib_of_the_first_run': peaks[0],
    }  # fmt: skip
  return figures


if __name__ == '__main__':
  main()
