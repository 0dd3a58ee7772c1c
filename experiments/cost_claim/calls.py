# SPDX-License-Identifier: Apache-2.0
"""Computes the length from which a call is half as expensive, by curves, model and list prices."""

import math

import numpy as np

from dsa_jax import cost
from dsa_jax.cost import published

MIXES = {  # Share of the call's tokens that are generated; share of the prompt that is cached.
    "DeepSeek's service, February 2025": published.SERVICE_MIX,
    'long document, short answer': {'output_share': 0.02, 'hit_share': 0.0},
    'chat': {'output_share': 0.1, 'hit_share': 0.5},
    'agent, cached history': {'output_share': 0.02, 'hit_share': 0.9},
    'reasoning': {'output_share': 0.6, 'hit_share': 0.0},
}
LENGTHS = 8192, 32_768, 131_072
OUTPUT_SHARES = np.geomspace(0.002, 0.9, 40)
HIT_SHARES = np.linspace(0, 0.98, 40)

Curves = dict[str, dict[str, cost.Curve]]  # By phase, then by kind.


def by_kind(curves: Curves, kind: str) -> dict[str, cost.Curve]:
  return {phase: kinds[kind] for phase, kinds in curves.items()}


def half_from(curves: Curves, mix: dict[str, float], ratio: float = 0.5) -> float:
  dense, sparse = by_kind(curves, 'dense'), by_kind(curves, 'sparse')
  return cost.cheaper_from(dense, sparse, **mix, ratio=ratio)


def cost_ratio(curves: Curves, mix: dict[str, float], length: int) -> float:
  """Returns sparse / dense for a call of this many tokens."""
  outputs = mix['output_share'] * length
  dense, sparse = (
      cost.call_seconds(c['prefill'], c['decode'], length - outputs, outputs, mix['hit_share'])
      for c in (by_kind(curves, 'dense'), by_kind(curves, 'sparse'))
  )
  return float(sparse / dense)


def compare(curves: Curves, model: Curves) -> dict[str, dict[str, float]]:
  """Returns, for each mix, the length that halves a call, beside what the price cut would need."""
  by_mix = {}
  for name, mix in MIXES.items():
    price = cost.price_ratio(published.PRICES_BEFORE, published.PRICES_AFTER, **mix)
    by_mix[name] = mix | {
        'half_from': half_from(curves, mix),
        'half_from_model': half_from(model, mix),
        'price_ratio': price,
        'as_cheap_as_priced_from': half_from(curves, mix, price),
        **{f'ratio_at_{length}': cost_ratio(curves, mix, length) for length in LENGTHS},
    }
  return by_mix


def half_map(curves: Curves) -> np.ndarray:
  """Returns the context from which a call costs half, by cache-hit share and output share."""
  return np.array(
      [
          [half_from(curves, {'output_share': o, 'hit_share': h}) for o in OUTPUT_SHARES]
          for h in HIT_SHARES
      ]
  )


def answer(curves: Curves, compared: dict[str, dict[str, float]], halves: np.ndarray) -> str:
  """Returns the answer in words."""
  said = [
      'From which context length is a call half as expensive? By the published curves, from'
      f' {_tokens(np.nanmin(halves))} to {_tokens(np.nanmax(halves))} tokens, depending on its mix:'
  ]
  said.append(
      '; '.join(
          f'{name} ({mix["output_share"]:.0%} of the tokens generated,'
          f' {mix["hit_share"]:.0%} of the prompt cached) from {_tokens(mix["half_from"])}'
          f' (model: {_tokens(mix["half_from_model"])})'
          for name, mix in compared.items()
      )
      + '.'
  )
  even = {p: _tokens(cost.crossover(*curves[p].values())) for p in curves}
  said.append(
      f'Below {even["prefill"]} tokens a prompt token, and below {even["decode"]} a generated one,'
      ' is the dearer one with DSA.'
  )
  cut = {
      name: (mix['price_ratio'], mix['as_cheap_as_priced_from'])
      for name, mix in compared.items()
  }
  first, last = (f(cut, key=lambda name: cut[name][1]) for f in (min, max))
  short, long = ([d[f'ratio_at_{n}'] for d in compared.values()] for n in (8192, 131_072))
  said.append(
      'The announced price cuts (60% of a cached, 50% of another prompt token, 75% of a generated'
      f' one) hold at every length: these calls now cost {_range([p for p, _ in cut.values()])} of'
      f' what they did. Computing them costs {_range(short)} of what it did at 8K tokens and'
      f' {_range(long)} at 128K; it falls as far as the price only from {_tokens(cut[first][1])}'
      f' tokens ({first}) to {_tokens(cut[last][1])} ({last}) on.'
  )
  old, new = published.PRICES_BEFORE['output'], published.PRICES_AFTER['output']
  dense, sparse = curves['decode'].values()
  dollars = cost.dollars_per_million(1.0, published.PRICE)  # Per chip-second of each token.
  above = np.interp(old / dollars, dense.costs, dense.positions)
  said.append(
      f'A dense generated token cost more than its old list price (${old}) beyond {_tokens(above)}'
      f' tokens; a sparse one costs ${dollars * sparse.at(sparse.limit):.2f} at 128K, below the'
      f' new one (${new}).'
      ' A cache hit is counted as free here: it saves the computation, and what its storage costs'
      ' is in none of the curves.'
  )
  return ' '.join(said)


def _tokens(x: float) -> str:
  return 'no length up to 128K' if math.isnan(x) else f'{x / 1024:.1f}K'


def _range(values: list[float]) -> str:
  return f'{min(values):.0%} to {max(values):.0%}'
