# SPDX-License-Identifier: Apache-2.0
"""Seconds per token by a roofline: arithmetic or memory bounds each part, and parts add up."""

from collections.abc import Sequence
import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.cost.chips import CHIPS, FITTED, Chip, Efficiency
from dsa_jax.cost.work import BYTES, Work, token_work

Numbers = int | float | Sequence | np.ndarray  # One number, or an array of numbers.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
  """The setting that a model is served in; the defaults are DeepSeek's, as far as they are known.

  128 sequences of 2 tokens are the setting of FlashMLA's published decode figure; the second token
  comes from MTP, and both count as useful. The 144 chips are those of DeepSeek's overview of its
  inference system (2025). The chunk is our choice: any large number gives the same seconds.
  """

  chip: Chip = CHIPS['h800']
  cache: str = 'fp8'  # The format of stored keys: 'fp8' or 'bf16'.
  weights: str = 'fp8'  # The format of weights, and of what is multiplied with them.
  batch: int = 128  # The number of sequences per chip that decode together.
  queries: int = 2  # The tokens per sequence and decode step, which read its cache together.
  chunk: int = 8192  # The number of prompt tokens per chip in one forward pass.
  expert_chips: int = 144  # The number of chips that share the routed experts, of which each has one at least.
  prefill: Efficiency = FITTED['prefill']
  decode: Efficiency = FITTED['decode']

  def chips_of(self, cfg: ModelConfig) -> int:
    """Returns how many chips share a model's routed experts; there are no more than experts."""
    return min(self.expert_chips, max(cfg.n_routed_experts, 1))

  def __post_init__(self):
    for name in ('batch', 'queries', 'chunk', 'expert_chips'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 1.')
    for name in ('cache', 'weights'):
      if getattr(self, name) not in BYTES:
        raise ConfigError(f'{name}={getattr(self, name)!r} must be one of {tuple(BYTES)}.')


class Part(NamedTuple):
  """The cost per token of one part of the model."""

  flops: float
  bytes: float
  seconds: float
  bound: Literal['compute', 'memory']


def token_parts(
    cfg: ModelConfig, context: int, phase: str, *, sparse: bool, serving: Serving = Serving()
) -> dict[str, Part]:
  """Returns what one token costs, by part.

  Attention runs in MHA form in dense prefill, and in MQA form in decode; sparse prefill takes the
  faster of masked MHA and gathered MQA, but layers with a window do what they do in dense prefill. Index scores of a prompt are one large FP8 product and
  reach the share of products with weights; in decode they read a cache, as attention does.

  Args:
    cfg: The model.
    context: The number of tokens that this one sees, itself included.
    phase: 'prefill' or 'decode'.
    sparse: Whether an indexer selects among them.
    serving: The chip, and the setting that it serves in.

  Raises:
    ConfigError: The phase is unknown, or the model has no such context.
  """
  if not 1 <= context <= cfg.max_seq_len:
    raise ConfigError(f'{context=} must be within 1 and max_seq_len={cfg.max_seq_len} of the model.')
  shared = dict(sparse=sparse, cache=serving.cache, chips=serving.chips_of(cfg), weights=serving.weights)
  if phase == 'prefill':
    shared |= dict(readers=serving.chunk, pass_tokens=serving.chunk, logits=False, scores='weights')
    forms, efficiency = ('mha', 'mqa') if sparse else ('mha',), serving.prefill
  elif phase == 'decode':
    shared |= dict(readers=serving.queries, pass_tokens=serving.batch * serving.queries)
    forms, efficiency = ('mqa',), serving.decode
  else:
    raise ConfigError(f"{phase=} must be 'prefill' or 'decode'.")
  candidates = []
  for form in forms:
    works = token_work(cfg, context, form=form, window_form=forms[0], **shared)
    candidates.append({work.part: _roofline(work, serving.chip, efficiency) for work in works})
  return min(candidates, key=_total)


def token_seconds(
    cfg: ModelConfig, context: int, phase: str, *, sparse: bool, serving: Serving = Serving()
) -> float:
  """Returns the chip-seconds of one token. See token_parts."""
  return _total(token_parts(cfg, context, phase, sparse=sparse, serving=serving))


def dollars_per_million(seconds: Numbers, price: float) -> Numbers:
  """Returns dollars per million tokens of so many chip-seconds each, at a price per chip-hour."""
  return seconds * price / 3600 * 1e6


def _roofline(work: Work, chip: Chip, efficiency: Efficiency) -> Part:
  share = efficiency.weights if work.kind == 'weights' else efficiency.context
  if work.kind == 'gather':
    share *= efficiency.gather
  compute = work.flops / (getattr(chip, work.unit) * share)
  memory = work.bytes / (chip.bandwidth * efficiency.bandwidth)
  bound = 'compute' if compute >= memory else 'memory'
  return Part(work.flops, work.bytes, max(compute, memory), bound)


def _total(parts: dict[str, Part]) -> float:
  return sum(part.seconds for part in parts.values())
