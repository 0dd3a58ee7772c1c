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
from dsa_jax.data.tokenizer import Bytes
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
      times = [time.monotonic()]
      for text in sampler.stream(prompt, **drawing):
        print(text, end='', flush=True)
        times.append(time.monotonic())
  except (ConfigError, OSError) as error:
    sys.exit(f'error: {error}')
  if isinstance(sampler.tokenizer, Bytes):
    times.pop()  # Its last piece ends an unfinished character, and is no token.
  print(f'\n[{describe(times)}, {sampler.attention} attention]', file=sys.stderr)


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
