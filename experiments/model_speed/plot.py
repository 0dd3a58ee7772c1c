# SPDX-License-Identifier: Apache-2.0
"""Draws plot.png of sampling.json and peer.json: python experiments/model_speed/plot.py"""

import json
import pathlib

import matplotlib

matplotlib.use('agg')
import matplotlib.pyplot as plt  # noqa: E402

HERE = pathlib.Path(__file__).parent


def main():
  figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout='constrained')
  sampling = json.loads((HERE / 'sampling.json').read_text())
  for i, (dtype, builds) in enumerate(sampling.items()):
    ratios = {k: v['processor'] / builds['before'][k]['processor'] for k, v in builds['now'].items()}
    axes[0].bar([x + 0.4 * i for x in range(len(ratios))], ratios.values(), 0.4, label=dtype)
    axes[0].set_xticks(range(len(ratios)), ratios)
  axes[0].axhline(0.5, color='k', lw=0.8, ls='--')
  axes[0].set(title='A drawn token', ylabel='processor time, of that before')
  axes[0].legend()
  peer = json.loads((HERE / 'peer.json').read_text())
  for axis, number in zip(axes[1:], ('prefill', 'decode')):
    for side in ('theirs', 'before', 'ours'):
      points = [(int(n), sides[side][number][0]) for n, sides in peer.items() if side in sides]
      axis.plot(*zip(*points), marker='o', label=side)
    axis.set(title=number, xlabel='context', ylabel='seconds of one core', xscale='log', yscale='log')
    axis.set_xticks([int(n) for n in peer], [f'{int(n) // 1024}K' for n in peer], minor=False)
    axis.minorticks_off()
    axis.legend()
  figure.savefig(HERE / 'plot.png', dpi=110)


if __name__ == '__main__':
  main()
