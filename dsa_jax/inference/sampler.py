# SPDX-License-Identifier: Apache-2.0
"""Continues texts with a model: reads prompts into a cache, then draws token after token."""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import logging
import pathlib
import typing
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.data.text import VOCAB_SIZE
from dsa_jax.data.tokenizer import Bytes, Tokenizer, find_tokenizer
from dsa_jax.inference.cache import FORMATS, Cache, init_cache
from dsa_jax.inference.draw import draw
from dsa_jax.inference.extend import extend, short_context
from dsa_jax.inference.load import find_checkpoint, load_checkpoint
from dsa_jax.kernels.backend import check_backend, default_backend
from dsa_jax.nn.attention.mla import MLA
from dsa_jax.nn.attention.types import Attention
from dsa_jax.nn.block import Block
from dsa_jax.nn.transformer import Transformer
from dsa_jax.params import BackboneParam
from dsa_jax.selection import check_rule

CHUNK = 512  # Tokens of a prompt that are read at a time.
TPU_CHUNK = 4096  # The same on a TPU, whose kernels pack all keys anew for each chunk.


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """The rule by which tokens are drawn, and when to stop."""

  max_new_tokens: int = 128  # A sequence ends after as many.
  temperature: float = 0.0  # Divides the logits. 0 always takes the likeliest token.
  top_k: int = 0  # Tokens are drawn from as many of the likeliest. 0 draws from all.
  top_p: float = 1.0  # Tokens are drawn from the likeliest that hold this much probability.
  stop: tuple[int, ...] = ()  # Ids that end a sequence. They are not returned.
  seed: int = 0  # The draws depend on it and on a text's place in the batch.

  def __post_init__(self):
    if self.max_new_tokens < 1:
      raise ConfigError(f'{self.max_new_tokens=} must be at least 1.')
    if not self.temperature >= 0:
      raise ConfigError(f'{self.temperature=} must be 0 or more.')
    if self.top_k < 0:
      raise ConfigError(f'{self.top_k=} must be 0 or more.')
    if not 0 < self.top_p <= 1:
      raise ConfigError(f'{self.top_p=} must be above 0 and at most 1.')
    if not 0 <= self.seed < 2**32:
      raise ConfigError(f'{self.seed=} must be within 0 and {2**32 - 1}.')


class Prefix(NamedTuple):
  """Texts that have been read. Any number of continuations may start from one."""

  cache: Cache
  logits: Float[Array, 'B W']  # Those of the next token.

  @property
  def lengths(self) -> np.ndarray:
    return np.asarray(self.cache.length)


class Sampler:
  """Reads and continues texts with one model.

      sampler = Sampler.load('runs/quickstart/checkpoints/sparse')
      print(sampler('def main('))
  """

  def __init__(
      self,
      model: Transformer,
      tokenizer: Tokenizer | None = None,
      *,
      capacity: int = 0,
      attention: Attention = 'sparse',
      rule: str = 'indexer',
      cache: str = '',
      chunk: int | None = None,
      backend: str = '',
  ):
    """Makes a sampler. Samplers of models with one structure share their compiled programs.

    Args:
      model: From `load_checkpoint`, or in training.
      tokenizer: Turns text into ids and back. None reads bytes.
      capacity: Tokens that a sequence may have, its prompt included. 0 stands for the model's
        `max_seq_len`.
      attention: 'sparse', 'masked' or 'dense'; see `extend`.
      rule: What selects, a key of `dsa_jax.selection.RULES`. Dense attention has none but the default.
      cache: The format of the cache, see `init_cache`. '' stands for the dtype of the activations.
      chunk: Tokens of a prompt that are read at a time. None stands for 512, and for 4096 on a TPU.
      backend: Which kernels run. '' stands for the platform's default.

    Raises:
      ConfigError: An argument is out of range.
    """
    if not isinstance(model, Transformer):
      raise ConfigError(
          f'a Sampler takes a model, not {type(model).__name__}: Sampler.load(FOLDER) makes one.'
      )
    self.cfg, self.tokenizer = model.cfg, tokenizer or Bytes()
    self.attention, self.rule = attention, rule
    if attention not in typing.get_args(Attention):
      raise ConfigError(f'{attention=} must be one of {typing.get_args(Attention)}.')
    check_rule(rule)
    if attention == 'dense' and rule != 'indexer':
      raise ConfigError(f"{rule=} selects nothing under {attention=}: use 'sparse' or 'masked'.")
    if not 0 <= capacity <= model.cfg.max_seq_len:
      raise ConfigError(f'{capacity=} must be within 0 and the {model.cfg.max_seq_len=}.')
    self.capacity = capacity or model.cfg.max_seq_len
    if cache not in ('', *FORMATS):
      raise ConfigError(f"{cache=} must be one of {FORMATS}, or '' for the model's dtype.")
    self._format = cache or model.cfg.dtype
    backend = backend or default_backend()
    check_backend(backend)
    self._on_tpu = backend == 'tpu'
    self._chunk = (TPU_CHUNK if self._on_tpu else CHUNK) if chunk is None else chunk
    if self._chunk < 1:
      raise ConfigError(f'{chunk=} must be at least 1.')
    on_cpu = jax.default_backend() == 'cpu'
    weights = prepared_for_cpu(model) if on_cpu else (model, None)
    self._weights, structure = jax.tree.flatten(weights)
    self._reader = make_reader(structure, attention, backend, rule, on_cpu)

  @classmethod
  def load(
      cls,
      folder: str | pathlib.Path,
      *,
      index_topk: int | None = None,
      rule: str | None = None,
      attention: Attention | None = None,
      **kwargs,
  ) -> 'Sampler':
    """Returns a sampler for a converted checkpoint, or for RUN/checkpoints/ENTRY.

    Args:
      folder: The checkpoint.
      index_topk: How many tokens each token selects. None stands for the model's own budget.
      rule: What selects them. None stands for the rule of the run, or else the indexer.
      attention: None stands for 'sparse', but for 'dense' if what selects is an indexer that was
        never trained.
      **kwargs: The other arguments of the class.

    Raises:
      ConfigError: There is no such checkpoint, or an argument is out of range or without effect.
    """
    stored = find_checkpoint(folder)
    learned = (rule or stored.rule) == 'indexer'
    if attention is None:
      attention = 'dense' if learned and not stored.has_trained_indexer else 'sparse'
    if attention == 'dense':
      given = {'index_topk': index_topk, 'rule': rule}
      if ignored := [f'{name}={value!r}' for name, value in given.items() if value is not None]:
        raise ConfigError(
            f'{", ".join(ignored)} would change nothing, because attention is dense: it was asked for, '
            f"or the indexer of {folder} was never trained. Give attention='sparse', too, or a rule "
            'that needs no training.'
        )
    selects = 'indexer' if attention == 'dense' else rule or stored.rule
    model = load_checkpoint(folder, index_topk=index_topk)
    tokenizer = find_tokenizer(stored.origin)
    is_foreign = model.cfg.vocab_size != VOCAB_SIZE and not stored.source
    if isinstance(tokenizer, Bytes) and is_foreign:
      logging.warning(
          '%s has no tokenizer.json: text is read and written as bytes, although the model has %d ids. '
          'Put the tokenizer of the model there, or use ids: `read`, `steps` and `generate`.',
          stored.folder, model.cfg.vocab_size,
      )  # fmt: skip
    return cls(model, tokenizer, rule=selects, attention=attention, **kwargs)

  def __call__(self, prompt: str, **kwargs) -> str:
    """Returns the continuation of one text; see SampleConfig for the arguments."""
    return ''.join(self.stream(prompt, **kwargs))

  def stream(self, prompt: str, **kwargs) -> Iterator[str]:
    """Yields the continuation of one text as it is written."""
    if not prompt:
      raise ConfigError(f'{prompt=} is empty: there must be something to continue.')
    config = SampleConfig(**({'stop': self.tokenizer.stop} | kwargs))
    steps = self._read_and_continue([self.tokenizer.encode(prompt)], config)
    return self.tokenizer.stream(ids[0] for ids in steps if ids[0] is not None)

  def generate(
      self, prompts: Sequence[Sequence[int]], config: SampleConfig = SampleConfig()
  ) -> list[list[int]]:
    """Returns the continuations of several texts, as ids."""
    texts = [[] for _ in prompts]
    for ids in self._read_and_continue(prompts, config):
      for text, i in zip(texts, ids):
        if i is not None:
          text.append(i)
    return texts

  def read(
      self, prompts: Sequence[Sequence[int]], room: int = 0, *, after: Prefix | None = None
  ) -> Prefix:
    """Reads texts, in chunks.

    Args:
      prompts: Token ids of each text.
      room: Tokens that must fit behind each text.
      after: Reads on from here, with one prompt for each of its texts. It stays as it was.

    Raises:
      ConfigError: A prompt is empty, too long, or holds an id that is no token.
    """
    self._check_prompts(prompts, room, after)
    if after is None:
      cache = init_cache(
          self.cfg, len(prompts), self.capacity, fmt=self._format, whole_lines=self._on_tpu
      )
      logits = jnp.zeros((len(prompts), self.cfg.vocab_size), jnp.float32)
    else:
      cache, logits = jax.tree.map(jnp.copy, after.cache), after.logits
    longest = max(map(len, prompts))
    width = min(self._chunk, 1 << (longest - 1).bit_length())  # Few programs for all lengths.
    tokens = np.zeros((len(prompts), -(-longest // width) * width), np.int32)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    for i, prompt in enumerate(prompts):
      tokens[i, : len(prompt)] = prompt
    before = 0 if after is None else int(after.lengths.max())
    for first in range(0, longest, width):
      n_new = np.clip(lengths - first, 0, width).astype(np.int32)
      chunk = tokens[:, first : first + width]
      logits, cache = read_chunk(
          self._weights, cache, chunk, n_new, logits,
          reader=self._reader, visible=self._visible(before + first, width),
      )  # fmt: skip
    return Prefix(cache, logits)

  def _visible(self, before: int, width: int) -> int:
    """Returns how many tokens a chunk may see; of a few such numbers, for few programs."""
    topk, most = self.cfg.index_topk, before + width
    longest = short_context(width, topk, self._reader.backend)
    if self.attention != 'sparse' or most > longest:
      return 0
    return min(topk if most <= topk else longest, self.capacity)

  def steps(self, prefix: Prefix, config: SampleConfig) -> Iterator[list[int | None]]:
    """Yields the next id of every text, step after step, and None for texts that have ended.

    The prefix stays as it was. Text i draws from a random state of its own, so its continuation
    depends on the seed and on i, but not on its neighbours.

    Raises:
      ConfigError: The new tokens do not fit into the cache, or `config` does not suit the model.
    """
    self._check_config(config)
    self._check_prefix(prefix)
    longest = prefix.lengths.max()
    if longest + config.max_new_tokens > self.capacity:
      raise ConfigError(
          f'{longest} tokens are held and {config.max_new_tokens=} are to follow: they do not fit '
          f'into a cache of {self.capacity}.'
      )
    return self._continue(prefix, config, keep=True)

  def _read_and_continue(
      self, prompts: Sequence[Sequence[int]], config: SampleConfig
  ) -> Iterator[list[int | None]]:
    self._check_config(config)
    return self._continue(self.read(prompts, config.max_new_tokens), config, keep=False)

  def _continue(self, prefix: Prefix, config: SampleConfig, *, keep: bool):
    """Yields what `steps` does; without `keep` it writes into the prefix's own cache.

    Each step begins before the ids of the one before it are read, so that the device never waits.
    """
    n = len(prefix.lengths)
    keys, running = begin_texts(config.seed, n)
    cache, logits = prefix
    if keep:
      cache = jax.tree.map(jnp.copy, cache)
    numbers = np.float32(config.temperature), np.float32(config.top_p), _padded(config.stop)
    begun = collections.deque()
    for step in range(config.max_new_tokens):
      ids, running, logits, cache = draw_and_read(
          self._weights, cache, logits, keys, running, *numbers,
          top_k=config.top_k, reader=self._reader,
      )  # fmt: skip
      begun.append((ids, running))
      if step:
        if (now := _read_step(*begun.popleft())) is None:
          return
        yield now
    if (now := _read_step(*begun.popleft())) is not None:
      yield now

  def _check_prompts(self, prompts: Sequence[Sequence[int]], room: int, after: Prefix | None):
    if room < 0:
      raise ConfigError(f'{room=} must be 0 or more.')
    before = np.zeros(len(prompts), int)
    if after is not None:
      self._check_prefix(after)
      before = after.lengths
    if not len(prompts) or len(before) != len(prompts):
      raise ConfigError(
          f'{len(prompts)} prompts for {len(before)} texts: there must be one for each, and at '
          'least one.'
      )
    for i, prompt in enumerate(prompts):
      self._check_prompt(i, prompt, int(before[i]), room)

  def _check_prompt(self, i: int, prompt: Sequence[int], before: int, room: int):
    if isinstance(prompt, str):
      raise ConfigError(f'prompt {i} is text, {prompt[:20]!r}: give `tokenizer.encode(text)`.')
    if not len(prompt):
      raise ConfigError(f'prompt {i} is empty: it must hold at least one token.')
    total = before + len(prompt) + room
    if total > self.capacity:
      raise ConfigError(
          f'prompt {i} has {before + len(prompt)} tokens and {room} are to follow: {total} do not '
          f'fit into a cache of {self.capacity}.'
      )
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= self.cfg.vocab_size:
      wrong = low if low < 0 else high
      raise ConfigError(
          f'prompt {i} holds id {wrong}; ids must be within 0 and {self.cfg.vocab_size - 1}.'
      )

  def _check_prefix(self, prefix: Prefix):
    capacity = prefix.cache.capacity(self.cfg)
    if capacity != self.capacity:
      raise ConfigError(
          f'the prefix has a cache of {capacity} tokens: it must come from a sampler of this '
          f'capacity, {self.capacity}.'
      )

  def _check_config(self, config: SampleConfig):
    if config.top_k > self.cfg.vocab_size:
      raise ConfigError(f'{config.top_k=} must be at most the vocabulary of {self.cfg.vocab_size}.')


def _padded(stop: tuple[int, ...]) -> np.ndarray:
  """Returns the ids and as many -1 as make a multiple of eight: one program serves most numbers."""
  ids = np.full(max(-(-len(stop) // 8), 1) * 8, -1, np.int32)
  ids[: len(stop)] = stop
  return ids


def _read_step(ids: jax.Array, running: jax.Array) -> list[int | None] | None:
  """Returns the id of every text that is running, and None if none is."""
  running = np.asarray(running)
  if not running.any():
    return None
  return [int(i) if alive else None for i, alive in zip(np.asarray(ids), running)]


def prepared_for_cpu(model: Transformer) -> tuple[Transformer, list[Block]]:
  """Returns a model without its layers, and its layers, as XLA:CPU reads them without copies.

  The layers lie by themselves, see `extend`. The head is rounded to the dtype of the activations but
  kept in float32, because XLA:CPU would do both before every product, at ten times the product's cost.
  """
  blocks = [model.block(i) for i in range(model.cfg.n_layers)]
  for block in blocks:
    if isinstance(block.attn, MLA):
      block.attn.split_expansion()
  rest = jax.tree.map(lambda x: x, model)  # A new module; the given one stays as it is.
  rest.dense_blocks = rest.moe_blocks = rest.mtp = None
  if model.cfg.dtype != 'float32':
    head = model.head_weight.astype(model.cfg.dtype).astype(jnp.float32)
    rest.head = nnx.data(BackboneParam(head, axes=('embed', 'vocab')))
  return rest, blocks


@dataclasses.dataclass(frozen=True)
class Reader:
  """What a program reads tokens with. It knows its hash, because that of a model takes a millisecond."""

  structure: jax.tree_util.PyTreeDef  # The model and its layers, without their weights.
  attention: Attention
  backend: str
  rule: str
  on_cpu: bool  # Whether they are as `prepared_for_cpu` returns them.
  known_hash: int

  def __hash__(self) -> int:
    return self.known_hash


@functools.cache  # Samplers of models with one structure have one reader, which equals itself at once.
def make_reader(
    structure: jax.tree_util.PyTreeDef, attention: Attention, backend: str, rule: str, on_cpu: bool
) -> Reader:
  fields = structure, attention, backend, rule, on_cpu
  return Reader(*fields, hash(fields))


def _read(
    weights: list[Array],
    cache: Cache,
    tokens: Int[Array, 'B T'],
    n_new: Int[Array, 'B'],
    logits: Float[Array, 'B W'],
    *,
    reader: Reader,
    visible: int = 0,
) -> tuple[Float[Array, 'B W'], Cache]:
  """Reads one chunk of every text; a text without new tokens keeps the logits that it had."""
  model, layers = jax.tree.unflatten(reader.structure, weights)
  reading = extend(
      model, cache, tokens, n_new,
      attention=reader.attention, backend=reader.backend, rule=reader.rule, layers=layers,
      visible=visible,
  )  # fmt: skip
  last = jnp.maximum(n_new - 1, 0)[:, None, None]
  hidden = jnp.take_along_axis(reading.hidden, last, axis=1)
  new = model.logits(hidden.astype(jnp.float32) if reader.on_cpu else hidden)[:, 0]
  return jnp.where(n_new[:, None] > 0, new, logits), reading.cache


# All programs belong to the module, so that all samplers share what is compiled.
read_chunk = jax.jit(_read, static_argnames=('reader', 'visible'), donate_argnames='cache')


@functools.partial(jax.jit, static_argnames='n')
def begin_texts(
    seed: Int[Array, ''] | int, n: int
) -> tuple[Key[Array, '{n}'], Bool[Array, '{n}']]:
  """Returns the random state of each of n texts, and that all are running."""
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(n))
  return keys, jnp.ones(n, bool)


@functools.partial(jax.jit, static_argnames=('top_k', 'reader'), donate_argnames='cache')
def draw_and_read(
    weights: list[Array],
    cache: Cache,
    logits: Float[Array, 'B W'],
    keys: Key[Array, 'B'],
    running: Bool[Array, 'B'],
    temperature: Float[Array, ''] | float,
    top_p: Float[Array, ''] | float,
    stop: Int[Array, 'N'],
    *,
    top_k: int,
    reader: Reader,
) -> tuple[Int[Array, 'B'], Bool[Array, 'B'], Float[Array, 'B W'], Cache]:
  """Draws a token for every text, and reads it where the text is running and does not stop with it.

  Returns:
    The ids, which texts go on with theirs, and the next logits and cache.
  """
  position_keys = jax.vmap(jax.random.fold_in)(keys, cache.length)
  ids = draw(logits, position_keys, temperature, top_k, top_p)
  running &= jnp.all(ids[:, None] != stop, axis=1)
  n_new = running.astype(jnp.int32)
  logits, cache = _read(weights, cache, ids[:, None], n_new, logits, reader=reader)
  return ids, running, logits, cache
