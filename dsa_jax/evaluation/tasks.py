# SPDX-License-Identifier: Apache-2.0
"""Tasks of long context, made from local text for any tokenizer at any length.

The kinds are those of RULER (Hsieh et al., 2404.06654); the words are this file's own. Everything
is drawn from fixed seeds, so a task is the same on every machine with the same text and tokenizer.
"""

from collections.abc import Callable, Collection, Sequence
import functools
import itertools
import random
import re
import string
from typing import NamedTuple

from dsa_jax.config import ConfigError

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
COLOURS = 'amber azure black brown coral golden green indigo olive pink red violet white'.split()
PLACES = 'basin bridge cellar chapel cliff garden harbor island market meadow mill tower'.split()
VALUES = 4  # Values of one key, and keys that are asked for at once.
DISTRACTORS = 8  # Needles beside the one that is asked for.
HOPS = 4  # Assignments of a chain, after the first.
COMMON = 5  # Common words that are asked for.
FREQUENT = 3  # Frequent words that are asked for.
QUOTED, CONTINUED = 8, 3  # Words of a quotation, and those that follow it.
ROOM = 16  # Tokens beside those of the answers that a model may take for them.
Measure = Callable[[str], int]  # The number of tokens of a text.


class Haystack(NamedTuple):
  """Local text, as pieces between which needles may lie."""

  sentences: tuple[str, ...]
  words: tuple[str, ...]  # Different ones, in a fixed order.

  @classmethod
  def of(cls, text: str) -> 'Haystack':
    """Cuts a text into sentences and lines.

    Raises:
      ConfigError: There is too little text.
    """
    pieces = (' '.join(piece.split()) for piece in re.split(r'(?<=[.!?])\s+|\n+', text))
    sentences = tuple(piece for piece in pieces if 20 <= len(piece) <= 400)
    words = tuple(sorted(set(re.findall(r'\b[a-z]{4,10}\b', text))))
    if len(sentences) < 50 or len(words) < 100:
      raise ConfigError(
          f'the haystack has {len(sentences)} sentences and {len(words)} different words: give '
          'text with at least 50 and 100, by --haystack.'
      )
    return cls(sentences, words)

  def take(self, n: int, rng: random.Random, without: Collection[str] = ()) -> list[str]:
    """Returns sentences in their order, from a random place on, around the end if need be."""
    first = rng.randrange(len(self.sentences))
    order = itertools.cycle([*self.sentences[first:], *self.sentences[:first]])
    return [*itertools.islice((x for x in order if x not in without), n)]


class Task(NamedTuple):
  """A text with a question about it."""

  context: str
  question: str
  prefix: str  # The beginning of the answer, for a model that continues text.
  answers: tuple[str, ...]  # All of them are asked for.
  depth: float | None  # The place of what is asked for, from 0 to 1; None if it is in several.
  room: int  # Tokens that a model may take for its answer.
  n_tokens: int  # Those of the whole prompt for a base model, and of the room for the answer.

  @property
  def base_prompt(self) -> str:
    return f'{self.context}\n\n{self.question}\n{self.prefix}'


class Draft(NamedTuple):
  """A task whose context is not yet as long as it shall be."""

  context: Callable[[int], str]  # Returns the text with so many pieces of filler.
  question: str
  prefix: str
  answers: Sequence[str]
  depth: float | None = None


def make_task(
    kind: str, haystack: Haystack, length: int, number: int, measure: Measure, spare: int = ROOM
) -> Task:
  """Returns a task that fills a length.

  Args:
    kind: A key of `KINDS`.
    haystack: The local text.
    length: Tokens of the prompt and of the room for the answer, at most.
    number: Tasks with other numbers are other ones. It also decides the depth.
    measure: The tokenizer's.
    spare: Tokens beside those of the answers that a model may take for them.

  Raises:
    ConfigError: The task does not fit into the length.
  """
  make_rng = lambda: random.Random(f'{kind}/{length}/{number}')
  draft = KINDS[kind](haystack, make_rng(), DEPTHS[number % len(DEPTHS)])
  room = measure(', '.join(draft.answers)) + spare
  n_tokens = lambda n: measure(_prompt(draft, n)) + room
  if n_tokens(0) > length:
    raise ConfigError(
        f'a task of {kind} takes {n_tokens(0)} tokens without filler; {length=} is too short.'
    )
  low, high = 0, 1
  while n_tokens(high) <= length:
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if n_tokens(middle) <= length else (low, middle)
  answers = tuple(draft.answers)
  return Task(
      draft.context(low), draft.question, draft.prefix, answers, draft.depth, room, n_tokens(low)
  )


def _prompt(draft: Draft, n: int) -> str:
  return f'{draft.context(n)}\n\n{draft.question}\n{draft.prefix}'


def _around(
    haystack: Haystack, seed: int, needles: Sequence[tuple[float, str]], n: int
) -> str:
  """Returns sentences with needles at their depths, those of one depth in the order given.

  A needle that is a sentence of the haystack is in no other place.
  """
  sentences = haystack.take(n, random.Random(seed), [needle for _, needle in needles])
  for depth, needle in sorted(needles, key=lambda x: -x[0]):
    sentences.insert(round(depth * n), needle)
  return ' '.join(sentences)


def _needles(
    haystack: Haystack, rng: random.Random, depth: float, *, keys: int, values: int, asked: int
) -> Draft:
  """Hides the codes of places, and asks for those of some."""
  places = rng.sample([f'{colour} {place}' for colour in COLOURS for place in PLACES], keys)
  codes = {place: [str(rng.randrange(10**6, 10**7)) for _ in range(values)] for place in places}
  hidden = [(p, code) for p in places for code in codes[p]]
  is_single = asked == values == 1
  depths = [depth if is_single and p == places[0] else rng.random() for p, _ in hidden]
  needles = [(d, f'A code of the {p} is {code}.') for d, (p, code) in zip(depths, hidden)]
  wanted = places[:asked]
  names = ' and of '.join(f'the {place}' for place in wanted)
  what = 'the code' if is_single else 'all the codes'
  return Draft(
      functools.partial(_around, haystack, rng.getrandbits(32), needles),
      f'Question: What {"is" if is_single else "are"} {what} of {names}, by the text above?',
      f'Answer: By the text above, {what} of {names} {"is" if is_single else "are"}',
      [code for place in wanted for code in codes[place]],
      depth if is_single else None,
  )


def _variables(haystack: Haystack, rng: random.Random, depth: float) -> Draft:
  """Assigns a number to a variable and that to others in turn; another chain lies between."""
  names = set()
  while len(names) < 2 * (HOPS + 1):
    names.add(''.join(rng.choices(string.ascii_uppercase, k=4)))
  names, needles, chains = sorted(names), [], []
  rng.shuffle(names)
  for chain in names[: HOPS + 1], names[HOPS + 1 :]:
    value = str(rng.randrange(10**4, 10**5))
    given = [value, *(f'VAR {name}' for name in chain)]
    depths = sorted(rng.random() for _ in chain)
    needles += [(d, f'Set VAR {name} = {x}.') for d, name, x in zip(depths, chain, given)]
    chains.append((value, chain))
  value, chain = chains[0]
  return Draft(
      functools.partial(_around, haystack, rng.getrandbits(32), needles),
      f'Question: Which {len(chain)} variables have the value {value}, directly or through others?',
      f'Answer: The {len(chain)} variables with the value {value} are',
      chain,
  )


def _common_words(haystack: Haystack, rng: random.Random, depth: float) -> Draft:
  """Lists words, of which a few come again and again and all others once or seldom."""
  words, seed = list(haystack.words), rng.getrandbits(32)
  rng.shuffle(words)
  question = f'Question: Which {COMMON} words are the most common in the list above?'
  prefix = f'Answer: The {COMMON} most common words in the list are'
  asked = f'{question} {prefix}'.lower()  # Who repeats the question has not answered.
  common = [word for word in words if word not in asked][:COMMON]
  others = [word for word in words if word not in common]

  def context(n: int) -> str:
    rare = [others[i % len(others)] for i in range(n)]
    listed = rare + common * (3 + n // 20 + n // len(others))
    random.Random(seed).shuffle(listed)
    return ' '.join(f'{i}. {word}' for i, word in enumerate(listed, start=1))

  return Draft(
      context,
      question,
      prefix,
      common,
  )


def _frequent_words(haystack: Haystack, rng: random.Random, depth: float) -> Draft:
  """Writes a text of made-up words, whose frequencies fall with the square of their ranks."""
  seed, words = rng.getrandbits(32), []
  while len(words) < 500:
    word = ''.join(rng.choices(string.ascii_lowercase, k=6))
    words += [word] if word not in words else []

  def context(n: int) -> str:
    text = []
    for rank, word in enumerate(words, start=1):
      text += [word] * max(round((n + 40) * 0.6 / rank**2), 1)
      if len(text) >= n + 40:
        break
    random.Random(seed).shuffle(text)
    return ' '.join(text)

  return Draft(
      context,
      f'Question: Which {FREQUENT} words of the coded text above are the most frequent?',
      f'Answer: The {FREQUENT} most frequent words are',
      words[:FREQUENT],
  )


def _quotation(haystack: Haystack, rng: random.Random, depth: float) -> Draft:
  """Quotes a sentence of the text, and asks for the words that follow."""
  usual = lambda x: QUOTED + CONTINUED <= len(x.split()) and len(x) <= 200
  plain = lambda x: usual(x) and haystack.sentences.count(x) == 1
  sentences = list(haystack.sentences)
  rng.shuffle(sentences)
  sentence = next(filter(plain, sentences), None)
  if sentence is None:
    raise ConfigError(f'no sentence of the haystack has {QUOTED + CONTINUED} words and comes once.')
  words = sentence.split()
  first = rng.randrange(len(words) - QUOTED - CONTINUED + 1)
  quoted = ' '.join(words[first : first + QUOTED])
  return Draft(
      functools.partial(_around, haystack, rng.getrandbits(32), [(depth, sentence)]),
      f'Question: Which {CONTINUED} words come after "{quoted}" in the text above?',
      f'Answer: The text above says "{quoted}',
      [' '.join(words[first + QUOTED : first + QUOTED + CONTINUED])],
      depth,
  )


Kind = Callable[[Haystack, random.Random, float], Draft]
KINDS: dict[str, Kind] = {
    'single': functools.partial(_needles, keys=1, values=1, asked=1),
    'multi_key': functools.partial(_needles, keys=1 + DISTRACTORS, values=1, asked=1),
    'multi_value': functools.partial(_needles, keys=1, values=VALUES, asked=1),
    'multi_query': functools.partial(_needles, keys=VALUES, values=1, asked=VALUES),
    'variables': _variables,
    'common_words': _common_words,
    'frequent_words': _frequent_words,
    'question': _quotation,
}


def score(answers: Sequence[str], text: str) -> float:
  """Returns the share of the answers that a text holds as whole words, whatever their case."""
  holds = lambda answer: re.search(rf'(?<!\w){re.escape(answer)}(?!\w)', text, re.IGNORECASE)
  return sum(bool(holds(answer)) for answer in answers) / len(answers)
