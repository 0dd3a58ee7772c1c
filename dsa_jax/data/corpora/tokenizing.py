# SPDX-License-Identifier: Apache-2.0
"""Turns documents into a folder of tokens, in parallel, once, and whole or not at all."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
import types
from typing import NamedTuple, NoReturn

import filelock
import numpy as np
import rich.console
import rich.progress

from dsa_jax.config import ConfigError
from dsa_jax.data.corpora import files as places, tokens
from dsa_jax.data.corpora.raw import Damaged, Document, Piece, RawFormat
from dsa_jax.data.tokenizer import Tokenizer
from dsa_jax.data.tokenizer_files import open_tokenizer

BATCH = 2**20  # Bytes of text that are tokenized at one time.
DAMAGED = ('stop', 'drop')
SILENCE = 60  # Seconds after which a log has a line of progress.
NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF
SHOWN = 10  # Damaged documents that a manifest names.


class Job(NamedTuple):
  """What a process needs to tokenize pieces."""

  source: RawFormat
  tokenizer: str
  special_tokens: str  # See `open_tokenizer`.
  digest: str  # The tokenizer's.
  damaged: str  # 'stop' ends the job at a damaged document, 'drop' counts it and goes on.
  folder: pathlib.Path
  dtype: str


class Done(NamedTuple):
  """What came of pieces."""

  documents: int
  tokens: int
  nbytes: int  # Of their files.
  empty: int
  damaged: int


def tokenize(
    sources: Sequence[RawFormat],
    tokenizer: str,
    out: pathlib.Path,
    *,
    damaged: str = 'stop',
    special_tokens: str = 'text',
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
    special_tokens: What their names in a document stand for; see `open_tokenizer`.
    workers: Processes; the cores of this machine if None.
    quiet: Whether to show no progress.

  Raises:
    ConfigError: The folder exists, a file cannot be read, or a document is damaged.
  """
  if damaged not in DAMAGED:
    raise ConfigError(f'{damaged=} must be one of {DAMAGED}.')
  if out.exists():
    raise ConfigError(f'{out} exists; choose another folder, or delete it.')
  opened = open_tokenizer(tokenizer, special_tokens)
  plan = describe(sources, opened, damaged)
  dtype = 'uint16' if opened.vocab_size <= 2**16 else 'uint32'
  pieces = [(source, piece) for source in sources for piece in source.pieces()]
  partial = out.with_name(out.name + '.partial')
  lock = out.with_name(partial.name + '.lock')  # Beside it, because the folder will be gone.
  out.parent.mkdir(parents=True, exist_ok=True)
  with locked(lock):
    if out.exists():  # Another process, for which this one has waited, wrote it.
      lock.unlink(missing_ok=True)
      raise ConfigError(f'{out} exists; choose another folder, or delete it.')
    partial.mkdir(exist_ok=True)
    _claim(partial, plan)
    if not (partial / tokens.MANIFEST).exists():
      of_tokenizer = tokenizer, special_tokens, opened.digest
      jobs = [Job(x, *of_tokenizer, damaged, partial, dtype) for x, _ in pieces]
      try:
        _run(jobs, [piece for _, piece in pieces], workers or os.cpu_count() or 1, quiet)
        now = describe(sources, open_tokenizer(tokenizer, special_tokens), damaged)
        _check_unchanged(plan, now, partial)
        _finish(partial, len(pieces), opened, dtype, digest_of(plan))
      except BaseException:
        if not any(partial.glob('part-*.json')):  # There is nothing to go on from.
          shutil.rmtree(partial, ignore_errors=True)
          lock.unlink(missing_ok=True)
        raise
    _leave_out_records(partial, len(pieces))
    os.replace(partial, out)
    lock.unlink(missing_ok=True)


def _leave_out_records(partial: pathlib.Path, n_parts: int):
  """Deletes what only a job that goes on needs."""
  kept = {tokens.MANIFEST, tokens.DOCUMENTS, *(_part(partial, i).name for i in range(n_parts))}
  for path in partial.iterdir():
    if path.name not in kept:
      path.unlink(missing_ok=True)


def describe(sources: Sequence[RawFormat], tokenizer: Tokenizer, damaged: str) -> dict:
  """Returns what decides the tokens: sources, the state of their files, and the tokenizer."""
  described = []
  for source in sources:
    names = [name for piece in source.pieces() for name in piece.names]
    states = {name: places.state_of(name) for name in dict.fromkeys(names)}
    described.append([type(source).__name__, dataclasses.asdict(source), states])
  plan = {
      'version': tokens.VERSION, 'sources': described, 'tokenizer': tokenizer.digest,
      'damaged': damaged,
  }  # fmt: skip
  return json.loads(json.dumps(plan))


def digest_of(plan: dict) -> str:
  """Returns a short name for what `describe` says, which a manifest keeps."""
  return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:24]


def cached(
    source: RawFormat, tokenizer: str, cache: pathlib.Path, damaged: str, special_tokens: str = 'text'
) -> pathlib.Path:
  """Returns the folder of a source's tokens, which is made if the cache lacks it.

  Raises:
    ConfigError: The source will not do, or the cache cannot be written.
  """
  opened = open_tokenizer(tokenizer, special_tokens)
  folder = cache / digest_of(describe([source], opened, damaged))
  if folder.exists():  # Whole, and maybe where nobody may write.
    return folder
  with kept_in(cache):
    cache.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix('.lock')):
      if not folder.exists():
        tokenize([source], tokenizer, folder, damaged=damaged, special_tokens=special_tokens)
  return folder


@contextlib.contextmanager
def kept_in(cache: pathlib.Path) -> Iterator[None]:
  """Names the cache where something cannot be kept in it."""
  try:
    yield
  except OSError as error:
    raise ConfigError(
        f'what is known of the data could not be kept in {cache}: {error}. Choose another folder by '
        'data.cache, or make room there if it is full.'
    ) from error


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Keeps other processes out, as far as the file system knows locks, and says if this one has to wait."""
  lock = filelock.FileLock(path)
  try:
    lock.acquire(timeout=1)
  except filelock.Timeout:
    logging.warning(f'{path.with_suffix("")}: another process tokenizes there; this one waits for it.')
    lock.acquire()
  except OSError as error:
    if error.errno not in NO_LOCKS:
      raise
    logging.warning(f'{path.parent}: {error.strerror}: let no other process tokenize there meanwhile.')
  try:
    yield
  finally:
    lock.release()


def _claim(partial: pathlib.Path, plan: dict):
  """Checks that what a killed job has left is of the same job, or begins anew if it is nothing."""
  path = partial / 'plan.json'
  before = json.loads(path.read_text()) if path.exists() else plan
  # Parts in which nothing was damaged are the same whatever is done about damaged documents.
  if before | {'damaged': plan['damaged']} == plan and before['damaged'] in ('stop', plan['damaged']):
    pass
  elif any(partial.glob('part-*.json')):
    others = [name for name in plan if before.get(name) != plan[name]]
    raise ConfigError(
        f'{partial} was begun with other files, or with another tokenizer: what differs is '
        f'{", ".join(others)}. Delete it, or choose another folder.'
    )
  tokens.write_whole(path, json.dumps(plan))


def _check_unchanged(plan: dict, now: dict, partial: pathlib.Path):
  if plan == now:
    return
  states = [{k: v for *_, files in x['sources'] for k, v in files.items()} for x in (plan, now)]
  names = sorted(name for name in states[0] | states[1] if states[0].get(name) != states[1].get(name))
  raise ConfigError(
      f'{", ".join(names[:3])}{", ..." if len(names) > 3 else ""} changed while it was tokenized. '
      f'Delete {partial}, and begin again when nothing writes there.'
  )


def _run(jobs: Sequence[Job], pieces: Sequence[Piece], workers: int, quiet: bool):
  """Tokenizes the pieces that are not there yet."""
  todo = [i for i in range(len(pieces)) if not _record(jobs[i].folder, i).exists()]
  with _progress(pieces, todo, quiet) as advance:
    if workers == 1 or len(todo) <= 1:
      for i in todo:  # The tokenizer itself takes all cores.
        advance(_tokenize_piece(jobs[i], i, pieces[i]))
      return
    spawn = multiprocessing.get_context('spawn')
    pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(todo)), spawn, begin_process)
    with pool:
      try:
        with no_main():
          running = [pool.submit(_tokenize_piece, jobs[i], i, pieces[i]) for i in todo]
        for future in concurrent.futures.as_completed(running):
          advance(future.result())
      except concurrent.futures.process.BrokenProcessPool as error:
        raise ConfigError(
            'a process that tokenizes has died, maybe for lack of memory: take fewer --workers, and '
            'begin again; what is done stays done.'
        ) from error
      except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


@contextlib.contextmanager
def no_main() -> Iterator[None]:
  """Keeps processes that begin from running the script again that starts them."""
  main = sys.modules['__main__']
  sys.modules['__main__'] = types.ModuleType('__main__')
  try:
    yield
  finally:
    sys.modules['__main__'] = main


def begin_process():
  """Prepares a process that tokenizes, which ends with the one that started it."""
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # Processes run beside each other.
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word.

  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


@functools.lru_cache(1)
def open_same(tokenizer: str, special_tokens: str, digest: str) -> Tokenizer:
  """Opens a tokenizer that another process has opened, too.

  Raises:
    ConfigError: It has changed since, which its digest tells.
  """
  opened = open_tokenizer(tokenizer, special_tokens)
  if opened.digest != digest:
    raise ConfigError(f'tokenizer={tokenizer!r} changed while it was used: begin again.')
  return opened


def _tokenize_piece(job: Job, i: int, piece: Piece) -> Done:
  """Writes part i of the folder: its tokens, its documents, and at the end its record."""
  about, problems, empty = [np.empty(0, tokens.ABOUT)], [], 0

  def documents() -> Iterator[np.ndarray]:
    nonlocal empty
    for texts, wrong, n_empty in in_batches(job.source.documents(piece)):
      if wrong and job.damaged == 'stop':
        refuse(wrong[0])
      ids = open_same(job.tokenizer, job.special_tokens, job.digest).encode_documents(texts)
      about.append(tokens.describe(ids, texts))
      problems.extend(wrong)
      empty += n_empty
      yield from ids

  size = tokens.write_part(_part(job.folder, i), documents(), job.dtype)
  about = np.concatenate(about)
  tokens.save(job.folder / f'part-{i:05}.npy', about)
  record = {
      'file': _part(job.folder, i).name, 'size': size, 'documents': len(about),
      'tokens': int(about['tokens'].sum()), 'bytes': int(about['bytes'].sum()), 'empty': empty,
      'damaged': len(problems), 'examples': [f'{x.where}: {x.reason}' for x in problems[:SHOWN]],
  }  # fmt: skip
  tokens.write_whole(_record(job.folder, i), json.dumps(record))
  return Done(record['documents'], record['tokens'], piece.nbytes, empty, len(problems))


def refuse(document: Damaged) -> NoReturn:
  raise ConfigError(
      f'{document.where}: {document.reason}. Mend it, or leave such documents out with '
      "damaged='drop'."
  )


def in_batches(
    documents: Iterable[Document],
) -> Iterator[tuple[list[bytes], list[Damaged], int]]:
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


def _finish(partial: pathlib.Path, n_parts: int, tokenizer: Tokenizer, dtype: str, plan: str):
  """Joins the records of all parts into the manifest and the index."""
  records = [json.loads(_record(partial, i).read_text()) for i in range(n_parts)]
  n = sum(record['documents'] for record in records)
  if not n:
    empty, damaged = (sum(record[name] for record in records) for name in ('empty', 'damaged'))
    example = next((f', such as {x}' for record in records for x in record['examples']), '')
    for i in range(n_parts):
      _record(partial, i).unlink()
    raise ConfigError(f'there is no document: {empty} are empty, and {damaged} damaged{example}.')
  index = np.lib.format.open_memmap(partial / tokens.DOCUMENTS, 'w+', tokens.ABOUT, (n,))
  first = 0
  for i, record in enumerate(records):
    index[first : first + record['documents']] = np.load(partial / f'part-{i:05}.npy')
    first += record['documents']
  index.flush()
  totals = {name: sum(record[name] for record in records) for name in ('tokens', 'bytes', 'empty', 'damaged')}
  manifest = {
      'version': tokens.VERSION,
      'plan': plan,
      'tokenizer': tokenizer.digest,
      'vocab_size': tokenizer.vocab_size,
      'dtype': dtype,
      'documents': n,
      **totals,
      'longest_document': int(index['tokens'].max()),
      'examples_of_damaged': [x for record in records for x in record['examples']][:SHOWN],
      'parts': [{name: record[name] for name in ('file', 'size', 'documents', 'tokens')} for record in records],
  }
  tokens.write_whole(partial / tokens.MANIFEST, json.dumps(manifest, indent=1))


def _part(folder: pathlib.Path, i: int) -> pathlib.Path:
  return folder / f'part-{i:05}.array_record'


def _record(folder: pathlib.Path, i: int) -> pathlib.Path:
  return folder / f'part-{i:05}.json'


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
  began, sums = time.monotonic(), np.zeros(5, np.int64)
  said = began

  def text() -> str:
    seconds = max(time.monotonic() - began, 1e-3)
    return f'{sums[0]:,} documents, {sums[1]:,} tokens, {sums[2] / 1e6 / seconds:.1f} MB/s'

  with rich.progress.Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
    task = bar.add_task('tokenize', total=total, completed=total - left, text='')

    def advance(done: Done):
      nonlocal said
      sums[:] += done
      bar.update(task, advance=done.nbytes, text=text())
      if not quiet and not console.is_terminal and time.monotonic() - said > SILENCE:
        share = (total - left + sums[2]) / max(total, 1)
        console.print(f'tokenize: {share:.0%}, {text()}', highlight=False)
        said = time.monotonic()

    yield advance
  if not quiet and not console.is_terminal:
    console.print(f'tokenize: {text()}', highlight=False)
  if not quiet and np.any(sums[3:]):
    console.print(f'tokenize: left out {sums[3]:,} empty, {sums[4]:,} damaged', highlight=False)
