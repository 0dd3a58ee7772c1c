# SPDX-License-Identifier: Apache-2.0
"""Turns documents into a folder of tokens, in parallel, once, and whole or not at all."""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import time
from typing import NamedTuple

import filelock
import numpy as np
import rich.console
import rich.progress

from dsa_jax.config import ConfigError
from dsa_jax.data.corpora import files as places, tokens
from dsa_jax.data.corpora.raw import Damaged, Document, Piece, RawFormat
from dsa_jax.data.tokenizer import Tokenizer, open_tokenizer

BATCH = 2**20  # Bytes of text that are tokenized at one time.
DAMAGED = ('stop', 'drop')
SHOWN = 10  # Damaged documents that a manifest names.


class Job(NamedTuple):
  """What a process needs to tokenize pieces."""

  source: RawFormat
  tokenizer: str
  damaged: str  # 'stop' ends the job at a damaged document, 'drop' counts it and goes on.
  folder: pathlib.Path
  dtype: str


class Done(NamedTuple):
  """What came of pieces."""

  documents: int
  tokens: int
  nbytes: int  # Of their files.


def tokenize(
    sources: Sequence[RawFormat],
    tokenizer: str,
    out: pathlib.Path,
    *,
    damaged: str = 'stop',
    workers: int | None = None,
    quiet: bool = False,
):
  """Writes the documents of sources as a folder of tokens, in their order.

  A job that was killed leaves OUT.partial, and the next one with the same arguments goes on there.

  Args:
    sources: What to read.
    tokenizer: Which one; see `open_tokenizer`.
    out: The folder, which must not exist.
    damaged: What to do about a document that is no text or no JSON: 'stop', or 'drop' and count it.
    workers: Processes; the cores of this machine if None.
    quiet: Whether to show no progress.

  Raises:
    ConfigError: The folder exists, a file cannot be read, or a document is damaged.
  """
  if damaged not in DAMAGED:
    raise ConfigError(f'{damaged=} must be one of {DAMAGED}.')
  if out.exists():
    raise ConfigError(f'{out} exists; choose another folder, or delete it.')
  opened = open_tokenizer(tokenizer)
  dtype = 'uint16' if opened.vocab_size <= 2**16 else 'uint32'
  pieces = [(source, piece) for source in sources for piece in source.pieces()]
  plan = describe(sources, tokenizer) | {'damaged': damaged}
  partial = out.with_name(out.name + '.partial')
  partial.mkdir(parents=True, exist_ok=True)
  with filelock.FileLock(partial / 'lock'):
    _claim(partial, plan)
    if not (partial / tokens.MANIFEST).exists():
      jobs = [Job(source, tokenizer, damaged, partial, dtype) for source, _ in pieces]
      _run(jobs, [piece for _, piece in pieces], workers or os.cpu_count() or 1, quiet)
      _finish(partial, len(pieces), opened, dtype)
    kept = {tokens.MANIFEST, tokens.DOCUMENTS, *(_part(partial, i).name for i in range(len(pieces)))}
    for path in partial.iterdir():
      if path.name not in kept:
        path.unlink(missing_ok=True)
    os.replace(partial, out)


def describe(sources: Sequence[RawFormat], tokenizer: str) -> dict:
  """Returns what decides the tokens: sources, the state of their files, and the tokenizer."""
  described = []
  for source in sources:
    names = [name for piece in source.pieces() for name in piece.names]
    states = {name: places.state_of(name) for name in dict.fromkeys(names)}
    described.append([type(source).__name__, dataclasses.asdict(source), states])
  plan = {'version': tokens.VERSION, 'sources': described, 'tokenizer': open_tokenizer(tokenizer).digest}
  return json.loads(json.dumps(plan))


def cached(source: RawFormat, tokenizer: str, cache: pathlib.Path, damaged: str) -> pathlib.Path:
  """Returns the folder of a source's tokens, which is made if the cache lacks it."""
  plan = json.dumps(describe([source], tokenizer) | {'damaged': damaged}, sort_keys=True)
  folder = cache / hashlib.sha256(plan.encode()).hexdigest()[:24]
  cache.mkdir(parents=True, exist_ok=True)
  with filelock.FileLock(folder.with_suffix('.lock')):
    if not folder.exists():
      tokenize([source], tokenizer, folder, damaged=damaged)
  return folder


def _claim(partial: pathlib.Path, plan: dict):
  """Checks that what a killed job has left is of the same job."""
  path = partial / 'plan.json'
  if path.exists() and json.loads(path.read_text()) != plan:
    raise ConfigError(
        f'{partial} was begun with other files, or with another tokenizer. Delete it, or choose '
        'another folder.'
    )
  _write(path, json.dumps(plan))


def _run(jobs: Sequence[Job], pieces: Sequence[Piece], workers: int, quiet: bool):
  """Tokenizes the pieces that are not there yet."""
  todo = [i for i in range(len(pieces)) if not _record(jobs[i].folder, i).exists()]
  with _progress(pieces, todo, quiet) as advance:
    if workers == 1 or len(todo) == 1:
      for i in todo:
        advance(_tokenize_piece(jobs[i], i, pieces[i]))
      return
    spawn = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(todo) or 1), spawn) as pool:
      running = [pool.submit(_tokenize_piece, jobs[i], i, pieces[i]) for i in todo]
      try:
        for future in concurrent.futures.as_completed(running):
          advance(future.result())
      except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


_OPENED = dict[str, Tokenizer]()  # Of this process.


def _tokenize_piece(job: Job, i: int, piece: Piece) -> Done:
  """Writes part i of the folder: its tokens, its documents, and at the end its record."""
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # Processes run beside each other.
  if job.tokenizer not in _OPENED:
    _OPENED[job.tokenizer] = open_tokenizer(job.tokenizer)
  parts, about, problems, empty = [], [], [], 0
  for texts, wrong, n_empty in _batches(job.source.documents(piece)):
    if wrong and job.damaged == 'stop':
      raise ConfigError(
          f'{wrong[0].where}: {wrong[0].reason}. Mend it, or leave such documents out with '
          "damaged='drop'."
      )
    ids = _OPENED[job.tokenizer].encode_documents(texts)
    parts += [x.astype(job.dtype) for x in ids]
    about.append(tokens.describe(ids, texts))
    problems += wrong
    empty += n_empty
  size = tokens.write_part(_part(job.folder, i), parts, job.dtype)
  about = np.concatenate([np.empty(0, tokens.ABOUT), *about])
  tokens.save(job.folder / f'part-{i:05}.npy', about)
  record = {
      'file': _part(job.folder, i).name, 'size': size, 'documents': len(about),
      'tokens': int(about['tokens'].sum()), 'bytes': int(about['bytes'].sum()), 'empty': empty,
      'damaged': len(problems), 'examples': [f'{x.where}: {x.reason}' for x in problems[:SHOWN]],
  }  # fmt: skip
  _write(_record(job.folder, i), json.dumps(record))
  return Done(record['documents'], record['tokens'], piece.nbytes)


def _batches(documents: Iterator[Document]) -> Iterator[tuple[list[bytes], list[Damaged], int]]:
  """Yields some texts at a time, with what was damaged and how many were empty among them."""
  texts, wrong, empty, total = [], [], 0, 0
  for document in documents:
    if isinstance(document, Damaged):
      wrong.append(document)
    elif document:
      texts.append(document)
      total += len(document)
    else:
      empty += 1
    if total >= BATCH or wrong:
      yield texts, wrong, empty
      texts, wrong, empty, total = [], [], 0, 0
  yield texts, wrong, empty


def _finish(partial: pathlib.Path, n_parts: int, tokenizer: Tokenizer, dtype: str):
  """Joins the records of all parts into the manifest and the index."""
  records = [json.loads(_record(partial, i).read_text()) for i in range(n_parts)]
  n = sum(record['documents'] for record in records)
  if not n:
    raise ConfigError(f'there is no document: {sum(r["empty"] for r in records)} are empty.')
  index = np.lib.format.open_memmap(partial / tokens.DOCUMENTS, 'w+', tokens.ABOUT, (n,))
  first = 0
  for i, record in enumerate(records):
    index[first : first + record['documents']] = np.load(partial / f'part-{i:05}.npy')
    first += record['documents']
  index.flush()
  totals = {name: sum(record[name] for record in records) for name in ('tokens', 'bytes', 'empty', 'damaged')}
  manifest = {
      'version': tokens.VERSION,
      'tokenizer': tokenizer.digest,
      'vocab_size': tokenizer.vocab_size,
      'dtype': dtype,
      'documents': n,
      **totals,
      'longest_document': int(index['tokens'].max()),
      'examples_of_damaged': [x for record in records for x in record['examples']][:SHOWN],
      'parts': [{name: record[name] for name in ('file', 'size', 'documents', 'tokens')} for record in records],
  }
  _write(partial / tokens.MANIFEST, json.dumps(manifest, indent=1))


def _part(folder: pathlib.Path, i: int) -> pathlib.Path:
  return folder / f'part-{i:05}.array_record'


def _record(folder: pathlib.Path, i: int) -> pathlib.Path:
  return folder / f'part-{i:05}.json'


def _write(path: pathlib.Path, text: str):
  """Writes a file that is there as a whole or not at all."""
  fresh = path.with_name(f'{path.name}.{os.getpid()}')
  fresh.write_text(text)
  os.replace(fresh, path)


@contextlib.contextmanager
def _progress(
    pieces: Sequence[Piece], todo: Sequence[int], quiet: bool
) -> Iterator[Callable[[Done], None]]:
  """Yields what counts pieces as done, and shows documents, MB/s and the time that is left."""
  total, left = sum(piece.nbytes for piece in pieces), sum(pieces[i].nbytes for i in todo)
  console = rich.console.Console(quiet=quiet)
  columns = (
      'tokenize', rich.progress.BarColumn(), rich.progress.TaskProgressColumn(), '{task.fields[text]}',
      rich.progress.TimeRemainingColumn(),
  )  # fmt: skip
  began, sums = time.monotonic(), np.zeros(3, np.int64)

  def text() -> str:
    seconds = max(time.monotonic() - began, 1e-3)
    return f'{sums[0]:,} documents, {sums[1]:,} tokens, {sums[2] / 1e6 / seconds:.1f} MB/s'

  with rich.progress.Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
    task = bar.add_task('tokenize', total=total, completed=total - left, text='')

    def advance(done: Done):
      sums[:] += done
      bar.update(task, advance=done.nbytes, text=text())

    yield advance
  if not quiet and not console.is_terminal:
    console.print(f'tokenize: {text()}', highlight=False)
