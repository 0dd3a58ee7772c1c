# SPDX-License-Identifier: Apache-2.0
r"""Writes documents as a folder of tokens, which training reads without the text.

python -m dsa_jax.tokenize --files='web/*.jsonl.zst' --tokenizer=checkpoints/v32 tokens/web
python -m dsa_jax.tokenize --config=configs/mine.py tokens/mine

The first form reads one source, whose format its files' endings tell, or --format. The second writes
a folder for each source of a config's mixture, and for its validation files. A job that was killed
goes on where it was. A config reads the result by `dict(format='tokens', files='tokens/web')`.
"""

import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from dsa_jax.command_line import end_stopped
from dsa_jax.config import ConfigError, local_path
from dsa_jax.data.corpora import files as places, tokenizing
from dsa_jax.data.corpora.raw import RawFormat
from dsa_jax.data.corpora.sources import RAW
from dsa_jax.data.corpora.tokens import read_manifest
from dsa_jax.data.sources import DataConfig, read_member
from dsa_jax.data.tokenizer import SPECIAL
from dsa_jax.data.tokenizer_files import open_tokenizer
from dsa_jax.training.flags import parse_flags
from dsa_jax.training.recipe import read_recipe

ENDINGS = {'.jsonl': 'jsonl', '.ndjson': 'jsonl', '.json': 'jsonl', '.parquet': 'parquet', '.arrow': 'arrow'}

CONFIG = config_flags.DEFINE_config_file('config', None, 'A config whose data is a mixture.')
FILES = flags.DEFINE_multi_string('files', [], 'Globs, files, folders or addresses; may be repeated.')
FORMAT = flags.DEFINE_enum('format', None, list(RAW), 'Of the files; by their endings if not given.')
FIELD = flags.DEFINE_string('field', 'text', 'The field or the column that holds the text.')
TOKENIZER = flags.DEFINE_string(
    'tokenizer', None, "'bytes', a tokenizer.json, or a folder that has one, as a checkpoint."
)
DAMAGED = flags.DEFINE_enum(
    'damaged', 'stop', tokenizing.DAMAGED, 'What to do about documents that are no text.'
)
SPECIAL_TOKENS = flags.DEFINE_enum(
    'special_tokens', 'text', SPECIAL,
    'What the name of a special token in a document stands for: text, or the token.'
)
WORKERS = flags.DEFINE_integer(
    'workers', None, 'Processes; the cores of this machine by default.', lower_bound=1
)


def main(argv: list[str]):
  try:
    if len(argv) != 2:
      raise ConfigError(f'one folder to write must be given; got {argv[1:]}.')
    out = local_path(argv[1], 'the folder to write')
    if CONFIG.value is None:
      source = guess_format(FILES.value, FORMAT.value, FIELD.value)
      write(source, TOKENIZER.value, DAMAGED.value, SPECIAL_TOKENS.value, out)
    else:
      write_mixture(read_recipe(CONFIG.value).data, out)
  except (ConfigError, OSError) as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:
    end_stopped('stopped; the same command goes on')


def write_mixture(data: DataConfig, out: pathlib.Path):
  """Writes each source of text of a mixture, but those that are there from the same files."""
  if given := [flag.name for flag in (FILES, FORMAT, FIELD, DAMAGED, SPECIAL_TOKENS) if flag.present]:
    raise ConfigError(f'--config says what to read: leave out --{", --".join(given)}.')
  members = {name: read_member(name, fields) for name, fields in data.sources.items()}
  sources = {name: member.source for name, member in members.items()}
  sources |= {f'{name}.validation': member.validation for name, member in members.items()}
  texts = {name: source for name, source in sources.items() if isinstance(source, RawFormat)}
  if not texts:
    raise ConfigError('the config has no source of text: data.sources must have one of a raw format.')
  for name, source in texts.items():
    tokenizer = TOKENIZER.value or data.tokenizer or 'bytes'
    opened = open_tokenizer(tokenizer, data.special_tokens)
    plan = tokenizing.digest_of(tokenizing.describe([source], opened, data.damaged))
    if (out / name).exists() and read_manifest(out / name).get('plan') == plan:
      print(f'{out / name} is there already, of the same files.')
    else:
      write(source, tokenizer, data.damaged, data.special_tokens, out / name)


def write(
    source: RawFormat, tokenizer: str | None, damaged: str, special_tokens: str, out: pathlib.Path
):
  """Tokenizes a source and says what came of it."""
  if not tokenizer:
    raise ConfigError("--tokenizer must be 'bytes', a tokenizer.json, or a folder that has one.")
  tokenizing.tokenize(
      [source], tokenizer, out,
      damaged=damaged, special_tokens=special_tokens, workers=WORKERS.value,
  )  # fmt: skip
  about = read_manifest(out)
  print(
      f'{out}: {about["documents"]:,} documents, {about["tokens"]:,} tokens of {about["bytes"]:,} '
      f'bytes; left out: {about["empty"]:,} empty, {about["damaged"]:,} damaged.'
  )


def guess_format(files: list[str], kind: str | None, field: str):
  """Returns the source of files, whose format their endings tell if none is given."""
  if not files:
    raise ConfigError('--files or --config must say what to read.')
  if kind is None and all((pathlib.Path(name) / 'state.json').exists() for name in files):
    kind = 'arrow'
  if kind is None:
    endings = {places.plain_suffix(name) for name in places.expand(files)}
    kinds = {ENDINGS.get(ending, 'text') for ending in endings}
    if len(kinds) > 1:
      raise ConfigError(f'the files end in {sorted(endings)}: give one kind, or --format.')
    (kind,) = kinds
  return RAW[kind](files=files) if kind == 'text' else RAW[kind](files=files, field=field)


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
