# SPDX-License-Identifier: Apache-2.0
r"""Says what a model loses when its attention goes sparse.

    python -m dsa_jax.evaluate runs/quickstart/checkpoints/sparse OUT
    python -m dsa_jax.evaluate checkpoints/qwen3 --files='texts/*.txt' --context=2048 \
        --index_topk=64,128,256 --rules=indexer,oracle,window_sinks OUT

The first form scores the run's own validation data. Dense attention is always scored, too. The same
command goes on where it was stopped, and adds the rules, budgets and tasks that are new.
--tasks=all lets every arm answer tasks of long context, too. --mesh.context=4 and the like share the
work among several devices, as in training and in sampling. On several hosts, each of them runs the same
command, and the first one writes; OUT must lie on a disk that all of them see.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import logging
import pathlib
import sys
from typing import Any

from absl import app, flags
import jax

from dsa_jax.claims import claimed
from dsa_jax.command_line import end_stopped
from dsa_jax.config import ConfigError
from dsa_jax.data.packing import PACKINGS
from dsa_jax.evaluation.answers import Quiz, answer_quizzes, collect_answers, make_quizzes
from dsa_jax.evaluation.arms import measure_budgets, score_arms
from dsa_jax.evaluation.page import write_page
from dsa_jax.evaluation.results import collect
from dsa_jax.evaluation.settings import DTYPES, FILE_FORMATS, PROMPTS, Settings
from dsa_jax.evaluation.subject import Subject, keep_settings, open_subject
from dsa_jax.evaluation.tasks import KINDS
from dsa_jax.parallel.mesh import MeshConfig
from dsa_jax.parallel.processes import check_same, end_process, is_first, join_job
from dsa_jax.reporting.progress import StepProgress
from dsa_jax.training.compilation_cache import compilation_cache

LOST = 'another process of this job has gone. Start the same command again, on each host: it goes on.'


def evaluate(settings: Settings) -> dict[str, Any]:
  """Evaluates a checkpoint; each part is kept as soon as it is there.

  Returns:
    What `evaluate.json` holds.

  Raises:
    ConfigError: Something will not do. Nothing has been written.
  """
  subject = open_subject(settings)
  quizzes = make_quizzes(subject)
  check_same(_of_job(subject, quizzes))
  with claimed(subject.settings.out) if is_first() else contextlib.nullcontext():
    keep_settings(subject)
    with StepProgress(quiet=not is_first()) as bar:
      scored, measured = score_arms(subject, bar), measure_budgets(subject, bar)
      answered = answer_quizzes(subject, quizzes, bar)
    results = collect(subject, scored, measured) | {'tasks': collect_answers(quizzes, answered)}
    if is_first():
      write_page(subject.settings.out, results)
  return results


def _of_job(subject: Subject, quizzes: Sequence[Quiz]) -> dict[str, Any]:
  """Returns what all processes must agree on, or they would work at different arms."""
  settings, out = dataclasses.asdict(subject.settings), subject.settings.out
  own = 'checkpoint', 'out', 'files', 'tokenizer', 'haystack'  # Places, which tell nothing.
  of_all = {f'--{name}': x for name, x in settings.items() if name not in own}
  kept = sorted(str(path.relative_to(out)) for path in out.rglob('*') if path.is_file())
  return of_all | {
      'the checkpoint and the data': {k: v for k, v in subject.identity.items() if k not in own},
      'the tasks': [quiz.digest for quiz in quizzes],
      'what OUT holds, which must lie on a disk that all of them see': kept,
  }


def main(argv: list[str]):
  logging.getLogger('absl').setLevel(logging.ERROR)  # Silences orbax's INFO logs.
  try:
    if len(argv) != 3:
      raise ConfigError(f'give the checkpoint and the folder of the results; got {argv[1:]}.')
    join_job()
    with compilation_cache(COMPILATION_CACHE.value):
      evaluate(read_flags(*argv[1:]))
  except (ConfigError, OSError) as error:
    sys.exit(f'error: {error}')
  except jax.errors.JaxRuntimeError as error:
    end_process(error, LOST)
  except KeyboardInterrupt:
    end_stopped('stopped; the same command goes on')


def read_flags(checkpoint: str, out: str) -> Settings:
  given = {name: flag.value for name, flag in SETTINGS.items() if flag.value is not None}
  for name in 'index_topk', 'lengths':
    try:
      given[name] = tuple(int(x) for x in given.get(name, ()))
    except ValueError as error:
      raise ConfigError(f'--{name}={given[name]} must be numbers.') from error
  given |= {name: tuple(given[name]) for name in ('files', 'rules', 'tasks') if name in given}
  if given.get('tasks') == ('all',):
    given['tasks'] = tuple(KINDS)
  mesh = MeshConfig(**{name: flag.value for name, flag in MESH.items()})
  return Settings(checkpoint=checkpoint, out=pathlib.Path(out), mesh=mesh, **given)


if __name__ == '__main__':
  COMPILATION_CACHE = flags.DEFINE_string(
      'compilation_cache', '', "Folder of compiled programs; default: the user's cache; off: none."
  )
  SETTINGS = {
      'files': flags.DEFINE_multi_string(
          'files', None, 'Globs, files or folders; may be repeated. Default: the data of the run.'
      ),
      'format': flags.DEFINE_enum('format', None, FILE_FORMATS, 'Of the files; default: text.'),
      'field': flags.DEFINE_string('field', None, 'The field or column of text; default: text.'),
      'tokenizer': flags.DEFINE_string(
          'tokenizer', None, "'bytes', a tokenizer.json, or its folder; default: the checkpoint's."
      ),
      'packing': flags.DEFINE_enum('packing', None, PACKINGS, 'Of files; default: concat.'),
      'min_tokens': flags.DEFINE_integer('min_tokens', None, 'Leaves out shorter documents.'),
      'context': flags.DEFINE_integer(
          'context', None, 'Tokens of a row; default: 2048, or what a smaller model can read.'
      ),
      'rows': flags.DEFINE_integer('rows', None, 'Rows to score; default: 64.'),
      'batch_size': flags.DEFINE_integer(
          'batch_size', None, 'Rows at a time, which memory depends on; default: 4.'
      ),
      'index_topk': flags.DEFINE_list(
          'index_topk', None, "Budgets, separated by commas; default: the model's own."
      ),
      'index_rope_factor': flags.DEFINE_float(
          'index_rope_factor', None,
          "How many times as long as the rows from which a run's indexer learned those to score are; default: the "
          "model's.",
      ),
      'rules': flags.DEFINE_list(
          'rules', None, 'What selects, separated by commas; default: all but an untrained indexer.'
      ),
      'tasks': flags.DEFINE_list(
          'tasks', None, f'Tasks of long context, separated by commas, or all: {", ".join(KINDS)}.'
      ),
      'lengths': flags.DEFINE_list(
          'lengths', None, 'Tokens of a task, separated by commas; default: --context.'
      ),
      'examples': flags.DEFINE_integer(
          'examples', None, 'Tasks of each kind and length; default: 10.'
      ),
      'prompt': flags.DEFINE_enum('prompt', None, PROMPTS, 'What the model is; default: base.'),
      'chat': flags.DEFINE_string(
          'chat', None, "What surrounds {prompt} for an instruct model; default: its chat template."
      ),
      'haystack': flags.DEFINE_string(
          'haystack', None, "A glob of plain text for tasks; default: Python's library."
      ),
      'dtype': flags.DEFINE_enum('dtype', None, DTYPES, 'Of matrices; default: float32.'),
      'backend': flags.DEFINE_string('backend', None, "Of the kernels; default: the platform's."),
  }  # fmt: skip
  MESH = {
      'fsdp': flags.DEFINE_integer('mesh.fsdp', 1, 'Devices that share rows and weights.'),
      'context': flags.DEFINE_integer('mesh.context', 1, 'Devices that share the tokens of a row.'),
      'expert': flags.DEFINE_integer('mesh.expert', 1, 'Devices that share rows and experts.'),
      'tensor': flags.DEFINE_integer('mesh.tensor', 1, 'Devices that share heads and experts.'),
  }
  app.run(main)
