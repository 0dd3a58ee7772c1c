# SPDX-License-Identifier: Apache-2.0
"""Ends a text where a stop text begins in it."""


class StopTexts:
  """Cuts a text, as it is written, where the first of some texts begins in it."""

  def __init__(self, texts: tuple[str, ...]):
    self._texts, self._held, self.reached = texts, '', False

  def push(self, piece: str) -> str:
    """Returns what may be shown once `piece` is there.

    The end that may be the beginning of a stop text is held back.
    """
    text = self._held + piece
    ends = [at for stop in self._texts if (at := text.find(stop)) >= 0]
    if ends:
      self._held, self.reached = '', True
      return text[: min(ends)]
    n_held = max((_overlap(text, stop) for stop in self._texts), default=0)
    self._held = text[len(text) - n_held :]
    return text[: len(text) - n_held]

  def end(self, rest: str) -> str:
    """Returns what may be shown after the last token, with `rest` that the tokenizer still had."""
    return '' if self.reached else self.push(rest) + self._held


def _overlap(text: str, stop: str) -> int:
  """Returns how long an end of the text is the beginning of `stop`."""
  longest = min(len(text), len(stop) - 1)
  return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
