# SPDX-License-Identifier: Apache-2.0
"""The claim on this machine: prefill and decode of a real model, dense and sparse, ever longer.

python experiments/cost_claim/measure.py [--longest 65536] [--out FOLDER]

Writes measured.json, measured.md and measured.png. The model is small, its weights and what its
cache holds are random: time does not depend on them. Each figure is the fastest of several runs of
the compiled step, dense and sparse by turns; what is predicted is the arithmetic of dsa_jax.cost at
this machine's own speed of one large matrix product and of one large copy.
"""

import argparse
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
from dsa_jax.kernels.backend import default_backend
from dsa_jax.nn.cache import init_cache
from dsa_jax.nn.extend import extend
from dsa_jax.state import init_params, model_graph

CHUNK = 512
RUNS = {'prefill': 2, 'decode': 8}
TOKENS = {'prefill': CHUNK, 'decode': 1}


def small_model(longest: int) -> ModelConfig:
  return ModelConfig(
      vocab_size=1024, dim=256, n_layers=2, n_dense_layers=2, inter_dim=512, n_heads=16,
      q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32,
      index_n_heads=4, index_head_dim=32, index_topk=512, max_seq_len=longest + CHUNK,
      original_seq_len=longest + CHUNK, dtype='float32',
  )  # fmt: skip


def this_machine() -> Chip:
  """What one product and one copy reach."""
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
  """Returns seconds per token at each context, by phase and by kind of attention."""
  graph, params, backend = model_graph(cfg), init_params(cfg, seed=0), default_backend()

  def step(params, cache, tokens, n_new, attention):
    model = nnx.merge(graph, params)
    reading = extend(model, cache, tokens, n_new, attention=attention, backend=backend)
    return model.logits(reading.hidden[:, -1:]), reading.cache

  step = jax.jit(step, static_argnums=4, donate_argnums=1)
  found = {phase: {'dense': [], 'sparse': []} for phase in TOKENS}
  for context in contexts:
    cache = full_cache(cfg, context)
    for phase, width in TOKENS.items():
      tokens, n_new = jnp.ones((1, width), jnp.int32), jnp.full(1, width, jnp.int32)
      seconds = {kind: [] for kind in found[phase]}
      for _ in range(RUNS[phase] + 1):  # By turns, so that both see the same machine.
        for kind in seconds:
          cache = cache._replace(length=jnp.full(1, context - width, jnp.int32))
          began = time.perf_counter()
          logits, cache = step(params, cache, tokens, n_new, kind)
          jax.block_until_ready((logits, cache))
          seconds[kind].append(time.perf_counter() - began)
      for kind, all_runs in seconds.items():
        found[phase][kind].append(min(all_runs[1:]) / width)  # The first one has compiled.
      row = {kind: found[phase][kind][-1] for kind in seconds}
      print(f'{phase} at {context:,}: ' + ', '.join(f'{k} {1e3 * s:.2f} ms' for k, s in row.items()))
  return found


def full_cache(cfg: ModelConfig, capacity: int):
  """A cache that holds just the context, of random rows."""
  cache = init_cache(cfg, 1, capacity, fmt='float32')
  fill = lambda x: jax.random.normal(jax.random.key(0), x.shape, x.dtype)
  return cache._replace(kv=fill(cache.kv), index_key=fill(cache.index_key))


def predict(cfg: ModelConfig, contexts: list[int], chip: Chip) -> dict[str, dict[str, list[float]]]:
  """Returns what the roofline says at the peaks of this machine: every part at full speed."""
  peak = Efficiency(weights=1.0, context=1.0, bandwidth=1.0)
  serving = Serving(
      chip=chip, cache='bf16', batch=1, queries=1, chunk=CHUNK, expert_chips=1, prefill=peak, decode=peak
  )
  seconds = lambda context, phase, kind: sum(
      part.seconds
      for part in token_parts(cfg, context, phase, sparse=kind == 'sparse', serving=serving).values()
  )
  return {
      phase: {kind: [seconds(c, phase, kind) for c in contexts] for kind in ('dense', 'sparse')}
      for phase in TOKENS
  }


def slope(contexts: list[int], seconds: list[float]) -> float:
  """Seconds per token for each further token of context, by least squares of relative errors."""
  x, y = np.array(contexts, float), np.array(seconds)
  design = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
  return float(np.linalg.lstsq(design, np.ones_like(y), rcond=None)[0][1])


def table(report: dict) -> str:
  lines = [
      f"{report['machine']}; {report['gflops']:.0f} GFLOP/s in a product, {report['gbytes']:.1f} GB/s in a copy.",
      '',
      '| context | ' + ' | '.join(f'{p} {k}, ms' for p in TOKENS for k in ('dense', 'sparse')) + ' | prefill, times cheaper | decode, times cheaper |',
      '| ---: |' + ' ---: |' * 6,
  ]  # fmt: skip
  measured = report['measured']
  for i, context in enumerate(report['contexts']):
    cells = [f'{context:,}']
    cells += [f'{1e3 * measured[p][k][i]:.3g}' for p in TOKENS for k in ('dense', 'sparse')]
    cells += [f"{measured[p]['dense'][i] / measured[p]['sparse'][i]:.2f}" for p in TOKENS]
    lines.append('| ' + ' | '.join(cells) + ' |')
  lines += [
      '',
      '| | measured, from first to last | µs per token and 1K of context: measured | at peak speed | share of peak |',
      '| --- | ---: | ---: | ---: | ---: |',
  ]
  for phase in TOKENS:
    for kind in ('dense', 'sparse'):
      values, peak = measured[phase][kind], report['predicted'][phase][kind]
      found, best = (1e9 * slope(report['contexts'], v) for v in (values, peak))
      lines.append(
          f'| {phase}, {kind} | {values[-1] / values[0]:.2f} x | {found:.3g} | {best:.3g} | {best / found:.0%} |'
      )
  return '\n'.join(lines) + '\n'


def plot(report: dict, path: pathlib.Path):
  figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
  colors = {'dense': 'C1', 'sparse': 'C0'}
  for panel, phase in zip(panels, TOKENS):
    for kind, color in colors.items():
      panel.plot(report['contexts'], 1e3 * np.array(report['measured'][phase][kind]), 'o-', color=color, label=f'{kind}, measured')
      panel.plot(report['contexts'], 1e3 * np.array(report['predicted'][phase][kind]), ':', color=color, label=f'{kind}, at peak speed')
    panel.set(xscale='log', yscale='log', title=phase, xlabel='tokens of context', ylabel='ms per token')
    panel.set_xticks(report['contexts'], [f'{c // 1024}K' for c in report['contexts']])
    panel.set_xticks([], minor=True)
    panel.legend(frameon=False)
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
      'machine': f'{jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}, jax {jax.__version__}',
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
