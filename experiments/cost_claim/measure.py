# SPDX-License-Identifier: Apache-2.0
"""Measures the claim on this machine: prefill and decode, dense and sparse, by context.

python experiments/cost_claim/measure.py [--longest 65536] [--out FOLDER]

Writes measured.json, measured.md and measured.png. The model is small; its weights and the rows of
its cache are random, because time does not depend on them. Decoding runs over consecutive tokens,
so that the context grows by one with each. Dense and sparse decoding take turns, and a figure is
the median of all tokens but those of the first turn, which compiles. 'indexer' is the scoring and
selecting of sparse decoding, run by itself. Predictions are the arithmetic of dsa_jax.cost at the
speed that this machine reaches in one large matrix product and in one large copy.
"""

import argparse
import functools
import json
import pathlib
import platform
import time

from flax import nnx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from dsa_jax.config import ModelConfig
from dsa_jax.cost.chips import Chip, Efficiency
from dsa_jax.cost.serving import Serving, token_parts
from dsa_jax.inference.cache import init_cache
from dsa_jax.inference.extend import extend
from dsa_jax.kernels import index_topk
from dsa_jax.kernels.backend import default_backend
from dsa_jax.training.state import init_params, model_graph

CHUNK = 512
TOKENS = {'prefill': CHUNK, 'decode': 1}  # Tokens of a step.
STEPS = {'prefill': 1, 'decode': 12}  # Steps of a turn.
TURNS = {'prefill': 3, 'decode': 4}
KINDS = {'prefill': ('dense', 'sparse'), 'decode': ('dense', 'sparse', 'indexer')}


def small_model(longest: int) -> ModelConfig:
  return ModelConfig(
      vocab_size=1024, dim=256, n_layers=2, n_dense_layers=2, inter_dim=512, n_heads=16,
      q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32,
      index_n_heads=4, index_head_dim=32, index_topk=512, max_seq_len=longest + CHUNK,
      original_seq_len=longest + CHUNK, dtype='float32',
  )  # fmt: skip


def this_machine() -> Chip:
  """Returns the peaks of this machine: what one product and one copy reach."""
  a = jnp.ones((2048, 2048))
  product = fastest(jax.jit(lambda a: a @ a), a, runs=5)
  b = jnp.ones(2**26)
  copy = fastest(jax.jit(lambda b: b + 1), b, runs=5)
  flops = 2 * 2048**3 / product
  return Chip(name='here', bf16=flops, fp8=flops, bandwidth=2 * b.nbytes / copy, memory=0)


def fastest(f, *arguments, runs: int) -> float:
  jax.block_until_ready(f(*arguments))
  seconds = []
  for _ in range(runs):
    began = time.perf_counter()
    jax.block_until_ready(f(*arguments))
    seconds.append(time.perf_counter() - began)
  return min(seconds)


def measure(cfg: ModelConfig, contexts: list[int]) -> dict[str, dict[str, list[float]]]:
  """Returns seconds per token at each context, by phase and by kind."""
  params, programs = init_params(cfg, seed=0), make_programs(cfg)
  per_token = {phase: {kind: [] for kind in kinds} for phase, kinds in KINDS.items()}
  for context in contexts:
    cache = full_cache(cfg, context)
    for phase, width in TOKENS.items():
      tokens, n_new = jnp.ones((1, width), jnp.int32), jnp.full(1, width, jnp.int32)
      seconds = {kind: [] for kind in KINDS[phase]}
      for turn in range(TURNS[phase] + 1):  # By turns, so that all see the same machine.
        for kind in seconds:
          cache = cache._replace(length=jnp.full(1, context - width * STEPS[phase], jnp.int32))
          for _ in range(STEPS[phase]):
            began = time.perf_counter()
            out, cache = programs[kind](params, cache, tokens, n_new)
            jax.block_until_ready((out, cache))
            if turn:
              seconds[kind].append((time.perf_counter() - began) / width)
      for kind, each in seconds.items():
        per_token[phase][kind].append(float(np.median(each)))
      row = {kind: per_token[phase][kind][-1] for kind in seconds}
      times = ', '.join(f'{kind} {1e3 * s:.2f} ms' for kind, s in row.items())
      print(f'{phase} at {context:,}: {times}')
  return per_token


def make_programs(cfg: ModelConfig):
  """Returns the step of each kind, which turns parameters, cache and tokens into the next cache."""
  graph, backend = model_graph(cfg), default_backend()

  def step(params, cache, tokens, n_new, attention):
    model = nnx.merge(graph, params)
    reading = extend(model, cache, tokens, n_new, attention=attention, backend=backend)
    return model.logits(reading.hidden[:, -1:]), reading.cache

  heads = 1, TOKENS['decode'], cfg.index_n_heads
  q = jax.random.normal(jax.random.key(0), (*heads, cfg.index_head_dim))
  weights = jax.random.normal(jax.random.key(1), heads)

  def indexer(params, cache, tokens, n_new):
    """Scores and selects in each layer."""
    del params, tokens
    end = (cache.length + n_new)[:, None]
    capacity = cache.capacity(cfg)

    def layer(first):
      span = first, capacity
      inputs = q, cache.index_key.rows, weights, jnp.zeros_like(end), end
      return index_topk(*inputs, topk=cfg.index_topk, span=span, backend=backend)

    selected = jax.lax.map(layer, capacity * jnp.arange(cfg.n_layers))
    return selected, cache._replace(length=cache.length + n_new)

  programs = {kind: functools.partial(step, attention=kind) for kind in ('dense', 'sparse')}
  programs['indexer'] = indexer
  return {kind: jax.jit(program, donate_argnums=1) for kind, program in programs.items()}


def full_cache(cfg: ModelConfig, capacity: int):
  """Returns a cache with random rows that holds just the context."""
  cache = init_cache(cfg, 1, capacity, fmt='float32')
  fill = lambda x: jax.random.normal(jax.random.key(0), x.shape, x.dtype)
  return cache._replace(**jax.tree.map(fill, {'kv': cache.kv, 'index_key': cache.index_key}))


def predict(cfg: ModelConfig, contexts: list[int], chip: Chip) -> dict[str, dict[str, list[float]]]:
  """Returns what the roofline predicts where every part reaches the peaks of this machine."""
  peak = Efficiency(weights=1.0, context=1.0, bandwidth=1.0)
  serving = Serving(
      chip=chip, cache='bf16', batch=1, queries=1, chunk=CHUNK, expert_chips=1,
      prefill=peak, decode=peak,
  )  # fmt: skip

  def seconds(context, phase, kind):
    parts = token_parts(cfg, context, phase, sparse=kind != 'dense', serving=serving)
    counted = ('index scores', 'selection') if kind == 'indexer' else parts
    return sum(parts[name].seconds for name in counted)

  return {p: {k: [seconds(c, p, k) for c in contexts] for k in kinds} for p, kinds in KINDS.items()}


def slope(contexts: list[int], seconds: list[float]) -> float:
  """Returns the seconds per token that each further token of context adds, by least squares."""
  x, y = np.array(contexts, float), np.array(seconds)
  design = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
  return float(np.linalg.lstsq(design, np.ones_like(y), rcond=None)[0][1])


def table(report: dict) -> str:
  measured, predicted, contexts = (report[k] for k in ('measured', 'predicted', 'contexts'))
  columns = [(phase, kind) for phase, kinds in KINDS.items() for kind in kinds]
  names = [f'{phase} {kind}, ms' for phase, kind in columns]
  names += [f'{phase}, times cheaper' for phase in KINDS]
  lines = [
      f"{report['machine']}; {report['gflops']:.0f} GFLOP/s in a product,"
      f" {report['gbytes']:.1f} GB/s in a copy.",
      '',
      f"| context | {' | '.join(names)} |",
      '| ---: |' + ' ---: |' * len(names),
  ]  # fmt: skip
  for i, context in enumerate(contexts):
    cells = [f'{1e3 * measured[p][k][i]:.3g}' for p, k in columns]
    cells += [f"{measured[p]['dense'][i] / measured[p]['sparse'][i]:.2f}" for p in KINDS]
    lines.append(f"| {context:,} | {' | '.join(cells)} |")
  lines += [
      '',
      '| | measured, from first to last | µs per token and 1K of context: measured'
      ' | at peak speed | share of peak |',
      '| --- | ---: | ---: | ---: | ---: |',
  ]
  for phase, kind in columns:
    values, peak = measured[phase][kind], predicted[phase][kind]
    slope_here, slope_at_peak = (1e9 * slope(contexts, v) for v in (values, peak))
    lines.append(
        f'| {phase}, {kind} | {values[-1] / values[0]:.2f} x | {slope_here:.3g}'
        f' | {slope_at_peak:.3g} | {slope_at_peak / slope_here:.0%} |'
    )
  if len(contexts) > 1:
    lines += ['', residual(measured['decode'])]
  return '\n'.join(lines) + '\n'


def residual(decode: dict[str, list[float]]) -> str:
  """Returns a sentence on the indexer's share of the growth of a sparse token's time."""
  sparse, indexer = (1e3 * (decode[kind][-1] - decode[kind][0]) for kind in ('sparse', 'indexer'))
  share = f', {indexer / sparse:.0%} of it' if sparse > 0 else ''
  return (
      f'From the first context to the last a sparse decoded token takes {sparse:.2f} ms more;'
      f' scoring and selecting, run by themselves, take {indexer:.2f} ms more{share}.'
  )


def plot(report: dict, path: pathlib.Path):
  figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
  colors = {'dense': 'C1', 'sparse': 'C0', 'indexer': 'C2'}
  for panel, (phase, kinds) in zip(panels, KINDS.items()):
    for kind in kinds:
      measured, peak = (1e3 * np.array(report[x][phase][kind]) for x in ('measured', 'predicted'))
      panel.plot(report['contexts'], measured, 'o-', color=colors[kind], label=f'{kind}, measured')
      panel.plot(report['contexts'], peak, ':', color=colors[kind], label=f'{kind}, at peak speed')
    panel.set(xscale='log', yscale='log', title=phase)
    panel.set(xlabel='tokens of context', ylabel='ms per token')
    panel.set_xticks(report['contexts'], [f'{c // 1024}K' for c in report['contexts']])
    panel.set_xticks([], minor=True)
    panel.set_ylim(top=10 * panel.get_ylim()[1])  # Room for the legend.
    panel.legend(frameon=False, ncols=2, loc='upper left')
  figure.savefig(path, dpi=120)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--longest', type=int, default=65536)
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path(__file__).parent)
  options = parser.parse_args()
  if options.longest < 4096:
    parser.error(f'--longest {options.longest} must be at least 4096.')
  contexts = [c for c in (2**n for n in range(12, 30)) if c <= options.longest]
  cfg, chip = small_model(options.longest), this_machine()
  report = {
      'machine': ', '.join(
          [jax.devices()[0].device_kind, platform.processor() or platform.machine(),
           f'jax {jax.__version__}']
      ),  # fmt: skip
      'gflops': chip.bf16 / 1e9,
      'gbytes': chip.bandwidth / 1e9,
      'contexts': contexts,
      'measured': measure(cfg, contexts),
      'predicted': predict(cfg, contexts, chip),
  }
  options.out.mkdir(parents=True, exist_ok=True)
  (options.out / 'measured.json').write_text(json.dumps(report, indent=2) + '\n')
  (options.out / 'measured.md').write_text(table(report))
  plot(report, options.out / 'measured.png')
  print(table(report))


if __name__ == '__main__':
  main()
