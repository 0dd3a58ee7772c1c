# SPDX-License-Identifier: Apache-2.0
"""Continues texts with a model: reads prompts into a cache, then draws token after token."""

import collections
from collections.abc import Collection, Iterator, Sequence
import dataclasses
import functools
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float
import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.data.chat import ChatTemplate, Message, find_chat_template, prompt_of
from dsa_jax.data.text import VOCAB_SIZE
from dsa_jax.data.tokenizer import Bytes, Rendered, Tokenizer, usual_tokenizer
from dsa_jax.data.tokenizer_files import find_tokenizer
from dsa_jax.inference.batching import Completion, Text, complete, size_of_batch
from dsa_jax.inference.cache import Cache
from dsa_jax.inference.load import (
    StoredModel, check_factor, config_of, find_checkpoint, load_checkpoint,
)  # fmt: skip
from dsa_jax.inference.memory import Texts, check_memory
from dsa_jax.inference.programs import make_engine
from dsa_jax.inference.sample_config import SampleConfig, are_whole, padded
from dsa_jax.inference.shares import check_mesh, check_texts, mesh_config, whole_rows
from dsa_jax.inference.slots import Written, check_logits, filled_slots, write
from dsa_jax.inference.stopping import StopTexts
from dsa_jax.nn.attention.types import Attention
from dsa_jax.nn.transformer import Transformer
from dsa_jax.parallel.mesh import MeshConfig
from dsa_jax.parallel.processes import to_host


FIXED = (  # A sampler's programs are made for these.
    'model', 'cfg', 'index_topk', 'index_rope_factor', 'attention', 'rule', 'capacity', 'cache', 'chunk', 'backend',
    'drafts', 'mesh', 'weights',
)  # fmt: skip
FREE = 'tokenizer', 'chat'


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=('cache', 'logits'), meta_fields=('mesh',)
)
@dataclasses.dataclass(frozen=True)
class Prefix:
  """Texts that have been read. Any number of continuations may start from one."""

  cache: Cache
  logits: Float[Array, 'B W']  # Those of the next token.
  mesh: MeshConfig  # The devices that have them: each mesh deals positions out in its own way.

  @property
  def lengths(self) -> np.ndarray:
    return to_host(self.cache.length)


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
      chat: ChatTemplate | None = None,
      capacity: int = 0,
      attention: Attention = 'sparse',
      rule: str = 'indexer',
      cache: str = '',
      chunk: int | None = None,
      backend: str = '',
      drafts: bool = False,
      mesh: Mesh | None = None,
  ):
    """Makes a sampler. Samplers of models with one structure share their compiled programs.

    Args:
      model: From `load_checkpoint`, or in training: then the weights of now, and of another sampler those of then.
      tokenizer: Turns text into ids and back. None reads bytes, where those are what the model knows,
        and ids alone elsewhere.
      chat: Turns a conversation into text. None: the model knows none.
      capacity: Tokens that a sequence may have, its prompt included. 0 stands for the model's
        `max_seq_len`.
      attention: 'sparse', 'masked' or 'dense'; see `extend`.
      rule: What selects, a key of `dsa_jax.selection.RULES`. Dense attention has none but the default.
      cache: The format of the cache, see `init_cache`. '' stands for the dtype of the activations.
      chunk: Tokens of a prompt that are read at a time. None stands for 512, and for 4096 on a TPU.
      backend: Which kernels run. '' stands for the platform's default.
      drafts: Whether `complete` lets the model's MTP layer guess tokens, so that a step may write two.
        The texts stay the same.
      mesh: Devices that share the work, see `make_mesh`. Weights are split as in training, texts over
        `fsdp` and `expert`, and the positions of each over `context`. A text that is alone is read by
        all of them. With several processes, each of them makes the same calls. None: one device.

    Raises:
      ConfigError: An argument is out of range.
    """
    if not isinstance(model, Transformer):
      raise ConfigError(
          f'a Sampler takes a model, not {type(model).__name__}: Sampler.load(FOLDER) makes one.'
      )
    self.cfg, self.chat = model.cfg, chat
    self.tokenizer = tokenizer or usual_tokenizer(model.cfg.vocab_size)
    self.attention, self.rule = attention, rule
    self.capacity = check_capacity(model.cfg, capacity, mesh)
    self._engine = make_engine(
        model, attention=attention, rule=rule, cache=cache, chunk=chunk, backend=backend,
        drafts=drafts, mesh=mesh,
    )  # fmt: skip

  def __setattr__(self, name: str, value: Any):
    if '_engine' in vars(self) and name in FIXED:
      raise ConfigError(
          f'{name} of a sampler is fixed: its programs are made for it. Sampler.load(..., {name}=...) '
          'makes another one, where that is an argument.'
      )
    if '_engine' in vars(self) and name not in FREE and not hasattr(type(self), name):
      raise ConfigError(f'a sampler has no {name}: how a text is drawn is an argument of the call that draws it.')
    super().__setattr__(name, value)

  @classmethod
  def load(
      cls,
      folder: str | pathlib.Path,
      *,
      index_topk: int | None = None,
      index_rope_factor: float | None = None,
      rule: str | None = None,
      attention: Attention | None = None,
      capacity: int = 0,
      weights: str = '',
      n_texts: int = 1,
      texts: Texts | None = None,
      tokenizer: Tokenizer | None = None,
      chat: ChatTemplate | None = None,
      mesh: Mesh | None = None,
      **kwargs,
  ) -> 'Sampler':
    """Returns a sampler for a converted checkpoint, or for RUN/checkpoints/ENTRY.

    Args:
      folder: The checkpoint.
      index_topk: How many tokens each token selects. None stands for the model's own budget.
      index_rope_factor: See `load_checkpoint`.
      rule: What selects them. None stands for the rule of the run, or else the indexer.
      attention: None stands for 'sparse', but for 'dense' if what selects is an indexer that was
        never trained.
      capacity: See the class.
      weights: 'float32', 'bfloat16', 'fp8' or 'int8', see `load_checkpoint`. '' stands for 'fp8' where the
        released checkpoint was in FP8, and for 'float32' elsewhere and on a CPU, which widens slowly.
      n_texts: How many texts of that capacity must fit beside the weights, which is checked before
        anything is loaded. `complete` checks what it needs for the texts that it is given.
      texts: What must fit in their place, where that is known better.
      tokenizer: None stands for the checkpoint's own.
      chat: None stands for the template of the checkpoint, if it has one.
      mesh: See there. Each device reads its own share of the weights only.
      **kwargs: The other arguments of the class.

    Raises:
      ConfigError: There is no such checkpoint, or an argument is out of range or without effect.
    """
    stored = find_checkpoint(folder)
    learned = (rule or stored.rule) == 'indexer'
    if attention is None:
      attention = 'dense' if learned and not stored.has_trained_indexer else 'sparse'
    if attention == 'dense':
      _check_unused(folder, index_topk=index_topk, index_rope_factor=index_rope_factor, rule=rule)
    selects = 'indexer' if attention == 'dense' else rule or stored.rule
    check_factor(index_rope_factor, selects)
    changes = dict(index_topk=index_topk, index_rope_factor=index_rope_factor)
    cfg = config_of(stored, **changes)
    weights, cache = weights or _usual_format(stored), kwargs.get('cache') or cfg.dtype
    texts = texts or Texts(n=n_texts, capacity=check_capacity(cfg, capacity, mesh))
    check_memory(cfg, texts, weights=weights, cache=cache, mesh=mesh)
    tokenizer = tokenizer or tokenizer_of(stored, cfg)
    chat = chat or find_chat_template(stored.origin)
    model = load_checkpoint(folder, **changes, mesh=mesh, dtype=weights)
    return cls(
        model, tokenizer, chat=chat, rule=selects, attention=attention, capacity=capacity, mesh=mesh,
        **kwargs,
    )  # fmt: skip

  @property
  def formats(self) -> tuple[str, ...]:
    """The formats of the cache and of the weights, which change what is written."""
    is_weight = lambda dtype: jnp.issubdtype(dtype, jnp.floating) or dtype == jnp.int8
    names = {x.dtype.name for x in self._engine.weights if is_weight(x.dtype)}
    return self._engine.cache_format, *sorted(names)

  def __call__(self, prompt: str, **kwargs) -> str:
    """Returns the continuation of one text; see SampleConfig for the arguments."""
    return ''.join(self.stream(prompt, **kwargs))

  def stream(self, prompt: str, **kwargs) -> Iterator[str]:
    """Yields the continuation of one text as it is written."""
    if not prompt:
      raise ConfigError(f'{prompt=} is empty: there must be something to continue.')
    config = self.of_text(SampleConfig(**kwargs))
    before = self.tokenizer.encode_prompt(prompt)
    steps = self._read_and_continue([before], config)
    return self._pieces((ids[0] for ids in steps if ids[0] is not None), before, config.stop_texts)

  def of_text(self, config: SampleConfig) -> SampleConfig:
    """Returns how a text is continued: up to the tokenizer's own ids, unless others are named."""
    is_open = config.stop is None
    return dataclasses.replace(config, stop=self.tokenizer.stop) if is_open else config

  def _pieces(
      self, ids: Iterator[int], before: list[int], stop_texts: tuple[str, ...]
  ) -> Iterator[str]:
    """Yields a piece of text for each id behind a prompt, and one behind the last."""
    steps, stops = self.tokenizer.steps(before), StopTexts(stop_texts)
    for i in ids:
      yield stops.push(steps.step(i))
      if stops.reached:
        break
    yield stops.end(steps.end())

  def prompt_of(self, messages: Sequence[Message], **choices: Any) -> Rendered:
    """Returns the text by which the model goes on with a conversation; see `ChatTemplate`.

    Give it to the sampler as it is: it brings along what begins a text, and nothing is added to it.

    Raises:
      ConfigError: The checkpoint has no chat template, or its template refuses the messages.
    """
    return prompt_of(messages, self.chat, **choices)

  def complete(
      self,
      prompts: Sequence[str | Sequence[int]],
      config: SampleConfig | None = None,
      *,
      samples: int = 1,
      slots: int = 8,
      without: Collection[tuple[int, int]] = (),
  ) -> Iterator[Completion]:
    """Yields continuations of many prompts, each as soon as it has ended.

    Texts are written side by side in slots. One that ends leaves, and the next prompt is read, in
    chunks between the steps of the others. What a prompt has in common with one that a slot still
    holds is not read again. No continuation depends on the others.

    Args:
      prompts: Texts or token ids.
      config: How to continue them. None stands for the likeliest tokens.
      samples: How many continuations each prompt gets.
      slots: At most so many texts are written at the same time.
      without: Pairs of a prompt and a sample that are not asked for.

    Raises:
      ConfigError: A prompt is empty, too long, or holds an id that is no token; the slots do not fit
        into memory; or an argument is out of range. Nothing has been read then. Or the logits behind
        a prompt are not finite; the others have been continued then.
    """
    config = self.of_text(config or SampleConfig())
    if samples < 1 or slots < 1:
      raise ConfigError(f'{samples=} and {slots=} must be at least 1.')
    check_texts(self._engine.mesh, 'slots', slots)
    check_drawing(config, self.cfg)
    encode = self.tokenizer.encode_prompt
    ids = [encode(x) if isinstance(x, str) else np.asarray(list(x)).tolist() for x in prompts]
    for i, prompt in enumerate(ids):
      check_prompt(i, prompt, self.cfg, self.capacity, room=config.max_new_tokens)
    texts = [
        Text(i, sample, prompt, self.tokenizer, config)
        for i, prompt in enumerate(ids)
        for sample in range(samples)
        if (i, sample) not in without
    ]
    if texts:
      longest = max(len(text.prompt) for text in texts) + config.max_new_tokens
      self._check_memory(longest, len(texts), slots)
    return complete(self._engine, texts, config, slots)

  def _check_memory(self, longest: int, n_texts: int, slots: int):
    """Raises a ConfigError if so many slots for texts of this length do not fit beside the weights."""
    engine = self._engine
    n, capacity = size_of_batch(self.cfg, engine.mesh, slots, n_texts, longest)
    texts = Texts(n=n, capacity=capacity, drafts=engine.drafts, is_running=True)
    mesh = engine.reader.shares and engine.reader.shares.mesh
    own = sum((x.addressable_shards[0].data if mesh else x).nbytes for x in engine.weights)
    check_memory(self.cfg, texts, weights=own, cache=engine.cache_format, mesh=mesh)

  def generate(
      self, prompts: Sequence[Sequence[int]], config: SampleConfig = SampleConfig()
  ) -> list[list[int]]:
    """Returns the continuations of several texts, as ids."""
    _check_writes_ids(config)
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
      cache = self._engine.empty_cache(len(prompts), self.capacity)
      logits = self._engine.empty_logits(len(prompts))
    else:
      cache, logits = jax.tree.map(jnp.copy, after.cache), after.logits
    longest = max(map(len, prompts))
    width = min(self._engine.chunk, 1 << (longest - 1).bit_length())  # Few programs for all lengths.
    tokens = np.zeros((len(prompts), -(-longest // width) * width), np.int32)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    for i, prompt in enumerate(prompts):
      tokens[i, : len(prompt)] = prompt
    before = 0 if after is None else int(after.lengths.max())
    for first in range(0, longest, width):
      n_new = np.clip(lengths - first, 0, width).astype(np.int32)
      chunk = tokens[:, first : first + width]
      logits, cache = self._engine.read(cache, logits, chunk, n_new, before=before + first)
    return Prefix(cache, logits, self._engine.mesh)

  def steps(self, prefix: Prefix, config: SampleConfig) -> Iterator[list[int | None]]:
    """Yields the next id of every text, step after step, and None for texts that have ended.

    The prefix stays as it was. Text i draws from a random state of its own, so its continuation
    depends on the seed and on i, but not on its neighbours.

    Raises:
      ConfigError: The new tokens do not fit into the cache, or `config` does not suit the model.
    """
    _check_writes_ids(config)
    check_drawing(config, self.cfg)
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
    check_drawing(config, self.cfg)
    return self._continue(self.read(prompts, config.max_new_tokens), config, keep=False)

  def _continue(self, prefix: Prefix, config: SampleConfig, *, keep: bool):
    """Yields what `steps` does; without `keep` it writes into the prefix's own cache.

    Each step begins before the ids of the one before it are read, so that the device never waits.
    """
    own = jnp.copy if keep else lambda x: x
    cache, logits = jax.tree.map(own, (prefix.cache, prefix.logits))
    slots = filled_slots(
        cache, logits, np.uint32(config.seed), config.max_new_tokens,
        shares=self._engine.reader.shares,
    )  # fmt: skip
    numbers = np.float32(config.temperature), np.float32(config.top_p), padded(config.stop)
    begun, every = collections.deque[Written](), np.ones(len(cache.length), bool)
    for step in range(config.max_new_tokens):
      written, slots = write(
          self._engine.weights, slots, every, *numbers,
          top_k=config.top_k, reader=self._engine.reader,
      )  # fmt: skip
      begun.append(written)
      if step:
        if (now := _read_step(begun.popleft())) is None:
          return
        yield now
    if (now := _read_step(begun.popleft())) is not None:
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
    check_texts(self._engine.mesh, 'prompts', len(prompts))
    for i, prompt in enumerate(prompts):
      check_prompt(i, prompt, self.cfg, self.capacity, before=int(before[i]), room=room)

  def _check_prefix(self, prefix: Prefix):
    if prefix.mesh != self._engine.mesh:
      raise ConfigError(
          f'the prefix lies on the mesh {prefix.mesh.sizes}: it must come from a sampler on this one, '
          f'{self._engine.mesh.sizes}.'
      )
    capacity = prefix.cache.capacity(self.cfg)
    if capacity != self.capacity:
      raise ConfigError(
          f'the prefix has a cache of {capacity} tokens: it must come from a sampler of this '
          f'capacity, {self.capacity}.'
      )


def check_drawing(config: SampleConfig, cfg: ModelConfig):
  """Raises a ConfigError if a model cannot draw so."""
  if config.top_k > cfg.vocab_size:
    raise ConfigError(f'{config.top_k=} must be at most the vocabulary of {cfg.vocab_size}.')


def check_prompt(
    i: int, prompt: Sequence[int], cfg: ModelConfig, capacity: int, *, before: int = 0, room: int
):
  """Raises a ConfigError if a model cannot read a prompt, behind others, and write behind it."""
  if isinstance(prompt, str):
    raise ConfigError(f'prompt {i} is text, {prompt[:20]!r}: give `tokenizer.encode_prompt(text)`.')
  if not len(prompt):
    raise ConfigError(f'prompt {i} is empty: it must hold at least one token.')
  ids = np.asarray(prompt)
  if ids.ndim != 1 or not are_whole(ids):
    raise ConfigError(f'prompt {i} must be a row of whole numbers; got {ids.dtype} of shape {ids.shape}.')
  total = before + len(prompt) + room
  if total > capacity:
    raise ConfigError(
        f'prompt {i} has {before + len(prompt)} tokens and {room} are to follow: {total} do not '
        f'fit into a cache of {capacity}.'
    )
  low, high = ids.min(), ids.max()
  if low < 0 or high >= cfg.vocab_size:
    wrong = low if low < 0 else high
    raise ConfigError(f'prompt {i} holds id {wrong}; ids must be within 0 and {cfg.vocab_size - 1}.')


def check_capacity(cfg: ModelConfig, capacity: int, mesh: Mesh | None) -> int:
  """Returns the capacity. Raises a ConfigError if it is out of range, or a mesh does not fit the model."""
  if not 0 <= capacity <= cfg.max_seq_len:
    raise ConfigError(f'{capacity=} must be within 0 and the {cfg.max_seq_len=}.')
  sizes = mesh_config(mesh)
  capacity = capacity or whole_rows(cfg.max_seq_len, sizes)
  check_mesh(sizes, cfg, capacity=capacity)
  return capacity


def tokenizer_of(stored: StoredModel, cfg: ModelConfig) -> Tokenizer:
  """Returns the tokenizer of a checkpoint, and warns where bytes stand in for that of its model."""
  tokenizer = find_tokenizer(stored.origin)
  is_foreign = cfg.vocab_size != VOCAB_SIZE and not stored.source
  if isinstance(tokenizer, Bytes) and is_foreign:
    logging.warning(
        '%s has no tokenizer.json: text is read and written as bytes, although the model has %d ids. '
        'Put the tokenizer of the model there, or use ids: `read`, `steps` and `generate`.',
        stored.folder, cfg.vocab_size,
    )  # fmt: skip
  return tokenizer


def _check_unused(folder: str | pathlib.Path, **given):
  if ignored := [f'{name}={value!r}' for name, value in given.items() if value is not None]:
    raise ConfigError(
        f'{", ".join(ignored)} would change nothing, because attention is dense: it was asked for, '
        f"or the indexer of {folder} was never trained. Give attention='sparse', too, or a rule "
        'that needs no training.'
    )


def _usual_format(stored: StoredModel) -> str:
  """Returns the format in which weights are kept if nobody says."""
  return 'fp8' if stored.was_fp8 and jax.default_backend() != 'cpu' else 'float32'


def _check_writes_ids(config: SampleConfig):
  if config.stop_texts:
    raise ConfigError(
        f'{config.stop_texts=} would change nothing, because ids are asked for: `complete` and `stream` '
        'write text.'
    )


def _read_step(written: Written) -> list[int | None] | None:
  """Returns the id of every text that goes on, and None if none does."""
  counts = np.asarray(written.counts)[:, 0]
  log_probs = np.asarray(written.log_probs)[:, 0].tolist()
  for i in np.flatnonzero(counts | np.asarray(written.ends)).tolist():  # Others have ended before.
    check_logits(log_probs[i], i)
  if not counts.any():
    return None
  ids = np.asarray(written.ids)[:, 0].tolist()
  return [i if goes_on else None for i, goes_on in zip(ids, counts)]
