# SPDX-License-Identifier: Apache-2.0
"""Lets every arm answer the tasks of long context, and scores the answers."""

from collections.abc import Iterator, Sequence
import hashlib
import json
import time
from typing import Any, NamedTuple

from flax import nnx
import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.data.chat import find_chat_template
from dsa_jax.data.text import find_files, read_text, refuse_others
from dsa_jax.data.tokenizer import Tokenizer, check_tokenizer
from dsa_jax.data.tokenizer_files import find_tokenizer, open_tokenizer, tokenizer_folder
from dsa_jax.evaluation.arms import Arm, arms_of, read_kept
from dsa_jax.evaluation.subject import Subject, keep_bytes
from dsa_jax.evaluation.tasks import ROOM, Haystack, Task, make_task, score
from dsa_jax.inference.sampler import SampleConfig, Sampler
from dsa_jax.reporting.progress import StepProgress

ANSWERS = 'answers'  # The folder of what is kept.
HAYSTACK_BYTES = 2**22  # As much of the files is read.
SPARE = {'base': ROOM, 'instruct': 4 * ROOM}  # An instruct model may say more than the answer.


class Quiz(NamedTuple):
  """Tasks of one kind and length, and their prompts."""

  kind: str
  length: int
  tasks: list[Task]
  prompts: list[list[int]]

  @property
  def name(self) -> str:
    return f'{self.kind}-{self.length}'

  @property
  def digest(self) -> str:
    answers = [task.answers for task in self.tasks]
    return hashlib.sha256(json.dumps([self.prompts, answers]).encode()).hexdigest()


def make_quizzes(subject: Subject) -> list[Quiz]:
  """Makes the tasks of every kind and length that the settings name.

  Raises:
    ConfigError: There is too little text, or a task does not fit.
  """
  settings = subject.settings
  if not settings.tasks:
    return []
  tokenizer, haystack = tokenizer_of(subject), _read_haystack(settings.haystack)
  chat = _chat(subject)
  empty = len(tokenizer.encode_prompt(chat.replace('{prompt}', '')))
  measure = lambda text: len(tokenizer.encode_prompt(text)) + empty
  quizzes = []
  for length in settings.lengths:
    for kind in settings.tasks:
      make = lambda i: make_task(kind, haystack, length, i, measure, SPARE[settings.prompt])
      tasks = [make(i) for i in range(settings.examples)]
      prompts = [tokenizer.encode_prompt(_prompt(task, settings.prompt, chat)) for task in tasks]
      quizzes.append(Quiz(kind, length, tasks, prompts))
  largest = max(i for quiz in quizzes for prompt in quiz.prompts for i in prompt)
  if largest >= subject.cfg.vocab_size:
    raise ConfigError(
        f'a prompt holds id {largest} and the model has {subject.cfg.vocab_size}: give the '
        'tokenizer of the model by --tokenizer.'
    )
  return quizzes


def answer_quizzes(
    subject: Subject, quizzes: Sequence[Quiz], bar: StepProgress
) -> dict[str, dict[str, Any]]:
  """Answers what has not been answered before, the likeliest token at each step.

  Returns:
    For each arm, by the name of a quiz, the `texts` of its answers, their `scores` and `seconds`.
  """
  tokenizer = tokenizer_of(subject) if quizzes else None
  answered = {}
  for arm in arms_of(subject) if quizzes else []:
    sampler, answered[arm.name] = None, {}
    for quiz in quizzes:
      path = subject.settings.out / ANSWERS / arm.name / f'{quiz.name}.json'
      kept = read_kept(path)
      if kept is None or kept.get('digest') != quiz.digest:
        sampler = sampler or _sampler(subject, arm, tokenizer)
        kept = _answer(quiz, sampler, subject.settings.batch_size, f'{arm.name} {quiz.name}', bar)
        keep_bytes(path, json.dumps(kept).encode())
      scores = [score(_as_written(task, tokenizer), x) for task, x in zip(quiz.tasks, kept['texts'])]
      answered[arm.name][quiz.name] = kept | {'scores': scores}
  return answered


def collect_answers(
    quizzes: Sequence[Quiz], answered: dict[str, dict[str, Any]]
) -> dict[str, Any]:
  """Returns mean scores by arm: by kind and length, and by depth and length."""
  lengths, depths, seconds = {}, {}, {}
  for arm, of_arm in answered.items():
    by_depth: dict[tuple[int, float], list[float]] = {}
    lengths[arm] = {quiz.name: float(np.mean(of_arm[quiz.name]['scores'])) for quiz in quizzes}
    seconds[arm] = sum(of_arm[quiz.name]['seconds'] for quiz in quizzes)
    for quiz in quizzes:
      for task, points in zip(quiz.tasks, of_arm[quiz.name]['scores']):
        if task.depth is not None:
          by_depth.setdefault((quiz.length, task.depth), []).append(points)
    depths[arm] = {
        f'{depth:.0%} of {length}': float(np.mean(points))
        for (length, depth), points in sorted(by_depth.items())
    }
  return {
      'kinds': list(dict.fromkeys(quiz.kind for quiz in quizzes)),
      'lengths': sorted({quiz.length for quiz in quizzes}),
      'scores': lengths,
      'by_depth': depths,
      'seconds': seconds,
  }


def tokenizer_of(subject: Subject) -> Tokenizer:
  """Returns the tokenizer of prompts: the one that was named, or else the checkpoint's own."""
  named = subject.settings.tokenizer
  tokenizer = open_tokenizer(named) if named else find_tokenizer(subject.stored.origin)
  check_tokenizer(tokenizer, subject.cfg.vocab_size)
  return tokenizer


def _read_haystack(pattern: str) -> Haystack:
  text, others, n_bytes = [], [], 0
  for file in find_files(pattern):
    content = read_text(file, others)[: HAYSTACK_BYTES - n_bytes]
    text.append(content.decode(errors='ignore'))  # The last character may be cut.
    n_bytes += len(content)
    if n_bytes >= HAYSTACK_BYTES:
      break
  refuse_others(others)
  return Haystack.of('\n'.join(text))


def _chat(subject: Subject) -> str:
  """Returns what surrounds a prompt; '{prompt}' alone for a base model."""
  settings = subject.settings
  if settings.prompt == 'base':
    return '{prompt}'
  if settings.chat:
    return settings.chat
  folder = tokenizer_folder(settings.tokenizer) if settings.tokenizer else subject.stored.origin
  if folder and (template := find_chat_template(folder, subject.moment)):
    # The room for an answer is none for thoughts, which Qwen3, GLM-4.5 and SmolLM3 begin with.
    chat = template([{'role': 'user', 'content': '{prompt}'}], enable_thinking=False)
    if '{prompt}' not in chat:
      raise ConfigError("the checkpoint's chat template drops a message of text: give --chat.")
    return chat
  raise ConfigError(
      "prompt='instruct' needs the marks of the model's turns: give --chat='...{prompt}...', because "
      'the checkpoint has no chat template.'
  )


def _prompt(task: Task, kind: str, chat: str) -> str:
  if kind == 'base':
    return task.base_prompt
  return chat.replace('{prompt}', f'{task.context}\n\n{task.question}')


def _sampler(subject: Subject, arm: Arm, tokenizer: Tokenizer) -> Sampler:
  settings = subject.settings
  graph = subject.graph(arm.index_topk or subject.cfg.index_topk)
  return Sampler(
      nnx.merge(graph, subject.params),
      tokenizer,
      capacity=settings.capacity,
      attention='sparse' if arm.rule else 'dense',
      rule=arm.rule or 'indexer',
      backend=settings.backend,
      mesh=subject.mesh,
  )


def _answer(
    quiz: Quiz, sampler: Sampler, batch_size: int, name: str, bar: StepProgress
) -> dict[str, Any]:
  began, texts = time.monotonic(), []
  bar.start_stage(name, len(quiz.tasks))
  for prompts, room in _batches(quiz, batch_size):
    config = SampleConfig(max_new_tokens=room, stop=sampler.tokenizer.stop)
    ids = sampler.generate(prompts, config)
    texts += [''.join(sampler.tokenizer.stream(*pair)) for pair in zip(ids, prompts)]
    n_tokens = sum(map(len, quiz.prompts[: len(texts)]))
    bar.update(min(len(texts), len(quiz.tasks)), n_tokens / (time.monotonic() - began))
  texts = texts[: len(quiz.tasks)]
  return {'digest': quiz.digest, 'texts': texts, 'seconds': time.monotonic() - began}


def _as_written(task: Task, tokenizer: Tokenizer) -> list[str]:
  """Returns the answers as a tokenizer writes them; some write 1234 as 1 2 3 4."""
  written = (''.join(tokenizer.stream(tokenizer.encode(answer))).strip() for answer in task.answers)
  return [text or answer for text, answer in zip(written, task.answers)]


def _batches(quiz: Quiz, batch_size: int) -> Iterator[tuple[list[list[int]], int]]:
  """Yields prompts, as many each time, and the tokens that their answers may take."""
  for first in range(0, len(quiz.tasks), batch_size):
    own = slice(first, first + batch_size)
    prompts = quiz.prompts[own]
    room = min(max(task.room for task in quiz.tasks[own]), quiz.length - max(map(len, prompts)))
    yield prompts + prompts[:1] * (batch_size - len(prompts)), room
