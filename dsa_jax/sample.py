# SPDX-License-Identifier: Apache-2.0
"""Continues a text, or the prompts of a file.

    python -m dsa_jax.sample --checkpoint=runs/quickstart/checkpoints/sparse --prompt='def main('
    python -m dsa_jax.sample --checkpoint=FOLDER --prompts=prompts.jsonl --out=answers.jsonl

A line of `--prompts` is {"prompt": "..."} or, for a checkpoint with a chat template, {"messages":
[{"role": "user", "content": "..."}]}, maybe with an "id". Answers are added to `--out` as they end;
the same command goes on where it was stopped.

A model that is too large for one device is split over several by `--mesh.expert=8` and the like, as in
training. On several hosts, each of them runs the same command.
"""

import dataclasses
import logging
import pathlib
import resource
import statistics
import sys
import time
from typing import Any, NamedTuple

from absl import app, flags
import jax
import rich.console

from dsa_jax.command_line import check_no_words, end_stopped
from dsa_jax.config import ConfigError, local_path
from dsa_jax.data.chat import ChatTemplate, find_chat_template, prompt_of
from dsa_jax.inference.batch_file import AnswerFile, Prompt, check_paths, moment_of, read_prompts
from dsa_jax.inference.batching import size_of_batch
from dsa_jax.inference.cache import FORMATS
from dsa_jax.inference.load import StoredModel, config_of, find_checkpoint, warn_of_length
from dsa_jax.inference.memory import Texts
from dsa_jax.inference.sampler import (
    SampleConfig, Sampler, check_capacity, check_drawing, check_prompt, tokenizer_of,
)  # fmt: skip
from dsa_jax.inference.shares import check_texts
from dsa_jax.inference.weights import FORMATS as WEIGHTS
from dsa_jax.parallel.mesh import MeshConfig, make_mesh
from dsa_jax.parallel.processes import check_same, end_process, is_first, join_job, moment_of_job
from dsa_jax.reporting.progress import StepProgress
from dsa_jax.selection import RULES
from dsa_jax.training.checkpoint import weights_of
from dsa_jax.training.compilation_cache import compilation_cache

LOST = (
    'another process of this job has gone. Start the same command again, on each host; with --out it '
    'goes on where it was stopped.'
)


class Job(NamedTuple):
  """What is to be written, which is known before any weight is loaded."""

  prompts: list[Prompt]
  config: SampleConfig
  checkpoint: pathlib.Path  # The step, in the folder that was named.
  is_latest: bool  # Whether it was found as the latest one.
  of_sampler: dict[str, Any]  # Arguments of `Sampler.load`.


def main(argv: list[str]):
  logging.getLogger('absl').setLevel(logging.ERROR)  # Silences orbax's INFO logs.
  of_sampler, drawing = (
      {name: flag.value for name, flag in flags_.items() if flag.value is not None}
      for flags_ in (SAMPLER, DRAWING)
  )
  try:
    check_no_words(argv)
    check_flags()
    join_job()
    with compilation_cache(COMPILATION_CACHE.value):
      job = prepare(of_sampler, drawing)
      (continue_file if PROMPTS.value else continue_one)(load(job), job)
  except (ConfigError, OSError) as error:
    sys.exit(f'error: {error}')
  except jax.errors.JaxRuntimeError as error:
    end_process(error, LOST)
  except KeyboardInterrupt:
    end_stopped('stopped; the same command goes on' if PROMPTS.value else 'stopped')


def prepare(of_sampler: dict[str, Any], drawing: dict[str, Any]) -> Job:
  """Reads the prompts, and checks what can be known of them without the weights."""
  sizes = MeshConfig(**{name: flag.value for name, flag in MESH.items()})
  if PROMPTS.value:
    check_texts(sizes, '--slots', SLOTS.value)
  mesh = make_mesh(**sizes.sizes) if sizes.n_devices > 1 else None
  named = find_checkpoint(CHECKPOINT.value)
  stored = named.at_one_step()
  cfg = config_of(stored, of_sampler.get('index_topk'), of_sampler.get('index_rope_factor'))
  capacity = check_capacity(cfg, of_sampler['capacity'], mesh)
  tokenizer, chat = tokenizer_of(stored, cfg), chat_of(stored)
  config = SampleConfig(**({'stop': tokenizer.stop} | drawing))
  check_drawing(config, cfg)
  prompts = given_prompts(chat)
  ids = [tokenizer.encode_prompt(prompt.text) for prompt in prompts]
  for i, prompt in enumerate(ids):
    check_prompt(i, prompt, cfg, capacity, room=config.max_new_tokens)
  is_sparse = stored.has_trained_indexer and of_sampler.get('attention') != 'dense'
  if is_sparse and of_sampler.get('rule', stored.rule) == 'indexer':
    warn_of_length(stored, cfg, max(map(len, ids)) + config.max_new_tokens)
  check_same({
      'flags': [of_sampler, dataclasses.asdict(config), sizes.sizes, SAMPLES.value, SLOTS.value],
      'prompts': ids,
      'the checkpoint': [stored.record['model'], weights_of(stored.step)],
  })
  texts = Texts(n=1, capacity=capacity)
  if PROMPTS.value:
    longest = max(map(len, ids)) + config.max_new_tokens
    n, capacity = size_of_batch(cfg, sizes, SLOTS.value, len(prompts) * SAMPLES.value, longest)
    texts = Texts(n=n, capacity=capacity, drafts=bool(of_sampler.get('drafts')), is_running=True)
  known = dict(mesh=mesh, tokenizer=tokenizer, chat=chat, texts=texts)
  return Job(prompts, config, stored.step, named.step is None, of_sampler | known)


def chat_of(stored: StoredModel) -> ChatTemplate | None:
  """Returns the chat template, which writes the date on which `--out` was begun."""
  kept = moment_of(local_path(OUT.value, '--out')) if OUT.value else None
  return find_chat_template(stored.origin, moment_of_job(kept))


def given_prompts(chat: ChatTemplate | None) -> list[Prompt]:
  if PROMPTS.value:
    return read_prompts(local_path(PROMPTS.value, '--prompts'), chat)
  text = read_prompt(PROMPT.value)
  return [Prompt(prompt_of([{'role': 'user', 'content': text}], chat) if CHAT.value else text, None)]


def load(job: Job) -> Sampler:
  """Loads the sampler, and says how long it took and how much memory of the host."""
  began = time.monotonic()
  sampler = Sampler.load(job.checkpoint, **job.of_sampler)
  seconds, unit = time.monotonic() - began, 1 if sys.platform == 'darwin' else 1024
  gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
  report(f'loaded in {seconds:.1f} s, with at most {gib:.2f} GiB of memory on this host')
  return sampler


def report(text: str):
  """Prints a line beside the answers; of several processes, the first does."""
  if is_first():
    print(f'[{text}]', file=sys.stderr, flush=True)


def check_flags():
  """Raises ConfigError unless the flags ask for one thing."""
  if bool(PROMPT.value) == bool(PROMPTS.value):
    raise ConfigError('give either --prompt, or --prompts with --out.')
  if bool(PROMPTS.value) != bool(OUT.value):
    raise ConfigError('--prompts and --out need each other: the answers are written to --out.')
  if PROMPT.value and SAMPLER['drafts'].value:
    raise ConfigError('--drafts needs --prompts: --prompt is continued without them.')
  if PROMPT.value and SAMPLES.value != 1:
    raise ConfigError(f'--samples={SAMPLES.value} needs --prompts: --prompt is continued once.')
  for name, flag in ('--prompts', PROMPTS), ('--out', OUT):
    local_path(flag.value or '', name)
  if PROMPTS.value:
    check_paths(pathlib.Path(PROMPTS.value), pathlib.Path(OUT.value))
  if PROMPTS.value and CHAT.value:
    raise ConfigError("--chat is for --prompt; a line of --prompts has 'messages' in place of a 'prompt'.")


def continue_one(sampler: Sampler, job: Job):
  """Prints the continuation of one prompt as it is written."""
  times = [time.monotonic()]
  for text in sampler.stream(job.prompts[0].text, **vars(job.config)):
    if is_first():
      print(text, end='', flush=True)
    times.append(time.monotonic())
  times.pop()  # The last piece is what the end leaves of a text, and no token.
  if is_first():
    print(file=sys.stderr)
  report(f'{describe(times)}, {sampler.attention} attention')


def continue_file(sampler: Sampler, job: Job):
  """Answers the prompts of a file that have no answer yet."""
  out = local_path(OUT.value, '--out')
  checkpoint = job.checkpoint.resolve()
  earlier = checkpoint.parent if job.is_latest else checkpoint
  answers = AnswerFile(
      out, sampler, job.prompts, job.config, SAMPLES.value, str(checkpoint), earlier=str(earlier),
      weights=weights_of(checkpoint),
  )  # fmt: skip
  done, began, n_tokens, n_steps, to_first = len(answers.answered), time.monotonic(), 0, 0, []
  with StepProgress(rich.console.Console(stderr=True, quiet=not is_first())) as bar:
    bar.start_stage('answers', done + answers.n_left, done)
    for i, completion in enumerate(answers.answer(SLOTS.value), done + 1):
      n_tokens, n_steps = n_tokens + len(completion.ids), n_steps + completion.steps
      to_first.append(completion.seconds_to_first)
      bar.update(i, n_tokens / (time.monotonic() - began))
  seconds = time.monotonic() - began
  text = f'{len(to_first)} answers, {n_tokens} tokens in {seconds:.1f} s'
  if to_first:
    text += (
        f': {n_tokens / seconds:.1f} tokens/s, the first of a text after '
        f'{statistics.median(to_first):.1f} s (median; {max(to_first):.1f} s at most)'
    )
    if SAMPLER['drafts'].value:
      text += f', {n_tokens / n_steps:.2f} tokens a step'
  report(f'{text}, {sampler.attention} attention')


def describe(times: list[float]) -> str:
  """Says how long it took, from when it began and when each token was there.

  The first token waits for the prompt to be read, and for compilation.
  """
  n_tokens = len(times) - 1
  text = f'{n_tokens} tokens in {times[-1] - times[0]:.1f} s'
  if n_tokens < 2:
    return text
  speed = (n_tokens - 1) / max(times[-1] - times[1], 1e-9)
  return f'{text}: {times[1] - times[0]:.1f} s to the first, then {speed:.1f} tokens/s'


def read_prompt(prompt: str) -> str:
  """Returns the prompt itself, or the text of the file that `@FILE` names."""
  if not prompt.startswith('@'):
    return prompt
  path = local_path(prompt[1:], '--prompt')
  try:
    return path.read_bytes().decode('utf-8-sig')  # With its line ends, as documents have them.
  except UnicodeDecodeError as error:
    raise ConfigError(f'{path} is no UTF-8 text: {error}.') from error


if __name__ == '__main__':
  CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Converted, or RUN/checkpoints/ENTRY.')
  PROMPT = flags.DEFINE_string('prompt', None, 'The text to continue, or @FILE to read it.')
  CHAT = flags.DEFINE_bool(
      'chat', False, "Makes --prompt the message of a user, by the checkpoint's chat template."
  )
  PROMPTS = flags.DEFINE_string('prompts', None, 'A JSONL file of prompts to continue.')
  OUT = flags.DEFINE_string('out', None, 'The JSONL file of their continuations.')
  SAMPLES = flags.DEFINE_integer('samples', 1, 'Continuations of each of --prompts.', lower_bound=1)
  SLOTS = flags.DEFINE_integer(
      'slots', 8, 'At most so many of them are written side by side.', lower_bound=1
  )
  COMPILATION_CACHE = flags.DEFINE_string(
      'compilation_cache', '', "Folder of compiled programs; default: the user's cache; off: none."
  )
  SAMPLER = {
      'attention': flags.DEFINE_enum(
          'attention', None, ['sparse', 'masked', 'dense'],
          'How to attend; default: sparse, or dense if the indexer was never trained.',
      ),
      'index_topk': flags.DEFINE_integer(
          'index_topk', None, "How many tokens each token selects; default: the model's budget."
      ),
      'index_rope_factor': flags.DEFINE_float(
          'index_rope_factor', None,
          "How many times as long as the rows from which a run's indexer learned a text may be; default: the model's.",
      ),
      'rule': flags.DEFINE_enum(
          'rule', None, list(RULES), "What selects them; default: the rule of the run, or 'indexer'."
      ),
      'cache': flags.DEFINE_enum(
          'cache', None, FORMATS, "Format of the cache; default: the model's dtype."
      ),
      'weights': flags.DEFINE_enum(
          'weights', '', ['', *WEIGHTS],
          'Format of the weights; default: fp8 if the released checkpoint was and this is no CPU, or float32.',
      ),
      'drafts': flags.DEFINE_bool(
          'drafts', None, "Lets the model's MTP layer guess tokens of --prompts, for fewer steps."
      ),
      'capacity': flags.DEFINE_integer(
          'capacity', 0, 'Tokens of the cache; 0: all that the model can read.'
      ),
  }  # fmt: skip
  MESH = {
      'fsdp': flags.DEFINE_integer('mesh.fsdp', 1, 'Devices that share texts and weights.'),
      'context': flags.DEFINE_integer('mesh.context', 1, 'Devices that share the tokens of a text.'),
      'expert': flags.DEFINE_integer('mesh.expert', 1, 'Devices that share texts and experts.'),
      'tensor': flags.DEFINE_integer('mesh.tensor', 1, 'Devices that share heads and experts.'),
  }
  DRAWING = {
      'max_new_tokens': flags.DEFINE_integer('max_new_tokens', 128, 'Tokens to write at most.'),
      'temperature': flags.DEFINE_float(
          'temperature', 0, 'Divides the logits; 0: always the likeliest token.'
      ),
      'top_k': flags.DEFINE_integer(
          'top_k', 0, 'Draw from as many of the likeliest tokens; 0: all.'
      ),
      'top_p': flags.DEFINE_float(
          'top_p', 1, 'Draw from the likeliest tokens that hold this probability.'
      ),
      'stop': flags.DEFINE_multi_integer(
          'stop', None, "An id that ends the text; may be repeated. Default: the tokenizer's own."
      ),
      'stop_texts': flags.DEFINE_multi_string(
          'stop_text', None, 'A text that ends the text; may be repeated.'
      ),
      'seed': flags.DEFINE_integer('seed', 0, 'Determines what is drawn.'),
  }
  flags.mark_flags_as_required(['checkpoint'])
  app.run(main)
