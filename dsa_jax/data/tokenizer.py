# SPDX-License-Identifier: Apache-2.0
"""Turns text into token ids and back, by a tokenizer.json or as plain bytes."""

import abc
import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import hashlib
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from dsa_jax.config import ConfigError
from dsa_jax.data.decoding import Decoding
from dsa_jax.data.formats import POINTER, recognise
from dsa_jax.data.text import BOS, VOCAB_SIZE

PROBE = 'a'  # A text, to see what a tokenizer puts around one.
PADDING = 256  # A vocabulary may be this much larger than its alphabet, so that devices divide it.
SPECIAL = 'text', 'ids'  # What the name of a special token in a document stands for.


class Rendered(str):
  """A prompt that a chat template has written, with whatever begins a text: a tokenizer adds nothing to it."""

  def replace(self, *args) -> 'Rendered':
    return Rendered(super().replace(*args))


class Steps(NamedTuple):
  """Turns the ids of one text into text, as soon as later ones cannot change it."""

  step: Callable[[int], str]  # Takes the next id.
  end: Callable[[], str]  # Returns what is left of a character that was never finished.


class _Streaming(abc.ABC):
  """What both tokenizers do with the ids of a text."""

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, between those that begin and end one."""

  def encode_prompt(self, text: str) -> list[int]:
    """Returns the ids of a text that goes on, so that nothing ends it.

    One that is `Rendered` has what its template has written, and no mark more, as in `transformers`.
    """
    return self.encode(text)

  @abc.abstractmethod
  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids, without that of marks."""

  @abc.abstractmethod
  def steps(self, before: Sequence[int] = ()) -> Steps:
    """Returns what turns the ids of a text into text, behind the ids of a prompt."""

  def stream(self, ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    """Yields a piece of text for each id, which may be empty, and then what the end leaves.

    The pieces are what `decode` makes of the prompt and these ids, less the text of the prompt.

    Args:
      ids: What follows the prompt.
      before: The prompt.
    """
    steps = self.steps(before)
    yield from map(steps.step, ids)
    yield steps.end()


class Bytes(_Streaming):
  """A tokenizer whose ids are bytes, as in the package's own text data, after BOS."""

  stop = (BOS,)  # Ids that end a text, because the next document begins.
  vocab_size = VOCAB_SIZE
  digest = 'bytes'

  def encode_documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """Returns BOS and the bytes of each text, uint32."""
    values = (np.frombuffer(text, np.uint8) for text in texts)
    return [np.append(np.uint32(BOS), text.astype(np.uint32)) for text in values]

  def encode(self, text: str) -> list[int]:
    """Returns BOS and the bytes of a text."""
    return [BOS, *text.encode()]

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(i for i in ids if i < 256).decode(errors='replace')

  def steps(self, before: Sequence[int] = ()) -> Steps:
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    decoder.decode(bytes(i for i in before if i < 256))  # It may end within a character.
    step = lambda i: decoder.decode(bytes([i])) if i < 256 else ''
    return Steps(step, lambda: decoder.decode(b'', final=True))


class Absent(_Streaming):
  """What a model of words has until it is given a tokenizer: its ids have no text."""

  stop = ()
  vocab_size = 0
  digest = ''

  def __init__(self, n_ids: int):
    self._n_ids = n_ids

  def encode(self, text: str) -> list[int]:
    raise ConfigError(
        f'{text[:20]!r}: no tokenizer was given, and the {self._n_ids} ids of the model are no bytes. Give ids in '
        'place of text, or tokenizer=open_tokenizer(FOLDER), which can be imported from dsa_jax.'
    )

  def decode(self, ids: Sequence[int]) -> str:
    return ''

  def steps(self, before: Sequence[int] = ()) -> Steps:
    return Steps(lambda i: '', lambda: '')


class Pretrained(_Streaming):
  """A tokenizer that the `tokenizers` library reads from a tokenizer.json.

  What the file was last used for does not count: truncation, padding and random merges are off.
  """

  def __init__(self, path: pathlib.Path, stop: tuple[int, ...] = ()):
    try:
      content = path.read_bytes()
      if recognise(content) == POINTER:
        raise ConfigError('it is a git-lfs pointer: `git lfs pull` fetches the file itself')
      self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # The library raises no narrower one.
      raise ConfigError(f'{path} is no tokenizer: {error}') from error
    self._content = content
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    model = self._tokenizer.model
    if getattr(model, 'dropout', None) is not None:
      model.dropout = None
    if getattr(model, 'nbest_size', None) is not None:
      model.nbest_size, model.alpha = None, None
    self.stop = stop
    self.named_stops = stop  # The same, and ids that the tokenizer lacks, behind the one that ends a document.
    self.special_tokens = 'text'  # One of SPECIAL, for documents.
    self.bos: int | None = None  # The id that begins a text, if it is known.
    self.adds_bos: bool | None = None  # Whether a text gets one; None leaves it to tokenizer.json.
    self._added: list[tokenizers.AddedToken] = []  # Tokens that tokenizer.json does not cut texts at, or otherwise.
    self._new: set[str] = set()  # Those of them that it does not have.
    self._was_special = False  # Whether one of them was special before.
    self._reads_marks = True  # Whether the name of a mark in a prompt is the mark.

  def id_of(self, token: str) -> int | None:
    return self._tokenizer.token_to_id(token)

  def is_mark(self, token: str) -> bool:
    """Returns whether a token is found in a text before it is cut into pieces."""
    return token in (added.content for added in self._tokenizer.get_added_tokens_decoder().values())

  def marks_alike(self, token: tokenizers.AddedToken) -> bool:
    """Returns whether texts are cut at a token already, in the same way."""
    return repr(token) == repr(self._tokenizer.get_added_tokens_decoder().get(self.id_of(token.content)))

  def add(self, token: tokenizers.AddedToken):
    """Makes a token one that texts are cut at; it keeps its id, or gets the next one."""
    known = self.id_of(token.content)
    if known is None:
      self._new.add(token.content)
    self._was_special |= self.is_special(known) and not token.special
    self._tokenizer.add_tokens([token])
    self._added.append(token)

  def read_again(self):
    """Reads the tokenizer as it is now: the library goes on to take for special what has been one before."""
    if self._was_special:
      self._tokenizer, self._was_special = tokenizers.Tokenizer.from_str(self._tokenizer.to_str()), False

  def read_marks(self, reads: bool):
    """Sets whether the name of a mark in a prompt is that mark, or text as in a document."""
    self._reads_marks, self._tokenizer.encode_special_tokens = reads, not reads

  @property
  def begins_with_space(self) -> bool | None:
    """Whether a text is read as if a space stood before it; None where loaders have no such choice."""
    splits = self._tokenizer.pre_tokenizer
    is_choice = isinstance(splits, tokenizers.pre_tokenizers.ByteLevel)
    return splits.add_prefix_space if is_choice else None

  def is_special(self, i: Any) -> bool:
    """Returns whether an id is that of a mark, which no ordinary text holds."""
    marks = self._tokenizer.get_added_tokens_decoder()
    return isinstance(i, int) and not isinstance(i, bool) and i in marks and marks[i].special

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, which begin with what begins a text, once."""
    encoding = self._tokenizer.encode(text)
    return self._begun_once(encoding.ids, encoding.special_tokens_mask)

  def encode_prompt(self, text: str) -> list[int]:
    if isinstance(text, Rendered):
      return self._tokenizer.encode(text, add_special_tokens=False).ids
    encoding = self._tokenizer.encode(text)
    ids, is_added = encoding.ids, encoding.special_tokens_mask
    n_after = is_added[::-1].index(0) if 0 in is_added else self._n_after
    n = len(ids) - n_after
    return self._begun_once(ids[:n], is_added[:n])

  def _begun_once(self, ids: list[int], is_added: list[int]) -> list[int]:
    """Returns the ids of a text, so that what begins one comes once."""
    n_before = is_added.index(0) if 0 in is_added else len(ids)
    before, rest = ids[:n_before], ids[n_before:]
    if self.adds_bos is False:
      before = [i for i in before if i != self.bos]
    while before and rest[: len(before)] == before:  # The text brings them along.
      rest = rest[len(before) :]
    if self.bos is None:
      return before + rest
    wants = self.adds_bos or rest[:1] == [self.bos]
    while rest[:1] == [self.bos]:
      rest = rest[1:]
    if self.bos not in before:
      return ([self.bos] if wants else []) + before + rest
    first = before.index(self.bos)  # Where the tokenizer puts it: another mark may come before it.
    return before[: first + 1] + [i for i in before[first:] if i != self.bos] + rest

  @functools.cached_property
  def _n_after(self) -> int:
    """The number of ids that the tokenizer puts behind an empty text."""
    is_added = self._tokenizer.encode(PROBE).special_tokens_mask
    return is_added[::-1].index(0) if 0 in is_added else 0

  @property
  def vocab_size(self) -> int:
    """One more than the highest id."""
    return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

  @property
  def digest(self) -> str:
    """A hash of all that decides the ids of a document."""
    was_added = self.bos in map(self.id_of, self._new)
    bos = self.bos if self.adds_bos or not was_added else None  # Else no document begins with it.
    settings = (bos, self.adds_bos, self.named_stops)
    if held := [self._fields(token) for token in self._added if self._is_held(token)]:
      settings += (held,)
    special = b'' if self.special_tokens == 'text' else self.special_tokens.encode()
    return hashlib.sha256(self._content + repr(settings).encode() + special).hexdigest()

  def _is_held(self, token: tokenizers.AddedToken) -> bool:
    """Returns whether the text of a document may hold a token."""
    return not token.special or self.special_tokens == 'ids'

  def _fields(self, token: tokenizers.AddedToken) -> tuple[Any, ...]:
    """Returns what decides where a token stands in a text, and its id."""
    where = token.normalized, token.lstrip, token.rstrip, token.single_word
    return self.id_of(token.content), token.content, token.special, *where

  @property
  def end(self) -> int | None:
    """The id that ends a document, if one is known: the first of those that end a text."""
    return self.stop[0] if self.stop else None

  def encode_documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """Returns the ids of documents, uint32, between what begins a text and the id that ends one.

    The name of a special token in a text is text, unless `special_tokens` is 'ids'. Then a document
    that brings its own beginning or end along has it once.

    Args:
      texts: UTF-8.
    """
    before, after = self._around()
    is_text, strings = self.special_tokens == 'text', [text.decode() for text in texts]
    self._tokenizer.encode_special_tokens = is_text
    try:
      encodings = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
      ids, names = [encoding.ids for encoding in encodings], self._names_of_marks() if is_text else {}
      ids = [self._without_marks(*pair, names) for pair in zip(strings, ids)]
    finally:
      self._tokenizer.encode_special_tokens = not self._reads_marks
    if is_text:
      return [np.asarray([*before, *of_text, *after], np.uint32) for of_text in ids]
    return [np.asarray(self._once(before, of_text, after), np.uint32) for of_text in ids]

  def _names_of_marks(self) -> dict[int, str]:
    """Returns the names of special tokens, but those of one character, by their ids."""
    added = self._tokenizer.get_added_tokens_decoder().items()
    return {i: token.content for i, token in added if token.special and len(token.content) > 1}

  def _without_marks(self, text: str, ids: list[int], names: dict[int, str]) -> list[int]:
    """Returns the ids of a text that holds no mark, although it may name one.

    Models of words and unigrams find the names of marks in their own vocabulary, whatever they are told. A
    text in which they have is cut within each name, and its parts are read by themselves.
    """
    taken = [names[i] for i in {*ids} & names.keys() if names[i] in text]
    if not taken:
      return ids
    cuts = [place.start() + 1 for place in re.finditer('|'.join(map(re.escape, taken)), text)]
    parts = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)])]
    encode = lambda part: self._tokenizer.encode(part, add_special_tokens=False).ids
    return [i for part in parts for i in self._without_marks(part, encode(part), names)]

  def _once(self, before: list[int], ids: list[int], after: list[int]) -> list[int]:
    """Returns ids between others, but what they begin or end with themselves."""
    begins = ids[: len(before)] == before
    ends = bool({*ids[-1:]} & {*after[-1:], *self.stop})
    return [*([] if begins else before), *ids, *([] if ends else after)]

  def _around(self) -> tuple[list[int], list[int]]:
    """Returns the ids before and behind those of a document's text."""
    encoding = self._tokenizer.encode(PROBE)
    text = [i for i, is_added in enumerate(encoding.special_tokens_mask) if not is_added]
    first, end = (text[0], text[-1] + 1) if text else (len(encoding.ids), len(encoding.ids))
    after = encoding.ids[end:]
    whole = self.encode(PROBE)
    before = whole[: len(whole) - (len(encoding.ids) - first)]
    if self.end is not None and not {*after[-1:]} & {*self.stop}:
      after.append(self.end)
    return before, after

  def decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=True)

  def steps(self, before: Sequence[int] = ()) -> Steps:
    decoding = Decoding(self._tokenizer, before)
    return Steps(decoding.step, decoding.end)


Tokenizer = Bytes | Pretrained | Absent


def check_alphabet(vocab_size: int, n_ids: int, what: str, *, is_bytes: bool):
  """Checks that ids are a model's own. Ids of a tokenizer may be fewer, those of bytes may not.

  Args:
    vocab_size: The model's vocabulary.
    n_ids: The ids that there are, from 0 on.
    what: What has them.
    is_bytes: Whether they are bytes, or those of a task that is made up.

  Raises:
    ConfigError: The model has fewer ids, or is of another alphabet.
  """
  spare = vocab_size - n_ids
  if spare < 0:
    raise ConfigError(f'model.vocab_size={vocab_size} is too small for {what}: it needs {n_ids}.')
  if spare >= PADDING and is_bytes:
    raise ConfigError(
        f'model.vocab_size={vocab_size} is of another alphabet than {what}, which has {n_ids} ids: '
        f'they are noise to the model. Only padding, fewer than {PADDING} ids, may be left over.'
    )


def usual_tokenizer(vocab_size: int) -> Tokenizer:
  """Returns what reads a model's texts if no tokenizer is given: bytes, or nothing where it has words."""
  return Bytes() if vocab_size - VOCAB_SIZE < PADDING else Absent(vocab_size)


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int):
  """Raises ConfigError unless the ids of a tokenizer are a model's."""
  is_bytes = isinstance(tokenizer, Bytes)
  what = 'a text in bytes' if is_bytes else 'the tokenizer'
  check_alphabet(vocab_size, tokenizer.vocab_size, what, is_bytes=is_bytes)
