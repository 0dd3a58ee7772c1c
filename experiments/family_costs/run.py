# SPDX-License-Identifier: Apache-2.0
"""Compares what a token costs in each family of DSA models: python experiments/family_costs/run.py

All of it is arithmetic of `dsa_jax.cost`, for one chip and the same setting; nothing is measured.
"""

import argparse
import dataclasses
import json
import pathlib

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

from dsa_jax import cost  # noqa: E402
from dsa_jax.config import ModelConfig  # noqa: E402
from dsa_jax.families import FAMILIES  # noqa: E402

HERE = pathlib.Path(__file__).parent
CONTEXTS = {'128K': 131_072, '1M': 1_048_576}
DSA = 'deepseek_v32', 'glm_moe_dsa', 'axk2', 'hy_v4', 'dots3_note', 'mistral_large4'
SCORING = 'index scores', 'selection'


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--chip', default='h200', choices=cost.CHIPS)
  parser.add_argument('--batch', type=int, default=32, help='sequences per chip that decode together')
  parser.add_argument('--out', type=pathlib.Path, default=HERE)
  args = parser.parse_args()
  serving = cost.Serving(chip=cost.CHIPS[args.chip], batch=args.batch)
  sizes = {name: cfg for family in DSA for name, cfg in FAMILIES[family].sizes.items()}
  models = {name: costs_of(cfg, serving) for name, cfg in sizes.items()}
  results = {'chip': args.chip, 'batch': args.batch, 'models': models}
  (args.out / 'family_costs.json').write_text(json.dumps(results, indent=1) + '\n')
  (args.out / 'table.md').write_text('\n'.join(table(models)) + '\n')
  draw(models, args.out / 'family_costs.png')


def costs_of(cfg: ModelConfig, serving: cost.Serving) -> dict:
  """Returns a model's costs by context: of a decoded token and of one of a prompt, and of its cache."""
  longer = dataclasses.replace(cfg, max_seq_len=max(cfg.max_seq_len, *CONTEXTS.values()))
  of_contexts = {}
  for name, context in CONTEXTS.items():
    of_contexts[name] = {
        'beyond_its_context': context > cfg.max_seq_len,
        'cache_gb': cost.cache_bytes(cfg, serving.cache) * context / 1e9,
        'attention_gflop': {
            kind: cost.attention_flops(longer, context, sparse=kind == 'sparse') / 1e9
            for kind in ('dense', 'sparse')
        },
        **{phase: token_costs(longer, context, phase, serving) for phase in ('decode', 'prefill')},
    }
  return {
      'layers': cfg.n_layers,
      'indexers': len(cfg.full_layers),
      'windows': len(cfg.window_layers),
      'index_heads': cfg.index_n_heads,
      'cache_bytes_per_token': cost.cache_bytes(cfg, serving.cache),
      'contexts': of_contexts,
  }


def token_costs(cfg: ModelConfig, context: int, phase: str, serving: cost.Serving) -> dict:
  dense, sparse = (
      {part: x.seconds for part, x in cost.token_parts(
          cfg, context, phase, sparse=is_sparse, serving=serving).items()}
      for is_sparse in (False, True)
  )  # fmt: skip
  total = sum(sparse.values())
  return {
      'dense_us': 1e6 * sum(dense.values()),
      'sparse_us': 1e6 * total,
      'ratio': sum(dense.values()) / total,
      'scoring': sum(sparse[part] for part in SCORING) / total,
      'attention': sparse['attention'] / total,
  }


def table(models: dict) -> list[str]:
  """Returns the lines of two tables: what a token costs, and what its cache takes."""
  lines = ['| model | layers, indexers, heads of each | bytes of a cached token | cache at 128K, 1M (GB) |']
  lines.append('| --- | --- | ---: | ---: |')
  for name, x in models.items():
    caches = ', '.join(f'{of["cache_gb"]:.1f}' for of in x['contexts'].values())
    shape = f'{x["layers"]}, {x["indexers"]}, {x["index_heads"]}'
    lines.append(f'| {name} | {shape} | {x["cache_bytes_per_token"]:,} | {caches} |')
  for phase in ('decode', 'prefill'):
    columns = [part for name in CONTEXTS for part in (
        f'{name}: µs dense', 'µs sparse', 'dense / sparse', 'scoring and selecting')]  # fmt: skip
    lines += ['', f'| {phase} | ' + ' | '.join(columns) + ' |', '| --- |' + ' ---: |' * len(columns)]
    for name, x in models.items():
      cells = []
      for of in x['contexts'].values():
        costs, mark = of[phase], '*' if of['beyond_its_context'] else ''
        cells += [f'{costs["dense_us"]:,.0f}', f'{costs["sparse_us"]:,.0f}']
        cells += [f'{costs["ratio"]:.1f}{mark}', f'{costs["scoring"]:.0%}']
      lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  return lines


def draw(models: dict, path: pathlib.Path):
  """Draws how much cheaper a sparse token is, and what scoring is of it."""
  figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout='constrained')
  for ax, phase in zip(axes, ('decode', 'prefill')):
    for i, context in enumerate(CONTEXTS):
      ratios = [x['contexts'][context][phase]['ratio'] for x in models.values()]
      at = [j + 0.38 * (i - 0.5) for j in range(len(models))]
      bars = ax.bar(at, ratios, 0.36, label=f'{context} tokens')
      shares = [x['contexts'][context][phase]['scoring'] for x in models.values()]
      ax.bar_label(bars, [f'{share:.0%}' for share in shares], fontsize=7)
    ax.set_xticks(range(len(models)), list(models), fontsize=8, rotation=20, ha='right')
    ax.set_title(f'{phase}: dense / sparse; labels: share of scoring and selecting', fontsize=9)
    ax.set_yscale('log')
    ax.yaxis.set_major_formatter('{x:g}')
    ax.axhline(1, color='grey', linewidth=0.8)
  figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=2, fontsize=8)
  figure.savefig(path, dpi=130)


if __name__ == '__main__':
  main()
