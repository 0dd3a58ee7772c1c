# SPDX-License-Identifier: Apache-2.0
"""Continues the prompts of a file; what was answered before a run was stopped is never lost."""

from collections.abc import Iterator
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import logging
import os
import pathlib
from typing import Any, BinaryIO, NamedTuple

from dsa_jax.config import ConfigError
from dsa_jax.data.chat import ChatTemplate, prompt_of
from dsa_jax.inference.batching import Completion
from dsa_jax.inference.sample_config import SampleConfig
from dsa_jax.inference.sampler import Sampler
from dsa_jax.parallel.processes import check_same, is_first, wait_for_all


KEYS = 'prompt', 'sample'  # What tells an answer from all others of a file.
DATED = (
    ' The chat template writes the date into prompts, and an earlier version did not keep it: what it began '
    'on another day needs another file.'
)


OF_LINE = {'id', 'prompt', 'messages', 'tools', 'documents', 'chat_template_kwargs'}  # Of a line.


class Prompt(NamedTuple):
  """A line of the file of prompts."""

  text: str
  name: Any  # The line's own 'id', which its answers carry along. None: it has none.
  moment: str = ''  # What the chat template took for now, if it writes the date into the prompt.


def read_prompts(path: pathlib.Path, chat: ChatTemplate | None) -> list[Prompt]:
  """Reads one prompt of each line of a JSONL file.

  A line is an object with a 'prompt', which is a text, or with 'messages', which the checkpoint's
  chat template makes into one, by 'tools', 'documents' and 'chat_template_kwargs' where the line has
  them; and maybe an 'id', which had better be no other line's.

  Raises:
    ConfigError: A line is something else.
  """
  prompts, names, repeated, unread = [], dict[str, int](), list[int](), set[str]()
  for number, line in enumerate(path.read_bytes().splitlines(), 1):
    if not line.strip():
      continue
    try:
      entry = json.loads(line)
      json.dumps(entry, ensure_ascii=False).encode()  # Refuses half a character.
      prompts.append(_read_entry(entry, chat))
      unread |= entry.keys() - OF_LINE
      if (name := prompts[-1].name) is not None:
        if names.setdefault(json.dumps(name, sort_keys=True), number) != number:
          repeated.append(number)
    except ValueError as error:  # Those of JSON and UTF-8, and ConfigError.
      raise ConfigError(f'{path}, line {number}: {error}') from error
  if not prompts:
    raise ConfigError(f'{path} holds no prompt.')
  if unread:
    logging.warning('%s: %s of its lines change nothing; those that do are %s.', path, sorted(unread), sorted(OF_LINE))
  if repeated:
    logging.warning(
        "%s: %d lines have an 'id' of a line before, the first of them line %d: 'prompt', the number "
        'of the prompt, tells their answers apart.',
        path, len(repeated), repeated[0],
    )  # fmt: skip
  return prompts


def check_paths(prompts: pathlib.Path, out: pathlib.Path):
  """Raises a ConfigError if the answers would be added to the prompts, under whatever names."""
  if out.exists() and prompts.exists() and out.samefile(prompts):
    raise ConfigError(f'--out={out} is the file of --prompts: name another file for the answers.')


def _read_entry(entry: Any, chat: ChatTemplate | None) -> Prompt:
  keys = {*entry} & {'prompt', 'messages'} if isinstance(entry, dict) else set()
  if len(keys) != 1:
    raise ConfigError("expected an object with either a 'prompt' or 'messages'.")
  if 'messages' in keys and not isinstance(entry['messages'], list):
    raise ConfigError(f"'messages' is {entry['messages']!r}; it must be a list.")
  choices = {name: entry[name] for name in ('tools', 'documents') if entry.get(name) is not None}
  more = entry.get('chat_template_kwargs') or {}
  if not isinstance(more, dict):
    raise ConfigError(f"'chat_template_kwargs' is {more!r}; it must be an object.")
  choices |= more
  if 'prompt' in keys and choices:
    raise ConfigError(f"{sorted(choices)} are for 'messages': a 'prompt' has no template that would write them.")
  text = entry['prompt'] if 'prompt' in keys else prompt_of(entry['messages'], chat, **choices)
  if not isinstance(text, str) or not text:
    raise ConfigError(f"'prompt' is {text!r}; it must be a text, and not an empty one.")
  moment = chat.moment if 'messages' in keys else None
  return Prompt(text, entry.get('id'), moment.isoformat() if moment else '')


def moment_of(path: pathlib.Path) -> str | None:
  """Returns what a file of answers has kept of when it was begun; None if it does not matter."""
  for line in path.read_bytes().splitlines() if path.exists() else ():
    if b'"moment": ' in line:
      with contextlib.suppress(ValueError, AttributeError):
        return json.loads(line).get('moment')
  return None


class AnswerFile:
  """A JSONL file to which answers are added, whole lines at a time."""

  def __init__(
      self,
      path: pathlib.Path,
      sampler: Sampler,
      prompts: list[Prompt],
      config: SampleConfig,
      samples: int,
      checkpoint: str = '',
      earlier: str | None = None,
      weights: str | None = None,
  ):
    """Reads what the file holds. A line whose writing was interrupted is dropped.

    Args:
      path: The file, which need not exist.
      sampler: What answers.
      prompts: What it answers.
      config: In which way it does.
      samples: How many answers each prompt gets.
      checkpoint: The name of the checkpoint. Answers of one with another name are refused.
      earlier: The name that an earlier version gave it, whose answers count too.
      weights: What tells its weights from others that have lain there, if it is known. Answers that
        are known to be of others are refused.

    Raises:
      ConfigError: The file holds something else than answers to these prompts, given in this way.
    """
    self._path, self._prompts, self._sampler = path, prompts, sampler
    self._config, self._samples, self._weights = sampler.of_text(config), samples, weights
    selection = sampler.attention, sampler.rule, sampler.cfg.index_topk
    if (factor := sampler.cfg.index_rope_factor) != 1:  # Earlier versions had none.
      selection += factor, sampler.cfg.index_original_seq_len
    settings = dataclasses.asdict(self._config), *selection, *sampler.formats
    digest = lambda *known: hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    digests = lambda name: [digest(prompt.text, [name, *settings]) for prompt in prompts]
    self._digests, self._earlier = digests(checkpoint), digests(checkpoint if earlier is None else earlier)
    self.answered: set[tuple[int, int]] = set()  # Prompts and samples.
    content = path.read_bytes() if path.exists() else b''
    self._size, self._whole = len(content), content.rfind(b'\n') + 1
    for number, line in enumerate(content[: self._whole].splitlines(), 1):
      try:
        self.answered.add(self._answer_of(line))
      except ConfigError as error:
        is_dated = any(prompt.moment for prompt in prompts) and moment_of(path) is None
        raise ConfigError(f'{path}, line {number} {error}{DATED * is_dated}') from error
    if content and not self._whole and not self._has_begun(content):
      raise ConfigError(f'{path} holds something else than answers: name another file.')

  def _has_begun(self, line: bytes) -> bool:
    """Returns whether a line without an end is an answer, or may be the beginning of one."""
    try:
      json.loads(line)
    except ValueError:
      numbers = itertools.product(range(len(self._prompts)), range(self._samples))
      heads = (self._as_line(at[0], dict(zip(KEYS, at)))[:-1] + b', "text": "' for at in numbers)
      return any(head.startswith(line) or line.startswith(head) for head in heads)
    with contextlib.suppress(ConfigError):
      return bool(self._answer_of(line))
    return False

  def _answer_of(self, line: bytes) -> tuple[int, int]:
    """Returns which prompt a line answers, and as which sample.

    Raises:
      ConfigError: It answers none, or in another way.
    """
    try:
      entry = json.loads(line)
      prompt, sample, digest = entry['prompt'], entry['sample'], entry['digest']
      is_known = prompt >= 0 and digest in (self._digests[prompt], self._earlier[prompt])
      if not (is_known and 0 <= sample < self._samples):
        raise ValueError
    except (ValueError, TypeError, KeyError, IndexError) as error:
      raise ConfigError(
          'answers no prompt of this file, or by another checkpoint or settings: go on with the prompts '
          'and flags that it was begun with, or name another file.'
      ) from error
    if entry.get('weights', self._weights) != self._weights:  # An earlier version did not tell them.
      raise ConfigError(
          'is by other weights, which lay at the same path: the checkpoint was trained or converted anew. '
          'Name another file.'
      )
    return prompt, sample

  @property
  def n_left(self) -> int:
    return len(self._prompts) * self._samples - len(self.answered)

  def answer(self, slots: int) -> Iterator[Completion]:
    """Writes the missing answers as they come, and yields them; of several processes, the first writes.

    Raises:
      ConfigError: A prompt is too long; nothing has been written then.
    """
    check_same({f'what {self._path} holds, which must lie on a disk that all of them see': sorted(self.answered)})
    texts = [prompt.text for prompt in self._prompts]
    completions = self._sampler.complete(
        texts, self._config, samples=self._samples, slots=slots, without=self.answered
    )
    wait_for_all('every process has read the answers')
    if not is_first():
      yield from completions
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with open(self._path, 'ab') as file:
      self._claim(file)
      file.truncate(self._whole)
      for completion in completions:
        file.write(self._as_line(completion.prompt, self._known_of(completion)) + b'\n')
        file.flush()  # What a call of the system leaves unwritten of a line, the next one writes.
        yield completion

  def _claim(self, file: BinaryIO):
    """Keeps other processes from adding answers, as far as the file system knows locks."""
    is_locked = False
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      is_locked = True
    except OSError:  # The file system knows no locks.
      pass
    if is_locked or os.fstat(file.fileno()).st_size != self._size:
      raise ConfigError(
          f'another process adds answers to {self._path}: wait until it ends, or name another file.'
      )

  def _known_of(self, completion: Completion) -> dict[str, Any]:
    prompt = self._prompts[completion.prompt]
    line = completion._asdict() | {'digest': self._digests[completion.prompt]}
    line |= {'weights': self._weights} if self._weights else {}
    line |= {'moment': prompt.moment} if prompt.moment else {}
    return line

  def _as_line(self, prompt: int, known: dict[str, Any]) -> bytes:
    """Returns what is known of an answer as a line begins and ends, with the prompt's own 'id'."""
    name = self._prompts[prompt].name
    line = known if name is None else {'id': name} | known
    return json.dumps(line, ensure_ascii=False).encode()
