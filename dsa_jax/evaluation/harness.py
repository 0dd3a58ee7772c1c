# SPDX-License-Identifier: Apache-2.0
"""What lm-evaluation-harness asks of a model: likelihoods of texts, and continuations."""

from collections.abc import Iterator, Mapping, Sequence
import collections
import contextlib
import functools
import logging
import pathlib
from typing import Any, NamedTuple

from flax import nnx
import jax
import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.data.batch import Batch
from dsa_jax.data.tokenizer import check_tokenizer
from dsa_jax.data.tokenizer_files import find_tokenizer
from dsa_jax.inference.load import check_factor, config_of, find_checkpoint, load_checkpoint
from dsa_jax.inference.sampler import SampleConfig, Sampler
from dsa_jax.kernels.backend import BACKENDS, default_backend, why_not_here
from dsa_jax.nn.attention.types import Attention, Mode
from dsa_jax.parallel.mesh import MeshConfig, make_mesh
from dsa_jax.reporting.evaluate import score_batch

NEW_TOKENS = 256  # Tokens of a continuation, unless the task says otherwise.
LOOKS_EVERY = 8  # Steps after which a continuation is searched for what ends it.
SHORTEST = 32  # Rows are padded to powers of two from here on, so that few programs serve all.


class Row(NamedTuple):
  """Tokens of which the last ones are scored."""

  ids: list[int]
  n_scored: int


class Harness:
  """Answers requests with one model."""

  def __init__(
      self,
      checkpoint: str | pathlib.Path,
      *,
      attention: Attention | None = None,
      index_topk: int | None = None,
      index_rope_factor: float | None = None,
      rule: str | None = None,
      batch_size: int = 4,
      max_length: int | None = None,
      backend: str = '',
      mesh: MeshConfig = MeshConfig(),
  ):
    """Loads a checkpoint.

    Args:
      checkpoint: RUN/checkpoints/ENTRY, or a converted checkpoint.
      attention: 'dense', 'sparse' or 'masked'. None stands for 'sparse', but for 'dense' if what
        selects is an indexer that was never trained.
      index_topk: Tokens that each token selects. None stands for the model's own budget.
      index_rope_factor: See `load_checkpoint`.
      rule: What selects them. None stands for the rule of the run, or else the indexer.
      batch_size: Texts that are in memory at a time.
      max_length: The longest text; the beginning of others is left out. None stands for all that
        the model can read.
      backend: The kernels that run. '' stands for the platform's default.
      mesh: The devices that share the work.

    Raises:
      ConfigError: There is no such checkpoint, or an argument is out of range or without effect.
    """
    stored = find_checkpoint(checkpoint)
    learned = (rule or stored.rule) == 'indexer'
    if attention is None:
      attention = 'dense' if learned and not stored.has_trained_indexer else 'sparse'
    changes = dict(index_topk=index_topk, index_rope_factor=index_rope_factor)
    if attention == 'dense' and {*changes.values(), rule} != {None}:
      raise ConfigError(
          f'{index_topk=}, {index_rope_factor=} and {rule=} would change nothing, because attention is dense.'
      )
    check_factor(index_rope_factor, rule or stored.rule)
    cfg = config_of(stored, **changes)
    if backend and backend not in BACKENDS:
      raise ConfigError(f'{backend=} must be one of {BACKENDS}.')
    if backend and (reason := why_not_here(backend)):
      raise ConfigError(f'{backend=}: {reason}')
    self.batch_size, self.max_length = batch_size, _longest(cfg, max_length, batch_size, mesh)
    self.tokenizer = find_tokenizer(stored.origin)
    check_tokenizer(self.tokenizer, cfg.vocab_size)
    if not self._after_prefix(''):
      logging.warning(
          'no id is known that begins or ends a text: the first token of a text with nothing before it '
          'is not scored.'
      )
    self._mesh = make_mesh(**mesh.sizes) if mesh.n_devices > 1 else None
    self._shares = mesh.context * mesh.tensor  # As many devices share the tokens of a row.
    self._model = load_checkpoint(checkpoint, **changes, mesh=self._mesh)
    selects = 'indexer' if attention == 'dense' else rule or stored.rule
    self._mode = Mode(attention=attention, rule=selects, backend=backend or default_backend())
    self._graph, self._params = nnx.split(self._model)

  @functools.cached_property
  def _sampler(self) -> Sampler:
    mode = self._mode
    return Sampler(
        self._model, self.tokenizer, capacity=self.max_length, attention=mode.attention,
        rule=mode.rule, backend=mode.backend, mesh=self._mesh,
    )  # fmt: skip

  def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Returns each continuation's log-probability, and whether greedy sampling would write it."""
    rows = []
    for context, continuation in pairs:
      stripped = context.rstrip()  # A tokenizer puts a space to the word behind it.
      encode = self.tokenizer.encode_prompt if stripped else self._after_prefix
      before, whole = encode(stripped), encode(context + continuation)
      rows.append(self._cut(Row(whole, max(len(whole) - len(before), 1))))
    return self._score(rows)

  def rolling(self, texts: Sequence[str]) -> list[float]:
    """Returns the log-probability of each whole text, which may be longer than the model reads."""
    windows = [list(self._windows(self._after_prefix(text))) for text in texts]
    scored = iter(self._score([row for of_text in windows for row in of_text]))
    return [sum(next(scored)[0] for _ in of_text) for of_text in windows]

  def continuations(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Returns what follows each context, up to the first of the texts in `until`."""
    texts, asked = [], collections.Counter[str]()
    for context, given in requests:
      until = given.get('until') or []
      until = [end for end in ([until] if isinstance(until, str) else until) if end]
      encode = self.tokenizer.encode_prompt if context else self._after_prefix
      prompt = encode(context)
      # A context that leaves too little room is cut, but not below half of what the model reads.
      spare = max(self.max_length - len(prompt), self.max_length // 2)
      room = min(int(given.get('max_gen_toks', NEW_TOKENS)), spare)
      is_drawn = given.get('do_sample', False)
      config = SampleConfig(
          max_new_tokens=room,
          temperature=float(given.get('temperature', 1.0)) if is_drawn else 0.0,
          top_k=min(max(int(given.get('top_k') or 0), 0), self._model.cfg.vocab_size) if is_drawn else 0,
          top_p=float(given.get('top_p', 1.0)),
          stop=self.tokenizer.stop,
          seed=asked[context],  # A request that comes again draws anew.
      )
      asked[context] += 1
      texts.append(self._continue(prompt[-(self.max_length - room) :], config, until))
    return texts

  def _continue(self, prompt: list[int], config: SampleConfig, until: Sequence[str]) -> str:
    prefix, ids, text = self._sampler.read([prompt], config.max_new_tokens), [], ''
    for step, [i] in enumerate(self._sampler.steps(prefix, config), start=1):
      if i is None:
        break
      ids.append(i)
      if step % LOOKS_EVERY == 0:
        text = ''.join(self.tokenizer.stream(ids, prompt))
        if any(end in text for end in until):
          break
    text = ''.join(self.tokenizer.stream(ids, prompt))
    ends = [text.index(end) for end in until if end in text]
    return text[: min(ends)] if ends else text

  def _after_prefix(self, text: str) -> list[int]:
    """Returns the ids of a text behind one that begins or ends documents, if any is known."""
    ids, begins = self.tokenizer.encode_prompt(text), self.tokenizer.encode_prompt('')[:1]
    return ids if begins else [*self.tokenizer.stop[:1], *ids]

  def _cut(self, row: Row) -> Row:
    ids = row.ids[-(self.max_length + 1) :]
    return Row(ids, min(row.n_scored, len(ids) - 1))

  def _windows(self, ids: list[int]) -> Iterator[Row]:
    """Yields rows that score every token but the first once; each reads as much as it can."""
    first = 1
    while first < len(ids):
      end = min(first + self.max_length, len(ids))
      yield self._cut(Row(ids[:end], end - first))
      first = end

  def _score(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
    """Scores rows, those of like lengths together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    for first in range(0, len(order), self.batch_size):
      own = order[first : first + self.batch_size]
      batch = self._batch([rows[i] for i in own])
      with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
        scored = score_batch(self._graph, self._params, batch, self._mode, None)
      nats, right = map(np.asarray, scored)
      for n, i in enumerate(own):
        counted = batch.weights[n] > 0
        results[i] = -float(nats[n][counted].sum()), bool(right[n][counted].all())
    return results

  def _batch(self, rows: Sequence[Row]) -> Batch:
    longest = max(len(row.ids) for row in rows) - 1
    width = max(SHORTEST, 1 << max(longest - 1, 0).bit_length())
    width = min(width + -width % self._shares, self.max_length)
    shape, position = (self.batch_size, width), np.arange(width, dtype=np.int32)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    start, end = np.tile(position, (2, self.batch_size, 1))
    for i, (ids, n_scored) in enumerate(rows):
      n = len(ids) - 1
      tokens[i, :n], targets[i, :n] = ids[:-1], ids[1:]
      weights[i, n - n_scored : n] = 1
      start[i, :n], end[i, :n] = 0, position[:n] + 1
    return Batch(tokens, targets, weights, start, end)


def _longest(cfg: ModelConfig, max_length: int | None, batch_size: int, mesh: MeshConfig) -> int:
  """Returns how many tokens a text may have.

  Raises:
    ConfigError: The length or the batch size is out of range, or the mesh cannot split them or the model.
  """
  if batch_size < 1:
    raise ConfigError(f'{batch_size=} must be at least 1.')
  longest = cfg.max_seq_len
  if max_length is not None and not 2 <= max_length <= longest:
    raise ConfigError(f'{max_length=} must be within 2 and the {longest} that the model can read.')
  if mesh.n_devices > 1:
    longest -= longest % (2 * mesh.context * mesh.tensor)
    mesh.check_model(cfg)
    mesh.check_rows(batch_size, max_length or longest)
  return max_length or longest
