# SPDX-License-Identifier: Apache-2.0
"""The sources of rows, by name."""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import logging
import os
import re
from typing import Any, NamedTuple


from dsa_jax.config import ConfigError, local_path, user_cache
from dsa_jax.data import raw_rows
from dsa_jax.data.corpora.raw import Piece, RawFormat
from dsa_jax.data.corpora.sources import FORMATS, RAW, Format, names_of, open_format
from dsa_jax.data.corpora.tokenizing import DAMAGED
from dsa_jax.data.corpora.tokens import TokenStream
from dsa_jax.data.corpus import describe_files
from dsa_jax.data.packing import PackingConfig, Rows, about, choose, count_left_out
from dsa_jax.data.pipeline import Mixture, first_rows
from dsa_jax.data.raw_rows import RawRows, describe_raw
from dsa_jax.data.recall import Recall
from dsa_jax.data.seeds import check_seed
from dsa_jax.data.streaming import left_out
from dsa_jax.data.text import VOCAB_SIZE, PackedText, find_files, split_files
from dsa_jax.data.tokenizer import SPECIAL, Bytes, Tokenizer, check_alphabet
from dsa_jax.data.tokenizer_files import open_tokenizer

SOURCES = ('text', 'recall', 'mixture')
SPLITS = ('train', 'validation')
TOKENIZED = ('ahead', 'on_the_fly')
# The fields that one source reads, and no other.
OF_SOURCE = {
    'text': ('files',),
    'recall': ('n_keys', 'n_values', 'tokens_per_pair', 'tokens_per_query'),
    'mixture': ('tokenizer', 'damaged', 'cache', *(field.name for field in dataclasses.fields(PackingConfig))),
}
Source = PackedText | Recall | Rows | Mixture


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(PackingConfig):
  """Where tokens come from. Some fields belong to one source only; packing is a mixture's."""

  # 'text' reads bytes of local files, 'recall' is synthetic retrieval, 'mixture' reads `sources`.
  source: str = 'text'
  seed: int = 0  # Determines the split and the packing; each stage shuffles by its own seed.

  files: str = ''  # text: A glob. '' stands for the sources of Python's standard library.
  validation_share: float = 0.05  # The share of text files, or of a mixture's documents.

  # mixture: Each source by a name of one's own. Its fields are `format`, a key of
  # `corpora.sources.FORMATS`, the fields of that format, `weight` (1 by default), and maybe
  # `validation_files`, all of whose documents are then for validation, and no others.
  sources: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  # mixture: 'bytes', a tokenizer.json, or a folder that has one. '' stands for that of the checkpoint
  # from which the recipe starts, and for bytes where it starts from none.
  tokenizer: str = ''
  # mixture: What the name of a special token in a document stands for: 'text', or the token ('ids').
  special_tokens: str = 'text'
  damaged: str = 'stop'  # mixture: What to do about damaged documents: 'stop', or 'drop' and count.
  cache: str = ''  # mixture: The folder for tokens of raw files. '' is one of the user's.
  # mixture: 'ahead' tokenizes raw files once, before the first step, and keeps their tokens in the
  # cache. 'on_the_fly' tokenizes them in other processes while training reads them, so that a short
  # run on a large corpus begins at once and fills no disk. It shuffles rows less widely, among some
  # megabytes of text, and it tokenizes again in each epoch, on each host.
  tokenized: str = 'ahead'

  n_keys: int = 128  # recall: Size of the key vocabulary.
  n_values: int = 16  # recall: Size of the value vocabulary.
  tokens_per_pair: int = 4  # recall: Tokens of a row for each key-value pair.
  tokens_per_query: int = 8  # recall: Tokens of a row for each query.

  def __post_init__(self):
    super().__post_init__()
    if self.source not in SOURCES:
      raise ConfigError(f'data.source={self.source!r} must be one of {SOURCES}.')
    if (self.source == 'mixture') != bool(self.sources):
      raise ConfigError(
          f"data.source={self.source!r} with {len(self.sources)} data.sources: a 'mixture' needs at "
          'least one, and the others have none.'
      )
    if self.damaged not in DAMAGED:
      raise ConfigError(f'data.damaged={self.damaged!r} must be one of {DAMAGED}.')
    if self.special_tokens not in SPECIAL:
      raise ConfigError(f'data.special_tokens={self.special_tokens!r} must be one of {SPECIAL}.')
    if self.tokenized not in TOKENIZED:
      raise ConfigError(f'data.tokenized={self.tokenized!r} must be one of {TOKENIZED}.')
    check_seed(self.seed)
    for name in ('tokens_per_pair', 'tokens_per_query'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.source == 'mixture' and not 0 <= self.validation_share < 1:
      raise ConfigError(f'{self.validation_share=} must be at least 0 and below 1.')
    for name, fields in self.sources.items():
      read_member(name, fields)
    if self.special_tokens != 'text' and not self._is_tokenized:
      raise ConfigError(
          f'data.special_tokens={self.special_tokens!r} would change nothing: it is for a mixture with '
          f"a source of raw files {tuple(RAW)}, or of 'tokens' that were made so."
      )
    if self.tokenized == 'on_the_fly' and not self.reads_text:
      raise ConfigError(
          f"data.tokenized={self.tokenized!r} is for a mixture with a source of raw files {tuple(RAW)}; "
          "'ahead' is for all others."
      )

  @property
  def vocab_size(self) -> int:
    if self.source == 'text':
      return VOCAB_SIZE
    if self.source == 'recall':
      shortest = 2 * max(self.tokens_per_query, self.tokens_per_pair)  # It has a pair and a query.
      return self._recall(seq_len=shortest, split='train').vocab_size
    members = {name: read_member(name, fields) for name, fields in self.sources.items()}
    kinds = [self._tokenizer.vocab_size] if self.reads_text else []
    return max(
        kinds
        + [self._open(n).vocab_size for n, x in members.items() if not isinstance(x.source, RawFormat)]
    )

  @property
  def reads_text(self) -> bool:
    """Whether a source is text that a tokenizer reads."""
    return any(fields['format'] in RAW for fields in self.sources.values())

  @property
  def _is_tokenized(self) -> bool:
    """Whether a source is text that a tokenizer reads, or has read."""
    return self.reads_text or any(fields['format'] == 'tokens' for fields in self.sources.values())

  @property
  def unused(self) -> list[str]:
    """The fields that have been set although another source reads them."""
    usual = {field.name: field.default for field in dataclasses.fields(self)}
    others = [name for source, names in OF_SOURCE.items() if source != self.source for name in names]
    return [name for name in others if getattr(self, name) != usual[name]]

  def check_vocabulary(self, vocab_size: int):
    """Raises ConfigError unless a model's vocabulary is that of the data."""
    is_bytes = self.source != 'mixture' or self.unit == 'byte'
    check_alphabet(vocab_size, self.vocab_size, f'the {self.source} data', is_bytes=is_bytes)

  @functools.cached_property
  def unit(self) -> str:
    """What one target is, for a count of bits in each."""
    if self.source == 'mixture':
      return 'byte' if self.reads_text and isinstance(self._tokenizer, Bytes) else 'token'
    return {'text': 'byte', 'recall': 'answer'}[self.source]

  def rows(self, seq_len: int, split: str) -> Source:
    """Returns a random-access source of rows of `seq_len` tokens."""
    if self.source == 'recall':
      return self._recall(seq_len, split)
    if self.source == 'mixture':
      members = {name: read_member(name, fields) for name, fields in self.sources.items()}
      rows = [self._rows_of(name, member, seq_len, split) for name, member in members.items()]
      return Mixture(rows, [member.weight for member in members.values()])
    train, validation = split_files(find_files(self.files), self.validation_share, self.seed)
    files = {'train': train, 'validation': validation}[split]
    return PackedText.from_files(files, seq_len, self.seed)

  def describe(self, *, trains: bool = True) -> dict[str, str]:
    """Returns a description of every file, or of every source, that is read.

    Args:
      trains: Whether something is trained, which had better not read what validation scores.
    """
    if self.source == 'mixture':
      if trains:
        self._check_validation()
      return {key: self._describe(key) for key in self._keys}
    if self.source == 'recall':
      return {}
    files = find_files(self.files)
    known = describe_files(files)
    if not trains:
      return known
    _, validation = split_files(files, self.validation_share, self.seed)  # By names of folders, too.
    side = lambda file: 'validation' if file in validation else 'training'
    return {name: f'{text}, for {side(file)}' for file, (name, text) in zip(files, known.items(), strict=True)}

  def about_documents(
      self, seq_len: int, states: Sequence[Mapping[str, Any]] = ()
  ) -> dict[str, dict[str, Any]]:
    """Returns what is known of the documents of each source of a mixture.

    It is what `packing.about` says, and how many of what training might read were left out, and why.
    Of a source that is tokenized on the fly, it is that of the first documents, `is_sample` is True,
    and those left out are counted by `states` of iterators over the mixture, where there are any.
    """
    known = {}
    for i, (name, fields) in enumerate(self.sources.items()):
      member = read_member(name, fields)
      rows = self._rows_of(name, member, seq_len, 'train')
      if isinstance(rows, RawRows):
        known[name] = rows.about() | ({'left_out': left_out(states, i)} if states else {})
        continue
      known[name] = about(rows)
      stream, share = self._side(name, member, 'train')
      by_length = count_left_out(stream, 'train', share, self.seed, self.of_rows(seq_len))
      known[name]['left_out'] = dict(stream.left_out) | {'length': by_length}
    return known

  def bytes_per_target(self, seq_len: int, n_rows: int) -> float | None:
    """Returns the bytes of text for each target of the first validation rows, None where not known.

    Documents have more or fewer bytes for each token, so that of other rows may differ.

    Args:
      seq_len: Tokens of a row.
      n_rows: How many rows are scored; see `pipeline.first_batches`.
    """
    if self.source != 'mixture':
      return 1.0 if self.unit == 'byte' else None
    by_holder = collections.defaultdict(list)
    for held, i in first_rows(self.rows(seq_len, 'validation'), n_rows, seed=0):
      by_holder[held].append(i)
    has_tokenizer = self.unit != 'byte' and (self.reads_text or self.tokenizer)
    decode = self._tokenizer.decode if has_tokenizer else None
    known = [held.text_of(numbers, decode) for held, numbers in by_holder.items()]
    n_bytes, n_targets = map(sum, zip(*known))
    return float(n_bytes / n_targets) if n_bytes > 0 else None

  @functools.cached_property
  def _keys(self) -> dict[str, Format]:
    """Every source, and its validation files, by the name that messages and descriptions give it."""
    keys = {}
    for name, fields in self.sources.items():
      member = read_member(name, fields)
      keys[name] = member.source
      if member.validation is not None:
        keys[f'{name} (validation)'] = member.validation
    return keys

  @functools.cached_property
  def _opened(self) -> dict[str, TokenStream]:
    return {}

  @functools.cached_property
  def _listed(self) -> dict[str, tuple[Piece, ...]]:
    return {}

  @functools.cached_property
  def _raw(self) -> dict[tuple[str, int, str], RawRows]:
    """What is tokenized while it is read, by source, tokens of a row, and split."""
    return {}

  @functools.cached_property
  def _tokenizer(self) -> Tokenizer:
    return open_tokenizer(self.tokenizer, self.special_tokens)

  def _open(self, key: str) -> TokenStream:
    """Returns the tokens of a source, which is opened once."""
    if key not in self._opened:
      cache = local_path(self.cache, 'data.cache') if self.cache else user_cache('tokens')
      stream = open_format(
          self._keys[key], self.tokenizer, cache, self.damaged, self.special_tokens
      )
      self._check_tokenizer(key, stream)
      self._opened[key] = stream
    return self._opened[key]

  def _check_tokenizer(self, key: str, stream: TokenStream):
    """Checks that one tokenizer made all ids, as far as that is known."""
    if self.tokenizer or self.reads_text:
      wanted, other = self._tokenizer.digest, f'tokenizer={self.tokenizer or "bytes"!r}'
    else:
      others = {name: x for name, x in self._opened.items() if x.tokenizer}
      name, first = next(iter(others.items()), (key, stream))
      wanted, other = first.tokenizer, f'data.sources.{name}, {first.place}'
    if stream.tokenizer and stream.tokenizer != wanted:
      raise ConfigError(
          f'data.sources.{key}: {stream.place} was made with another tokenizer than {other} '
          f'({stream.tokenizer[:12]}, not {wanted[:12]}). Tokenize it again, or name its tokenizer, or '
          'set data.special_tokens as it was made with.'
      )

  def _check_validation(self):
    """Warns where training reads a file that is for validation."""
    if self._keys.keys() == self.sources.keys():
      return  # No source has files of its own for validation.
    real = lambda name: name if '://' in name else os.path.realpath(name)
    names = {key: {*map(real, names_of(source))} for key, source in self._keys.items()}
    for key, held_out in names.items():
      others = [other for other in names if other in self.sources and held_out & names[other]]
      if key not in self.sources and others:
        common = held_out & names[others[0]]
        logging.warning(
            f'data.sources: {min(common)} is of {key} and of the files of {others[0]}: training reads what '
            'validation scores.'
        )

  def _describe(self, key: str) -> str:
    source = self._keys[key]
    if self._is_raw(source):
      return describe_raw(source, self._pieces(key), self._tokenizer)
    return self._open(key).digest()

  def _pieces(self, key: str) -> tuple[Piece, ...]:
    """Returns the pieces of a source of raw files, which are listed once."""
    if key not in self._listed:
      self._listed[key] = tuple(self._keys[key].pieces())
    return self._listed[key]

  def _is_raw(self, source: Format) -> bool:
    """Returns whether a source is tokenized while it is read."""
    return self.tokenized == 'on_the_fly' and isinstance(source, RawFormat)

  def _key(self, name: str, member: 'Member', split: str) -> tuple[str, float | None]:
    """Returns the key of a source's documents of a split, and the share that is for validation."""
    if member.validation is None:
      return name, self.validation_share
    return f'{name} (validation)' if split == 'validation' else name, None

  def _side(self, name: str, member: 'Member', split: str) -> tuple[TokenStream, float | None]:
    """Returns what holds a source's documents of a split, and the share that is for validation."""
    key, share = self._key(name, member, split)
    return self._open(key), share

  def _rows_of(self, name: str, member: 'Member', seq_len: int, split: str) -> Rows | RawRows:
    key = name, seq_len, split
    if self._is_raw(member.source) and key not in self._raw:
      self._raw[key] = self._raw_rows(name, member, seq_len, split)
      self._raw[key].first(1)  # So that a corpus that will not do says so at once.
    if key in self._raw:
      return self._raw[key]
    stream, share = self._side(name, member, split)
    documents = choose(stream, split, share, self.seed, self.of_rows(seq_len))
    return Rows(stream, documents, seq_len, self.packing)

  def _raw_rows(self, name: str, member: 'Member', seq_len: int, split: str) -> RawRows:
    key, share = self._key(name, member, split)
    return RawRows(
        source=self._keys[key],
        pieces=self._pieces(key),
        tokenizer=self.tokenizer,
        special_tokens=self.special_tokens,
        digest=self._tokenizer.digest,
        damaged=self.damaged,
        split=split,
        validation_share=share,
        seed=self.seed,
        packing=self.of_rows(seq_len),
        seq_len=seq_len,
        window_bytes=max(raw_rows.WINDOW, raw_rows.WINDOW_ROWS * seq_len),
    )

  def _recall(self, seq_len: int, split: str) -> Recall:
    return Recall(
        seq_len=seq_len,
        n_keys=self.n_keys,
        n_values=self.n_values,
        n_pairs=seq_len // self.tokens_per_pair,
        n_queries=seq_len // self.tokens_per_query,
        n_rows=1 << 30,
        seed=2 * self.seed + SPLITS.index(split),
    )


class Member(NamedTuple):
  """A source of a mixture."""

  source: Format
  validation: Format | None  # The files that are for validation alone.
  weight: float


def read_member(name: str, fields: Mapping[str, Any]) -> Member:
  """Reads a source of a mixture.

  Raises:
    ConfigError: A field is missing, misspelt or out of range.
  """
  where = f'data.sources.{name}'
  if not re.fullmatch(r'\w[\w -]*', name):
    raise ConfigError(
        f'data.sources: the name {name!r} must be of letters, digits, underscores, spaces and '
        'hyphens: it names a folder of tokens and a row of the report.'
    )
  if not isinstance(fields, Mapping):
    raise ConfigError(f"{where}={fields!r} must be fields, such as dict(format='text', files='x/*.txt').")
  fields = dict(fields)
  kind, weight = fields.pop('format', None), fields.pop('weight', 1.0)
  held_out = fields.pop('validation_files', None)
  if kind not in FORMATS:
    raise ConfigError(f'{where}: format={kind!r} must be one of {tuple(FORMATS)}.')
  if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float('inf'):
    raise ConfigError(f'{where}: {weight=} must be a number above 0.')
  known = [field.name for field in dataclasses.fields(FORMATS[kind])]
  if unknown := [field for field in fields if field not in known]:
    others = [*known, 'weight', 'validation_files']
    raise ConfigError(f'{where} has no field {unknown[0]!r}; those of {kind} are {others}.')
  try:
    source = FORMATS[kind](**fields)
    validation = FORMATS[kind](**fields | {'files': held_out}) if held_out else None
  except (TypeError, ConfigError) as error:
    raise ConfigError(f'{where}: {error}') from error
  return Member(source, validation, float(weight))
