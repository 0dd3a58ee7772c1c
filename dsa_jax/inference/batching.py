# SPDX-License-Identifier: Apache-2.0
"""Continues many texts in a running batch, which texts join and leave; see `Sampler.complete`."""

import collections
from collections.abc import Iterator, Sequence
import math
import time
from typing import NamedTuple

import jax
import numpy as np

from dsa_jax.config import ModelConfig
from dsa_jax.data.tokenizer import Tokenizer
from dsa_jax.inference.cache import Cache, shapes_of
from dsa_jax.inference.drafts import Drafts, no_drafts, read_chunk_with_drafts
from dsa_jax.inference.programs import Engine
from dsa_jax.inference.sample_config import SampleConfig, padded
from dsa_jax.inference.shares import make_texts, place_text, whole_rows
from dsa_jax.inference.slots import Slots, Written, copy_of, free_slots, join, not_finite, write
from dsa_jax.inference.stopping import StopTexts
from dsa_jax.parallel.mesh import MeshConfig

LINE = 512  # The capacity of slots is a multiple of it, for few programs.
CHUNKS = 4  # At most so many chunks of prompts are read between two steps.
HOPELESS = 8  # After so many texts without finite logits, and none with, no more are begun.
FEWEST = 32  # No chunk is shorter; it may be padding. Others are 4, 16, ... times as long.


class Completion(NamedTuple):
  """A continuation."""

  prompt: int  # The number of the prompt.
  sample: int  # The number of the continuation among those of its prompt.
  text: str
  ids: list[int]  # All that were drawn but those that end a text.
  log_probs: list[float]  # Of each id, by the model: before temperature, top-k and top-p.
  ended_by: str  # 'stop' is an id or a text that ends one, 'length' the most tokens that were asked for.
  prompt_tokens: int
  reused_tokens: int  # Those tokens of the prompt that had been read with another one.
  steps: int  # How many steps it took. Drafts make them fewer than tokens.
  seconds_to_first: float  # From when the prompt was begun to when the first token was there.
  seconds: float  # To when the last one was.


class Text:
  """A text that is being written."""

  def __init__(
      self,
      place: int,
      sample: int,
      prompt: list[int],
      tokenizer: Tokenizer,
      config: SampleConfig,
  ):
    self.place, self.sample, self.prompt = place, sample, prompt
    self.ids, self.log_probs, self.ended_by = list[int](), list[float](), ''
    self.n_steps, self.n_reused = 0, 0
    self._most = config.max_new_tokens
    self._pieces, self._steps = list[str](), tokenizer.steps(prompt)
    self._stops = StopTexts(config.stop_texts)
    self._began, self._first = 0.0, 0.0

  def begin(self, n_reused: int):
    self._began, self.n_reused = time.monotonic(), n_reused

  def add_step(self, ids: np.ndarray, counts: np.ndarray, log_probs: np.ndarray, ends: bool):
    """Takes what a step has written, which may end the text."""
    self._first = self._first or time.monotonic() - self._began
    self.n_steps += 1
    for i, log_prob in zip(ids[counts].tolist(), log_probs[counts].tolist()):
      self.ids.append(i)
      self.log_probs.append(log_prob)
      self._pieces.append(self._stops.push(self._steps.step(i)))
      if self._stops.reached:
        self.ended_by = 'stop'
        return
    if ends:
      self.ended_by = 'stop'
    elif len(self.ids) == self._most:
      self.ended_by = 'length'

  def completion(self) -> Completion:
    rest = self._stops.end(self._steps.end())
    ended_by = 'stop' if self._stops.reached else self.ended_by  # The rest may hold a stop text.
    seconds = time.monotonic() - self._began
    return Completion(
        self.place, self.sample, ''.join(self._pieces) + rest, self.ids, self.log_probs,
        ended_by, len(self.prompt), self.n_reused, self.n_steps, self._first or seconds, seconds,
    )  # fmt: skip


def complete(
    engine: Engine, texts: Sequence[Text], config: SampleConfig, n_slots: int
) -> Iterator[Completion]:
  """Yields what `Sampler.complete` does, for texts whose prompts have been checked."""
  if not texts:
    return
  longest = max(len(text.prompt) for text in texts) + config.max_new_tokens
  n_slots, capacity = size_of_batch(engine.cfg, engine.mesh, n_slots, len(texts), longest)
  batch = Batch(engine, config, n_slots, capacity)
  for text in batch.run(iter(texts)):
    yield text.completion()


def size_of_batch(
    cfg: ModelConfig, mesh: MeshConfig, n_slots: int, n_texts: int, longest: int
) -> tuple[int, int]:
  """Returns the slots of a running batch, and the capacity of each.

  Args:
    cfg: The model.
    mesh: The devices.
    n_slots: At most so many.
    n_texts: All texts.
    longest: Tokens of the longest text, with those that are to follow.
  """
  line, n_shares = math.lcm(LINE, mesh.context), mesh.fsdp * mesh.expert
  capacity = min(-(-longest // line) * line, whole_rows(cfg.max_seq_len, mesh))
  # Some slots may stay free, for even shares.
  return min(n_slots, -(-n_texts // n_shares) * n_shares), capacity


class Batch:
  """Texts in slots, and one whose prompt is being read beside them."""

  def __init__(self, engine: Engine, config: SampleConfig, n_slots: int, capacity: int):
    self._engine, self._config = engine, config
    self._numbers = np.float32(config.temperature), np.float32(config.top_p), padded(config.stop)
    self._slots = free_slots(
        engine.empty_cache(n_slots, capacity), engine.cfg,
        drafts=engine.drafts, shares=engine.reader.shares,
    )  # fmt: skip
    self._texts: list[Text | None] = [None] * n_slots
    self._held = [list[int]() for _ in range(n_slots)]  # The prompt that each slot last had.
    self._begun = collections.deque[tuple[list[Text | None], Written]]()
    self._reader = PromptReader(engine, capacity)
    self._broken, self._has_ended = list[int](), False  # Prompts without logits; whether a text has.

  def run(self, texts: Iterator[Text]) -> Iterator[Text]:
    """Yields texts as they end. Each step begins before the ids of the one before it are read.

    Raises:
      ConfigError: The logits of some texts are not finite. The others have ended then, unless all that
        were begun are so.
    """
    most = max(len(self._texts), HOPELESS)
    while self._has_ended or len(self._broken) < most:
      self._read_prompts(texts)
      if any(self._texts):
        self._begin_step()
      if not self._begun:
        break
      if len(self._begun) > 1 or not any(self._texts):
        yield from self._end_step()
    if self._broken:
      raise not_finite(self._broken[0], len(self._broken) - 1)

  def _read_prompts(self, texts: Iterator[Text]):
    """Reads a few chunks of the next prompts, as long as there are free slots."""
    for _ in range(CHUNKS):
      if None not in self._texts:
        return
      if self._reader.text is None:
        if (text := next(texts, None)) is None:
          return
        self._reader.begin(text, self._held, self._slots)
      if self._reader.read_chunk():
        self._join(self._texts.index(None))

  def _join(self, slot: int):
    text, cache, drafts, logits = self._reader.finish()
    self._texts[slot], self._held[slot] = text, text.prompt
    config = self._config
    self._slots = join(
        self._slots, slot, cache, drafts, logits, np.uint32(config.seed), text.place,
        text.sample, config.max_new_tokens, shares=self._engine.reader.shares,
    )  # fmt: skip

  def _begin_step(self):
    kept = np.array([text is not None for text in self._texts])
    written, self._slots = write(
        self._engine.weights, self._slots, kept, *self._numbers,
        top_k=self._config.top_k, reader=self._engine.reader,
    )  # fmt: skip
    self._begun.append((list(self._texts), written))

  def _end_step(self) -> Iterator[Text]:
    """Yields the texts that have ended with the oldest step whose ids were not read yet."""
    texts, written = self._begun.popleft()
    ids, counts, log_probs, ends = map(np.asarray, written)
    for slot, text in enumerate(texts):
      if text is None or text.ended_by:
        continue
      if np.isnan(log_probs[slot, 0]):
        text.ended_by, self._texts[slot] = 'not finite', None
        self._broken.append(text.place)
        continue
      text.add_step(ids[slot], counts[slot], log_probs[slot], bool(ends[slot]))
      if text.ended_by:
        self._texts[slot], self._has_ended = None, True
        yield text


class PromptReader:
  """Reads one prompt after the other, each in chunks, and no token that is at hand."""

  def __init__(self, engine: Engine, capacity: int):
    self._engine = engine
    self._cache = engine.empty_cache(1, capacity)
    shares, self._drafts = engine.reader.shares, None
    if engine.drafts:
      shapes = shapes_of(self._cache)
      self._drafts = make_texts(no_drafts, shapes, engine.cfg, n_texts=1, shares=shares)
    self._logits = engine.empty_logits(1)
    self._held: list[int] = []  # What the cache holds.
    self.text: Text | None = None

  def begin(self, text: Text, held: Sequence[list[int]], slots: Slots):
    """Begins a prompt behind what it has in common with the last one or with that of a slot.

    The last token is read in any case, for the logits of the next. So is the last one in common where
    there are drafts, which depend on the token behind it.
    """
    self.text, most = text, len(text.prompt) - 1
    less = 1 if self._engine.drafts else 0
    common = lambda tokens: max(min(n_common(text.prompt, tokens) - less, most), 0)
    own, in_slots = common(self._held), [common(tokens) for tokens in held]
    if max(in_slots) >= own + FEWEST:
      own, slot = max(in_slots), int(np.argmax(in_slots))
      self._cache, self._drafts = copy_of(slots, slot, shares=self._engine.reader.shares)
    self._held = text.prompt[:own]
    text.begin(own)
    length = lambda: place_text(np.array([own], np.int32), self._engine.reader.shares)
    self._cache = self._cache._replace(length=length())
    if self._drafts is not None:
      self._drafts = self._drafts._replace(cache=self._drafts.cache._replace(length=length()))

  def read_chunk(self) -> bool:
    """Reads on; returns whether the prompt has been read."""
    before, prompt, engine = len(self._held), self.text.prompt, self._engine
    width = chunk_width(len(prompt) - before, engine.chunk)
    new, behind = prompt[before : before + width], prompt[before + 1 : before + 1 + width]
    n_new, tokens = _as_row(new, width)
    if self._drafts is None:
      self._logits, self._cache = engine.read(
          self._cache, self._logits, tokens, n_new, before=before
      )
    else:
      n_known, behind = _as_row(behind, width)
      capacity = self._cache.capacity(engine.cfg)
      self._logits, self._cache, self._drafts = read_chunk_with_drafts(
          engine.weights, self._cache, self._drafts, tokens, behind, n_new, n_known,
          reader=engine.reader, visible=engine.visible(before, width, capacity),
      )  # fmt: skip
    self._held = prompt[: before + len(new)]
    return len(self._held) == len(prompt)

  def finish(self) -> tuple[Text, Cache, Drafts | None, jax.Array]:
    """Returns the text, its caches, which go on being used here, and its logits."""
    text, self.text = self.text, None
    return text, self._cache, self._drafts, self._logits


def _as_row(tokens: list[int], width: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the number of tokens [1], and the tokens with padding behind them [1, width]."""
  row = np.zeros((1, width), np.int32)
  row[0, : len(tokens)] = tokens
  return np.array([len(tokens)], np.int32), row


def chunk_width(n_left: int, most: int) -> int:
  """Returns the width of the chunk in which so many tokens are read, or the first of them."""
  width = min(FEWEST, most)
  while width < min(n_left, most):
    width = min(4 * width, most)
  return width


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
  """Returns how many tokens two texts have in common, from the first on."""
  return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
