# SPDX-License-Identifier: Apache-2.0
"""Turns the ids of a text that is being written into text, as soon as later ids cannot change it."""

from collections.abc import Sequence
import os
import re

import tokenizers

KEPT = 8  # So many ids, at least, are decoded together with those that follow.
MOST = 24  # Of more than these the first are forgotten, so that no step decodes a long text.
BYTE = re.compile('<0x[0-9A-Fa-f]{2}>')  # A token that stands for a byte, where decoders know such.
UNFINISHED = '\N{REPLACEMENT CHARACTER}'  # What decoders write for the bytes of half a character.


class Decoding:
  """Decodes a text piece by piece: together, the pieces are what all ids decode to.

  Decoders write one id in several ways: a space is lost at the beginning of a text, and one byte too
  many turns every byte of its row into `UNFINISHED`. So the pieces are differences of texts that
  were decoded from the ids before and after a step.
  """

  def __init__(self, tokenizer: tokenizers.Tokenizer, before: Sequence[int] = ()):
    """Begins behind the ids of a prompt, whose text is in no piece."""
    self._tokenizer = tokenizer
    added = tokenizer.get_added_tokens_decoder().values()
    self._marks = {token.content for token in added if token.special}
    self._ids = [i for i in before if self._is_text(i)]
    self._forget_first()
    self._shown = self._decode(self._ids)

  def step(self, i: int) -> str:
    """Takes the next id, and returns the text that is certain by now."""
    if not self._is_text(i):
      return ''
    self._ids.append(i)
    if self._is_byte(i):  # What it becomes depends on the bytes that follow.
      return ''
    piece = self._show(self._decode(self._ids).removesuffix(UNFINISHED))
    if piece and len(self._ids) > MOST:
      self._forget_first()
      self._shown = self._decode(self._ids).removesuffix(UNFINISHED)
    return piece

  def end(self) -> str:
    """Returns what is left, however it ends."""
    return self._show(self._decode(self._ids))

  def _show(self, text: str) -> str:
    """Returns what a text has beyond that which was shown."""
    if self._shown.startswith(text):
      return ''
    piece = text[len(os.path.commonprefix((self._shown, text))) :]
    self._shown = text
    return piece

  def _forget_first(self):
    """Forgets the first ids, but keeps whole rows of bytes, and something that can be seen.

    Behind that, the rest of a text is decoded as it is behind the whole.
    """
    n_kept = KEPT
    while n_kept < len(self._ids):
      first = len(self._ids) - n_kept
      while first and self._is_byte(self._ids[first]):
        first -= 1
      if self._decode(self._ids[first:]).strip():
        self._ids = self._ids[first:]
        return
      n_kept *= 2

  def _decode(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def _is_text(self, i: int) -> bool:
    """Returns whether an id is that of a token, and of none that ordinary text lacks."""
    token = self._tokenizer.id_to_token(i)
    return token is not None and token not in self._marks

  def _is_byte(self, i: int) -> bool:
    return BYTE.fullmatch(self._tokenizer.id_to_token(i)) is not None
