# SPDX-License-Identifier: Apache-2.0
"""Draws the model beside the published curves, and a map of the lengths that halve a call."""

import pathlib

from calls import HIT_SHARES, MIXES, OUTPUT_SHARES, Curves
import matplotlib
from matplotlib import figure as mpl_figure
import numpy as np

from dsa_jax import cost
from dsa_jax.cost import published
from dsa_jax.reporting import plots

COLOURS = {'dense': '#404040', 'sparse': '#0072B2'}


def draw_curves(path: pathlib.Path, model: Curves) -> None:
  """Draws dollars per million tokens by position: published points and fitted lines."""
  with matplotlib.rc_context(plots.RC):
    figure = mpl_figure.Figure(figsize=(10, 4.4), dpi=150, layout='constrained')
    for axes, phase in zip(figure.subplots(1, 2), model):
      for kind, curve in model[phase].items():
        x = np.linspace(0, curve.limit, 600)
        axes.plot(x / 1024, _dollars(curve.at(x)), color=COLOURS[kind], label=f'{kind}, model')
        there = np.unique([*published.POSITIONS, *published.CURVES[phase, kind].positions])
        points = _dollars(published.CURVES[phase, kind].at(there))
        axes.plot(there / 1024, points, 'o', ms=4.5, mfc='none', color=COLOURS[kind],
                  label=f'{kind}, published')  # fmt: skip
      axes.set(yscale='log', title=phase, xlabel='position (K = 1024 tokens)')
      axes.set_xscale('function', functions=(lambda x: np.log(x + 2), lambda y: np.exp(y) - 2))
      axes.set_xlim(-0.15, 140)
      axes.set_xticks([0, 1, 2, 4, 8, 16, 32, 64, 128])
      axes.set_xticklabels(['0', *(f'{2**i}K' for i in range(8))])
      axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
      axes.yaxis.set_major_formatter('{x:g}')
      axes.yaxis.set_minor_formatter('')
      axes.set_ylabel('dollars per million tokens')
    axes.legend(loc='upper left')
    figure.savefig(path)


def draw_halves(path: pathlib.Path, halves: np.ndarray) -> None:
  """Draws the context from which a call costs half, by output share and cache-hit share."""
  with matplotlib.rc_context(plots.RC | {'axes.grid': False}):
    figure = mpl_figure.Figure(figsize=(7, 4.6), dpi=150, layout='constrained')
    axes = figure.subplots()
    mesh = axes.pcolormesh(OUTPUT_SHARES, HIT_SHARES, halves / 1024, cmap='viridis_r')
    lines = axes.contour(OUTPUT_SHARES, HIT_SHARES, halves / 1024, colors='w', linewidths=0.8,
                         levels=[20, 24, 32, 40, 48, 64])  # fmt: skip
    axes.clabel(lines, fmt='%gK')
    for name, mix in MIXES.items():
      axes.plot(
          mix['output_share'], mix['hit_share'], 'o', color='#D55E00', clip_on=False, zorder=3
      )
      right = mix['output_share'] > 0.15
      axes.annotate(name, (mix['output_share'], mix['hit_share']), fontsize=8.5,
                    bbox=dict(facecolor='w', alpha=0.75, lw=0, pad=1.2),
                    xytext=(-7 if right else 7, 6), textcoords='offset points',
                    ha='right' if right else 'left')  # fmt: skip
    axes.set(xscale='log', xlabel="share of the call's tokens that are generated",
             ylabel='share of the prompt that is cached',
             title='Context from which a sparse call costs half (published curves)')  # fmt: skip
    axes.xaxis.set_major_formatter('{x:g}')
    figure.colorbar(mesh, label='prompt and answer, K = 1024 tokens')
    figure.savefig(path)


def _dollars(seconds):
  return cost.dollars_per_million(seconds, published.PRICE)
