# SPDX-License-Identifier: Apache-2.0
"""Continues a text.

    python -m dsa_jax.sample --checkpoint=runs/quickstart/checkpoints/sparse --prompt='def main('
"""

import logging
import pathlib
import sys
import time

from absl import app, flags

from dsa_jax.config import ConfigError
from dsa_jax.inference.cache import FORMATS
from dsa_jax.inference.sampler import Sampler
from dsa_jax.selection import RULES
from dsa_jax.training.compilation_cache import compilation_cache


def main(_):
  logging.getLogger('absl').setLevel(logging.ERROR)  # Silences orbax's INFO logs.
  sampler_flags = {name: flag.value for name, flag in SAMPLER.items() if flag.value is not None}
  drawing = {name: flag.value for name, flag in DRAWING.items() if flag.value is not None}
  try:
    with compilation_cache(COMPILATION_CACHE.value):
      prompt = read_prompt(PROMPT.value)
      sampler = Sampler.load(CHECKPOINT.value, **sampler_flags)
      began, n_chars = time.monotonic(), 0
      for text in sampler.stream(prompt, **drawing):
        print(text, end='', flush=True)
        n_chars += len(text)
  except (ConfigError, OSError) as error:
    sys.exit(f'error: {error}')
  seconds = time.monotonic() - began
  summary = f'[{n_chars} characters in {seconds:.1f} s, {sampler.attention} attention]'
  print(f'\n{summary}', file=sys.stderr)


def read_prompt(prompt: str) -> str:
  """Returns the prompt itself, or the text of the file that `@FILE` names."""
  if not prompt.startswith('@'):
    return prompt
  path = pathlib.Path(prompt[1:]).expanduser()
  try:
    return path.read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise ConfigError(f'{path} is no UTF-8 text: {error}.') from error


if __name__ == '__main__':
  CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Converted, or RUN/checkpoints/ENTRY.')
  PROMPT = flags.DEFINE_string('prompt', None, 'The text to continue, or @FILE to read it.')
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
      'rule': flags.DEFINE_enum(
          'rule', None, list(RULES), "What selects them; default: the rule of the run, or 'indexer'."
      ),
      'cache': flags.DEFINE_enum(
          'cache', None, FORMATS, "Format of the cache; default: the model's dtype."
      ),
      'capacity': flags.DEFINE_integer(
          'capacity', 0, 'Tokens of the cache; 0: all that the model can read.'
      ),
  }  # fmt: skip
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
      'seed': flags.DEFINE_integer('seed', 0, 'Determines what is drawn.'),
  }
  flags.mark_flags_as_required(['checkpoint', 'prompt'])
  app.run(main)
