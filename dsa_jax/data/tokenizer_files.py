# SPDX-License-Identifier: Apache-2.0
"""Opens the tokenizer of a checkpoint, a release or a run, as the files beside its tokenizer.json want it."""

import logging
import pathlib
from typing import Any

import tokenizers

from dsa_jax.checkpoint_paths import readings
from dsa_jax.config import ConfigError
from dsa_jax.data.tokenizer import SPECIAL, Bytes, Pretrained, Tokenizer
from dsa_jax.json_files import read_object

# What decides the ids of a text or of a conversation, beside config.json.
TOKENIZER_FILES = (
    'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
    'generation_config.json', 'chat_template.jinja',
)  # fmt: skip


def open_tokenizer(where: str, special_tokens: str = 'text') -> Tokenizer:
  """Returns the tokenizer of that name.

  Args:
    where: '' or 'bytes'; a tokenizer.json; or a folder that has one, such as a converted checkpoint,
      a release, or a run that started from one.
    special_tokens: What the name of one in a document stands for: 'text', or the token's id ('ids').

  Raises:
    ConfigError: There is no such tokenizer, it is damaged, or it has no special tokens.
  """
  if special_tokens not in SPECIAL:
    raise ConfigError(f'{special_tokens=} must be one of {SPECIAL}.')
  folder = tokenizer_folder(where)
  tokenizer = Bytes() if folder is None else find_tokenizer(folder)
  if special_tokens == 'text':
    return tokenizer
  if isinstance(tokenizer, Bytes):
    raise ConfigError(f'{special_tokens=} would change nothing: bytes have no special tokens.')
  tokenizer.special_tokens = special_tokens
  return tokenizer


def tokenizer_folder(where: str) -> pathlib.Path | None:
  """Returns the folder of a tokenizer's files, None for bytes; see `open_tokenizer`."""
  if where in ('', 'bytes'):
    return None
  path = pathlib.Path(where).expanduser()
  folder = kept_tokenizer(path.parent if path.name == 'tokenizer.json' else path)
  if folder:
    return folder
  raise ConfigError(
      f"tokenizer={where!r} must be 'bytes', a tokenizer.json (a file of that name), or a folder of "
      'this machine that has one; there is none.'
  )


def kept_tokenizer(place: pathlib.Path) -> pathlib.Path | None:
  """Returns where a checkpoint, a release or a run keeps its tokenizer, None if it has none."""
  for reading in readings(place):
    for folder in (reading.folder, *(home / 'origin' for home in reading.homes)):
      if (folder / 'tokenizer.json').is_file():
        return folder
  return None


def find_tokenizer(folder: pathlib.Path) -> Tokenizer:
  """Returns the tokenizer of a checkpoint: its tokenizer.json, or bytes where it has none.

  The files beside it say whether a text begins with an id of its own, and which ids end one.

  Args:
    folder: The checkpoint, a release, or what a run has kept of one.

  Raises:
    ConfigError: A file is damaged, or names a token that the tokenizer lacks.
  """
  path = folder / 'tokenizer.json'
  if not path.exists():
    if read_object(folder / 'config.json').get('source'):
      logging.warning(f'{folder} has no tokenizer.json: texts are read and written as bytes.')
    return Bytes()
  tokenizer = Pretrained(path)
  released = released_config(folder)
  settings = read_object(folder / 'tokenizer_config.json')
  tokens = read_object(folder / 'special_tokens_map.json')
  token = lambda key: text_of_token(settings.get(key)) or text_of_token(tokens.get(key))
  for i, added in _described_tokens(folder, settings, tokens):
    _add_token(tokenizer, folder, i, added, released.get('vocab_size'))
  for name in sorted(_special_names(settings) | _special_names(tokens)):
    if tokenizer.id_of(name) is not None and not tokenizer.is_mark(name):
      tokenizer.add(tokenizers.AddedToken(name, normalized=False, special=True))
  tokenizer.read_again()
  tokenizer.read_marks(not settings.get('split_special_tokens'))
  space, wanted = tokenizer.begins_with_space, settings.get('add_prefix_space')
  if None not in (space, wanted) and space != wanted:
    logging.warning(
        f'{folder}: add_prefix_space={wanted!r} of tokenizer_config.json contradicts {space} of '
        'tokenizer.json, which is obeyed: texts may get other ids in other loaders.'
    )
  named = stop_ids(folder, released)
  tokenizer.stop = _known_stops(tokenizer, folder, named, token('eos_token'))
  tokenizer.named_stops = named if named[:1] == tokenizer.stop[:1] else tokenizer.stop
  adds, where = settings.get('add_bos_token'), f'{folder}/tokenizer_config.json'
  if adds not in (None, True, False):
    raise ConfigError(f'{where}: add_bos_token={adds!r} must be true or false.')
  bos, first = token('bos_token'), released.get('bos_token_id')
  tokenizer.bos = tokenizer.id_of(bos) if bos else first if tokenizer.is_special(first) else None
  if adds and tokenizer.bos is None:
    raise ConfigError(
        f'{where}: add_bos_token is true, but bos_token={bos!r} is no token of tokenizer.json.'
    )
  tokenizer.adds_bos = adds
  return tokenizer


def _known_stops(
    tokenizer: Pretrained, folder: pathlib.Path, ids: tuple[int, ...], eos_token: str | None
) -> tuple[int, ...]:
  """Returns the ids that end a text: those of a model's files, or its eos_token where they name none.

  Args:
    tokenizer: The tokenizer, with all its tokens.
    folder: Where it lies.
    ids: What config.json and generation_config.json say.
    eos_token: What the files of the tokenizer say.

  Raises:
    ConfigError: The model's files name ids, and the tokenizer has none of them.
  """
  named = None if eos_token is None else tokenizer.id_of(eos_token)
  if not ids:
    return () if named is None else (named,)
  known = tuple(i for i in ids if i < tokenizer.vocab_size)
  says = f'{folder}: config.json or generation_config.json says that a text ends with eos_token_id={[*ids]}'
  if not known:
    raise ConfigError(
        f'{says}, but its tokenizer has ids below {tokenizer.vocab_size} only: the files are of different models.'
    )
  if named is not None and named not in ids and not any(map(tokenizer.is_special, known)):
    logging.warning(
        f'{says}, which is no special token, and the files of its tokenizer say that eos_token={eos_token!r} is '
        f'{named}. The former is obeyed.'
    )
  return known


def _described_tokens(
    folder: pathlib.Path, settings: dict[str, Any], tokens: dict[str, Any]
) -> list[tuple[int, tokenizers.AddedToken]]:
  """Returns the tokens to which the files beside tokenizer.json give ids, by id."""
  described = settings.get('added_tokens_decoder') or {}
  special = _special_names(settings) | _special_names(tokens)
  try:
    wanted = {int(i): tokenizers.AddedToken(**fields) for i, fields in described.items()}
    for token in wanted.values():
      token.special |= token.content in special
    for name, i in read_object(folder / 'added_tokens.json').items():
      token = tokenizers.AddedToken(name, normalized=False, special=name in special)
      wanted.setdefault(int(i), token)
  except (AttributeError, TypeError, ValueError) as error:
    raise ConfigError(f'{folder}: the added tokens must be tokens with ids: {error}') from error
  return sorted(wanted.items(), key=lambda item: item[0])


def _special_names(fields: dict[str, Any]) -> set[str]:
  """Returns the tokens that a file names as special, such as its pad_token."""
  names = set[str]()
  for key, value in fields.items():
    if key.endswith(('_token', '_special_tokens')):
      is_named = isinstance(value, dict) and 'content' not in value  # As {"image_token": "<img>"}.
      values = value.values() if is_named else value if isinstance(value, list) else [value]
      texts = map(text_of_token, values)
      names |= {text for text in texts if text is not None}
  return names


def _add_token(
    tokenizer: Pretrained, folder: pathlib.Path, i: int, token: tokenizers.AddedToken, n_ids: Any
):
  """Adds a token that tokenizer.json does not cut texts at, unless the model has too few ids for it.

  One at which it does gets the flags of this one, as `transformers` does it: they say whether the spaces
  beside it are its own, and whether it is special.

  Args:
    tokenizer: The tokenizer. Where it knows the token by another id, that one holds.
    folder: Where it lies.
    i: The id that the token must get.
    token: The token.
    n_ids: The vocabulary of the model, None if it is not known.
  """
  known = tokenizer.id_of(token.content)
  if known not in (None, i) or tokenizer.marks_alike(token) or (isinstance(n_ids, int) and i >= n_ids):
    return
  tokenizer.add(token)
  if tokenizer.id_of(token.content) != i:
    raise ConfigError(
        f'{folder}: tokenizer_config.json or added_tokens.json says that {token.content!r} is {i}; '
        f'behind the ids of tokenizer.json it is {tokenizer.id_of(token.content)}. Save the tokenizer '
        'again.'
    )


def released_config(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the config.json of a release, which that of a converted checkpoint holds.

  Keys that stand in a section of the text are as good as those beside it.
  """
  record = read_object(folder / 'config.json')
  config = record['source'].get('config', {}) if 'source' in record else record
  text = config.get('text_config')
  return text | {k: v for k, v in config.items() if v is not None} if isinstance(text, dict) else config


def text_of_token(token: Any) -> str | None:
  """Returns the text of a token, which may be described by an object."""
  token = token.get('content') if isinstance(token, dict) else token
  return token if isinstance(token, str) else None


def stop_ids(folder: pathlib.Path, released: dict[str, Any]) -> tuple[int, ...]:
  """Returns the ids that end a text by config.json or by generation_config.json."""
  generation = read_object(folder / 'generation_config.json')
  ids = list[int]()
  for name, config in (('config.json', released), ('generation_config.json', generation)):
    stop = config.get('eos_token_id')
    for i in stop if isinstance(stop, list) else [] if stop is None else [stop]:
      if isinstance(i, bool) or not isinstance(i, int) or i < 0:
        raise ConfigError(f'{folder}: {name}: eos_token_id={stop!r} must be an id or a list.')
      ids.append(i)
  return tuple(dict.fromkeys(ids))
