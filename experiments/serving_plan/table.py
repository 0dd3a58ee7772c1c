# SPDX-License-Identifier: Apache-2.0
"""Writes table.md from the reports of plan.py: python experiments/serving_plan/table.py"""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
from plan import TOPOLOGIES, granted_gib  # noqa: E402

CHIPS = {topology: chip for chip, of_chip in TOPOLOGIES.items() for topology in of_chip.values()}
HEAD = (
    'model', 'devices', 'step', 'texts', 'weights', 'cache', 'weights, GiB', 'cache, GiB', 'temporaries, GiB',
    'all, GiB', 'fits', 'sent, MiB', 'tokens per second', 'dollars per million',
)  # fmt: skip


def main():
  reports = [json.loads(path.read_text()) for path in HERE.glob('*.json')]
  order = 'topology', 'weights', 'phase', 'batch', 'cache'
  reports.sort(key=lambda x: (x['model'] != 'v32', *(x[name] for name in order)))
  lines = ['| ' + ' | '.join(HEAD) + ' |', '| --- | --- | --- | ---: | --- | --- |' + ' ---: |' * (len(HEAD) - 6)]
  lines += ['| ' + ' | '.join(cells_of(report)) + ' |' for report in reports]
  (HERE / 'table.md').write_text('\n'.join(lines) + '\n')


def cells_of(x: dict) -> list[str]:
  gib, chip = x['gib'], CHIPS[x['topology']]
  mesh = ', '.join(f'{axis} {n}' for axis, n in x['mesh'].items() if n > 1)
  granted = granted_gib(chip)
  fits = 'yes' if gib['total'] <= granted else f'no, of {granted:.1f}'
  sizes = [f'{gib[part]:.1f}' for part in ('weights', 'cache', 'temporaries', 'total')]
  sent, speed = sum(x['collective_mib'].values()), x['by_roofline']
  return [
      x['model'], f'{x["devices"]} {chip} ({mesh})', x['phase'], str(x['batch']), x['weights'], x['cache'],
      *sizes,
      fits, f'{sent:,.0f}', f'{speed["tokens_per_second"]:,}', f'{speed["dollars_per_million"]:.2f}',
  ]  # fmt: skip


if __name__ == '__main__':
  main()
