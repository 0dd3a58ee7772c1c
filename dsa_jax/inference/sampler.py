# SPDX-License-Identifier: Apache-2.0
"""A model with room to read and write."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import pathlib
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.data.tokenizer import Bytes, Tokenizer, find_tokenizer
from dsa_jax.inference.cache import Cache, init_cache
from dsa_jax.inference.extend import extend
from dsa_jax.inference.load import has_trained_indexer, load_checkpoint, read_record
from dsa_jax.kernels.backend import default_backend
from dsa_jax.nn.attention.types import Attention
from dsa_jax.nn.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """How tokens are drawn."""

  max_new_tokens: int = 128
  temperature: float = 0.0  # 0: always the likeliest.
  top_k: int = 0  # Draw from that many of the likeliest; 0: from all.
  top_p: float = 1.0  # Draw from the likeliest that hold this much probability.
  stop: tuple[int, ...] = ()  # Ids that end a sequence; they are not returned.
  seed: int = 0

  def __post_init__(self):
    if self.max_new_tokens < 1:
      raise ConfigError(f'{self.max_new_tokens=} must be at least 1.')
    if not self.temperature >= 0:
      raise ConfigError(f'{self.temperature=} must be 0 or more.')
    if self.top_k < 0:
      raise ConfigError(f'{self.top_k=} must be 0 or more.')
    if not 0 < self.top_p <= 1:
      raise ConfigError(f'{self.top_p=} must be above 0 and at most 1.')


class Prefix(NamedTuple):
  """Texts that have been read; any number of continuations may start from one."""

  cache: Cache
  logits: Float[Array, 'B W']  # Of the next token.

  @property
  def lengths(self) -> np.ndarray:
    return np.asarray(self.cache.length)


class Sampler:
  """A model with room to read and write.

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
      cache: str = '',
      chunk: int | None = None,
      backend: str = '',
  ):
    """Makes a sampler.

    Args:
      model: From `load_checkpoint`, or in training.
      tokenizer: Bytes if None.
      capacity: Tokens that a sequence may have, prompt included; 0: all the model was made for.
      attention: 'sparse', 'masked' or 'dense'; see `extend`.
      cache: Its format, see `init_cache`; '': the dtype of the model's activations.
      chunk: Tokens of a prompt that are read at a time; None: 512, but 4096 on a TPU, whose kernels
        pack all keys for each chunk.
      backend: Of the kernels; '': the platform's default.
    """
    self.cfg, self.tokenizer, self.attention = model.cfg, tokenizer or Bytes(), attention
    self.capacity = capacity or model.cfg.max_seq_len
    if not 1 <= self.capacity <= model.cfg.max_seq_len:
      raise ConfigError(f'{capacity=} must be within 1 and the {model.cfg.max_seq_len=}.')
    backend = backend or default_backend()
    self._on_tpu = backend == 'tpu'
    chunk = (4096 if self._on_tpu else 512) if chunk is None else chunk
    if chunk < 1:
      raise ConfigError(f'{chunk=} must be at least 1.')
    self._chunk, self._format = chunk, cache or model.cfg.dtype
    self._graph, self._params = nnx.split(model)
    how = {'attention': attention, 'backend': backend}
    self._read = jax.jit(functools.partial(_read, self._graph, **how), donate_argnums=1)
    self._step = jax.jit(
        functools.partial(_step, self._graph, **how), donate_argnums=1, static_argnames='top_k'
    )

  @classmethod
  def load(cls, folder: str | pathlib.Path, **kwargs) -> 'Sampler':
    """Returns a sampler for a converted checkpoint, or for RUN/checkpoints/ENTRY.

    Attention is sparse unless told otherwise, but dense where the indexer was never trained.
    """
    folder = pathlib.Path(folder).expanduser()
    record = read_record(folder)
    kwargs = {'attention': 'sparse' if has_trained_indexer(folder, record) else 'dense'} | kwargs
    return cls(load_checkpoint(folder), find_tokenizer(folder, record), **kwargs)

  def __call__(self, prompt: str, **kwargs) -> str:
    """Returns the continuation of one text; see SampleConfig for the arguments."""
    return ''.join(self.stream(prompt, **kwargs))

  def stream(self, prompt: str, **kwargs) -> Iterator[str]:
    """Yields the continuation of one text as it is written."""
    if not prompt:
      raise ConfigError('the prompt is empty: there must be something to continue.')
    config = SampleConfig(**({'stop': self.tokenizer.stop} | kwargs))
    prefix = self.read([self.tokenizer.encode(prompt)], config.max_new_tokens)
    new = (ids[0] for ids in self.steps(prefix, config))
    return self.tokenizer.stream(i for i in new if i is not None)

  def read(self, prompts: Sequence[Sequence[int]], room: int = 0, *, after: Prefix | None = None) -> Prefix:
    """Reads texts, in chunks.

    Args:
      prompts: Token ids of each.
      room: Tokens that must fit behind them.
      after: Read on from here, one prompt for each of its texts; it stays as it was.

    Raises:
      ValueError: A prompt is empty, too long, or holds an id that is no token.
    """
    before = np.zeros(len(prompts), int) if after is None else after.lengths
    if not prompts or len(before) != len(prompts):
      raise ConfigError(f'{len(prompts)} prompts for {len(before)} texts; there must be one for each.')
    for i, prompt in enumerate(prompts):
      self._check(i, prompt, int(before[i]), room)
    longest = max(map(len, prompts))
    width = min(self._chunk, 1 << (longest - 1).bit_length())  # Few programs for all lengths.
    tokens = np.zeros((len(prompts), -(-longest // width) * width), np.int32)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    for i, prompt in enumerate(prompts):
      tokens[i, : len(prompt)] = prompt
    if after is None:
      how = {'fmt': self._format, 'whole_lines': self._on_tpu}
      cache = init_cache(self.cfg, len(prompts), self.capacity, **how)
      logits = jnp.zeros((len(prompts), self.cfg.vocab_size), jnp.float32)
    else:
      cache, logits = jax.tree.map(jnp.copy, after.cache), after.logits
    for first in range(0, longest, width):
      n_new = np.clip(lengths - first, 0, width).astype(np.int32)
      piece = tokens[:, first : first + width]
      logits, cache = self._read(self._params, cache, piece, n_new, logits)
    return Prefix(cache, logits)

  def _check(self, i: int, prompt: Sequence[int], before: int, room: int):
    if not len(prompt):
      raise ConfigError(f'prompt {i} is empty: it must hold at least one token.')
    total = before + len(prompt) + room
    if total > self.capacity:
      raise ConfigError(
          f'prompt {i} has {before + len(prompt)} tokens and {room} are to follow: {total} do not fit '
          f'into a cache of {self.capacity}.'
      )
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= self.cfg.vocab_size:
      wrong = low if low < 0 else high
      raise ConfigError(f'prompt {i} holds id {wrong}; ids must be within 0 and {self.cfg.vocab_size - 1}.')

  def steps(self, prefix: Prefix, config: SampleConfig) -> Iterator[list[int | None]]:
    """Yields the next id of every text, step after step; None for those that have ended.

    Text i draws from a random state of its own: what it becomes depends on the seed and on i, not on
    its neighbours.
    """
    if prefix.lengths.max() + config.max_new_tokens > self.capacity:
      raise ConfigError(
          f'{prefix.lengths.max()} tokens are held and {config.max_new_tokens=} are to follow: they do '
          f'not fit into a cache of {self.capacity}.'
      )
    if config.top_k > self.cfg.vocab_size:
      raise ConfigError(f'{config.top_k=} must be at most the vocabulary of {self.cfg.vocab_size}.')
    n = len(prefix.lengths)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(config.seed), jnp.arange(n))
    cache, logits = jax.tree.map(jnp.copy, prefix.cache), prefix.logits
    running = np.ones(n, bool)
    for _ in range(config.max_new_tokens):
      ids, logits, cache = self._step(
          self._params, cache, logits, keys, jnp.asarray(running),
          config.temperature, config.top_p, top_k=config.top_k,
      )  # fmt: skip
      ids = np.asarray(ids)
      running &= ~np.isin(ids, config.stop)
      if not running.any():
        return
      yield [int(i) if alive else None for i, alive in zip(ids, running)]

  def generate(self, prompts: Sequence[Sequence[int]], config: SampleConfig = SampleConfig()) -> list[list[int]]:
    """Returns the continuations of several texts, as ids."""
    prefix = self.read(prompts, config.max_new_tokens)
    found = [[] for _ in prompts]
    for ids in self.steps(prefix, config):
      for text, i in zip(found, ids):
        if i is not None:
          text.append(i)
    return found


def _read(graph, params, cache: Cache, tokens, n_new, logits, *, attention, backend):
  """One chunk of every text; those that are over keep the logits they had."""
  model = nnx.merge(graph, params)
  reading = extend(model, cache, tokens, n_new, attention=attention, backend=backend)
  last = jnp.maximum(n_new - 1, 0)[:, None, None]
  hidden = jnp.take_along_axis(reading.hidden, last, axis=1)
  new = model.logits(hidden)[:, 0]
  return jnp.where(n_new[:, None] > 0, new, logits), reading.cache


def _step(
    graph, params, cache: Cache, logits, keys, running, temperature, top_p, *, top_k, attention, backend
):
  """Draws a token for every running text, and reads it."""
  position_keys = jax.vmap(jax.random.fold_in)(keys, cache.length)
  ids = draw(logits, position_keys, temperature, top_k, top_p)
  how = {'attention': attention, 'backend': backend}
  logits, cache = _read(graph, params, cache, ids[:, None], running.astype(jnp.int32), logits, **how)
  return ids, logits, cache


def draw(
    logits: Float[Array, 'B W'],
    keys: Key[Array, 'B'],
    temperature: Float[Array, ''] | float,
    top_k: int,
    top_p: Float[Array, ''] | float,
) -> Int[Array, 'B']:
  """Draws an id from each row; the likeliest, lowest id first, at temperature 0.

  Cut to the `top_k` likeliest first, then to the fewest that hold `top_p` of what is left.
  """
  order = jnp.argsort(-logits, axis=-1, stable=True)
  if top_k:
    order = order[:, :top_k]
  scaled = jnp.take_along_axis(logits, order, axis=-1) / jnp.where(temperature > 0, temperature, 1)
  probs = jax.nn.softmax(scaled, axis=-1)
  kept = jnp.cumsum(probs, axis=-1) - probs < top_p  # What is likelier holds less than that.
  rank = jax.vmap(jax.random.categorical)(keys, jnp.where(kept, scaled, -jnp.inf))
  rank = jnp.where(temperature > 0, rank, 0)
  return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
